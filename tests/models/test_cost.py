"""Counts against hand values, and against the floors published for two real shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from gvjax.models import cost, decoding, shapes, transformer
from gvjax.models.config import ModelConfig

SMALL = ModelConfig(
    vocab_size=7,
    embed_dim=4,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=6,
    mlp_dim=5,
)
# Per layer: query 4·12, key and value 4·6 each, output 12·4, gate, up and down 4·5 each.
BODY = 3 * (48 + 24 + 24 + 48 + 3 * 20)


def test_parameters_by_hand():
    assert cost.body_params(SMALL) == BODY
    assert cost.head_params(SMALL) == 28
    # Two norms a layer and the last one, and the embedding, which is tied.
    assert cost.num_params(SMALL) == BODY + (2 * 3 + 1) * 4 + 28


def test_the_body_does_not_count_norms_and_biases():
    params = transformer.init(jax.random.key(0), shapes.TINY)
    assert cost.num_params(shapes.TINY) == sum(x.size for x in jax.tree.leaves(params))
    biased = dataclasses.replace(SMALL, qkv_bias=True, mlp_bias=True, qk_norm=True)
    assert cost.body_params(biased) == BODY
    assert cost.num_params(biased) > cost.num_params(SMALL)


def test_forward_by_hand():
    # 10 tokens, 4 of them scored: 50 pairs a layer, 2 heads of 6, 4 operations each.
    expected = 2 * BODY * 10 + 3 * 50 * 2 * 6 * 4 + 2 * 28 * 4
    assert cost.forward_flops(SMALL, 10, scored=4) == expected
    assert cost.forward_flops(SMALL, 10) == expected + 2 * 28 * 6
    assert cost.forward_flops(SMALL, 10, scored=0) == expected - 2 * 28 * 4


def test_a_sequence_in_two_parts_costs_as_much_as_in_one():
    for model in (SMALL, dataclasses.replace(SMALL, sliding_window=4, global_every=2)):
        whole = cost.forward_flops(model, 10)
        parts = cost.forward_flops(model, 7) + cost.forward_flops(model, 3, before=7)
        assert parts == pytest.approx(whole)


def test_a_window_is_never_overcounted():
    # Window 4, every layer local: 4 tokens that see half of 4 each, 6 that see 4.
    local = dataclasses.replace(SMALL, sliding_window=4)
    assert cost.attended(local, 10) == 3 * (4 * 4 / 2 + 6 * 4)
    assert cost.attended(local, 2, before=3) == 3 * (1 * 3.5 + 4)
    assert cost.attended(local, 2, before=9) == 3 * 2 * 4
    mixed = dataclasses.replace(local, global_every=3)
    assert cost.attended(mixed, 10) == 2 * 32 + 50
    # No row holds more than the window of such a layer, and decoding reads no more.
    matrices = 4 * (BODY + 28)
    assert cost.decode_bytes(mixed, 1, 10) == matrices + 2 * 6 * 4 * (4 + 4 + 10)


@pytest.mark.parametrize(
    "name, body, head, cache, train_640, train_2048",
    [
        ("pythia-1.4b", 1208, 103, 196_608, 8.06, 8.47),
        ("smollm2-135m", 106, 28, 23_040, 0.873, 1.02),
    ],
)
def test_real_shapes(name, body, head, cache, train_640, train_2048):
    """Published sizes: millions of parameters, bytes of cache a token, 10⁹ operations a trained token."""
    model = shapes.shape(name, dtype="bfloat16")
    assert round(cost.body_params(model) / 1e6) == body
    assert round(cost.head_params(model) / 1e6) == head
    assert cost.cache_bytes(model) == cache

    def trained(length):
        return 3 * cost.forward_flops(model, length) / length / 1e9

    assert trained(640) == pytest.approx(train_640, rel=5e-3)
    assert trained(2048) == pytest.approx(train_2048, rel=5e-3)


@pytest.mark.parametrize(
    "rows, pythia, smollm2",
    [
        (1, 0.64, 0.066),
        (16, 1.03, 0.112),
        (64, 2.30, 0.260),
        (256, 7.35, 0.853),
        (1024, 27.6, 3.22),
    ],
)
def test_decoding_against_a_bandwidth(rows, pythia, smollm2):
    """Milliseconds of a step at a mean cache of 576 tokens and 4.3 TB/s, bf16."""
    for name, expected in (("pythia-1.4b", pythia), ("smollm2-135m", smollm2)):
        model = shapes.shape(name, dtype="bfloat16")
        milliseconds = cost.decode_bytes(model, rows, 576) / 4.3e12 * 1e3
        assert milliseconds == pytest.approx(expected, rel=0.01)
        # Decoding is bound by bandwidth: at 790 TFLOP/s the operations take an eighth of the time at most.
        assert cost.decode_flops(model, rows, 576) / 790e12 * 1e3 < 0.14 * expected


def test_sharing_a_prompt():
    """What running the prompt of a 512 + 128 pair, or of four samples, once saves."""
    for name, pair, four in (
        ("pythia-1.4b", 1.64, 2.4),
        ("smollm2-135m", 1.60, 2.28),
    ):
        model = shapes.shape(name)
        alone = cost.forward_flops(model, 640, scored=128)
        assert cost.grouped_flops(model, 512, 128, 1) == pytest.approx(alone)
        shared = cost.grouped_flops(model, 512, 128, 2)
        assert 2 * alone / shared == pytest.approx(pair, abs=0.02)
        shared = cost.grouped_flops(model, 512, 128, 4)
        assert 4 * alone / shared == pytest.approx(four, abs=0.03)


def test_bytes_of_the_optimizer():
    # Three numbers read and written, one read, four bytes each.
    assert cost.update_bytes(1000) == 1000 * (3 * 8 + 4)
    assert cost.state_bytes(1000) == 1000 * 3 * 4


def test_the_compiler_agrees_on_matrix_products():
    """XLA's own count of an unrolled forward pass without attention's masked half: within what norms add."""
    model = dataclasses.replace(shapes.TINY, num_layers=2, mlp_dim=1024)
    params, tokens = transformer.init_shapes(model), jnp.ones((2, 16), jnp.int32)
    forward = jax.jit(lambda params, tokens: transformer.apply(model, params, tokens))
    counted = forward.lower(params, tokens).compile().cost_analysis()["flops"]
    ours = 2 * cost.forward_flops(model, 16)
    assert ours < counted < 1.1 * ours


@pytest.mark.parametrize(
    ("kv_heads", "rows", "length", "of_it"),
    [
        # Nearly all of it matrices; nearly all of it cache, and half as much with half the heads.
        (4, 2, 32, "matrices"),
        (4, 64, 512, "cache"),
        (2, 64, 512, "cache"),
    ],
)
def test_the_compiler_agrees_on_the_bytes_of_a_decode_step(
    kv_heads, rows, length, of_it
):
    """XLA's own count for one token a row after a full cache, which is written in place: about a quarter more at most.

    The rest is what stays in a chip's own memory or is small beside a real network: scores and probabilities, written
    and read again by softmax, activations, logits, and the slots that the new token takes.
    """
    model = dataclasses.replace(
        shapes.TINY,
        vocab_size=1024,
        embed_dim=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=kv_heads,
        mlp_dim=1024,
    )
    matrices = 4 * (cost.body_params(model) + cost.head_params(model))
    ours = cost.decode_bytes(model, rows, length)
    share = matrices / ours
    assert (share if of_it == "matrices" else 1 - share) > 0.75
    decode = jax.jit(decoding.decode_fn(model), donate_argnums=3)
    params = jax.eval_shape(
        lambda params: decoding.decode_params(model, params),
        transformer.init_shapes(model),
    )
    cache = jax.eval_shape(
        lambda: {**decoding.init_cache(model, rows, length), "slot": jnp.int32(0)}
    )
    token = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    program = decode.lower(params, token, token, cache).compile()
    assert ours < program.cost_analysis()["bytes accessed"] < 1.26 * ours


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="no shape 'gpt-5'; use one of tiny"):
        shapes.shape("gpt-5")


def test_llama_8b_has_its_eight_billion():
    assert cost.num_params(shapes.LLAMA_8B) == pytest.approx(8.03e9, rel=2e-3)
