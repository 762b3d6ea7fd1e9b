"""Packed pairs: nothing lost, nothing overfilled, the same numbers, and little padding on the real samples."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gvjax import steps
from gvjax.data import packing, sources
from gvjax.data.batches import Batches
from gvjax.data.examples import LengthPolicy, encode_rows
from gvjax.data.schema import DemonstrationRow, PreferenceRow, PromptRow
from gvjax.data.templates import CHATML_TEMPLATE, ChatTemplate
from gvjax.data.tokenizer import ByteTokenizer
from gvjax.models import heads, transformer
from gvjax.models.config import ModelConfig
from gvjax.steps.sequences import sums_by_pair

SAMPLES = pathlib.Path(__file__).parent / "samples"
MODEL = ModelConfig(vocab_size=300, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=32)


def text_pairs(count, seed=0):
    """Pairs of mixed lengths; chosen completions are the longer ones on average."""
    rng = np.random.default_rng(seed)

    def letters(low, high):
        return bytes(rng.integers(97, 123, rng.integers(low, high), np.uint8)).decode()

    return sources.from_rows(
        [
            PreferenceRow(letters(1, 12), letters(4, 24), letters(1, 16), float(i))
            for i in range(count)
        ]
    )


@pytest.mark.parametrize("seed", range(3))
def test_pairs_lose_nothing_and_overfill_nothing(seed):
    rng = np.random.default_rng(seed)
    # First sequences are half as long again: without swapping, second rows would stay a third empty.
    first, second = rng.integers(1, 60, 500), rng.integers(1, 40, 500)
    bins, swapped = packing.pack_pairs(first, second, 64)
    assert sorted(i for each in bins for i in each) == list(range(500))
    used = packing.filled(bins, first, second, swapped)
    assert used.max() <= 64
    assert 1 - (first.sum() + second.sum()) / (len(bins) * 2 * 64) < 0.05
    assert 0.2 < swapped.mean() < 0.8


def test_pairs_by_hand():
    bins, swapped = packing.pack_pairs(np.array([6, 4]), np.array([3, 6]), 10)
    # 4 + 6 is the longest pair: its 6 into the first row, the other's 6 beside its 4 in the second.
    assert bins == [(1, 0)]
    assert swapped.tolist() == [True, True]
    assert packing.filled(bins, *map(np.array, ([6, 4], [3, 6])), swapped) == [10]
    assert packing.pack_pairs(np.zeros(0, int), np.zeros(0, int), 10)[0] == []
    with pytest.raises(ValueError, match="length 11 exceeds"):
        packing.pack_pairs(np.array([2]), np.array([11]), 10)


def test_many_open_bins_are_closed_and_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(packing, "OPEN_BINS", 3)
    rng = np.random.default_rng(0)
    first, second = rng.integers(1, 60, (2, 200))
    bins, swapped = packing.pack_pairs(first, second, 64)
    assert sorted(i for each in bins for i in each) == list(range(200))
    assert packing.filled(bins, first, second, swapped).max() <= 64


def packed_at(lengths):
    return lambda capacity: len(packing.pack(lengths, capacity))


def test_the_shortest_rows_by_hand():
    # Seven of 10 fill 2.2 rows of 32: three rows, for which 30 is enough and 29 is not.
    lengths = np.full(7, 10)
    assert packing.shortest(packed_at(lengths), 32, longest=10, total=70) == 30
    # Fourteen of 10 in five rows, though 28 would hold as many tokens.
    lengths = np.full(14, 10)
    assert packing.shortest(packed_at(lengths), 32, longest=10, total=140) == 30
    # Never shorter than a sequence: two rows of 30 would hold 60 tokens, but not one of 40.
    lengths = np.array([40, 10, 10])
    assert packing.shortest(packed_at(lengths), 45, longest=40, total=60) == 40
    assert packing.shortest(packed_at(lengths), 40, longest=40, total=60) == 40


@pytest.mark.parametrize("seed", range(5))
def test_the_shortest_rows_hold_all_in_no_more(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(20, 120, 30)
    rows_of, total = packed_at(lengths), int(lengths.sum())
    short = packing.shortest(rows_of, 512, longest=int(lengths.max()), total=total)
    assert rows_of(short) == rows_of(512)
    assert (512 - short) % 8 == 0
    assert total / (rows_of(short) * short) > 0.95


@functools.cache
def both_batches():
    """(every pair in a row of its own, the same pairs packed and in which order), with reference log-probabilities."""
    rows = text_pairs(24)
    examples = encode_rows(rows, ByteTokenizer(), LengthPolicy((32, 64)))
    rng = np.random.default_rng(1)
    reference = tuple(rng.uniform(-9, -1, (2, 24)).astype(np.float32))
    examples = dataclasses.replace(examples, ref_logps=reference)
    plain = Batches(examples, batch_size=24, seed=0, shuffle=False)
    packed = Batches(examples, batch_size=8, seed=0, packing=True, drop_remainder=False)
    assert packed.batches_per_epoch == 1
    return plain.batch_at(0), plain.rows_at(0), packed.batch_at(0), packed.rows_at(0)


def test_each_pair_is_where_the_weights_say():
    plain, order, packed, where = both_batches()
    assert packed.weight.shape == packed.swapped.shape == (8, max(map(len, where)))
    assert packed.weight.sum() == 24
    assert packed.swapped.any() and not packed.swapped.all()
    position = {unit[0]: row for row, unit in enumerate(order)}
    for b, unit in enumerate(where):
        for s, example in enumerate(unit):
            row = position[example]
            sides = [packed.chosen, packed.rejected]
            if packed.swapped[b, s]:
                sides.reverse()
            for side, alone in zip(sides, (plain.chosen, plain.rejected)):
                inside = side.segments[b] == s + 1
                mask = alone.completion_mask[row]
                length = int(np.flatnonzero(mask)[-1]) + 1
                np.testing.assert_array_equal(
                    side.tokens[b][inside], alone.tokens[row][:length]
                )
                np.testing.assert_array_equal(
                    side.completion_mask[b][inside], mask[:length]
                )
            assert packed.margin[b, s] == plain.margin[row]
            assert packed.ref_chosen_logps[b, s] == plain.ref_chosen_logps[row]


def test_counting_a_packed_batch_counts_its_tokens():
    plain, _, packed, _ = both_batches()
    for batch in (plain, packed):
        both = steps.interleave(batch.chosen, batch.rejected)
        chosen, rejected = sums_by_pair(batch, both.completion_mask * 1.0)
        assert sorted(chosen[chosen > 0]) == sorted(plain.chosen.completion_mask.sum(1))
        assert rejected.sum() == plain.rejected.completion_mask.sum()


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_dpo_of_packed_pairs_is_dpo(num_microbatches):
    """Loss, metrics and the parameters after a step: attention does not cross from one pair into another."""
    plain, _, packed, _ = both_batches()
    logps_fn = transformer.token_logps_fn(MODEL)
    tx = optax.adam(1e-3)
    state = steps.init_train_state(transformer.init(jax.random.key(0), MODEL), tx)
    whole = steps.make_dpo_step(logps_fn, tx, beta=0.3)
    step = steps.make_dpo_step(
        logps_fn, tx, beta=0.3, num_microbatches=num_microbatches
    )
    expected, found = jax.jit(whole)(state, plain), jax.jit(step)(state, packed)
    assert set(expected[1]) == set(found[1])
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=2e-5, atol=2e-6)
    close = functools.partial(np.testing.assert_allclose, atol=2e-5)
    jax.tree.map(close, found[0].params, expected[0].params)


@pytest.mark.parametrize("pooling", ["last", "mean", "sum"])
@pytest.mark.parametrize("over", ["completion", "all"])
def test_rewards_of_packed_pairs_are_their_rewards(pooling, over):
    if pooling == "last" and over == "all":
        pytest.skip("refused elsewhere")
    plain, _, packed, _ = both_batches()
    params = heads.init(jax.random.key(0), MODEL, zero=False)
    objective = steps.reward_objective(
        heads.reward_fn(MODEL, pooling=pooling, over=over), centering=0.1
    )
    alone, together = (
        jax.jit(objective)(params, plain),
        jax.jit(objective)(params, packed),
    )
    np.testing.assert_allclose(together[0].value, alone[0].value, rtol=1e-5)
    for name, metric in alone[1].items():
        np.testing.assert_allclose(together[1][name].value, metric.value, rtol=1e-4)


def test_the_reference_of_packed_pairs_keeps_their_shape():
    plain, order, packed, where = both_batches()
    logps_fn = transformer.token_logps_fn(MODEL)
    params = transformer.init(jax.random.key(3), MODEL)
    alone = steps.with_ref_logps(logps_fn, params, plain)
    together = steps.with_ref_logps(logps_fn, params, packed)
    assert together.ref_chosen_logps.shape == packed.weight.shape
    position = {unit[0]: row for row, unit in enumerate(order)}
    for b, unit in enumerate(where):
        for s, example in enumerate(unit):
            np.testing.assert_allclose(
                together.ref_rejected_logps[b, s],
                alone.ref_rejected_logps[position[example]],
                rtol=1e-5,
            )


def test_packed_pairs_without_weights_are_refused():
    packed = both_batches()[2]
    packed = dataclasses.replace(packed, weight=None)
    step = steps.make_dpo_step(transformer.token_logps_fn(MODEL), optax.sgd(1.0))
    params = transformer.init(jax.random.key(0), MODEL)
    with pytest.raises(ValueError, match=r"`weight` must be f32\[B, S\]"):
        step(steps.init_train_state(params, optax.sgd(1.0)), packed)


def test_prompts_are_not_packed():
    rows = sources.from_rows([PromptRow("ab")])
    examples = encode_rows(rows, ByteTokenizer(), LengthPolicy((8,)))
    with pytest.raises(ValueError, match="demonstrations and pairs, and these are"):
        Batches(examples, batch_size=1, seed=0, packing=True)


# Padding.

BUCKETS = (256, 512, 1024, 1536, 2048, 3072, 4096)


@pytest.mark.parametrize(
    ("name", "packed", "plain"),
    [
        ("hh_rlhf", 0.05, 0.4),
        ("ultrafeedback_binarized", 0.05, 0.4),
        ("gsm8k", 0.05, 0.35),
        ("svamp", 0.05, 0.5),
        ("scitldr", 0.05, 0.35),
        ("tldr_pages", 0.05, 0.7),
    ],
)
def test_padding_of_the_real_samples(name, packed, plain, data_dir):
    """At most 5% of the positions are padding; bucketing alone leaves more, padding to the longest most."""
    rows = sources.load(
        name,
        "train",
        path=SAMPLES / f"{name}.train.jsonl.gz",
        data_dir=data_dir,
        max_bad_share=0.1,
    )
    assert rows.kind in (DemonstrationRow, PreferenceRow)
    examples = encode_rows(
        rows,
        ByteTokenizer(),
        LengthPolicy(BUCKETS),
        template=ChatTemplate(CHATML_TEMPLATE),
    )
    made = functools.partial(
        Batches, examples, batch_size=1, seed=0, drop_remainder=False
    )
    bucketed, together = made().padding(), made(packing=True).padding()
    assert together < packed
    assert together < bucketed < plain


def test_padding_by_hand():
    rows = sources.from_rows(
        [DemonstrationRow("abc", "de"), DemonstrationRow("a", "b")]
    )
    tokenizer = ByteTokenizer(add_bos=False)
    examples = encode_rows(rows, tokenizer, LengthPolicy((4, 8, 12)))
    # With EOS 6 and 3 tokens, in rows of 8 and 4; together 9 in a row of 12.
    assert Batches(examples, batch_size=1, seed=0).padding() == pytest.approx(3 / 12)
    packed = Batches(examples, batch_size=1, seed=0, packing=True)
    assert packed.padding() == pytest.approx(3 / 12)
    filler = Batches(examples, batch_size=3, seed=0, drop_remainder=False)
    assert filler.padding() == pytest.approx(1 - 9 / 24)


def test_packed_arrays_may_be_numpy_and_stay_so():
    """Host arrays until the first jit: what a thread makes touches no device."""
    packed = both_batches()[2]
    assert not any(isinstance(leaf, jnp.ndarray) for leaf in jax.tree.leaves(packed))
