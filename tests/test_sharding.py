"""The same numbers on every mesh, and refusals that name the way out."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from gvjax import sharding
from gvjax.types import TrainState

RULES = [
    ("in/kernel", P("fsdp", "tensor")),
    ("out/kernel", P("tensor", "fsdp")),
    ("bias", P()),
]
MESHES = {
    "1": (1, 1, 1),
    "8x1x1": (8, 1, 1),
    "1x8x1": (1, 8, 1),
    "1x1x8": (1, 1, 8),
    "2x2x2": (2, 2, 2),
}
TX = optax.adamw(1e-2)


def mesh_of(name: str) -> jax.sharding.Mesh:
    data, fsdp, tensor = MESHES[name]
    devices = jax.devices()[: data * fsdp * tensor]
    return sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)


def init(key: jax.Array) -> TrainState:
    keys = jax.random.split(key)
    params = {
        "in": {"kernel": jax.random.normal(keys[0], (8, 16)), "bias": jnp.zeros(16)},
        "out": {"kernel": jax.random.normal(keys[1], (16, 8))},
    }
    return TrainState(jnp.zeros((), jnp.int32), params, TX.init(params))


def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
    def loss_fn(params):
        hidden = jnp.tanh(batch["x"] @ params["in"]["kernel"] + params["in"]["bias"])
        return jnp.mean(jnp.square(hidden @ params["out"]["kernel"] - batch["y"]))

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    updates, opt_state = TX.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), {"loss": loss}


def batch_of(rows: int, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(rows, 8)).astype(np.float32),
        "y": rng.normal(size=(rows, 8)).astype(np.float32),
    }


def train(mesh: jax.sharding.Mesh, steps: int = 3):
    state = sharding.init_sharded(init, mesh, RULES, jax.random.key(0))
    targets = sharding.shardings(mesh, state, RULES)
    step = sharding.jit_step(train_step, mesh, targets)
    losses = []
    for seed in range(steps):
        state, metrics = step(state, sharding.put_batch(mesh, batch_of(16, seed)))
        losses.append(float(metrics["loss"]))
    return losses, state, step, targets


@pytest.mark.parametrize("name", MESHES)
def test_same_numbers_on_every_mesh(name):
    expected_state = init(jax.random.key(0))
    expected_losses = []
    for seed in range(3):
        expected_state, metrics = jax.jit(train_step)(
            expected_state, batch_of(16, seed)
        )
        expected_losses.append(float(metrics["loss"]))
    losses, state, step, targets = train(mesh_of(name))
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    for got, want in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(expected_state.params)
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert step.compilations == 1
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == targets


def test_moments_inherit_and_scalars_replicate():
    mesh = mesh_of("2x2x2")
    targets = sharding.shardings(mesh, jax.eval_shape(init, jax.random.key(0)), RULES)
    adam = targets.opt_state[0]
    assert adam.mu["in"]["kernel"].spec == P("fsdp", "tensor")
    assert adam.nu["out"]["kernel"].spec == P("tensor", "fsdp")
    assert adam.count.spec == P()
    assert targets.step.spec == P()


def test_factored_moments_are_replicated():
    params = {"kernel": jnp.zeros((256, 128))}
    state = TrainState(
        jnp.zeros((), jnp.int32), params, optax.adafactor(1e-3).init(params)
    )
    targets = sharding.shardings(
        mesh_of("2x2x2"), state, [("kernel", P("fsdp", "tensor"))]
    )
    assert targets.params["kernel"].spec == P("fsdp", "tensor")
    assert {s.spec for s in jax.tree.leaves(targets.opt_state)} == {P()}


def test_rules_end_at_a_key_boundary_and_the_first_wins():
    mesh = mesh_of("1x8x1")
    tree = {"a": {"kernel": jnp.zeros(8)}, "lora_kernel": jnp.zeros(8)}
    rules = [("a/kernel", P("fsdp")), ("kernel", P())]
    with pytest.raises(ValueError, match=r"no sharding rule fits lora_kernel.*\(8,\)"):
        sharding.shardings(mesh, tree, rules)
    targets = sharding.shardings(mesh, tree, [*rules, ("lora_.*", P())])
    assert targets["a"]["kernel"].spec == P("fsdp")
    assert targets["lora_kernel"].spec == P()


@pytest.mark.parametrize(
    ("shape", "spec", "message"),
    [
        ((12, 4), P("fsdp"), r"w of shape \(12, 4\): dimension 0 of size 12.*8 or 16"),
        ((8, 4), P(None, "fsdp"), r"size 4 is not divisible by fsdp=8.*1, 2 or 4 ways"),
        ((8,), P(None, "fsdp"), r"2 dimensions, but its shape is \(8,\)"),
        ((8,), P("model"), r"names the axis 'model'"),
    ],
)
def test_arrays_that_do_not_divide_are_refused(shape, spec, message):
    with pytest.raises(ValueError, match=message):
        sharding.shardings(mesh_of("1x8x1"), {"w": jnp.zeros(shape)}, [("w", spec)])


def test_make_mesh_fills_and_refuses():
    assert sharding.make_mesh().shape == {"data": 8, "fsdp": 1, "tensor": 1}
    mesh = sharding.make_mesh(data=2, fsdp=-1, tensor=2)
    assert mesh.shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert sharding.platform(mesh) == "cpu"
    with pytest.raises(ValueError, match=r"needs 6 devices and there are 8.*data=8"):
        sharding.make_mesh(data=6)
    with pytest.raises(ValueError, match=r"data=2 or fsdp=4"):
        sharding.make_mesh(data=4, fsdp=8, tensor=1, devices=jax.devices() * 2)
    with pytest.raises(ValueError, match=r"do not divide by 3.*1, 2, 4 or 8"):
        sharding.make_mesh(fsdp=3)
    with pytest.raises(ValueError, match="data and fsdp are both -1"):
        sharding.make_mesh(fsdp=-1)
    with pytest.raises(ValueError, match="tensor=0 must be"):
        sharding.make_mesh(tensor=0)


def test_batches_are_split_by_rows():
    mesh = mesh_of("2x2x2")
    batch = sharding.put_batch(mesh, {**batch_of(8), "scale": np.float32(2)})
    assert batch["x"].sharding.spec == P(("data", "fsdp"))
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 8)}
    assert batch["scale"].sharding.is_fully_replicated
    np.testing.assert_array_equal(batch["x"], batch_of(8)["x"])
    local = sharding.put_batch(mesh, batch_of(8), global_batch=8)
    np.testing.assert_array_equal(local["y"], batch_of(8)["y"])
    np.testing.assert_array_equal(sharding.process_rows(mesh, 8), np.arange(8))
    with pytest.raises(ValueError, match="x has 4 rows, but this process owns 8"):
        sharding.put_batch(mesh, batch_of(4), global_batch=8)
    with pytest.raises(ValueError, match=r"x of size 6 is not divisible.*4 or 8"):
        sharding.put_batch(mesh, batch_of(6))


def test_a_batch_that_does_not_divide_is_refused_before_compiling():
    mesh = mesh_of("8x1x1")
    state = sharding.init_sharded(init, mesh, RULES, jax.random.key(0))
    step = sharding.jit_step(train_step, mesh, sharding.shardings(mesh, state, RULES))
    with pytest.raises(ValueError, match=r"batch array x of size 12.*use 8 or 16"):
        step(state, batch_of(12))
    assert step.compilations == 0


def test_a_second_compilation_for_the_same_shapes_is_warned_of(caplog):
    mesh = mesh_of("1")
    state = sharding.init_sharded(init, mesh, RULES, jax.random.key(0))
    step = sharding.jit_step(
        train_step, mesh, sharding.shardings(mesh, state, RULES), donate=False
    )
    with caplog.at_level(logging.WARNING, "gvjax.sharding"):
        step(state, batch_of(4))
        step(state, batch_of(4, seed=1))
        step(state, batch_of(8))
        assert (step.compilations, caplog.text) == (2, "")
        step(state, {**batch_of(4), "y": np.ones((4, 8), np.int32)})
    assert step.compilations == 3
    assert "train_step is compiled again for the same shapes" in caplog.text
    assert "float32" in caplog.text and "int32" in caplog.text


@pytest.mark.parametrize("name", ["1", "1x8x1"])
def test_the_state_is_donated_and_reference_params_survive(name):
    mesh = mesh_of(name)
    ref = sharding.init_sharded(init, mesh, RULES, jax.random.key(0)).params

    def from_params(params):
        return TrainState(jnp.zeros((), jnp.int32), params, TX.init(params))

    state = sharding.init_sharded(from_params, mesh, RULES, ref)
    step = sharding.jit_step(train_step, mesh, sharding.shardings(mesh, state, RULES))
    before = jax.tree.map(np.array, ref)
    step(state, sharding.put_batch(mesh, batch_of(8)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    jax.tree.map(np.testing.assert_array_equal, ref, before)


def test_activations_may_be_constrained_with_bare_specs():
    mesh = mesh_of("2x2x2")

    def step(state, batch):
        hidden = jax.lax.with_sharding_constraint(
            batch["x"] @ state["w"], P(("data", "fsdp"), "tensor")
        )
        return state, {"mean": jnp.mean(hidden)}

    state = sharding.init_sharded(
        lambda: {"w": jnp.ones((8, 4))}, mesh, [("w", P("fsdp"))]
    )
    jitted = sharding.jit_step(
        step, mesh, sharding.shardings(mesh, state, [("w", P("fsdp"))]), donate=False
    )
    _, metrics = jitted(state, batch_of(8))
    np.testing.assert_allclose(
        metrics["mean"], batch_of(8)["x"].sum(1).mean(), rtol=1e-5
    )
