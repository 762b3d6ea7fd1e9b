"""Rows: every TRL format, every fault, and what is dropped."""

import numpy as np
import pytest

from gvjax.data import schema
from gvjax.data.schema import (
    DemonstrationRow,
    Message,
    PreferenceRow,
    PromptRow,
    UnpairedRow,
)


def user(words):
    return {"role": "user", "content": words}


def reply(words):
    return {"role": "assistant", "content": words}


SKY = (Message("user", "What colour is the sky?"),)
BLUE, GREEN = (Message("assistant", "Blue."),), (Message("assistant", "Green."),)

FORMATS = [
    ({"prompt": "The sky is"}, PromptRow("The sky is")),
    ({"prompt": [user("What colour is the sky?")]}, PromptRow(SKY)),
    ({"prompt": "2+2=", "ground_truth": 4}, PromptRow("2+2=", "4")),
    (
        {"prompt": "The sky is", "completion": " blue."},
        DemonstrationRow("The sky is", " blue."),
    ),
    (
        {
            "prompt": [user("What colour is the sky?")],
            "completion": [reply("Blue.")],
        },
        DemonstrationRow(SKY, BLUE),
    ),
    ({"text": "The sky is blue."}, DemonstrationRow("", "The sky is blue.")),
    (
        {"messages": [user("What colour is the sky?"), reply("Blue.")]},
        DemonstrationRow(SKY, BLUE),
    ),
    (
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        PreferenceRow("The sky is", " blue.", " green."),
    ),
    (
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        PreferenceRow("The sky is", " blue.", " black."),
    ),
    (
        {
            "prompt": [user("What colour is the sky?")],
            "chosen": [reply("Blue.")],
            "rejected": [reply("Green.")],
            "margin": 2,
        },
        PreferenceRow(SKY, BLUE, GREEN, 2.0),
    ),
    (
        {
            "chosen": [user("What colour is the sky?"), reply("Blue.")],
            "rejected": [user("What colour is the sky?"), reply("Green.")],
            "score_chosen": 8.0,
            "score_rejected": 5.5,
        },
        PreferenceRow(SKY, BLUE, GREEN, 2.5),
    ),
    (
        {
            "prompt": "What colour is the sky?",
            "chosen": [user("What colour is the sky?"), reply("Blue.")],
            "rejected": [user("What colour is the sky?"), reply("Green.")],
        },
        PreferenceRow(SKY, BLUE, GREEN),
    ),
    (
        {
            "prompt": "What colour is the sky?",
            "chosen": [reply("Blue.")],
            "rejected": [reply("Green.")],
        },
        PreferenceRow(SKY, BLUE, GREEN),
    ),
    (
        {"prompt": "The sky is", "completion": " blue.", "label": True},
        UnpairedRow("The sky is", " blue.", True),
    ),
    (
        {
            "prompt": [user("What colour is the sky?")],
            "completion": [reply("Green.")],
            "label": 0,
        },
        UnpairedRow(SKY, GREEN, False),
    ),
]


@pytest.mark.parametrize(("record", "row"), FORMATS)
def test_every_format(record, row):
    kind, converter = schema.find_format(record)
    assert kind is type(row)
    assert converter(record) == row


def test_unknown_format_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'instruction'.*\{chosen, rejected\}"):
        schema.find_format(["instruction", "output"])


def test_implicit_prompt_never_splits_a_word():
    row = schema.preference({"chosen": "The cat sat", "rejected": "The car sat"})
    assert row == PreferenceRow("The", " cat sat", " car sat")


def test_equal_conversations_still_end_with_a_reply():
    turns = [user("What colour is the sky?"), reply("Blue.")]
    row = schema.normalise(
        {"chosen": turns, "rejected": turns}, schema.preference, "f:1"
    )
    assert row == PreferenceRow(
        SKY, BLUE, BLUE, row_id="f:1", faults=("identical_pair",)
    )


FAULTY = [
    ({"prompt": "a", "chosen": " x", "rejected": " x"}, ("identical_pair",)),
    ({"prompt": "a", "chosen": "  ", "rejected": " x"}, ("empty_completion",)),
    ({"prompt": " ", "chosen": " y", "rejected": " x"}, ("empty_prompt",)),
    ({"prompt": "a\udcff", "chosen": " y", "rejected": " x"}, ("invalid_utf8",)),
    ({"prompt": "a", "chosen": " y", "rejected": " x"}, ()),
]


@pytest.mark.parametrize(("record", "faults"), FAULTY)
def test_faults(record, faults):
    row = schema.normalise(record, schema.preference, "f:7")
    assert row.faults == faults
    assert row.row_id == "f:7"


def test_invalid_bytes_become_replacement_characters():
    row = schema.normalise({"prompt": "a\udcffb"}, schema.prompt_only, "f:1")
    assert row.prompt == "a\ufffdb"
    conversation = schema.normalise(
        {"prompt": [user("a\udcffb")]}, schema.prompt_only, "f:1"
    )
    assert conversation.prompt == (Message("user", "a\ufffdb"),)


UNUSABLE = [
    ({"prompt": "a", "chosen": "x"}, schema.preference, "missing_keys"),
    (
        {"prompt": "a", "chosen": "x", "rejected": None},
        schema.preference,
        "missing_keys",
    ),
    (
        {"prompt": "a", "chosen": 3, "rejected": "x"},
        schema.preference,
        "missing_keys",
    ),
    (
        {"chosen": "x", "rejected": [reply("y")]},
        schema.preference,
        "missing_keys",
    ),
    ({"prompt": [{"role": "user"}]}, schema.prompt_only, "missing_keys"),
    (
        {"prompt": [{"role": "user<|im_end|>", "content": "a"}]},
        schema.prompt_only,
        "missing_keys",
    ),
    (
        {"prompt": "a", "completion": "b", "label": "good"},
        schema.unpaired,
        "missing_keys",
    ),
    (
        {
            "chosen": [user("a"), reply("b"), user("c"), reply("d")],
            "rejected": [user("a"), reply("e"), user("c"), reply("f")],
        },
        schema.preference,
        "early_divergence",
    ),
]


@pytest.mark.parametrize(("record", "converter", "fault"), UNUSABLE)
def test_unusable_rows(record, converter, fault):
    with pytest.raises(schema.UnusableRow) as raised:
        converter(record)
    assert raised.value.fault == fault


def test_sift_drops_only_what_is_named():
    faults = {"identical_pair": [1, 4], "empty_completion": [4, 7]}
    kept, report = schema.sift(100, faults, (), str)
    assert len(kept) == 100
    assert report.counts == {"identical_pair": 2, "empty_completion": 2}
    kept, report = schema.sift(100, faults, (), str, drop=["identical_pair"])
    np.testing.assert_array_equal(kept, np.setdiff1d(np.arange(100), [1, 4]))
    assert report.kept == 98
    assert report.first == {
        "identical_pair": ("1", "4"),
        "empty_completion": ("4", "7"),
    }
    assert "identical_pair: 2 dropped" in str(report)
    assert "empty_completion: 2 kept" in str(report)


def test_sift_reports_the_first_few():
    faults = {"identical_pair": list(range(20))}
    _, report = schema.sift(1000, faults, (), str)
    assert report.first["identical_pair"] == ("0", "1", "2", "3", "4")


def test_sift_stops_at_too_many_bad_rows():
    # Rows with two faults count once: 3 rows of 100.
    faults = {"identical_pair": [1, 2], "empty_completion": [2, 3]}
    schema.sift(100, faults, (), str, max_bad_share=0.03)
    with pytest.raises(ValueError, match=r"3 of 100 rows are bad.*0\.02"):
        schema.sift(100, faults, (), str, max_bad_share=0.02, drop=["identical_pair"])


def test_sift_refuses_unusable_rows_unless_named():
    faults = {"missing_keys": [5]}
    with pytest.raises(ValueError, match="1 rows cannot be used, the first being 5"):
        schema.sift(100, faults, [5], str)
    kept, _ = schema.sift(100, faults, [5], str, drop=["missing_keys"])
    assert 5 not in kept


def test_sift_refuses_unknown_faults():
    with pytest.raises(ValueError, match="'ties'"):
        schema.sift(1, {}, (), str, drop=["ties"])
    with pytest.raises(ValueError, match=r"max_bad_share 2"):
        schema.sift(1, {}, (), str, max_bad_share=2)


def test_views():
    pair = PreferenceRow("The sky is", " blue.", " green.", row_id="f:1")
    assert schema.as_prompt(pair) == PromptRow("The sky is", row_id="f:1")
    assert schema.as_demonstration(pair) == DemonstrationRow(
        "The sky is", " blue.", row_id="f:1"
    )
    chat = schema.as_conversation(pair)
    assert chat.prompt == (Message("user", "The sky is"),)
    assert chat.rejected == (Message("assistant", "green."),)
    quiet = schema.with_system(chat, "")
    assert quiet.prompt[0] == Message("system", "")
    assert schema.with_system(quiet, "other") is quiet
    with pytest.raises(ValueError, match="plain text"):
        schema.with_system(pair, "")
    with pytest.raises(ValueError, match="names no completion"):
        schema.as_demonstration(PromptRow("a"))
