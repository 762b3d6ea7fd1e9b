"""What is saved comes back, or the error says what did not."""

import errno
import json
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from gvjax import sharding
from gvjax.checkpoint import (
    CheckpointError,
    CheckpointMismatch,
    Checkpoints,
    ConfigMismatch,
    DirectoryError,
    digests,
    restore_params,
)
from gvjax.digests import json_hash
from gvjax.types import TrainState

RULES = [("kernel", P("fsdp", "tensor")), ("bias", P("fsdp"))]
TX = optax.adamw(1e-2)
CONFIG = {"optim": {"rate": 0.1, "clip": None}, "seed": 0, "layers": [8, 16]}


def make_state(key: jax.Array) -> dict:
    """A train state beside a typed key and a half-precision array, as a recipe may hold them."""
    params = {
        "in": {"kernel": jax.random.normal(key, (16, 8)), "bias": jnp.ones(8)},
        "out": {"kernel": jax.random.normal(key, (8, 16), jnp.bfloat16)},
    }
    train = TrainState(jnp.zeros((), jnp.int32), params, TX.init(params))
    return {"train": train, "key": jax.random.fold_in(key, 7)}


RULES_STATE = [*RULES, ("key", P())]


def sharded_state(mesh: jax.sharding.Mesh, seed: int = 0) -> dict:
    return sharding.init_sharded(make_state, mesh, RULES_STATE, jax.random.key(seed))


def abstract_on(mesh: jax.sharding.Mesh) -> dict:
    shapes = jax.eval_shape(make_state, jax.random.key(0))
    return sharding.abstract(shapes, sharding.shardings(mesh, shapes, RULES_STATE))


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: data * fsdp * tensor]
    return sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def largest_file(step_directory: pathlib.Path) -> pathlib.Path:
    files = [p for p in (step_directory / "state").rglob("d/*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


@pytest.fixture
def mesh():
    return mesh_of(1, 8, 1)


def test_everything_comes_back_on_another_mesh(tmp_path, mesh):
    state = sharded_state(mesh)
    meta = {"config": CONFIG, "position": {"epoch": 1, "row": 96}, "loss": 0.1 + 0.2}
    with Checkpoints(tmp_path, every_steps=4) as checkpoints:
        assert checkpoints.latest_step() is None
        assert not checkpoints.save(3, state, meta)
        assert checkpoints.save(4, state, meta)
        assert not checkpoints.save(4, state, meta, force=True)
        assert checkpoints.save(5, state, {}, force=True)
    for target in (mesh_of(2, 2, 2), mesh_of(1, 2, 4), mesh_of(1, 1, 1)):
        with Checkpoints(tmp_path, every_steps=4) as checkpoints:
            assert checkpoints.steps() == [4, 5]
            restored = checkpoints.restore(abstract_on(target), 4)
        assert (restored.meta, restored.step) == (meta, 4)
        assert restored.mesh == {"data": 1, "fsdp": 8, "tensor": 1}
        assert restored.versions["jax"] == jax.__version__
        assert_same(restored.state, state)
        kernel = restored.state["train"].params["in"]["kernel"]
        assert kernel.sharding.mesh == target
        assert kernel.sharding.spec == P("fsdp", "tensor")
        key = restored.state["key"]
        np.testing.assert_array_equal(
            jax.random.normal(key, 3), jax.random.normal(state["key"], 3)
        )


def test_a_resumed_run_equals_an_unbroken_one(tmp_path, mesh):
    def step(state, batch):
        def loss_fn(params):
            hidden = jnp.tanh(batch @ params["in"]["kernel"] + params["in"]["bias"])
            return jnp.mean(jnp.square(hidden @ params["out"]["kernel"] - batch))

        loss, grads = jax.value_and_grad(loss_fn)(state["train"].params)
        train = state["train"]
        updates, opt_state = TX.update(grads, train.opt_state, train.params)
        params = optax.apply_updates(train.params, updates)
        return {**state, "train": TrainState(train.step + 1, params, opt_state)}, {
            "loss": loss
        }

    abstract = abstract_on(mesh)
    jitted = sharding.jit_step(step, mesh, jax.tree.map(lambda a: a.sharding, abstract))

    def run(state, first, last, checkpoints=None):
        for number in range(first, last):
            batch = np.random.default_rng(number).normal(size=(8, 16))
            # The step donates the state: a save that still read it would be caught by the digests.
            state, _ = jitted(state, batch.astype(np.float32))
            if checkpoints is not None:
                checkpoints.save(number + 1, state, {})
        return state

    unbroken = run(sharded_state(mesh), 0, 8)
    with Checkpoints(tmp_path, every_steps=1) as checkpoints:
        run(sharded_state(mesh), 0, 5, checkpoints)
    with Checkpoints(tmp_path, every_steps=1) as checkpoints:
        restored = checkpoints.restore(abstract)
    assert restored.step == 5
    assert_same(run(restored.state, 5, 8), unbroken)
    assert jitted.compilations == 1


def test_a_save_does_not_read_donated_arrays(tmp_path, mesh):
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    sizes = jax.sharding.NamedSharding(mesh, P("fsdp"))
    array = jax.device_put(jnp.zeros((1024, 1024)), sizes)
    with Checkpoints(tmp_path, every_steps=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"x": array}, {})
            for _ in range(20):
                array = add(array)
        abstract = {"x": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
        for step, value in ((1, 0), (2, 20)):
            restored = checkpoints.restore(abstract, step)
            assert np.unique(restored.state["x"]) == value


def test_a_save_is_off_the_critical_path(tmp_path):
    # 32 MB that do not compress: written in the background, after `save` has returned.
    bits = np.random.default_rng(0).integers(0, 2**32, 2**23, dtype=np.uint32)
    with Checkpoints(tmp_path, every_steps=1) as checkpoints:
        assert checkpoints.save(1, {"x": jnp.asarray(bits)}, {})
        assert not (tmp_path / "1").exists()
        assert checkpoints.latest_step() is None
        checkpoints.wait()
        assert (tmp_path / "1").exists() and checkpoints.latest_step() == 1


def test_digests_do_not_depend_on_the_mesh_and_see_every_bit():
    meshes = [mesh_of(1, 1, 1), mesh_of(8, 1, 1), mesh_of(1, 8, 1), mesh_of(2, 2, 2)]
    # Made once and moved: drawn on each mesh, normal numbers may differ in their last bits on newer jax.
    state = make_state(jax.random.key(0))
    first, *others = [
        digests(jax.device_put(state, sharding.shardings(mesh, state, RULES_STATE)))
        for mesh in meshes
    ]
    assert all(other == first for other in others)
    assert len(first) == len(jax.tree.leaves(make_state(jax.random.key(0))))

    values = np.zeros((3, 5), np.float32)
    clean = digests({"x": values})["x"]
    for bit in (0, 17, 31):
        for index in (0, 7, 14):
            flipped = values.copy().view(np.uint32)
            flipped.flat[index] ^= np.uint32(1 << bit)
            assert digests({"x": flipped.view(np.float32)})["x"] != clean
    swapped = np.arange(4, dtype=np.int32)
    assert digests({"x": swapped}) != digests({"x": swapped[::-1].copy()})
    dtypes = [bool, np.int8, jnp.bfloat16, np.float16, np.uint32, np.complex64]
    for dtype in dtypes:
        zero, one = jnp.zeros(4, dtype), jnp.array([0, 0, 1, 0], dtype)
        assert digests({"x": zero}) != digests({"x": one})


@pytest.mark.parametrize(
    "dtype",
    [bool, np.int8, jnp.int4, jnp.bfloat16, np.float16, np.float32, np.complex64],
)
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (3, 4, 2)])
def test_small_arrays_are_digested_on_the_host_as_large_ones_by_a_program(
    dtype, shape, monkeypatch
):
    values = np.random.default_rng(0).integers(-3, 4, shape)
    state = {"x": jnp.asarray(values, dtype), "key": jax.random.key(3)}
    on_host = digests(state)
    monkeypatch.setattr("gvjax.digests._ON_HOST", -1)
    assert digests(state) == on_host


def test_a_digest_is_what_it_was():
    """Checkpoints that lie on disk have been digested with it."""
    values = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    assert digests({"x": values}) == {"x": 3516072793}


def flip_a_stored_bit(step_directory: pathlib.Path, array: np.ndarray) -> None:
    """Flips one bit of `array` where its bytes stand on disk."""
    pattern = array.tobytes()
    for path in (step_directory / "state").rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        at = data.find(pattern)
        if at >= 0:
            damaged = bytearray(data)
            damaged[at + len(pattern) // 2] ^= 0x10
            path.write_bytes(damaged)
            return
    raise AssertionError("the array's bytes are on no file as they are")


def incompressible(seed: int) -> np.ndarray:
    bits = np.random.default_rng(seed).integers(0, 2**32, (64, 64), dtype=np.uint32)
    return bits.view(np.int32)


def test_a_flipped_bit_on_disk_is_an_error_naming_the_array(tmp_path, caplog):
    state = {"a": jnp.asarray(incompressible(0)), "b": jnp.asarray(incompressible(1))}
    with Checkpoints(tmp_path, every_steps=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, {"position": step})
    # Zstandard stores what it cannot shrink as it is, so the bytes can be found and changed.
    flip_a_stored_bit(tmp_path / "3", np.asarray(state["b"])[8:40])
    with Checkpoints(tmp_path, every_steps=1) as checkpoints:
        with pytest.raises(CheckpointError, match=r"/3: the contents of b are not"):
            checkpoints.restore(state, 3)
        with caplog.at_level(logging.WARNING, "gvjax.checkpoint"):
            restored = checkpoints.restore(state)
        assert "CHECKPOINT DAMAGED" in caplog.text and "contents of b" in caplog.text
        assert (restored.step, restored.meta) == (2, {"position": 2})
        assert_same(restored.state, state)
        # The run goes on from step 2: its own step 3 takes the place of the damaged one.
        assert checkpoints.steps() == [1, 2]
        assert (tmp_path / "3.damaged").is_dir()
        assert checkpoints.save(3, state, {"position": 33})
        assert checkpoints.restore(state).meta == {"position": 33}


@pytest.mark.parametrize("damage", ["truncate", "delete", "header", "hash"])
def test_other_damage_falls_back_too(tmp_path, damage, caplog):
    state = {"a": jnp.asarray(incompressible(0))}
    with Checkpoints(tmp_path, every_steps=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {"position": step})
    header = tmp_path / "2" / "header" / "data.json"
    if damage == "truncate":
        os.truncate(largest_file(tmp_path / "2"), 100)
    elif damage == "delete":
        largest_file(tmp_path / "2").unlink()
    elif damage == "header":
        header.write_text(header.read_text()[:40])
    else:
        content = json.loads(header.read_text())
        content["content"]["meta"]["position"] = 5
        header.write_text(json.dumps(content))
    with Checkpoints(tmp_path, every_steps=1) as checkpoints:
        with pytest.raises(CheckpointError) as raised:
            checkpoints.restore(state, 2)
        assert len(str(raised.value)) < 500 and "\n" not in str(raised.value)
        assert checkpoints.restore(state).step == 1
    assert "CHECKPOINT DAMAGED" in caplog.text


def test_nothing_sound_is_an_error(tmp_path):
    state = {"a": jnp.asarray(incompressible(0))}
    with Checkpoints(tmp_path, every_steps=1) as checkpoints:
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            checkpoints.restore(state)
        checkpoints.save(1, state, {})
        checkpoints.wait()
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 4.*\[1\]"):
            checkpoints.restore(state, 4)
        largest_file(tmp_path / "1").unlink()
        with pytest.raises(CheckpointError, match=r"all of \[1\] are damaged"):
            checkpoints.restore(state)


def test_wrong_arrays_are_named_in_one_line(tmp_path):
    state = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4, jnp.int32)}
    with Checkpoints(tmp_path, every_steps=1) as checkpoints:
        checkpoints.save(1, state, {})
        for asked, message in [
            ({"a": state["a"]}, "/1 has b, for which there is no place"),
            ({**state, "c": jnp.zeros(1)}, "/1 has no c; it has a, b"),
            (
                {**state, "a": jnp.zeros((3, 2))},
                r"a as float32\[2, 3\], asked for is float32\[3, 2\]",
            ),
            ({**state, "b": jnp.zeros(4)}, r"b as int32\[4\], asked for is float32"),
        ]:
            with pytest.raises(CheckpointMismatch, match=message):
                checkpoints.restore(asked)
        # The checkpoint is sound, so it is not set aside.
        assert checkpoints.steps() == [1]


def test_a_changed_config_is_refused_field_by_field(tmp_path, caplog):
    state = {"a": jnp.zeros(2)}
    with Checkpoints(tmp_path, every_steps=1) as checkpoints:
        checkpoints.save(1, state, {"config": CONFIG, "tokenizer": "ab12", "row": 3})
        same = {"config": {**CONFIG, "layers": (8, 16)}, "tokenizer": "ab12"}
        assert checkpoints.restore(state, expect=same).meta["row"] == 3
        changed = {
            "config": {"optim": {"rate": 0.2, "clip": None}, "layers": [8, 16], "x": 1},
            "tokenizer": "cd34",
        }
        with pytest.raises(ConfigMismatch) as raised:
            checkpoints.restore(state, expect=changed)
        fields = ["config.optim.rate", "config.seed", "config.x", "tokenizer"]
        assert "config.optim.rate: 0.1 -> 0.2; config.seed: 0 -> absent" in str(
            raised.value
        )
        assert "config.x: absent -> 1" in str(raised.value)
        assert "clip" not in str(raised.value)
        with pytest.raises(ConfigMismatch, match="another config: tokenizer"):
            checkpoints.restore(state, expect=changed, allow_changes=fields[:-1])
        with caplog.at_level(logging.WARNING, "gvjax.checkpoint"):
            checkpoints.restore(state, expect=changed, allow_changes=fields)
        assert "with config.optim.rate: 0.1 -> 0.2" in caplog.text


def test_old_checkpoints_go_and_milestones_stay(tmp_path):
    state = {"a": jnp.zeros(2)}
    with Checkpoints(
        tmp_path, every_steps=1, keep_latest=2, keep_every=4
    ) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, state, {})
        checkpoints.wait()
        assert checkpoints.steps() == [4, 6, 7]
        with pytest.raises(ValueError, match=r"cannot save step 5.*later step 7"):
            checkpoints.save(5, state, {})


def test_params_alone_are_handed_on(tmp_path, mesh):
    state = sharded_state(mesh)
    with Checkpoints(tmp_path, every_steps=1) as checkpoints:
        checkpoints.save(1, state, {"tokenizer": "ab12"})
        checkpoints.save(2, state, {"tokenizer": "ab12"})
    largest_file(tmp_path / "2").unlink()
    abstract = abstract_on(mesh_of(2, 2, 2))["train"].params
    restored = restore_params(
        tmp_path, abstract, prefix="train/params", expect={"tokenizer": "ab12"}
    )
    assert restored.step == 1
    assert_same(restored.state, state["train"].params)
    # Reading for the next stage leaves the earlier stage's directory as it was.
    assert (tmp_path / "2").is_dir()

    half = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, jnp.bfloat16, sharding=leaf.sharding
        ),
        abstract,
    )
    restored = restore_params(tmp_path, half, prefix="train/params")
    want = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state["train"].params)
    assert_same(restored.state, want)
    with pytest.raises(CheckpointMismatch, match="train/params/in/bias"):
        restore_params(tmp_path, {"in": {}}, 1, prefix="train/params")
    with pytest.raises(ConfigMismatch, match="tokenizer"):
        restore_params(
            tmp_path, half, prefix="train/params", expect={"tokenizer": "cd34"}
        )


def test_a_file_system_that_cannot_rename_directories_is_refused(tmp_path, monkeypatch):
    """Such as a bucket without a hierarchical namespace that is mounted: its first checkpoint would never be whole."""
    rename = os.rename

    def files_only(old, new, **options):
        if os.path.isdir(old):
            raise OSError(errno.ENOSYS, "Function not implemented")
        rename(old, new, **options)

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, files_only)
    with pytest.raises(DirectoryError, match="directories cannot be renamed there"):
        Checkpoints(tmp_path, every_steps=1)


def test_trying_to_rename_leaves_nothing_behind(tmp_path):
    with Checkpoints(tmp_path, every_steps=1):
        assert list(tmp_path.iterdir()) == []


def test_bad_arguments_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="every_steps 0 must be at least 1"):
        Checkpoints(tmp_path, every_steps=0)
    with pytest.raises(ValueError, match="keep_latest 0"):
        Checkpoints(tmp_path, every_steps=1, keep_latest=0)
    with pytest.raises(ValueError, match="on_full_disk 'ignore'"):
        Checkpoints(tmp_path, every_steps=1, on_full_disk="ignore")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot keep checkpoints in"):
        Checkpoints(tmp_path / "file", every_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        with pytest.raises(CheckpointError, match="the directory is not writable"):
            Checkpoints(tmp_path, every_steps=1)
    with Checkpoints(tmp_path / "run", every_steps=1) as checkpoints:
        with pytest.raises(ValueError, match="meta must be JSON"):
            checkpoints.save(1, {"a": jnp.zeros(2)}, {"x": jnp.zeros(2)})
        with pytest.raises(ValueError, match="a is int64, which jax would narrow"):
            checkpoints.save(1, {"a": np.zeros(2, np.int64)}, {})
        with pytest.raises(ValueError, match="same path"):
            checkpoints.save(1, {"a/b": jnp.zeros(2), "a": {"b": jnp.zeros(2)}}, {})


def test_json_hash_sees_content_and_not_order():
    assert json_hash({"a": 1, "b": [1, 2]}) == json_hash({"b": (1, 2), "a": 1})
    assert json_hash({"a": 1}) != json_hash({"a": 1.5})


def python(script: str, *args: object) -> subprocess.Popen:
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


FULL_DISK = """
    import resource, signal, sys
    import numpy as np
    from gvjax.checkpoint import CheckpointError, Checkpoints
    # Writing past the limit fails with "File too large", as a full disk does with "No space left on device".
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    state = lambda size: {"a": np.random.default_rng(0).normal(size=size).astype(np.float32)}
    with Checkpoints(sys.argv[1], every_steps=1, on_full_disk=sys.argv[2]) as checkpoints:
        checkpoints.save(1, state(10), {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            checkpoints.save(2, state(100_000), {})
            checkpoints.wait()
        except CheckpointError as error:
            print("STOPPED", error)
            sys.exit(3)
        print("STEPS", checkpoints.steps(), checkpoints.last_error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        checkpoints.save(3, state(10), {})
    assert checkpoints.restore(state(10)).step == 3
"""


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk_stops_or_continues_as_told(tmp_path, policy):
    run = python(FULL_DISK, tmp_path, policy)
    out, err = run.communicate(timeout=120)
    message = "checkpoint of step 2 in .* was not written because the disk is full.*last good step is 1"
    if policy == "stop":
        assert run.returncode == 3, err
        assert "STOPPED" in out
    else:
        assert run.returncode == 0, err
        assert "STEPS [1]" in out
    assert re.search(message, out), out
    assert not list(tmp_path.glob("*tmp*"))


def test_a_save_that_takes_too_long_by_the_clock_is_passed_over(tmp_path, caplog):
    state = {"a": jnp.zeros(2)}
    with Checkpoints(tmp_path, every_steps=1) as checkpoints:
        with pytest.raises(CheckpointError, match=r"step 1 .* was not written"):
            # With nothing to fall back on.
            checkpoints.failed(1, TimeoutError("after a year"))
        checkpoints.save(1, state, {})
        checkpoints.failed(2, TimeoutError("after a year"))
        assert "TimeoutError: after a year; the last good step is 1" in caplog.text
        with pytest.raises(CheckpointError, match=r"step 2 .* was not written"):
            checkpoints.failed(2, ValueError("a bug"))
        # What the one that was given up still writes may be in the way of one more.
        checkpoints.failed(2, TimeoutError("after a year"))
        checkpoints.failed(3, OSError(errno.ENOTEMPTY, "Directory not empty"))
        with pytest.raises(CheckpointError, match=r"step 3 .* was not written"):
            checkpoints.failed(3, OSError(errno.ENOTEMPTY, "Directory not empty"))
        assert checkpoints.save(3, state, {})
        # A save that comes through in between has shown that nothing is.
        checkpoints.failed(4, TimeoutError("after a year"))
        assert checkpoints.save(4, state, {})
        with pytest.raises(CheckpointError, match=r"step 5 .* was not written"):
            checkpoints.failed(5, OSError(errno.ENOTEMPTY, "Directory not empty"))
    assert checkpoints.latest_step() == 4


KILLED = """
    import sys, time
    import numpy as np
    from gvjax.checkpoint import Checkpoints
    with Checkpoints(sys.argv[1], every_steps=1, keep_latest=2) as checkpoints:
        first = (checkpoints.latest_step() or 0) + 1
        if first > 1:
            restored = checkpoints.restore({"a": np.zeros((1000, 1000), np.float32)})
            assert (np.asarray(restored.state["a"]) == restored.step).all()
        for step in range(first, 1000):
            checkpoints.save(step, {"a": np.full((1000, 1000), step, np.float32)}, {})
            print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_while_saving_the_directory_restores(tmp_path):
    last = 0
    for attempt in range(4):
        run = python(KILLED, tmp_path)
        begun = [int(run.stdout.readline()) for _ in range(3)]
        time.sleep(0.013 * attempt)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert begun[0] > last
        # A save begun is waited for by the next one: at most the last two were still being written.
        with Checkpoints(tmp_path, every_steps=1, keep_latest=2) as checkpoints:
            assert not list(tmp_path.glob("*tmp*"))
            restored = checkpoints.restore({"a": np.zeros((1000, 1000), np.float32)})
        assert restored.step >= begun[-1] - 1
        assert np.unique(restored.state["a"]) == restored.step
        last = restored.step
