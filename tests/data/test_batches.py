"""Batches: masks from lengths, any step at any time, any number of processes, few shapes, nothing lost."""

import collections
import pathlib

import numpy as np
import pytest

from gvjax.data import packing, schema, sources
from gvjax.data.batches import Batches, PromptBatch, process_rows
from gvjax.data.examples import LengthPolicy, encode_row, encode_rows
from gvjax.data.schema import (
    DemonstrationRow,
    Message,
    PreferenceRow,
    PromptRow,
    UnpairedRow,
)
from gvjax.data.templates import ChatTemplate
from gvjax.data.tokenizer import ByteTokenizer

WIDE = LengthPolicy((512,))


def texts(count, seed=0):
    """Deterministic (prompt, completion) strings of 1 to 20 and 0 to 30 letters, each starting with its number."""
    generator = np.random.default_rng(seed)
    return [
        (
            f"{i:03d}" + "p" * int(generator.integers(1, 20)),
            "c" * int(generator.integers(0, 30)),
        )
        for i in range(count)
    ]


def demonstrations(count):
    return sources.from_rows([DemonstrationRow(p, c) for p, c in texts(count)])


def pairs(count):
    return sources.from_rows(
        [
            PreferenceRow(p, c + "y", c + "nn", float(i))
            for i, (p, c) in enumerate(texts(count))
        ]
    )


def unpaired(count):
    return sources.from_rows(
        [UnpairedRow(p, c, i % 3 == 0) for i, (p, c) in enumerate(texts(count))]
    )


def prompts(count):
    return sources.from_rows([PromptRow(p) for p, _ in texts(count)])


KINDS = [demonstrations, pairs, unpaired, prompts]
BUCKETS = LengthPolicy((16, 32, 64))


def encoded(rows, lengths=BUCKETS, tokenizer=None, **options):
    return encode_rows(rows, tokenizer or ByteTokenizer(), lengths, **options)


def leaves(batch):
    import jax

    return jax.tree.leaves(batch)


# --- one row -------------------------------------------------------------------------------------


def test_plain_rows_get_one_bos_and_one_eos():
    each = ByteTokenizer()
    example = encode_row(DemonstrationRow("ab", "cd"), each, WIDE)
    assert list(example.prompt) == [257, 97, 98]
    assert [list(ids) for ids in example.completions] == [[99, 100, 258]]
    assert not example.truncated


def test_parts_are_concatenated_at_the_seam(bpe):
    """Prompt ids do not depend on the completion, even where encoding the whole would merge across the seam."""
    example = encode_row(DemonstrationRow("The capi", "tal"), bpe, WIDE)
    assert list(example.prompt) == bpe.encode("The capi")
    assert list(example.completions[0]) == [*bpe.encode("tal"), 2]
    assert [*example.prompt, *example.completions[0][:-1]] != bpe.encode("The capital")


def test_both_completions_of_a_pair_share_the_prompt(bpe, chatml):
    row = PreferenceRow(
        (Message("user", "What is the capital of France?"),),
        (Message("assistant", "Paris."),),
        (Message("assistant", "<|im_end|>"),),
    )
    example = encode_row(row, bpe, WIDE, chatml)
    assert list(example.prompt) == chatml.encode_prompt(bpe, row.prompt)
    assert [(ids == 2).sum() for ids in example.completions] == [1, 1]
    assert [ids[-1] for ids in example.completions] == [2, 2]
    with pytest.raises(ValueError, match="there is no chat template"):
        encode_row(row, bpe, WIDE)


def test_a_broken_template_names_the_row(bpe):
    from gvjax.data.templates import ChatTemplate

    template = ChatTemplate(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}!{% endif %}"
    )
    row = DemonstrationRow(
        (Message("user", "a"),), (Message("assistant", "b"),), row_id="f:3"
    )
    with pytest.raises(ValueError, match=r"row f:3: .*prefix property"):
        encode_row(row, bpe, WIDE, template)


def cut(prompt, completion, **policy):
    policy = LengthPolicy((12,), **policy)
    each = ByteTokenizer()
    example = encode_row(DemonstrationRow(prompt, completion), each, policy)
    return (
        each.decode(example.prompt, skip_special=False),
        each.decode(example.completions[0], skip_special=False),
        example.truncated,
    )


def test_truncation():
    assert cut("abcdef", "xyz") == ("<bos>abcdef", "xyz<eos>", False)
    # The beginning goes, BOS stays.
    assert cut("abcdefghij", "xyz") == ("<bos>defghij", "xyz<eos>", True)
    assert cut("abcdefghij", "xyz", prompt_truncation="right") == (
        "<bos>abcdefg",
        "xyz<eos>",
        True,
    )
    assert cut("abcdef", "xyz", max_prompt=4) == ("<bos>def", "xyz<eos>", True)
    # A cut completion does not end where it is cut.
    assert cut("abcdef", "vwxyz", max_completion=3) == ("<bos>abcdef", "vwx", True)
    assert cut("ab", "x" * 20) == ("<bos>"[:0] + "b", "x" * 11, True)


def test_truncation_at_a_newline_keeps_the_last_line():
    policy = {"max_prompt": 8, "prompt_truncation": "newline"}
    assert cut("ab\ncd\nef\nTL", "x", **policy)[0] == "<bos>ab\nTL"[:-2] + "TL"
    assert cut("ab\ncd\n\nTL", "x", **policy)[0] == "<bos>ab\n\nTL"
    # A single long line leaves only the cut from the left.
    assert cut("abcdefghij\nTL", "x", **policy)[0] == "<bos>ghij\nTL"
    with pytest.raises(ValueError, match="is for plain text"):
        encode_row(
            PromptRow((Message("user", "a" * 20),)),
            ByteTokenizer(),
            LengthPolicy((12,), prompt_truncation="newline"),
            ChatTemplate("{{ messages[0].content }}"),
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"buckets": ()}, "must be ascending"),
        ({"buckets": (8, 4)}, "must be ascending"),
        ({"buckets": (8,), "max_prompt": 9}, "max_prompt 9"),
        ({"buckets": (8,), "max_completion": 0}, "max_completion 0"),
        ({"buckets": (8,), "max_prompt": 5, "max_completion": 4}, "together exceed"),
        ({"buckets": (8,), "prompt_truncation": "middle"}, "'middle'"),
    ],
)
def test_length_policies_that_cannot_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        LengthPolicy(**arguments)


# --- all rows ------------------------------------------------------------------------------------


def test_too_long_rows_are_cut_and_counted_or_dropped():
    rows = demonstrations(40)
    short = LengthPolicy((24,))
    whole = encoded(rows, short)
    count = whole.report.counts["too_long"]
    assert 0 < count == whole.truncated.sum() < 40
    assert len(whole) == 40
    left = encoded(rows, short, drop=["too_long"], max_bad_share=1.0)
    assert len(left) == 40 - count
    assert not left.truncated.any()
    np.testing.assert_array_equal(left.rows, np.flatnonzero(~whole.truncated))
    with pytest.raises(ValueError, match=f"{count} of 40 rows are bad"):
        encoded(rows, short, drop=["too_long"], max_bad_share=0.01)
    with pytest.raises(ValueError, match="no row is left"):
        encoded(rows, LengthPolicy((3,)), drop=["too_long"], max_bad_share=1.0)


def test_the_number_of_threads_changes_nothing():
    one, many = (encoded(pairs(30), num_threads=n) for n in (0, 4))
    np.testing.assert_array_equal(one.prompts.flat, many.prompts.flat)
    np.testing.assert_array_equal(one.completions[1].flat, many.completions[1].flat)
    assert one.fingerprint == many.fingerprint


def test_masks_come_from_lengths_where_pad_is_eos(bpe):
    """With pad equal to EOS, the EOS of each completion is trained on and the padding is not."""
    assert bpe.pad_id == bpe.eos_id
    examples = encoded(demonstrations(8), LengthPolicy((96,)), bpe)
    batch = Batches(examples, batch_size=8, seed=0, shuffle=False).batch_at(0)
    for b in range(8):
        prompt, completion = examples.prompts[b], examples.completions[0][b]
        stop = len(prompt) + len(completion)
        assert completion[-1] == bpe.eos_id
        np.testing.assert_array_equal(
            batch.tokens[b], [*prompt, *completion, *[bpe.pad_id] * (96 - stop)]
        )
        np.testing.assert_array_equal(
            batch.completion_mask[b],
            (np.arange(96) >= len(prompt)) & (np.arange(96) < stop),
        )


def test_an_empty_prompt_leaves_the_first_token_out():
    rows = sources.from_rows([DemonstrationRow("", "abc")])
    examples = encoded(rows, LengthPolicy((8,)), ByteTokenizer(add_bos=False))
    batch = Batches(examples, batch_size=1, seed=0).batch_at(0)
    assert batch.completion_mask[0].tolist() == [False, True, True, True, *[False] * 4]


def test_dtypes_and_fields():
    batch = Batches(encoded(pairs(20)), batch_size=4, seed=1).batch_at(2)
    assert batch.chosen.tokens.dtype == np.int32
    assert batch.chosen.completion_mask.dtype == np.bool_
    assert batch.chosen.tokens.shape == batch.rejected.tokens.shape
    assert batch.margin.dtype == np.float32
    assert batch.weight is None
    assert batch.chosen.segments is None
    batches = Batches(encoded(prompts(20)), batch_size=4, seed=1)
    batch = batches.batch_at(2)
    assert isinstance(batch, PromptBatch)
    assert batch.lengths.dtype == batch.rows.dtype == np.int32
    assert [(int(i),) for i in batch.rows] == batches.rows_at(2)


def test_margins_are_kept_only_where_all_are_known(caplog):
    rows = [PreferenceRow("a", "b", "c", 1.0), PreferenceRow("a", "d", "e")]
    examples = encoded(sources.from_rows(rows))
    assert Batches(examples, batch_size=2, seed=0).batch_at(0).margin is None
    assert "1 of 2 rows have no margin, so none is used" in caplog.text


def test_pairs_carry_their_own_margin_and_completions():
    rows = pairs(20)
    batches = Batches(encoded(rows), batch_size=4, seed=1)
    each = ByteTokenizer()
    for step in range(batches.batches_per_epoch):
        batch = batches.batch_at(step)
        for b, (position,) in enumerate(batches.rows_at(step)):
            row = rows[position]
            assert batch.margin[b] == row.margin
            for side, text in (
                (batch.chosen, row.chosen),
                (batch.rejected, row.rejected),
            ):
                words = side.tokens[b][side.completion_mask[b]]
                assert each.decode(words, skip_special=False) == text + "<eos>"


def test_an_unpaired_row_left_alone_meets_another_rows_completion():
    rows = unpaired(5)
    batches = Batches(
        encoded(rows), batch_size=2, seed=0, shuffle=False, drop_remainder=False
    )
    alone = [
        batch.kl_sequences
        for batch in map(batches.batch_at, range(batches.batches_per_epoch))
        if batch.weight.sum() == 1
    ]
    own = {row.prompt + row.completion for row in rows}
    assert alone
    for sequences in alone:
        (b,) = np.flatnonzero(sequences.completion_mask.any(1))
        words = ByteTokenizer().decode(sequences.tokens[b])
        assert words not in own and words
    with pytest.raises(ValueError, match="there must be two"):
        Batches(encoded(unpaired(1)), batch_size=2, seed=0, drop_remainder=False)


def test_unpaired_rows_meet_the_next_rows_completion():
    rows = unpaired(24)
    batches = Batches(encoded(rows, WIDE), batch_size=6, seed=1)
    batch, where = batches.batch_at(1), batches.rows_at(1)
    each = ByteTokenizer()
    for b in range(6):
        row, partner = rows[where[b][0]], rows[where[(b + 1) % 6][0]]
        assert batch.desirable[b] == row.label
        words = each.decode(batch.kl_sequences.tokens[b])
        assert words == row.prompt + partner.completion
        mask = batch.kl_sequences.completion_mask[b]
        assert mask.sum() == len(partner.completion) + 1


# --- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_visits_every_row_once(make, shuffle):
    batches = Batches(
        encoded(make(50)), batch_size=8, seed=3, shuffle=shuffle, drop_remainder=False
    )
    assert batches.batches_per_epoch == 7
    for epoch in range(2):
        steps = range(7 * epoch, 7 * epoch + 7)
        seen = [i for step in steps for unit in batches.rows_at(step) for i in unit]
        assert sorted(seen) == list(range(50))


def test_dropping_the_remainder_loses_less_than_a_batch_and_not_always_the_same():
    batches = Batches(encoded(demonstrations(50)), batch_size=8, seed=3)
    assert batches.batches_per_epoch == 6
    missing = []
    for epoch in range(6):
        steps = range(6 * epoch, 6 * epoch + 6)
        seen = [i for step in steps for unit in batches.rows_at(step) for i in unit]
        assert len(seen) == len(set(seen)) == 48
        missing.append(frozenset(range(50)) - frozenset(seen))
    assert len(set(missing)) > 1


def test_no_length_is_always_what_an_epoch_leaves_out():
    """One long row among short ones: a bucket that it could never fill must not keep it from every epoch."""
    rows = [DemonstrationRow("p", "c" * (40 if i == 3 else 2)) for i in range(11)]
    batches = Batches(encoded(sources.from_rows(rows)), batch_size=4, seed=0)
    assert batches.batches_per_epoch == 2
    seen = collections.Counter()
    for step in range(2 * 60):
        for (position,) in batches.rows_at(step):
            seen[position] += 1
    # Of 60 epochs 8/11 on average.
    assert set(seen) == set(range(11))
    assert min(seen.values()) > 30


def test_epochs_and_seeds_differ():
    examples = encoded(demonstrations(64))
    orders = {
        (seed, epoch): tuple(
            unit
            for step in range(8)
            for unit in Batches(examples, batch_size=8, seed=seed).rows_at(
                8 * epoch + step
            )
        )
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4


def test_the_order_is_the_same_on_every_machine():
    """Raw Philox output is fixed by numpy's compatibility policy; a change here would break every resume."""
    batches = Batches(encoded(demonstrations(8), WIDE), batch_size=8, seed=7)
    assert [unit[0] for unit in batches.rows_at(0)] == [4, 1, 6, 3, 2, 7, 5, 0]


def test_batches_come_in_the_shapes_of_the_buckets():
    examples = encoded(demonstrations(200))
    batches = Batches(examples, batch_size=8, seed=0, drop_remainder=False)
    shapes = collections.Counter()
    for step in range(batches.batches_per_epoch):
        batch = batches.batch_at(step)
        shapes[batch.tokens.shape] += 1
        longest = max(
            examples.totals[unit[0]] for unit in batches.rows_at(step) if unit
        )
        assert longest <= batch.tokens.shape[1]
    assert set(shapes) == {(8, 16), (8, 32), (8, 64)}
    # At most one batch a bucket is longer than it must be: the one that took over what was left.
    shares = examples.bucket_shares()
    for bucket, share in shares.items():
        assert abs(shapes[8, bucket] - share * 200 / 8) <= 1
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("make", KINDS)
def test_fillers_have_no_mask_and_no_weight(make):
    batches = Batches(
        encoded(make(5), WIDE), batch_size=8, seed=0, drop_remainder=False
    )
    batch = batches.batch_at(0)
    real = np.array([bool(unit) for unit in batches.rows_at(0)])
    assert real.sum() == 5
    if isinstance(batch, PromptBatch):
        np.testing.assert_array_equal(batch.rows >= 0, real)
        np.testing.assert_array_equal(batch.lengths > 0, real)
        return
    if hasattr(batch, "weight"):
        np.testing.assert_array_equal(batch.weight, real)
    for leaf in leaves(batch):
        if leaf.dtype == np.bool_ and leaf.ndim == 2:
            np.testing.assert_array_equal(leaf.any(1), real)


# --- resume and processes ------------------------------------------------------------------------


def assert_equal(left, right):
    left, right = leaves(left), leaves(right)
    assert len(left) == len(right)
    for a, b in zip(left, right):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("make", KINDS)
def test_any_step_after_a_restart_is_the_same(make):
    steps = [0, 1, 5, 6, 7, 13, 40]
    first = Batches(encoded(make(50)), batch_size=8, seed=3)
    seen = {step: first.batch_at(step) for step in steps}
    again = Batches(encoded(make(50)), batch_size=8, seed=3)
    for step in reversed(steps):
        assert_equal(again.batch_at(step), seen[step])
    assert again.fingerprint == first.fingerprint
    again.check_resume(first.fingerprint)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_make_the_rows_of_one_batch(make, processes):
    examples = encoded(make(50))
    whole = Batches(examples, batch_size=8, seed=3)
    for step in (0, 9):
        parts = [
            Batches(examples, batch_size=8, seed=3).batch_at(
                step, process_rows(8, index, processes)
            )
            for index in range(processes)
        ]
        for leaf, *shares in zip(leaves(whole.batch_at(step)), *map(leaves, parts)):
            np.testing.assert_array_equal(leaf, np.concatenate(shares))


def test_rows_may_be_asked_for_in_any_order():
    batches = Batches(encoded(pairs(20)), batch_size=4, seed=1)
    asked = batches.batch_at(1, [3, 0])
    np.testing.assert_array_equal(
        asked.chosen.tokens, batches.batch_at(1).chosen.tokens[[3, 0]]
    )
    assert batches.rows_at(1, [3, 0]) == [batches.rows_at(1)[i] for i in (3, 0)]


def test_process_rows_refuses_unequal_shares():
    with pytest.raises(ValueError, match="batch_size 8 is not divisible by the 3"):
        process_rows(8, 0, 3)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_iterating_goes_on_where_it_is_told(prefetch):
    batches = Batches(encoded(pairs(30)), batch_size=4, seed=1)
    rows = process_rows(4, 1, 2)
    steps = list(batches.iterate(5, 19, rows=rows, prefetch=prefetch))
    assert len(steps) == 14
    for step, batch in enumerate(steps, start=5):
        assert_equal(batch, batches.batch_at(step, rows))
    endless = batches.iterate(100)
    assert_equal(next(endless), batches.batch_at(100))
    assert list(batches.iterate(3, 3)) == []
    with pytest.raises(ValueError, match="start_step 4"):
        batches.iterate(4, 3)


def test_resume_refuses_other_data():
    rows = demonstrations(50)
    base = Batches(encoded(rows), batch_size=8, seed=3)
    others = [
        Batches(encoded(demonstrations(49)), batch_size=8, seed=3),
        Batches(encoded(rows, LengthPolicy((16, 64))), batch_size=8, seed=3),
        Batches(
            encoded(rows, tokenizer=ByteTokenizer(add_bos=False)), batch_size=8, seed=3
        ),
        Batches(encoded(rows), batch_size=4, seed=3),
        Batches(encoded(rows), batch_size=8, seed=4),
        Batches(encoded(rows), batch_size=8, seed=3, shuffle=False),
        Batches(encoded(rows), batch_size=8, seed=3, packing=True),
        Batches(encoded(rows), batch_size=8, seed=3, drop_remainder=False),
    ]
    assert len({each.fingerprint for each in [base, *others]}) == 9
    for each in others:
        with pytest.raises(ValueError, match="data changed since the checkpoint"):
            each.check_resume(base.fingerprint)


def test_what_cannot_be_batched_is_refused():
    examples = encoded(demonstrations(5))
    with pytest.raises(ValueError, match="5 rows do not make one batch"):
        Batches(examples, batch_size=8, seed=0)
    with pytest.raises(ValueError, match="batch_size 0"):
        Batches(examples, batch_size=0, seed=0)
    with pytest.raises(ValueError, match="seed -1"):
        Batches(examples, batch_size=1, seed=-1)
    with pytest.raises(ValueError, match="step -1"):
        Batches(examples, batch_size=1, seed=0).batch_at(-1)
    with pytest.raises(ValueError, match="batch_size of at least 2"):
        Batches(encoded(unpaired(5)), batch_size=1, seed=0)
    with pytest.raises(ValueError, match="packing is for demonstrations"):
        Batches(encoded(unpaired(5)), batch_size=2, seed=0, packing=True)


# --- packing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_packing_loses_nothing_and_overfills_nothing(seed):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 60, 300)
    bins = packing.pack(lengths, 64)
    assert sorted(i for each in bins for i in each) == list(range(300))
    assert max(lengths[list(each)].sum() for each in bins) <= 64
    fewest = int(np.ceil(lengths.sum() / 64))
    assert len(bins) <= 11 / 9 * fewest + 1


def test_packing_by_hand():
    assert packing.pack(np.array([4, 6, 5, 3, 2]), 10) == [(1, 0), (2, 3, 4)]
    assert packing.pack(np.array([], int), 10) == []
    with pytest.raises(ValueError, match="length 11 exceeds"):
        packing.pack(np.array([11]), 10)


def test_packed_rows_are_the_plain_rows_side_by_side():
    rows = demonstrations(60)
    examples = encoded(rows)
    batches = Batches(
        examples, batch_size=4, seed=2, packing=True, drop_remainder=False
    )
    assert batches.batches_per_epoch * 4 < 60
    seen = []
    for step in range(batches.batches_per_epoch):
        batch, where = batches.batch_at(step), batches.rows_at(step)
        assert batch.tokens.shape == (4, 64)
        for b, unit in enumerate(where):
            seen += unit
            for number, position in enumerate(unit, start=1):
                inside = batch.segments[b] == number
                prompt = examples.prompts[position]
                completion = examples.completions[0][position]
                np.testing.assert_array_equal(
                    batch.tokens[b][inside], [*prompt, *completion]
                )
                np.testing.assert_array_equal(
                    batch.completion_mask[b][inside],
                    [False] * len(prompt) + [True] * len(completion),
                )
            padding = batch.segments[b] == 0
            assert (batch.tokens[b][padding] == examples.pad_id).all()
            assert not batch.completion_mask[b][padding].any()
            assert batch.segments[b].max() == len(unit)
    assert sorted(seen) == list(range(60))


def test_the_first_token_of_a_packed_sequence_is_not_trained_on():
    rows = sources.from_rows([DemonstrationRow("", "abc"), DemonstrationRow("", "de")])
    examples = encoded(rows, LengthPolicy((8,)), ByteTokenizer(add_bos=False))
    batch = Batches(examples, batch_size=1, seed=0, packing=True).batch_at(0)
    assert batch.segments[0].tolist() == [1, 1, 1, 1, 2, 2, 2, 0]
    assert batch.completion_mask[0].tolist() == [
        *[False, True, True, True],
        *[False, True, True],
        False,
    ]


def test_real_rows_down_both_roads_share_their_prompts(data_dir, bpe, chatml):
    """The prompts that are sampled from are those of the pairs, token by token."""
    samples = pathlib.Path(__file__).parent / "samples"

    rows = sources.load(
        "hh_rlhf",
        "train",
        path=samples / "hh_rlhf.train.jsonl.gz",
        data_dir=data_dir,
        drop=["early_divergence"],
    )
    policy = LengthPolicy((256, 512), max_prompt=200, max_completion=200)
    whole = encoded(rows, policy, bpe, template=chatml)
    asked = encoded(rows.map(schema.as_prompt), policy, bpe, template=chatml)
    shown = encoded(rows.map(schema.as_demonstration), policy, bpe, template=chatml)
    np.testing.assert_array_equal(whole.prompts.flat, asked.prompts.flat)
    np.testing.assert_array_equal(whole.prompts.flat, shown.prompts.flat)
    np.testing.assert_array_equal(whole.completions[0].flat, shown.completions[0].flat)
    assert len(whole) == 57
