"""What people are shown gives nothing away, and what they fill in comes back to the right pair or not at all."""

import csv
import json

import numpy as np
import pytest

from gvjax.judges.human import (
    COLUMNS,
    OtherPairsError,
    export_pairs,
    import_labels,
)

PAIRS = [(f"prompt {i}", f"good {i}", f"bad {i}") for i in range(41)]


def read(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def write(path, rows, columns=COLUMNS, **settings):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", **settings)
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def sheet(tmp_path):
    export_pairs(tmp_path / "sheet.csv", tmp_path / "key.json", PAIRS, seed=1)
    return tmp_path / "sheet.csv", tmp_path / "key.json"


def labels_of(sheet, key, **options):
    return import_labels(sheet, key, PAIRS, seed=1, **options)


def filled(sheet, label):
    """The rows, labelled by `label(row)`."""
    rows = read(sheet)
    for row in rows:
        row["preferred"] = label(row)
    return rows


def prefers_good(row):
    return "first" if row["first"].startswith("good") else "second"


def test_round_trip(sheet):
    path, key = sheet
    write(path, filled(path, prefers_good))
    labels = labels_of(path, key)
    np.testing.assert_array_equal(labels.scores, np.ones(41))
    write(
        path,
        filled(
            path, lambda row: {"first": "second", "second": "first"}[prefers_good(row)]
        ),
    )
    np.testing.assert_array_equal(labels_of(path, key).scores, np.zeros(41))


def test_each_label_finds_its_pair(sheet):
    path, key = sheet
    asked = np.random.default_rng(0).choice([0.0, 0.5, 1.0], 41)

    def label(row):
        want = asked[int(row["prompt"].split()[1])]
        if want == 0.5:
            return " TIE "
        return (
            prefers_good(row)
            if want
            else {"first": "Second", "second": "First"}[prefers_good(row)]
        )

    rows = filled(path, label)
    write(path, rows[::-1])
    np.testing.assert_array_equal(labels_of(path, key).scores, asked)


def test_the_sheet_gives_nothing_away(sheet):
    path, key = sheet
    rows = read(path)
    order = [int(row["prompt"].split()[1]) for row in rows]
    assert sorted(order) == list(range(41)) and order != sorted(order)
    shown_first = sum(row["first"].startswith("good") for row in rows)
    assert shown_first in (20, 21)
    labels = labels_of(path, key, allow_missing=True)
    assert labels.a_was_first.sum() == shown_first
    assert len({row["id"] for row in rows}) == 41
    assert {len(row["id"]) for row in rows} == {16}
    assert all(row["preferred"] == "" for row in rows)
    assert set(rows[0]) == set(COLUMNS)


def test_the_place_is_random_between_seeds(tmp_path):
    first = []
    for seed in range(12):
        names = tmp_path / f"{seed}.csv", tmp_path / f"{seed}.json"
        export_pairs(*names, PAIRS[:1], seed=seed)
        first.append(
            import_labels(*names, PAIRS[:1], seed=seed, allow_missing=True).a_was_first[
                0
            ]
        )
    assert 2 <= sum(first) <= 10


def test_a_seed_draws_the_same_again(sheet, tmp_path):
    path, key = sheet
    export_pairs(tmp_path / "again.csv", tmp_path / "again.json", PAIRS, seed=1)
    assert (tmp_path / "again.csv").read_bytes() == path.read_bytes()
    export_pairs(tmp_path / "other.csv", tmp_path / "other.json", PAIRS, seed=2)
    with pytest.raises(ValueError, match="id is not in the key file"):
        labels_of(tmp_path / "other.csv", key)


def test_any_text_survives(tmp_path):
    texts = [
        'a "quoted", text',
        "two\nlines\r\nthree",
        "naïve 日本語",
        "",
        "x" * 200_000,
    ]
    pairs = [(text, f"a{text}", f"b{text}") for text in texts]
    names = tmp_path / "sheet.csv", tmp_path / "key.json"
    export_pairs(*names, pairs, seed=0)
    labels = import_labels(*names, pairs, seed=0, allow_missing=True)
    assert np.isnan(labels.scores).all()
    before = csv.field_size_limit(10**6)
    try:
        rows = {row["prompt"]: {row["first"], row["second"]} for row in read(names[0])}
    finally:
        csv.field_size_limit(before)
    assert rows == {text: {f"a{text}", f"b{text}"} for text in texts}


def test_no_text_is_run_by_a_spreadsheet(tmp_path):
    names = tmp_path / "sheet.csv", tmp_path / "key.json"
    export_pairs(*names, [("=1+1", "@x", "- a list")], seed=0)
    (row,) = read(names[0])
    assert row["prompt"] == "'=1+1"
    assert {row["first"], row["second"]} == {"'@x", "'- a list"}


def test_work_is_not_overwritten(sheet, tmp_path):
    for names in ((sheet[0], tmp_path / "new"), (tmp_path / "new", sheet[1])):
        with pytest.raises(ValueError, match="may hold labels"):
            export_pairs(*names, PAIRS, seed=1)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="no pairs"):
        export_pairs(tmp_path / "a", tmp_path / "b", [], seed=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(), "row is missing"),
        (lambda rows: rows[3].update(preferred=" "), "row has no label"),
        (lambda rows: rows.append(dict(rows[0])), "id occurs twice.*line 43"),
        (
            lambda rows: rows[0].update(id="nobody"),
            "id is not in the key file.*'nobody'",
        ),
        (
            lambda rows: rows[0].update(preferred="A"),
            "label is none of first, second, tie.*'A'",
        ),
        (lambda rows: [row.update(preferred="1") for row in rows], "and 36 more"),
        (
            lambda rows: [row.update(preferred="") for row in rows],
            r"no label.*and 36 more",
        ),
    ],
)
def test_strict(sheet, change, message):
    path, key = sheet
    rows = filled(path, prefers_good)
    change(rows)
    write(path, rows)
    with pytest.raises(ValueError, match=message):
        labels_of(path, key)


def test_parts_of_a_sheet(sheet):
    path, key = sheet
    rows = filled(path, prefers_good)
    gone = {int(row["prompt"].split()[1]) for row in (rows[0], rows[5])}
    rows[5]["preferred"] = ""
    write(path, rows[1:])
    labels = labels_of(path, key, allow_missing=True)
    assert set(np.flatnonzero(np.isnan(labels.scores))) == gone
    assert np.nansum(labels.scores) == 39
    rows[7]["preferred"] = "?"
    write(path, rows)
    with pytest.raises(ValueError, match="label is none of"):
        labels_of(path, key, allow_missing=True)


@pytest.mark.parametrize(
    ("pairs", "seed"),
    [
        ([*PAIRS[:-1], ("task 40", "good 40", "another")], 1),
        ([PAIRS[1], PAIRS[0], *PAIRS[2:]], 1),
        (PAIRS[:-1], 1),
        (PAIRS, 2),
    ],
)
def test_labels_of_other_pairs_are_refused_however_many(sheet, pairs, seed):
    path, key = sheet
    write(path, filled(path, prefers_good))
    with pytest.raises(OtherPairsError, match=r"other pairs.*41 labels say nothing"):
        import_labels(path, key, pairs, seed=seed)


def test_ties_can_be_ruled_out(sheet):
    path, key = sheet
    write(path, filled(path, lambda row: "tie"))
    np.testing.assert_array_equal(labels_of(path, key).scores, np.full(41, 0.5))
    with pytest.raises(ValueError, match="none of first, second"):
        labels_of(path, key, allow_ties=False)


def test_other_files_are_refused(sheet, tmp_path):
    path, key = sheet
    rows = filled(path, prefers_good)
    write(path, rows, delimiter=";")
    with pytest.raises(ValueError, match="comma-separated"):
        labels_of(path, key)
    write(path, rows, columns=("id", "prompt"))
    with pytest.raises(ValueError, match="'preferred'"):
        labels_of(path, key)
    path.write_bytes("id,preferred\né,first\n".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        labels_of(path, key)
    path.write_text('id,preferred\n"a"b,first\n')
    with pytest.raises(ValueError, match="no CSV"):
        labels_of(path, key)
    whole = json.loads(key.read_text())
    name = next(iter(whole["rows"]))
    twice = {**whole["rows"], name: {"pair": 1, "swapped": False}}
    for value, message in (
        ([], "no key file"),
        ({"version": 1}, "no key file"),
        ({**whole, "version": 2}, "version 2"),
        ({**whole, "rows": twice}, "each pair once"),
    ):
        key.write_text(json.dumps(value))
        with pytest.raises(ValueError, match=message):
            labels_of(path, key)
