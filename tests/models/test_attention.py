"""Attention against its definition, and the kernel that each platform gets."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash_kernels,
)

from gvjax.models import blocked, layers
from gvjax.models.attention import (
    AttentionConfig,
    cached_attention,
    causal_attention,
    choose_kernel,
    selected_attention,
)
from gvjax.models.config import ModelConfig


def naive(queries, keys, values, config, segments):
    """In float64 numpy, one query at a time."""
    out = np.zeros(queries.shape)
    group = queries.shape[2] // keys.shape[2]
    for b, t, h in np.ndindex(queries.shape[:3]):
        first = 0 if config.window is None else max(0, t - config.window + 1)
        seen = [s for s in range(first, t + 1) if segments[b, s] == segments[b, t]]
        scores = config.scale * keys[b, seen, h // group] @ queries[b, t, h]
        if config.softcap is not None:
            scores = config.softcap * np.tanh(scores / config.softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ values[b, seen, h // group]
    return out


def random_heads(length, head_dim):
    """Queries of four heads, keys and values of two."""
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, head_dim) for heads in (4, 2, 2)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("config", [AttentionConfig(0.5), AttentionConfig(0.5, 5, 0.7)])
def test_a_few_positions_read_what_they_read_among_all(config):
    queries, keys, values = random_heads(9, 4)
    positions = jnp.array([[0, 5], [8, 3]])
    picked = jnp.take_along_axis(queries, positions[:, :, None, None], axis=1)
    got = selected_attention(picked, keys, values, config=config, positions=positions)
    whole = causal_attention(queries, keys, values, config=config)
    expected = jnp.take_along_axis(whole, positions[:, :, None, None], axis=1)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_that_read_a_prompt_together_read_what_each_would(dtype):
    """Three prompts of up to 6 tokens, two rows each with 5 of their own; what is read of both is rounded once."""
    rng = np.random.default_rng(1)

    def drawn(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    queries = drawn(6, 1, 4, 16)
    keys, values, in_keys, in_values = (
        drawn(count, 2, length, 16) for count, length in [(6, 5)] * 2 + [(3, 6)] * 2
    )
    lengths = np.array([6, 2, 4])
    places = np.where(np.arange(6) < lengths[:, None], np.arange(6), -1)
    of_each = functools.partial(jnp.repeat, repeats=2, axis=0)
    slots = of_each(lengths)[:, None] + np.arange(5)
    attend = functools.partial(
        cached_attention,
        queries,
        config=AttentionConfig(0.25),
        positions=slots[:, 3:4],
    )
    together = attend(
        keys, values, slot_positions=slots, prompts=(in_keys, in_values, places)
    )
    alone = attend(
        jnp.concatenate([of_each(in_keys), keys], axis=2),
        jnp.concatenate([of_each(in_values), values], axis=2),
        slot_positions=jnp.concatenate([of_each(places), slots], axis=1),
    )
    assert together.dtype == dtype
    np.testing.assert_allclose(
        together.astype(jnp.float32), alone.astype(jnp.float32), rtol=1e-2, atol=1e-6
    )
    if dtype == jnp.bfloat16:
        assert np.mean(np.asarray(together == alone)) > 0.9


@pytest.mark.parametrize("length", [7, 300, 1030])
@pytest.mark.parametrize(
    "config",
    [AttentionConfig(0.5), AttentionConfig(0.5, window=5, softcap=0.7)],
    ids=["global", "local"],
)
def test_blocks_of_queries_see_what_the_definition_says(length, config):
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(2, length, 4, 2))
    keys, values = rng.normal(size=(2, 2, length, 2, 2))
    segments = np.sort(rng.integers(1, 3, (2, length)), axis=1)
    for packing in (None, segments):
        ids = np.ones((2, length)) if packing is None else packing
        got = causal_attention(
            *(jnp.asarray(x, jnp.float32) for x in (queries, keys, values)),
            config=config,
            segments=packing,
        )
        np.testing.assert_allclose(
            got, naive(queries, keys, values, config, ids), atol=1e-5
        )


@pytest.mark.parametrize(
    "length, width",
    [(140, 4), (7, 8), (140, 144)],
    ids=["two blocks", "weights kept", "two blocks' weights kept"],
)
@pytest.mark.parametrize(
    "config",
    [AttentionConfig(0.5), AttentionConfig(0.5, window=150, softcap=0.7)],
    ids=["global", "local"],
)
def test_the_gradient_written_out_is_the_derived_one(config, length, width):
    rng = np.random.default_rng(1)
    queries, weights = rng.normal(size=(2, 1, length, 2, width))
    keys, values = rng.normal(size=(2, 1, length, 1, width))
    segments = jnp.asarray(np.sort(rng.integers(1, 3, (1, length)), axis=1))
    mask = np.tril(np.ones((length, length), bool))
    mask &= segments[0][:, None] == segments[0][None]
    if config.window is not None:
        mask &= ~np.tril(mask, -config.window)

    def plain(queries, keys, values):
        scores = config.scale * jnp.einsum("bshd,btgd->bhst", queries, keys)
        if config.softcap is not None:
            scores = config.softcap * jnp.tanh(scores / config.softcap)
        seen = jax.nn.softmax(jnp.where(mask, scores, -1e30))
        return jnp.sum(jnp.einsum("bhst,btgd->bshd", seen, values) * weights)

    def ours(queries, keys, values):
        out = causal_attention(queries, keys, values, config=config, segments=segments)
        return jnp.sum(out * weights)

    arrays = [jnp.asarray(x, jnp.float32) for x in (queries, keys, values)]
    got, expected = (
        jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*arrays) for f in (ours, plain)
    )
    for one, other in zip(got, expected):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("batch", [4, 1], ids=["sequences", "heads of one sequence"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize(
    "length, width",
    [(140, 4), (7, 8)],
    ids=["scores made again", "weights kept"],
)
def test_a_few_at_a_time_are_as_all_at_once(monkeypatch, batch, packed, length, width):
    rng = np.random.default_rng(2)
    heads = [
        jnp.asarray(rng.normal(size=(batch, length, number, width)), jnp.float32)
        for number in (8, 4, 4, 8)
    ]
    segments = jnp.asarray(np.sort(rng.integers(1, 3, (batch, length)), axis=1))

    def run(cached):
        monkeypatch.setattr(blocked, "_CACHED", cached)

        def attend(*heads):
            return causal_attention(
                *heads,
                config=AttentionConfig(0.5),
                segments=segments if packed else None,
                platform="cpu",
            )

        def both(queries, keys, values, g):
            out, pull = jax.vjp(attend, queries, keys, values)
            return out, pull(g)

        program = jax.jit(both).lower(*heads).compile()
        return program(*heads), program.as_text()

    # Of four, or of four key heads with two queries each, two at a time.
    few = 2 * (2 if batch == 1 else 8) * length**2
    (together, text), (looped, text_looped) = run(2**40), run(few)
    assert " while(" not in text
    assert text_looped.count(" while(") == 2
    chex.assert_trees_all_close(looped, together, rtol=1e-5, atol=1e-6)


def test_only_one_cpu_walks_through_loops(monkeypatch):
    monkeypatch.setattr(blocked, "_CACHED", 100)
    heads = random_heads(20, 4)

    def loops(lowered_for=None, **where):
        def attend(*heads):
            return causal_attention(*heads, config=AttentionConfig(0.5), **where)

        traced = jax.jit(attend).trace(*heads)
        lowered = traced.lower(lowering_platforms=(lowered_for or "cpu",))
        return "stablehlo.while" in lowered.as_text()

    devices = np.array(jax.devices("cpu")).reshape(-1, 1, 1)
    names = ("data", "fsdp", "tensor")
    assert loops() and loops(platform="cpu")
    assert not loops("tpu") and not loops("cuda")
    assert not loops(platform="gpu")
    assert not loops(platform="cpu", mesh=jax.sharding.Mesh(devices, names))
    assert loops(platform="cpu", mesh=jax.sharding.Mesh(devices[:1], names))


def test_rotation_turns_pairs_of_the_rotated_part_only():
    config = ModelConfig(
        vocab_size=2,
        embed_dim=8,
        num_layers=1,
        num_heads=1,
        mlp_dim=8,
        rope_fraction=0.5,
        rope_theta=100.0,
    )
    x = jnp.arange(1.0, 9.0).reshape(1, 1, 1, 8)
    rotation = layers.rotation_of(jnp.array([[3]]), config, 0, None)
    got = layers._rotate(x, rotation)[0, 0, 0]
    # Pairs (1, 3) and (2, 4) turn by 3 · 100⁰ and 3 · 100^(−1/2); 5 to 8 stand still.
    a, b = 3.0, 0.3
    expected = [
        np.cos(a) - 3 * np.sin(a),
        2 * np.cos(b) - 4 * np.sin(b),
        3 * np.cos(a) + np.sin(a),
        4 * np.cos(b) + 2 * np.sin(b),
        *[5, 6, 7, 8],
    ]
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(
    "expected, change",
    [
        ("cudnn", {}),
        ("xla", {"dtype": jnp.float32}),
        ("xla", {"head_dim": 256}),
        ("xla", {"head_dim": 100}),
        ("xla", {"packed": True}),
        ("xla", {"config": AttentionConfig(1.0, softcap=50.0)}),
        ("xla", {"platform": None}),
        ("xla", {"platform": "cpu"}),
        ("splash", {"platform": "tpu"}),
        ("splash", {"platform": "tpu", "packed": True, "dtype": jnp.float32}),
        ("splash", {"platform": "tpu", "head_dim": 64}),
        ("xla", {"platform": "tpu", "head_dim": 192}),
    ],
    ids=str,
)
def test_the_kernel_follows_platform_and_shapes(expected, change):
    usual = {
        "config": AttentionConfig(1.0),
        "platform": "gpu",
        "dtype": jnp.bfloat16,
        "head_dim": 128,
        "packed": False,
    }
    settings = {**usual, **change}
    settings["dtype"] = jnp.dtype(settings["dtype"])
    assert choose_kernel(settings.pop("config"), **settings) == expected


@pytest.mark.parametrize(
    "head_dim, softcap, packed", [(64, None, False), (128, 5.0, True)]
)
def test_the_kernel_of_tpus_has_the_numbers_of_plain_attention(
    head_dim, softcap, packed, monkeypatch
):
    # Interpreted, step by step, where there is no TPU. Its values, and what a gradient makes of them.
    make = functools.partial(splash_kernels.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_kernels, "make_splash_mha", make)
    window = 40 if packed else None
    config = AttentionConfig(head_dim**-0.5, window=window, softcap=softcap)
    segments = np.repeat([[1, 2, 3]], 2, 0).repeat(50, 1) if packed else None
    heads = random_heads(150, head_dim)

    def both(platform):
        def attend(*heads):
            return causal_attention(
                *heads, config=config, segments=segments, platform=platform
            )

        weights = jnp.cos(jnp.arange(head_dim))
        gradient = jax.grad(lambda *heads: jnp.sum(attend(*heads) * weights), (0, 1, 2))
        return jax.jit(attend)(*heads), jax.jit(gradient)(*heads)

    chex.assert_trees_all_close(both("tpu"), both(None), atol=1e-5)


@pytest.mark.parametrize(
    "platform, target, call",
    [("gpu", "cuda", "cudnn"), ("tpu", "tpu", "tpu_custom_call"), (None, "cpu", "")],
)
def test_a_program_for_another_platform_holds_its_kernel(
    platform, target, call, monkeypatch
):
    # The process' own backend is a CPU here: the choice must not look at it. JAX asks for an installed cuDNN while it
    # traces, which a machine without a GPU has not.
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000
    )
    queries = jax.ShapeDtypeStruct((2, 256, 4, 128), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct((2, 256, 2, 128), jnp.bfloat16)

    def loss(q, k, v):
        config = AttentionConfig(0.1, window=100)
        return jnp.sum(causal_attention(q, k, v, config=config, platform=platform))

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(queries, keys, keys)
    text = traced.lower(lowering_platforms=(target,)).as_text()
    assert call in text
    assert platform is not None or "custom_call" not in text
