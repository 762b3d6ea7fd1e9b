"""One decoder: cached equals whole, packed equals separate, scanned equals unrolled, and no switch is dead."""

import dataclasses
import functools
import re
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvjax import logps, sharding
from gvjax.models import decoding, heads, transformer
from gvjax.models.config import ModelConfig

BASE = ModelConfig(
    vocab_size=12, embed_dim=16, num_layers=2, num_heads=4, mlp_dim=24, head_dim=8
)
FAMILIES = {
    "neox": dataclasses.replace(
        BASE,
        norm="layer",
        rope_fraction=0.25,
        mlp_gated=False,
        activation="gelu",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        parallel_residual=True,
        tied_embeddings=False,
    ),
    "llama": dataclasses.replace(BASE, num_kv_heads=2),
    "qwen2": dataclasses.replace(BASE, num_kv_heads=2, qkv_bias=True),
    "qwen3": dataclasses.replace(BASE, num_kv_heads=1, qk_norm=True),
    "gemma2": dataclasses.replace(
        BASE,
        num_kv_heads=2,
        norm_plus_one=True,
        post_norms=True,
        activation="gelu_tanh",
        scale_embedding=True,
        sliding_window=3,
        global_every=2,
        query_scale=0.3,
        attention_softcap=2.0,
        logit_softcap=3.0,
    ),
    "gemma3": dataclasses.replace(
        BASE,
        num_layers=3,
        norm_plus_one=True,
        post_norms=True,
        qk_norm=True,
        activation="gelu_tanh",
        scale_embedding=True,
        sliding_window=3,
        global_every=2,
        rope_theta=1e6,
        local_rope_theta=1e4,
        rope_scale=8.0,
    ),
}


@functools.cache
def params_of(config: ModelConfig):
    """Parameters in which nothing is 0 or 1, equal between configs where path and shape are."""

    def noisy(path, leaf):
        rng = np.random.default_rng(zlib.crc32(sharding.path_str(path).encode()))
        noise = rng.normal(0, 0.3, leaf.shape)
        return jnp.asarray(noise + ("scale" in str(path)), jnp.float32)

    shapes = transformer.init_shapes(config)
    return jax.tree_util.tree_map_with_path(noisy, shapes)


def tokens_of(batch: int, length: int, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, BASE.vocab_size, (batch, length)), jnp.int32)


apply = jax.jit(transformer.apply, static_argnums=0)


@pytest.mark.parametrize("name", ["neox", "qwen3", "gemma2", "gemma3"])
def test_ragged_prefill_and_single_steps_give_the_logits_of_one_pass(name):
    config = FAMILIES[name]
    params, tokens = params_of(config), tokens_of(3, 9)
    lengths = jnp.array([5, 1, 3])
    expected = apply(config, params, tokens)
    decode = jax.jit(decoding.decode_fn(config))

    positions = jnp.where(jnp.arange(5) < lengths[:, None], jnp.arange(5), -1)
    cache = decoding.init_cache(config, 3, 9)
    prompts = jnp.where(positions < 0, 7, tokens[:, :5])
    logits, cache = decode(params, prompts, positions, cache)
    for step in range(4):
        last = (lengths + step - 1)[:, None, None]
        want = jnp.take_along_axis(expected, last, axis=1)[:, 0]
        np.testing.assert_allclose(logits, want, atol=1e-5)
        position = (lengths + step)[:, None]
        token = jnp.take_along_axis(tokens, position, axis=1)
        logits, cache = decode(params, token, position, cache)


def test_several_tokens_may_follow_into_a_cache_in_use():
    config = FAMILIES["gemma3"]
    params, tokens = params_of(config), tokens_of(2, 8)
    apply(config, params, tokens)[:, -1]
    decode = jax.jit(decoding.decode_fn(config))
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))
    cache = decoding.init_cache(config, 2, 8)
    params = decoding.decode_params(config, params)
    _, cache = decode(params, tokens[:, :4], positions[:, :4], cache)
    logits, _ = decode(params, tokens[:, 4:], positions[:, 4:], cache)
    np.testing.assert_allclose(logits, apply(config, params, tokens)[:, -1], atol=1e-5)


def test_a_cache_too_short_for_the_prompt_is_refused():
    decode = decoding.decode_fn(BASE)
    with pytest.raises(ValueError, match="5 tokens do not fit a cache of length 4"):
        cache = decoding.init_cache(BASE, 1, 4)
        decode(params_of(BASE), tokens_of(1, 5), jnp.arange(5)[None], cache)


def test_a_cache_beyond_the_learned_positions_is_refused():
    """As a sequence of that length is: every token past the last position would be taken for that one."""
    config = dataclasses.replace(BASE, learned_positions=6)
    with pytest.raises(ValueError, match="sequences of 7 tokens exceed learned_pos"):
        decoding.init_cache(config, 1, 7)
    prompts = decoding.init_cache(config, 1, 4)
    decoding.init_cache(config, 2, 2, after=prompts)
    with pytest.raises(ValueError, match="sequences of 7 tokens exceed learned_pos"):
        decoding.init_cache(config, 2, 3, after=prompts)


CHANGES = {
    "vocab_size": {"vocab_size": 13},
    "embed_dim": {"embed_dim": 24},
    "num_layers": {"num_layers": 3},
    "num_heads": {"num_heads": 2},
    "mlp_dim": {"mlp_dim": 32},
    "num_kv_heads": {"num_kv_heads": 2},
    "head_dim": {"head_dim": 4},
    "norm": {"norm": "layer"},
    "norm_epsilon": {"norm_epsilon": 0.1},
    "norm_plus_one": {"norm_plus_one": True},
    "post_norms": {"post_norms": True},
    "qk_norm": {"qk_norm": True},
    "learned_positions": {"learned_positions": 6},
    "rope_theta": {"rope_theta": 10.0},
    "rope_fraction": {"rope_fraction": 0.5},
    "rope_scale": {"rope_scale": 2.0},
    "rope_llama3": {"rope_llama3": (8.0, 1.0, 4.0, 4)},
    "sliding_window": {"sliding_window": 3},
    "global_every": {"sliding_window": 3, "global_every": 2},
    "local_rope_theta": {"sliding_window": 3, "local_rope_theta": 10.0},
    "mlp_gated": {"mlp_gated": False},
    "activation": {"activation": "gelu"},
    "qkv_bias": {"qkv_bias": True},
    "output_bias": {"output_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "parallel_residual": {"parallel_residual": True},
    "tied_embeddings": {"tied_embeddings": False},
    "scale_embedding": {"scale_embedding": True},
    "query_scale": {"query_scale": 1.0},
    "attention_softcap": {"attention_softcap": 0.5},
    "logit_softcap": {"logit_softcap": 0.5},
    "dtype": {"dtype": "bfloat16"},
}


def test_every_switch_is_in_the_table_below_or_has_its_own_test():
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    assert names == set(CHANGES) | {"remat", "scan_layers"}


@functools.cache
def logits_of(config: ModelConfig) -> np.ndarray:
    return np.asarray(transformer.apply(config, params_of(config), tokens_of(2, 6)))


@pytest.mark.parametrize("name", CHANGES)
def test_every_switch_changes_the_logits(name):
    change = dict(CHANGES[name])
    changed = dataclasses.replace(BASE, **change)
    value = change.pop(name)
    without = dataclasses.replace(BASE, **change)
    assert getattr(without, name) != value
    one, other = logits_of(without), logits_of(changed)
    assert np.all(np.isfinite(other))
    assert one.shape != other.shape or np.max(np.abs(one - other)) > 1e-4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"head_dim": None, "num_heads": 3}, "16 is not divisible by num_heads 3"),
        ({"num_kv_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3"),
        ({"rope_fraction": 0.0}, "rope_fraction 0.0"),
        ({"rope_fraction": 0.4}, "3 dimensions; pairs"),
        ({"logit_softcap": -1.0}, "logit_softcap is -1.0"),
        ({"global_every": 2}, "set sliding_window"),
        ({"local_rope_theta": 1e4}, "set sliding_window"),
        ({"global_every": -1}, "global_every is -1"),
        ({"rope_llama3": (8.0, 4.0, 1.0, 4)}, "low below high"),
        ({"norm": "batch"}, "norm is 'batch'"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **change)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(config, params, tokens):
    return jax.value_and_grad(
        lambda p: jnp.sum(transformer.token_logps_fn(config)(p, tokens))
    )(params)


@pytest.mark.parametrize(
    "layers, platform, chosen, expected",
    [
        (4, "cpu", None, False),
        (32, None, None, False),
        (33, "cpu", None, True),
        (9, "tpu", None, True),
        (9, "gpu", False, False),
        (4, "cpu", True, True),
    ],
)
def test_depth_and_platform_choose_the_scan(layers, platform, chosen, expected):
    config = dataclasses.replace(
        FAMILIES["llama"], num_layers=layers, scan_layers=chosen
    )
    run = functools.partial(transformer.hidden, config, platform=platform)
    program = jax.make_jaxpr(run)(
        transformer.init_shapes(config), jax.ShapeDtypeStruct((1, 4), jnp.int32)
    )
    loops = [eqn for eqn in program.eqns if eqn.primitive.name == "scan"]
    assert len(loops) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"scan_layers": True},
        {"remat": "dots"},
        {"remat": "full", "scan_layers": True},
    ],
    ids=str,
)
def test_scanned_and_recomputed_layers_give_the_same_numbers(change):
    # Three layers in periods of two: one whole period, and one layer over.
    config = FAMILIES["gemma3"]
    params, tokens = params_of(config), tokens_of(2, 6)
    expected = loss_and_gradient(config, params, tokens)
    other = dataclasses.replace(config, **change)
    chex.assert_trees_all_close(
        loss_and_gradient(other, params, tokens), expected, rtol=1e-4, atol=1e-4
    )
    programs = [
        str(jax.make_jaxpr(loss_and_gradient, static_argnums=0)(c, params, tokens))
        for c in (config, other)
    ]
    for word in ("scan", "remat"):
        is_new = word in programs[1] and word not in programs[0]
        assert is_new == (word in str(change).replace("'none'", ""))


def test_what_a_cpu_multiplies_together_or_turned_changes_no_numbers():
    config = dataclasses.replace(FAMILIES["qwen2"], num_layers=1)
    params = transformer.init(jax.random.key(0), config)
    tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, config.vocab_size)
    # Biases are not 0, so that each must find its own projection.
    leaves, treedef = jax.tree.flatten(params)
    leaves = [leaf + 0.1 * jnp.sin(jnp.arange(leaf.shape[-1])) for leaf in leaves]
    params = jax.tree.unflatten(treedef, leaves)

    @functools.partial(jax.jit, static_argnums=0)
    def found(platform, params):
        logps_fn = transformer.token_logps_fn(config, platform=platform)
        return jax.value_and_grad(lambda p: jnp.sum(logps_fn(p, tokens) ** 2))(params)

    arranged, plain = found("cpu", params), found("gpu", params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-4),
        arranged,
        plain,
    )
    lowered = found.lower("cpu", params).as_text()
    together = f"{config.embed_dim}x{(config.num_heads + 2 * config.kv_heads) * config.width}xf32"
    assert together in lowered
    assert together not in found.lower("gpu", params).as_text()


@pytest.mark.parametrize("scan_layers", [False, True])
def test_what_nobody_asks_of_prompts_changes_no_numbers(scan_layers):
    config = dataclasses.replace(BASE, num_layers=1, scan_layers=scan_layers)
    params = transformer.init(jax.random.key(0), config)
    tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, config.vocab_size)
    scored = jnp.arange(9) >= jnp.array([[4], [5], [4]])

    @functools.partial(jax.jit, static_argnums=0)
    def found(shortest_prompt, params):
        logps_fn = transformer.token_logps_fn(config, shortest_prompt=shortest_prompt)

        def weighed(params):
            logps = jnp.where(scored, logps_fn(params, tokens, scored=scored), 0.0)
            return jnp.sum(logps**2), logps

        return jax.grad(weighed, has_aux=True)(params)

    (fewer, fewer_logps), (all_, logps) = found(4, params), found(1, params)
    np.testing.assert_allclose(fewer_logps, logps, atol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
        fewer,
        all_,
    )
    # The last token predicts nothing either.
    rows = f"tensor<{3 * (8 - 3)}x{config.mlp_dim}xf32>"
    assert scan_layers or rows in found.lower(4, params).as_text()
    assert rows not in found.lower(1, params).as_text()


def test_grouped_heads_equal_full_heads_that_repeat_them():
    grouped = FAMILIES["llama"]
    full = dataclasses.replace(grouped, num_kv_heads=4)
    params = params_of(grouped)

    def repeated(kernel):
        layers, width, _ = kernel.shape
        split = kernel.reshape(layers, width, 2, grouped.width)
        return jnp.repeat(split, 2, axis=2).reshape(layers, width, -1)

    attention = dict(params["layers"]["attention"])
    for name in ("key", "value"):
        attention[name] = {"kernel": repeated(attention[name]["kernel"])}
    wide = {**params, "layers": {**params["layers"], "attention": attention}}
    tokens = tokens_of(2, 6)
    np.testing.assert_allclose(
        apply(full, wide, tokens), apply(grouped, params, tokens), atol=1e-5
    )


def test_logps_are_those_of_the_logits_in_any_chunks():
    config = FAMILIES["gemma2"]
    params, tokens = params_of(config), tokens_of(3, 7)
    expected = logps.token_logps(apply(config, params, tokens), tokens)
    for chunk_size in (4, 1024):
        logps_fn = jax.jit(transformer.token_logps_fn(config, chunk_size=chunk_size))
        np.testing.assert_allclose(logps_fn(params, tokens), expected, atol=1e-5)


def test_no_buffer_of_batch_by_time_by_vocabulary():
    config = dataclasses.replace(BASE, vocab_size=1000)
    logps_fn = transformer.token_logps_fn(config, chunk_size=16)
    shapes = transformer.init_shapes(config)
    tokens = jax.ShapeDtypeStruct((32, 33), jnp.int32)
    gradient = jax.jit(jax.grad(lambda p, t: jnp.sum(logps_fn(p, t))))
    program = gradient.lower(shapes, tokens).compile().as_text()
    sizes = [
        np.prod([int(size) for size in shape.split(",")])
        for shape in re.findall(r"f32\[([\d,]+)\]", program)
    ]
    assert 16 * 1000 <= max(sizes) < 32 * 32 * 1000


def test_padding_changes_nothing():
    config = FAMILIES["llama"]
    params, tokens = params_of(config), tokens_of(2, 6)
    logps_fn = jax.jit(transformer.token_logps_fn(config))
    for filler in (0, 5):
        padded = jnp.pad(tokens, ((0, 0), (0, 4)), constant_values=filler)
        np.testing.assert_allclose(
            logps_fn(params, padded)[:, :6], logps_fn(params, tokens), atol=1e-6
        )


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_packed_sequences_do_not_see_each_other(name):
    config = FAMILIES[name]
    params, first, second = params_of(config), tokens_of(1, 4, 1), tokens_of(1, 5, 2)
    packed = jnp.concatenate([first, second, jnp.zeros((1, 3), jnp.int32)], axis=1)
    segments = jnp.array([[1] * 4 + [2] * 5 + [0] * 3])
    logps_fn = jax.jit(transformer.token_logps_fn(config))
    together = logps_fn(params, packed, segments)[0]
    np.testing.assert_allclose(together[:4], logps_fn(params, first)[0], atol=1e-5)
    np.testing.assert_allclose(together[4:9], logps_fn(params, second)[0], atol=1e-5)
    assert together[4] == 0


def test_bfloat16_stays_close_to_float32():
    # One product rounds to 2⁻⁹ of its size; over two layers log-probabilities of size 2.5 move by under 0.05.
    config = FAMILIES["llama"]
    half = dataclasses.replace(config, dtype="bfloat16")
    params = transformer.init(jax.random.key(0), config)
    tokens = tokens_of(4, 8)
    exact = transformer.token_logps_fn(config)(params, tokens)
    rounded = transformer.token_logps_fn(half)(params, tokens)
    assert rounded.dtype == jnp.float32
    difference = jnp.max(jnp.abs(exact - rounded))
    assert 0 < difference < 0.05


def test_every_parameter_has_a_rule_and_the_mesh_changes_no_numbers():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    for config in FAMILIES.values():
        wide = dataclasses.replace(config, num_kv_heads=2)
        shapes = transformer.init_shapes(wide)
        splits = sharding.shardings(mesh, shapes, transformer.PARTITION_RULES)
        for path, split in jax.tree_util.tree_flatten_with_path(splits)[0]:
            if "kernel" in str(path) or "embedding" in str(path):
                assert set(split.spec) >= {"fsdp", "tensor"}
        reward = jax.eval_shape(lambda c=wide: heads.init(jax.random.key(0), c))
        sharding.shardings(mesh, reward, heads.PARTITION_RULES)

    config = FAMILIES["llama"]
    params, tokens = params_of(config), tokens_of(4, 6)
    splits = sharding.shardings(mesh, params, transformer.PARTITION_RULES)
    logps_fn = transformer.token_logps_fn(config, mesh=mesh)
    loss = jax.jit(jax.value_and_grad(lambda p, t: jnp.sum(logps_fn(p, t))))
    result = loss(jax.device_put(params, splits), sharding.put_batch(mesh, tokens))
    chex.assert_trees_all_close(
        jax.device_get(result),
        jax.device_get(loss_and_gradient(config, params, tokens)),
        rtol=1e-4,
        atol=1e-4,
    )
