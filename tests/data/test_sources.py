"""Sources: real samples round trip, traps that the upstream data holds, and prepared datasets without TensorFlow."""

import functools
import gzip
import json
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from gvjax.data import answers, schema, sources, upstream
from gvjax.data.schema import (
    DemonstrationRow,
    Message,
    PreferenceRow,
    PromptRow,
    UnpairedRow,
)

SAMPLES = pathlib.Path(__file__).parent / "samples"


def records(name, split):
    with gzip.open(SAMPLES / f"{name}.{split}.jsonl.gz", "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def load(name, split, data_dir, **options):
    path = SAMPLES / f"{name}.{split}.jsonl.gz"
    return sources.load(name, split, path=path, data_dir=data_dir, **options)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


COUNTS = [
    ("hh_rlhf", 58, 21, PreferenceRow),
    ("ultrafeedback_binarized", 60, 19, PreferenceRow),
    ("gsm8k", 100, 40, DemonstrationRow),
    ("svamp", 120, 40, DemonstrationRow),
    ("scitldr", 60, 20, DemonstrationRow),
    ("tldr_pages", 200, 60, DemonstrationRow),
]


@pytest.mark.parametrize(("name", "train", "test", "kind"), COUNTS)
def test_samples_round_trip(name, train, test, kind, data_dir):
    """What is read back from array_record is what the converter made of each upstream record, in order."""
    for split, count in (("train", train), ("test", test)):
        rows = load(name, split, data_dir, max_bad_share=0.1)
        given = records(name, split)
        assert len(rows) == len(given) == count
        assert rows.kind is kind
        convert = upstream.SOURCES[name].convert
        for i, record in enumerate(given):
            row_id = f"{name}.{split}.jsonl.gz:{i + 1}"
            assert rows[i] == schema.normalise(record, convert, row_id)


def test_counts_of_faults_in_the_samples(data_dir):
    found = {
        (name, split): dict(
            load(name, split, data_dir, max_bad_share=0.1).report.counts
        )
        for name, *_ in COUNTS
        for split in ("train", "test")
    }
    assert {key: counts for key, counts in found.items() if counts} == {
        ("hh_rlhf", "train"): {"early_divergence": 1},
        ("hh_rlhf", "test"): {"empty_completion": 1},
        ("ultrafeedback_binarized", "train"): {
            "identical_pair": 1,
            "empty_completion": 1,
        },
        ("ultrafeedback_binarized", "test"): {"identical_pair": 1},
    }


def test_drop_leaves_out_the_named_rows(data_dir):
    name = "ultrafeedback_binarized"
    whole = load(name, "train", data_dir)
    rows = load(name, "train", data_dir, drop=["identical_pair"])
    assert len(rows) == 59
    assert all(row.chosen != row.rejected for row in rows)
    assert rows.report.first == whole.report.first
    assert rows.fingerprint != whole.fingerprint


def test_hh_dialogues_are_cut_after_the_common_turns(data_dir):
    rows = load("hh_rlhf", "train", data_dir)
    early = [row for row in rows if "early_divergence" in row.faults]
    assert [row.row_id for row in early] == ["hh_rlhf.train.jsonl.gz:58"]
    for row, record in zip(rows, records("hh_rlhf", "train")):
        assert row.prompt[-1].role == "user"
        for text, dialogue in (
            (row.chosen, record["chosen"]),
            (row.rejected, record["rejected"]),
        ):
            assert [turn.role for turn in text] == ["assistant"]
            # Nothing is lost and nothing is said twice.
            words = " ".join(turn.content for turn in (*row.prompt, *text)).split()
            marks = ("Human:", "Assistant:")
            assert [w for w in words if w not in marks] == [
                w for w in dialogue.split() if w not in marks
            ]


def turns(*words):
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[i % 2]}: {w}" for i, w in enumerate(words))


def test_hh_early_divergence_keeps_the_rest_in_the_completion():
    row = upstream.hh_rlhf(
        {"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "x", "y", "z")}
    )
    assert row.prompt == (Message("user", "a"),)
    assert row.chosen == (Message("assistant", "b\n\nHuman: c\n\nAssistant: d"),)
    assert row.rejected == (Message("assistant", "x\n\nHuman: y\n\nAssistant: z"),)
    assert row.faults == ("early_divergence",)


def test_hh_dialogues_of_other_lengths():
    row = upstream.hh_rlhf(
        {"chosen": turns("a", "b"), "rejected": turns("a", "b", "c", "d")}
    )
    assert row.prompt == (Message("user", "a"),)
    assert row.faults == ("early_divergence",)


def test_hh_without_a_shared_prompt_is_unusable():
    with pytest.raises(schema.UnusableRow, match="early_divergence"):
        upstream.hh_rlhf({"chosen": turns("a", "b"), "rejected": turns("c", "b")})
    with pytest.raises(schema.UnusableRow, match="missing_keys"):
        upstream.hh_rlhf({"chosen": "no marks", "rejected": turns("c", "b")})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 86,400", "86400"),
        ("$1,250.50 in all", "1250.5"),
        (266.0, "266"),
        ("-0.50%", "-0.5"),
        ("18 dollars", "18"),
        ("\u22127", "-7"),
        ("100", "100"),
        (".5", "0.5"),
        ("none", None),
    ],
)
def test_canonical_number(text, number):
    assert answers.canonical_number(text) == number


def test_answers_are_canonical(data_dir):
    rows = load("gsm8k", "train", data_dir)
    upstream = records("gsm8k", "train")
    separated = [
        i for i, r in enumerate(upstream) if "," in r["answer"].split("####")[1]
    ]
    assert len(separated) == 4
    for i in separated:
        assert rows[i].answer == upstream[i]["answer"].split("####")[1].strip().replace(
            ",", ""
        )
    assert "<<" in rows[0].completion  # calculator marks stay as upstream wrote them
    assert load("svamp", "train", data_dir)[0].completion == " 1"


def test_scitldr_keeps_all_targets(data_dir):
    rows = load("scitldr", "test", data_dir)
    for row, record in zip(rows, records("scitldr", "test")):
        assert (row.completion[1:], *row.references) == tuple(
            target.strip() for target in record["target"]
        )
    assert {len(row.references) for row in rows} <= {1, 2, 3}


POST = {"subreddit": "tifu", "title": "A title", "post": "line 1\nline 2"}


def comparison(choice, split, **info):
    return {
        "info": {"id": "t3_x", **POST, **info},
        "summaries": [
            {"text": " first", "policy": "sup2", "note": None},
            {"text": " second", "policy": "ref", "note": None},
        ],
        "choice": choice,
        "worker": "w",
        "batch": "3",
        "split": split,
        "extra": {"confidence": 4},
    }


def test_tldr_preference_reads_the_split_from_the_rows(tmp_path):
    folder = tmp_path / "comparisons"
    folder.mkdir()
    write(folder / "batch3.json", [comparison(0, "train"), comparison(1, "valid1")])
    write(folder / "batch4.json", [comparison(1, "train")])
    rows = sources.load("tldr_preference", "train", path=folder, data_dir=tmp_path)
    prompt = "SUBREDDIT: r/tifu\n\nTITLE: A title\n\nPOST: line 1\nline 2\n\nTL;DR:"
    assert list(rows) == [
        PreferenceRow(prompt, " first", " second", row_id="batch3.json:1"),
        PreferenceRow(prompt, " second", " first", row_id="batch4.json:1"),
    ]
    valid = sources.load("tldr_preference", "valid1", path=folder, data_dir=tmp_path)
    assert [row.row_id for row in valid] == ["batch3.json:2"]
    with pytest.raises(ValueError, match="no rows for split 'valid2'"):
        sources.load("tldr_preference", "valid2", path=folder, data_dir=tmp_path)


def test_tldr_sft(tmp_path):
    write(tmp_path / "train.jsonl", [{"id": "t3_x", **POST, "summary": " short. "}])
    write(tmp_path / "valid.jsonl", [{"id": "t3_y", **POST, "summary": "other"}] * 2)
    rows = sources.load("tldr_sft", "train", path=tmp_path, data_dir=tmp_path)
    assert len(rows) == 1
    assert rows[0].completion == " short."
    assert rows[0].prompt.endswith("line 2\n\nTL;DR:")


def test_tldr_pages_from_markdown(tmp_path):
    folder = tmp_path / "pages" / "linux"
    folder.mkdir(parents=True)
    (folder / "ls.md").write_text(
        "# ls\n\n> List files.\n> More: <https://x>.\n\n- List all:\n\n`ls -a`\n\n- List one:\n\n`ls {{path}}`\n"
    )
    rows = sources.load("tldr_pages", path=tmp_path / "pages", data_dir=tmp_path)
    assert [(row.prompt, row.completion) for row in rows] == [
        ("# List all\n$", " ls -a"),
        ("# List one\n$", " ls {{path}}"),
    ]


def test_svamp_is_one_json_list(tmp_path):
    path = tmp_path / "SVAMP.json"
    path.write_text(json.dumps(records("svamp", "test"), indent=1))
    rows = sources.load("svamp", "train[:10]", path=path, data_dir=tmp_path)
    assert len(rows) == 10


def test_jsonl_with_all_kinds_of_bad_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = b'{"prompt": "a", "chosen": " x", "rejected": " y"}\n'
    path.write_bytes(
        b"\xef\xbb\xbf"
        + good
        + b'{"prompt": "a\xff", "chosen": " x", "rejected": " y"}\n'
        + b"\n"
        + b"not json\n"
        + b'{"prompt": "a", "chosen": " x"}\n'
        + b'{"prompt": "a", "chosen": " x", "rejected": " x"}\n'
        + b'{"prompt": "a", "chosen": "", "rejected": " x"}\n'
        + good * 94
    )
    with pytest.raises(ValueError, match=r"2 rows cannot be used.*rows.jsonl:3"):
        sources.load("jsonl", path=path, data_dir=tmp_path)
    rows = sources.load("jsonl", path=path, data_dir=tmp_path, drop=["missing_keys"])
    assert rows.report.counts == {
        "invalid_utf8": 1,
        "missing_keys": 2,
        "identical_pair": 1,
        "empty_completion": 1,
    }
    assert rows.report.first["missing_keys"] == ("rows.jsonl:3", "rows.jsonl:4")
    assert len(rows) == 98
    assert rows[0].prompt == "a"
    assert rows[1].prompt == "a\ufffd"
    with pytest.raises(ValueError, match=r"5 of 100 rows are bad"):
        sources.load(
            "jsonl",
            path=path,
            data_dir=tmp_path,
            drop=["missing_keys"],
            max_bad_share=0.04,
        )


JSONL = [
    ({"prompt": "a", "answer": "4"}, PromptRow("a", "4")),
    ({"prompt": "a", "completion": " b"}, DemonstrationRow("a", " b")),
    (
        {"prompt": "a", "chosen": " b", "rejected": " c", "margin": 0.5},
        PreferenceRow("a", " b", " c", 0.5),
    ),
    (
        {"prompt": "a", "completion": " b", "label": False},
        UnpairedRow("a", " b", False),
    ),
    (
        {
            "prompt": [
                {"role": "system", "content": ""},
                {"role": "user", "content": "é\n"},
            ],
            "completion": [{"role": "assistant", "content": "b"}],
        },
        DemonstrationRow(
            (Message("system", ""), Message("user", "é\n")),
            (Message("assistant", "b"),),
        ),
    ),
]


@pytest.mark.parametrize(("record", "row"), JSONL)
def test_jsonl_and_parquet_of_every_kind(record, row, tmp_path):
    line = write(tmp_path / "x.jsonl", [record, record])
    rows = sources.load("jsonl", path=line, data_dir=tmp_path)
    assert [schema.dataclasses.replace(each, row_id="") for each in rows] == [row, row]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([record, record]), tmp_path / "x.parquet"
    )
    rows = sources.load("jsonl", path=tmp_path / "x.parquet", data_dir=tmp_path)
    assert [schema.dataclasses.replace(each, row_id="") for each in rows] == [row, row]
    assert rows[1].row_id == "x.parquet:2"


def test_parquet_with_invalid_utf8(tmp_path):
    column = pyarrow.array([b"ok", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"prompt": column})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    rows = sources.load(
        "jsonl",
        path=tmp_path / "x.parquet",
        data_dir=tmp_path,
        drop=["invalid_utf8"],
        max_bad_share=0.5,
    )
    assert [row.prompt for row in rows] == ["ok"]
    assert rows.report.first == {"invalid_utf8": ("x.parquet:2",)}


def test_prepared_once_and_a_changed_file_is_another_dataset(tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    first = sources.load("jsonl", path=path, data_dir=tmp_path)
    with monkeypatch.context() as patched:
        # A second preparation would fail.
        patched.setattr(
            sources.GvjaxRows,
            "download_and_prepare",
            lambda self: pytest.fail("prepared twice"),
        )
        again = sources.load("jsonl", path=path, data_dir=tmp_path)
    assert again.fingerprint == first.fingerprint
    write(path, [{"prompt": "a"}, {"prompt": "c"}])
    changed = sources.load("jsonl", path=path, data_dir=tmp_path)
    assert changed.fingerprint != first.fingerprint
    assert [row.prompt for row in changed] == ["a", "c"]
    assert [row.prompt for row in first] == ["a", "b"]


def test_a_half_made_dataset_is_made_again(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    sources.load("jsonl", path=path, data_dir=tmp_path)
    (index,) = tmp_path.rglob("faults.json")
    index.unlink()
    assert len(sources.load("jsonl", path=path, data_dir=tmp_path)) == 2


def test_slices_and_their_faults(tmp_path):
    rows = [{"prompt": "a", "chosen": " x", "rejected": f" y{i}"} for i in range(20)]
    rows[15]["rejected"] = " x"
    path = write(tmp_path / "x.jsonl", rows)
    options = {"path": path, "data_dir": tmp_path, "drop": ["identical_pair"]}
    first = sources.load("jsonl", "train[:50%]", **options)
    assert [row.rejected for row in first] == [f" y{i}" for i in range(10)]
    assert not first.report.counts
    last = sources.load("jsonl", "train[12:]", max_bad_share=0.2, **options)
    assert [row.rejected for row in last] == [
        f" y{i}" for i in (12, 13, 14, 16, 17, 18, 19)
    ]
    assert last.report.first == {"identical_pair": ("x.jsonl:16",)}
    assert last[-1].rejected == " y19"
    assert len(last[2:4]) == 2


def test_a_missing_file_or_split_is_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        sources.load("gsm8k", path=tmp_path / "no", data_dir=tmp_path)
    write(tmp_path / "a.train.jsonl", [])
    write(tmp_path / "b.train.jsonl", [])
    with pytest.raises(ValueError, match="2 files for split 'train'"):
        sources.load("gsm8k", path=tmp_path, data_dir=tmp_path)
    with pytest.raises(ValueError, match="'gsm9k' is not known"):
        sources.load("gsm9k", path=tmp_path, data_dir=tmp_path)
    with pytest.raises(ValueError, match="reads local files"):
        sources.load("gsm8k", data_dir=tmp_path)


class Foreign(tfds.core.GeneratorBasedBuilder):
    """A dataset that someone else prepared, in GSM8K's schema or with conversations."""

    VERSION = tfds.core.Version("1.0.0")
    name = "foreign"

    def _info(self):
        text = tfds.features.Text()
        turns = tfds.features.Sequence({"role": text, "content": text})
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {"question": text, "answer": text, "prompt": turns}
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(6):
            yield (
                i,
                {
                    "question": f"What is {i}?",
                    "answer": f"It is {i}.\n#### {i}" if i else "unknown",
                    "prompt": [{"role": "user", "content": f"{i}?"}],
                },
            )


def test_prepared_datasets_by_name_and_by_directory(tmp_path):
    builder = Foreign(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    options = {"data_dir": tmp_path, "drop": ["missing_keys"], "max_bad_share": 0.2}
    rows = sources.load("tfds:foreign:gsm8k", "train", **options)
    assert sorted(row.answer for row in rows) == ["1", "2", "3", "4", "5"]
    assert rows.report.counts == {"missing_keys": 1}
    assert all(row.row_id.startswith("foreign/train:") for row in rows)
    # Its own fields say that it holds prompts, with answers beside them.
    chats = sources.load(
        "tfds:foreign", "train", path=builder.data_path, data_dir=tmp_path
    )
    assert {row.prompt for row in chats} == {
        (Message("user", f"{i}?"),) for i in range(6)
    }
    with pytest.raises(ValueError, match="no prepared dataset 'absent'"):
        sources.load("tfds:absent", "train", data_dir=tmp_path)


def test_other_file_formats_are_refused(tmp_path):
    builder = Foreign(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    (info,) = tmp_path.rglob("dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="stored as tfrecord"):
        sources.load("tfds:foreign", "train", data_dir=tmp_path)


def test_views_change_the_fingerprint(tmp_path):
    path = write(
        tmp_path / "x.jsonl", [{"prompt": "a", "chosen": " x", "rejected": " y"}]
    )
    rows = sources.load("jsonl", path=path, data_dir=tmp_path)
    prompts = rows.map(schema.as_prompt)
    assert prompts.kind is PromptRow
    assert prompts[0].prompt == "a"
    assert prompts.fingerprint != rows.fingerprint
    chats = rows.map(schema.as_conversation)
    views = [
        chats.map(functools.partial(schema.with_system, system=words))
        for words in ("", "Be brief.")
    ]
    assert views[1][0].prompt[0] == Message("system", "Be brief.")
    assert views[0].fingerprint != views[1].fingerprint
    with pytest.raises(ValueError, match="named function"):
        rows.map(lambda row: row)


def has_long_prompt(row):
    return len(row.prompt) > 1


def test_filter(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"prompt": p} for p in ("a", "bb", "c", "dd")])
    rows = sources.load("jsonl", path=path, data_dir=tmp_path)
    long = rows.filter(has_long_prompt)
    assert [row.row_id for row in long] == ["x.jsonl:2", "x.jsonl:4"]
    assert long.fingerprint != rows.fingerprint
    with pytest.raises(ValueError, match="named function"):
        rows.filter(lambda row: True)


def test_a_first_record_that_lacks_a_field_does_not_decide_the_format(tmp_path):
    whole = {"prompt": "a", "chosen": " x", "rejected": " y"}
    lacking = {"prompt": "a", "chosen": " x"}
    path = write(tmp_path / "x.jsonl", [lacking, *[whole] * 39])
    rows = sources.load("jsonl", path=path, data_dir=tmp_path, drop=["missing_keys"])
    assert rows.kind is PreferenceRow
    assert len(rows) == 39


def test_rows_that_a_program_made():
    made = [PromptRow(f"{i}", faults=("empty_prompt",) * (i == 3)) for i in range(40)]
    rows = sources.from_rows(made, drop=["empty_prompt"])
    assert [row.prompt for row in rows] == [f"{i}" for i in range(40) if i != 3]
    assert rows.fingerprint != sources.from_rows(made).fingerprint
    np.testing.assert_equal(rows.report.counts, {"empty_prompt": 1})


def test_no_tensorflow(tmp_path):
    """Preparing, reading and batching import no TensorFlow; a fresh process, since other tests may have."""
    code = f"""
import sys
from gvjax.data import batches, examples, inspect, sources
from gvjax.data.tokenizer import ByteTokenizer
rows = sources.load("svamp", "test", path={str(SAMPLES / "svamp.test.jsonl.gz")!r}, data_dir={str(tmp_path)!r})
encoded = examples.encode_rows(rows, ByteTokenizer(), examples.LengthPolicy((512,)))
batches.Batches(encoded, batch_size=4, seed=0).batch_at(3)
assert 'tensorflow' not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
