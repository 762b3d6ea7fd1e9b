"""`gvjax bench`: rows that run, rates by hand, refusals before anything is compiled, ratios. Nothing here is a timed test."""

import dataclasses
import json
import time

import jax
import numpy as np
import pytest

from gvjax import sharding
from gvjax.__main__ import main
from gvjax.bench import command, report, request, timing, works
from gvjax.bench.footing import Footing
from gvjax.bench.request import Request, Sizes, make_request
from gvjax.bench.timing import Ceilings, Row, Work
from gvjax.models import cost
from gvjax.models.config import ModelConfig

MICRO = ModelConfig(vocab_size=300, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16)
SIZES = Sizes(batch=8, prompt=8, completion=8, group=2)


def micro(*rows, **changes) -> Request:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    made = Request("tiny", MICRO, SIZES, mesh, rows, 2)
    return dataclasses.replace(made, **changes)


def asked(**changes):
    options = {
        "shape": "tiny",
        "batch": None,
        "lengths": None,
        "group": None,
        "dtype": None,
        "remat": "none",
        "scan": False,
        "mesh": "data=1,fsdp=8",
        "only": (),
        "repeats": 2,
    }
    return make_request(**{**options, **changes})


# Rows.


def test_rows_of_every_kind_run_and_say_what_they_cost(tmp_path):
    rows = ("sft", "dpo_packed", "rloo", "decode", "restore", "data")
    found = command.run(micro(*rows), small=True)
    by_name = {row.name: row for row in found.rows}
    assert tuple(by_name) == rows
    assert all(row.cpu_seconds >= 0 and row.repeats == 2 for row in found.rows)
    sft = by_name["sft"]
    assert sft.tokens_per_second == pytest.approx(8 * 16 / sft.seconds)
    flops = 8 * 3 * cost.forward_flops(MICRO, 16, scored=8)
    expected = flops / sft.seconds / found.ceilings.flops
    assert sft.mfu == pytest.approx(expected)
    params = cost.num_params(MICRO)
    assert sft.compiled_memory > cost.state_bytes(params)
    assert set(by_name["rloo"].shares) == {
        *("data", "generate", "score", "reference", "train")
    }
    for row in ("sft", "rloo", "data"):
        assert sum(by_name[row].shares.values()) == pytest.approx(1, abs=0.02)
    assert 0 < by_name["dpo_packed"].padding < 0.5
    assert by_name["decode"].mfu is None
    assert by_name["restore"].tokens_per_second is None
    # What was written is what is read.
    path = tmp_path / "bench.json"
    report.save(found, path)
    assert report.load(path) == found
    assert "rloo" in json.loads(path.read_text())["rows"][2]["name"]


@pytest.mark.parametrize("row", [r for r in request.ROWS if r not in ("save", "data")])
def test_every_row_has_a_maker_and_its_inputs(row):
    assert row in works._MAKERS


def test_tokens_are_never_zero_and_prompts_are_shared():
    footing = Footing(micro("dpo"))
    batch = footing.pairs("x", 0, 64)
    for side in (batch.chosen, batch.rejected):
        assert side.tokens.min() >= 1 and side.tokens.max() < MICRO.vocab_size
        assert side.completion_mask.sum() == 64 * 8
    np.testing.assert_array_equal(
        batch.chosen.tokens[:, :8], batch.rejected.tokens[:, :8]
    )
    assert (batch.chosen.tokens[:, 8:] != batch.rejected.tokens[:, 8:]).any()
    assert (batch.ref_chosen_logps < 0).all()


# Measuring.


def test_the_median_of_the_repeats_counts_and_warm_ups_do_not():
    # The first two calls are slow; of the others one is.
    taken = iter([0.2, 0.1, 0.01, 0.06, 0.02])

    def once(number, clock):
        with clock.part("data"):
            time.sleep(next(taken))

    work = Work(once, tokens=10, samples=5, flops=1e6, rest="train")
    row = timing.measure("x", work, repeats=3, ceilings=Ceilings(1e9, 1e9))
    assert 0.02 <= row.seconds < 0.05
    assert row.spread > 1
    assert row.first_seconds > 0.1
    assert row.tokens_per_second == pytest.approx(10 / row.seconds)
    assert row.mfu == pytest.approx(1e6 / row.seconds / 1e9)
    assert row.shares["data"] > 0.9
    assert row.of_bandwidth is None


def test_what_moves_bytes_is_compared_with_the_copy():
    work = Work(lambda number, clock: time.sleep(0.01), moved=1e6)
    row = timing.measure("x", work, repeats=1, ceilings=Ceilings(1e9, 1e9))
    assert row.of_bandwidth == pytest.approx(1e6 / row.seconds / 1e9)
    assert row.mfu is None and row.tokens_per_second is None and row.padding is None


def test_a_difference_that_comes_out_negative_has_no_rate():
    work = Work(lambda *_: None, tokens=1, reading=lambda whole, parts: -1.0)
    row = timing.measure("x", work, repeats=1, ceilings=Ceilings(1.0, 1.0))
    assert row.tokens_per_second is None


# Requests.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 12}, r"--batch 12 makes no whole number .*use 8 or 16"),
        ({"batch": 24, "only": ("dpo",)}, r"pairs \(2 sequences each\).*use 16 or 32"),
        ({"batch": 16, "only": ("ppo",)}, r"prompts \(4 sequences each\).*use 32"),
        ({"group": 1}, "--group 1 must be at least 2"),
        ({"repeats": 0}, "--repeats 0 must be at least 1"),
        ({"lengths": "512"}, "--lengths 512: give prompt and completion tokens"),
        ({"lengths": "1+8"}, "both must be at least 2"),
        ({"only": ("stf",)}, "--only stf: there is no such row; use sft, "),
        ({"mesh": "model=2"}, "there is no axis 'model'"),
        ({"mesh": "fsdp=two"}, "fsdp=two is no whole number"),
        ({"mesh": "fsdp=3"}, "8 devices do not divide by 3"),
        ({"shape": "pythia"}, "there is no shape 'pythia'"),
        ({"mesh": "tensor=8", "only": ("sft",)}, "num_heads 4 is not divisible"),
    ],
)
def test_what_cannot_be_run_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        asked(**changes)


def test_what_cannot_fit_is_refused_with_what_can(monkeypatch):
    monkeypatch.setattr(request, "memory_limit", lambda: 40 * 2**30)
    # 8 billion parameters: 30 GiB to decode with, 150 to train.
    on_one = {"shape": "llama-8b", "mesh": "data=8", "batch": 64}
    with pytest.raises(
        ValueError, match=r"row sft needs at least 149.* --only reference"
    ):
        asked(**on_one)
    asked(**on_one, only=("reference", "prefill", "decode"))
    asked(shape="llama-8b", mesh="fsdp=8", batch=64, only=("sft",))
    monkeypatch.setattr(request, "memory_limit", lambda: None)
    asked(**on_one)


def test_defaults_suit_where_it_runs():
    made = asked()
    assert made.model.dtype == "float32"
    assert made.sizes == request.DEFAULT_SIZES["tiny"]["cpu"]
    assert made.rows == tuple(request.ROWS)
    bare = asked(dtype="bfloat16", remat="full", scan=True, only=("decode", "sft"))
    assert (bare.model.dtype, bare.model.remat) == ("bfloat16", "full")
    assert bare.model.scan_layers and bare.rows == ("sft", "decode")


def test_needed_memory_by_hand():
    params = cost.num_params(MICRO)
    need = request.needed_bytes
    assert need(micro(), "decode") == 4 * params
    # Policy, parameters, two moments, gradient.
    assert need(micro(), "sft") == (4 + 12 + 4) * params
    assert need(micro(), "rloo") == need(micro(), "sft") + 4 * params


# Ratios.


def made_up(**changes):
    row = Row("sft", 0.5, 0.1, 0.4, 3, shares={"train": 1.0})
    made = report.make_report(micro("sft"), Ceilings(1e12, 1e9), (row,))
    return dataclasses.replace(made, **changes)


def cells(table, row=0):
    return [list(column.cells)[row] for column in table.columns]


def test_a_row_that_takes_half_the_time_is_twice_as_fast():
    before = made_up()
    after = made_up(rows=(dataclasses.replace(before.rows[0], seconds=0.25),))
    assert cells(report.table(after, before))[-1] == "2.00"
    unknown = made_up(rows=(dataclasses.replace(before.rows[0], name="new"),))
    assert cells(report.table(unknown, before))[-1] == ""


def test_ratios_of_other_work_are_refused(tmp_path):
    path = tmp_path / "before.json"
    new = micro("sft")
    report.check_comparable(new, made_up(device="another", dtype="bfloat16"), path)
    with pytest.raises(ValueError, match="use --shape llama-30m"):
        report.check_comparable(new, made_up(shape="llama-30m"), path)
    other = dataclasses.asdict(dataclasses.replace(SIZES, batch=16))
    with pytest.raises(ValueError, match=r"use --batch 16 --lengths 8\+8 --group 2"):
        report.check_comparable(new, made_up(sizes=other), path)


@pytest.mark.parametrize("content", ["", "[]", '{"shape": "tiny"}'])
def test_files_that_are_no_benchmark_are_refused(content, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is no benchmark of this version"):
        report.load(path)
    with pytest.raises(ValueError, match="cannot be read"):
        report.load(tmp_path / "absent.json")


# The command.


def test_the_command_refuses_with_the_way_out(capsys):
    assert main(["bench", "--batch", "3"]) == 64
    assert "gvjax bench: --batch 3 makes no whole number" in capsys.readouterr().err
    assert main(["bench", "--against", "absent.json", "--only", "encode"]) == 64
    assert "absent.json cannot be read" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for word in (*request.ROWS, "MFU", "--against before.json", "spread"):
        assert word in shown


def test_the_command_prints_writes_and_compares(tmp_path, capsys):
    path = tmp_path / "before.json"
    line = ["bench", "--only", "encode", "--repeats", "1", "--batch", "8"]
    line += ["--mesh", "data=8"]
    assert main([*line, "--json", str(path)]) == 0
    assert main([*line, "--against", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "measured ceilings" in shown and "x faster" in shown
