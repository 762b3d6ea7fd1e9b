"""Looking at data: colours follow the masks, and the numbers are right by hand."""

import io

import numpy as np
import rich.console

from gvjax.data import inspect, sources
from gvjax.data.batches import Batches
from gvjax.data.examples import LengthPolicy, encode_rows
from gvjax.data.schema import DemonstrationRow, PreferenceRow, PromptRow, UnpairedRow
from gvjax.data.tokenizer import ByteTokenizer

LENGTHS = LengthPolicy((8, 16))


def encoded(rows):
    return encode_rows(rows, ByteTokenizer(), LENGTHS)


def console():
    return rich.console.Console(
        file=io.StringIO(), width=100, force_terminal=True, color_system="standard"
    )


def test_paint_follows_the_mask():
    tokens = np.array([257, 97, 98, 99, 0xC3, 0xA9, 258, 256])
    mask = np.array([0, 0, 0, 1, 1, 1, 1, 0], bool)
    painted = inspect.paint(tokens, mask, 7, ByteTokenizer())
    assert painted.plain == "<bos>abcé<eos>"
    assert [painted.plain[s.start : s.end] for s in painted.spans] == [
        "<bos>ab",
        "cé",
        "<eos>",
    ]
    assert [span.style for span in painted.spans] == [
        inspect.PROMPT_STYLE,
        inspect.COMPLETION_STYLE,
        inspect.END_STYLE,
    ]
    # An EOS that is not trained on (the end of an earlier turn) is no end here.
    quiet = inspect.paint(tokens, np.zeros(8, bool), 7, ByteTokenizer())
    assert [span.style for span in quiet.spans] == [inspect.PROMPT_STYLE]


def test_show_every_kind():
    kinds = [
        [PromptRow("ab", row_id=f"f:{i}") for i in range(3)],
        [DemonstrationRow("ab", "cd", row_id=f"f:{i}") for i in range(3)],
        [PreferenceRow("ab", "cd", "ef", row_id=f"f:{i}") for i in range(3)],
        [UnpairedRow("ab", "cd", True, row_id=f"f:{i}") for i in range(3)],
    ]
    for made in kinds:
        rows = sources.from_rows(made)
        batches = Batches(encoded(rows), batch_size=4, seed=0, drop_remainder=False)
        out = console()
        inspect.show(batches, ByteTokenizer(), rows=rows, console=out)
        text = out.file.getvalue()
        assert all(f"f:{i}" in text for i in range(3))
        assert "filler" in text
        assert "\x1b[2m<bos>ab\x1b[0m" in text
        if not isinstance(made[0], PromptRow):
            assert "\x1b[32mcd\x1b[0m" in text
            assert "3 trained on" in text
        if isinstance(made[0], PreferenceRow):
            assert "\x1b[32mef\x1b[0m" in text


def test_show_packed_rows_names_all_that_is_in_them():
    rows = sources.from_rows(
        [DemonstrationRow("a", "b", row_id=f"f:{i}") for i in (1, 2)]
    )
    batches = Batches(encoded(rows), batch_size=1, seed=0, packing=True)
    out = console()
    inspect.show(batches, ByteTokenizer(), rows=rows, console=out)
    assert "row 0: f:1, f:2" in out.file.getvalue()
    assert "8 of 8 tokens, 4 trained on" in out.file.getvalue()


def test_statistics_by_hand():
    rows = sources.from_rows(
        [
            PreferenceRow("a", "bbb", "c", 1.0),
            PreferenceRow(" A ", "bbb", "c", 1.0),
            PreferenceRow("b", "x", "yy", 0.0),
            PreferenceRow("c", "x", "x", 2.0),
            PreferenceRow("d", "xxxxxxxxxxxxxxxxxxxx", "y", 2.0),
        ]
    )
    other = sources.from_rows([PromptRow("B"), PromptRow("e"), PromptRow("c ")])
    out = console()
    found = inspect.stats(rows, encoded(rows), other=other, console=out)
    assert found.rows == 5
    assert found.duplicate_rows == 1
    assert found.duplicate_prompts == 1
    assert found.ties == 2
    assert found.longer_chosen == 3 / 4
    assert found.desirable is None
    assert (found.leaked, found.other_rows) == (2, 3)
    assert found.truncated == 1
    assert found.bucket_shares == {8: 4 / 5, 16: 1 / 5}
    # BOS and a letter (" A " has three), the longer completion and EOS; buckets 8, 8, 8, 8, 16.
    assert found.padding_share == 1 - (6 + 8 + 5 + 4 + 16) / (4 * 8 + 16)
    np.testing.assert_array_equal(
        found.completion_lengths, [4, 4, 2, 2, 15, 2, 2, 3, 2, 2]
    )
    text = out.file.getvalue()
    assert "2 of 3 (66.7%)" in text
    assert "ties" in text


def test_label_balance():
    rows = sources.from_rows([UnpairedRow("a", "b", i == 0) for i in range(4)])
    found = inspect.stats(rows, encoded(rows), console=console())
    assert found.desirable == 1 / 4
    assert found.ties is None
    assert found.leaked is None


def test_histogram():
    lines = inspect.histogram(np.array([0, 1, 1, 7]), bins=4, width=4)
    assert [line.split() for line in lines] == [
        ["0", "-", "1", "████", "3"],
        ["2", "-", "3", "0"],
        ["4", "-", "5", "0"],
        ["6", "-", "7", "█", "1"],
    ]
    assert inspect.histogram(np.array([], int)) == []
