"""Adapters: off they are the reference, on they train alone, merged they are plain weights."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gvjax import sharding
from gvjax.models import decoding, hf, lora, transformer
from gvjax.models.config import ModelConfig
from gvjax.models.lora import LoraConfig
from gvjax.steps import init_train_state, make_dpo_step, with_ref_logps
from gvjax.types import PreferenceBatch, SequenceBatch

CONFIG = ModelConfig(
    vocab_size=12, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, head_dim=8
)
LORA = LoraConfig(rank=3, alpha=6.0)
LOGPS_FN = transformer.token_logps_fn(CONFIG)


@functools.cache
def base():
    return transformer.init(jax.random.key(0), CONFIG)


@functools.cache
def noisy_adapters(config: LoraConfig = LORA):
    adapters = lora.init(jax.random.key(1), base(), config)
    leaves, treedef = jax.tree.flatten(adapters)
    rng = np.random.default_rng(2)
    noise = [jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32) for x in leaves]
    return jax.tree.unflatten(treedef, noise)


@functools.cache
def tokens():
    return jnp.asarray(np.random.default_rng(3).integers(0, 12, (4, 7)), jnp.int32)


def pairs() -> PreferenceBatch:
    mask = jnp.broadcast_to(jnp.arange(7) >= 3, (2, 7))
    prompt = tokens()[:2, :3]
    chosen, rejected = (
        SequenceBatch(jnp.concatenate([prompt, half[:, 3:]], axis=1), mask)
        for half in (tokens()[:2], tokens()[2:])
    )
    return PreferenceBatch(chosen=chosen, rejected=rejected)


def test_new_adapters_change_nothing():
    adapters = lora.init(jax.random.key(1), base(), LORA)
    chex.assert_trees_all_equal(lora.merge(base(), adapters, LORA), base())
    logps_fn = jax.jit(LOGPS_FN)
    # On a CPU queries, keys and values with adapters are three products and not one: the last bits may differ.
    np.testing.assert_allclose(
        logps_fn(lora.apply(base(), adapters, LORA), tokens()),
        logps_fn(base(), tokens()),
        atol=2e-6,
    )
    a = adapters["layers"]["mlp"]["down"]["lora_a"]
    assert a.shape == (2, 24, 3)
    # Uniform in ±1/√24.
    assert 0.9 < np.max(np.abs(a)) * 24**0.5 <= 1
    assert not np.array_equal(a[0], a[1])


def test_one_adapter_by_hand():
    config = LoraConfig(rank=3, alpha=6.0, targets="mlp/down")
    adapters = noisy_adapters(config)
    assert list(adapters["layers"]) == ["mlp"]
    pair = adapters["layers"]["mlp"]["down"]
    merged = lora.merge(base(), adapters, config)
    want = base()["layers"]["mlp"]["down"]["kernel"] + 2.0 * jnp.einsum(
        "lir,lro->lio", pair["lora_a"], pair["lora_b"]
    )
    np.testing.assert_allclose(
        merged["layers"]["mlp"]["down"]["kernel"], want, atol=1e-6
    )
    for path in (("mlp", "up"), ("attention", "query")):
        kernels = (p["layers"][path[0]][path[1]]["kernel"] for p in (merged, base()))
        assert next(kernels) is next(kernels)


def test_applied_is_merged():
    applied = lora.apply(base(), noisy_adapters(), LORA)
    merged = lora.merge(base(), noisy_adapters(), LORA)
    want = transformer.apply(CONFIG, merged, tokens())
    assert not np.allclose(want, transformer.apply(CONFIG, base(), tokens()), atol=0.1)
    np.testing.assert_allclose(
        transformer.apply(CONFIG, applied, tokens()), want, atol=1e-5
    )
    decode = decoding.decode_fn(CONFIG)
    positions = jnp.broadcast_to(jnp.arange(7), (4, 7))
    params = decoding.decode_params(CONFIG, applied)
    cache = decoding.init_cache(CONFIG, 4, 7)
    logits, _ = decode(params, tokens(), positions, cache)
    np.testing.assert_allclose(logits, want[:, -1], atol=1e-5)


def test_dpo_trains_adapters_only_and_the_reference_stays():
    params = lora.adapted(base(), lora.init(jax.random.key(1), base(), LORA))
    # Weight decay would shrink a base that is not frozen though it has no gradient.
    tx = lora.adapters_only(optax.adamw(1e-2, weight_decay=0.1))
    step = jax.jit(make_dpo_step(lora.adapter_logps_fn(LOGPS_FN, LORA), tx, beta=0.1))
    state = init_train_state(params, tx)
    sizes = [np.size(leaf) for leaf in jax.tree.leaves(state.opt_state)]
    trained = sum(leaf.size for leaf in jax.tree.leaves(params["lora"]))
    assert sum(size for size in sizes if size > 1) == 2 * trained
    score = jax.jit(functools.partial(with_ref_logps, LOGPS_FN))
    batch = score(params["base"], pairs())
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[0], np.log(2), rtol=1e-6)
    assert losses[0] > losses[1] > losses[2]
    chex.assert_trees_all_equal(state.params["base"], params["base"])
    chex.assert_trees_all_equal(score(state.params["base"], pairs()), batch)
    for leaf in jax.tree.leaves(state.params["lora"]):
        assert np.any(leaf != 0)


def test_no_gradient_of_the_size_of_a_kernel():
    # Had W + AB been made, or W a gradient, there would be a product as large as W. Three rows of 7 tokens are no such size.
    logps_fn = lora.adapter_logps_fn(LOGPS_FN, LORA)
    params = lora.adapted(base(), noisy_adapters())
    gradient = jax.grad(lambda p: jnp.sum(logps_fn(p, tokens()[:3])))
    program = jax.make_jaxpr(gradient)(params)
    shapes = {
        var.aval.shape
        for equation in program.eqns
        if equation.primitive.name == "dot_general"
        for var in equation.outvars
    }
    assert shapes and not shapes & {(16, 24), (24, 16), (2, 16, 24), (2, 24, 16)}


def test_every_adapter_has_a_rule_and_a_mesh_changes_no_numbers():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params = lora.adapted(base(), noisy_adapters())
    logps_fn = jax.jit(lora.adapter_logps_fn(LOGPS_FN, LORA))
    want = logps_fn(params, tokens())
    splits = sharding.shardings(mesh, params, lora.PARTITION_RULES)
    for split in jax.tree.leaves(splits["lora"]):
        assert {"fsdp", "tensor"} & set(split.spec)
    got = logps_fn(jax.device_put(params, splits), tokens())
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_export_is_merged_or_refused(tmp_path):
    with pytest.raises(ValueError, match=r"lora_a.*merge adapters first"):
        applied = lora.apply(base(), noisy_adapters(), LORA)
        hf.save_policy(tmp_path, CONFIG, applied)
    merged = lora.merge(base(), noisy_adapters(), LORA)
    hf.save_policy(tmp_path, CONFIG, merged)
    chex.assert_trees_all_equal(hf.load_policy(tmp_path)[1], merged)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"targets": "("}, "no regular expression"),
        ({"targets": "attention/q_proj"}, "matches no layer; there are: attention/"),
        ({"rank": 17}, "rank 17 is larger than attention/key, of 16 by 16"),
    ],
)
def test_impossible_adapters_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        lora.init(jax.random.key(0), base(), LoraConfig(**settings))
