"""`gvjax bench`: rows that run, rates by hand, refusals before anything is compiled, ratios. No test here is timed."""

import contextlib
import dataclasses
import json
import math
import pathlib
import time
import weakref

import jax
import numpy as np
import pytest

from gvjax import config, sharding
from gvjax.__main__ import main
from gvjax.bench import command, report, request, timing, works
from gvjax.bench.footing import Footing
from gvjax.bench.request import Request, Sizes, make_request
from gvjax.bench.timing import Ceilings, Row, Work
from gvjax.data import schema, sources
from gvjax.models import cost
from gvjax.models.config import ModelConfig
from gvjax.plan import compiling, fitting, programs, targets
from gvjax.recipes import sft
from gvjax.recipes.loop import Clock
from gvjax.types import SharedPrompts

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


@pytest.fixture(scope="module")
def found():
    """Every row, run."""
    return command.run(micro(*request.ROWS), small=True)


@pytest.fixture(scope="module")
def by_name(found):
    return {row.name: row for row in found.rows}


def test_rows_say_what_they_cost(found, by_name):
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


def test_what_is_written_is_what_is_read(found, tmp_path):
    path = tmp_path / "bench.json"
    report.save(found, path)
    assert report.load(path) == found
    assert json.loads(path.read_text())["rows"][0]["name"] == "sft"


def test_every_row_has_a_maker(by_name):
    assert tuple(by_name) == tuple(request.ROWS) == tuple(works._MAKERS)


COUNTED = [row for row in request.ROWS if row not in ("save", "restore", "encode")]
"""Rows of which tokens, and operations or bytes, are counted; data takes what comes."""


@pytest.mark.parametrize("name", request.ROWS)
def test_every_row_has_finite_positive_figures(by_name, name):
    row = by_name[name]
    assert row.repeats == 2 and row.first_seconds >= 0
    assert math.isfinite(row.seconds) and math.isfinite(row.cpu_seconds)
    # A step of decoding is a difference of two measurements, and a busy machine can turn it round.
    if name == "decode" and row.seconds <= 0:
        return
    assert row.seconds > 0 and row.cpu_seconds >= 0 and 0 <= row.spread < math.inf
    assert row.peak_memory is None or row.peak_memory > 0
    expected = {
        "tokens_per_second": name in COUNTED and name != "data",
        "samples_per_second": name not in ("save", "restore"),
        "mfu": name in COUNTED and name not in ("data", "decode"),
        "of_bandwidth": name == "decode",
        "compiled_memory": name in TRAINING,
        "planned_memory": name in TRAINING,
    }
    for figure, is_known in expected.items():
        value = getattr(row, figure)
        assert (value is not None) == is_known, figure
        assert value is None or 0 < value < math.inf, figure


TRAINING = [row for row in request.TRAINED if row != "save"]


@pytest.mark.parametrize("row", ["sft_packed", "dpo_packed", "encode", "data"])
def test_the_shortest_lengths_have_text(row):
    sizes = Sizes(batch=2, prompt=2, completion=2, group=2)
    with works.work(row, Footing(micro(row, sizes=sizes))) as work:
        # BOS and a letter, a letter and EOS: every row is full.
        assert work.padding == 0
        if row == "encode":
            work.once(0, Clock())


def test_a_row_is_let_go_of_before_the_next_is_made(monkeypatch):
    earlier = []

    @contextlib.contextmanager
    def work(name, footing):
        assert not any(reference() for reference in earlier)
        made = Work(lambda number, clock: None)
        earlier.append(weakref.ref(made))
        yield made

    monkeypatch.setattr(works, "work", work)
    found = command.run(micro("sft", "dpo", "rloo"), small=True)
    assert len(found.rows) == len(earlier) == 3


def test_rows_that_pack_into_no_full_row_are_packed_as_far_as_they_go(monkeypatch):
    # 12 tokens each, with BOS and EOS: two do not fit into 16, and one fits into 12.
    rows = [schema.DemonstrationRow("abc", "abcdefg")] * 8
    monkeypatch.setattr(works, "_text", lambda *_: sources.from_rows(rows))
    with works.work("sft_packed", Footing(micro("sft_packed"))) as work:
        assert work.tokens == 8 * 12
        assert work.padding == 0


def test_the_input_pipeline_meets_every_bucket_before_it_is_timed(monkeypatch):
    widths = []

    class Training:
        def start(self, params):
            return None

        def step(self, state, batch):
            widths.append(batch.tokens.shape[1])
            return state, {}

    monkeypatch.setattr(sft, "program", lambda *_: (Training(), None))
    sizes = dataclasses.replace(SIZES, batch=2)
    with works.work("data", Footing(micro("data", sizes=sizes))) as work:
        work.once(0, Clock())
        first = set(widths)
        assert len(first) > 1
        for number in range(1, 150):
            work.once(number, Clock())
    assert set(widths) == first


def test_the_prefill_that_decoding_is_told_from_has_the_sampler_s_cache():
    footing = Footing(micro("decode"))
    arguments = footing.prompts("x", 0, 8)[:2]
    _, cache = jax.eval_shape(
        works._prefill_program(footing), footing.policy, *arguments
    )
    assert cache["positions"].shape == (8, SIZES.prompt)


# Operations and bytes.


def work_of(name, mesh=None, **changes) -> Work:
    footing = Footing(micro(name, **({"mesh": mesh} if mesh else {}), **changes))
    with works.work(name, footing) as work:
        return work


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("name", ["sft", "reward", "dpo"])
def test_a_step_costs_what_plan_says(name, share_prompts):
    footing = Footing(micro(name, share_prompts=share_prompts))
    sections = {
        "sft": config.SftSection(batch_size=8),
        "reward": config.RewardSection(batch_size=4),
        "dpo": config.DpoSection(batch_size=4),
    }
    stage = programs.stage_of(
        name, sections[name], footing.ground, pairs=None, evaluated=1
    )
    (step,) = [each for each in stage.programs if each.name == "train step"]
    assert work_of(name, share_prompts=share_prompts).flops == step.work.flops
    one = cost.forward_flops(MICRO, 16, scored=0 if name == "reward" else 8)
    if name == "dpo" and share_prompts:
        one = cost.grouped_flops(MICRO, 8, 8, 2) / 2
    assert step.work.flops == 3 * 8 * one


def test_every_device_reads_its_own_copy_of_the_matrices():
    def moved(**axes):
        mesh = sharding.make_mesh(devices=jax.devices()[:4], **axes)
        return work_of("decode", mesh).moved

    matrices = 4 * (cost.body_params(MICRO) + cost.head_params(MICRO))
    caches = 8 * cost.cache_bytes(MICRO) * 12
    assert moved(fsdp=4) == moved(data=4, fsdp=1) == 4 * matrices + caches
    assert moved(fsdp=2, tensor=2) == 2 * matrices + caches


# Memory, measured and planned.


@pytest.mark.parametrize("name", ["sft", "rloo"])
def test_memory_is_what_plan_says(by_name, name, monkeypatch):
    def on_a_cpu(program, *_):
        # Where the peak that plan reads of a program leaves its temporaries out.
        peak = works.program_memory(program.lower().compile(), "cpu")
        return compiling.Compiled(peak=peak)

    monkeypatch.setattr(compiling, "_compile", on_a_cpu)
    asked = {
        "sft": {"settings": {"recipe": "sft", "batch_size": 8}},
        "rloo": {
            "settings": {
                "recipe": "policy_gradient",
                "algorithm": "rloo",
                "prompts_per_step": 4,
                "samples_per_prompt": 2,
            },
            "start": "runs/sft",
            "reward_model": "runs/reward",
            "evaluation": {"validation_prompts": 1},
        },
    }
    lengths = {"vocab_size": 300, "prompt_length": 8, "completion_length": 8}
    settings = config.RunConfig(
        run_dir="runs/x",
        task={"name": "lengths", "options": lengths},
        model={"embed_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 16},
        **asked[name],
    )
    (planned,) = fitting.plan(
        settings, targets.target("v5e-1"), jax.devices()[:1], search=False
    )
    assert by_name[name].planned_memory == planned.peak
    # The reference policy and the reward model lie beside an online step.
    weights = 4 * cost.num_params(MICRO)
    beside = by_name[name].planned_memory - by_name[name].compiled_memory
    assert beside >= (2 * weights if name == "rloo" else 0)


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/clear_refs").exists(), reason="Linux alone forgets"
)
def test_what_an_earlier_row_held_is_not_counted_for_the_next():
    def touched(mebibytes):
        return [np.ones(2**15, np.uint8) for _ in range(32 * mebibytes)]

    before = timing._PeakMemory().bytes()
    large, above = touched(256), touched(1)
    # With something above it, freed memory is kept by the C library.
    del large
    peak = timing._PeakMemory()
    assert peak.bytes() - before < 64 * 2**20
    large = touched(256)
    assert peak.bytes() - before > 200 * 2**20
    del large, above


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


@pytest.fixture
def sleep(monkeypatch):
    """Lets the clock go on, and nothing else does."""
    now = [0.0]
    for clock in ("perf_counter", "monotonic"):
        monkeypatch.setattr(time, clock, lambda: now[0])

    def sleep(seconds):
        now[0] += seconds

    return sleep


def test_the_median_of_the_repeats_counts_and_warm_ups_do_not(sleep):
    # The first two calls are slow; of the others one is.
    taken = iter([0.2, 0.1, 0.01, 0.06, 0.02])

    def once(number, clock):
        with clock.part("data"):
            sleep(next(taken))

    work = Work(once, tokens=10, samples=5, flops=1e6, rest="train")
    row = timing.measure("x", work, repeats=3, ceilings=Ceilings(1e9, 1e9))
    assert row.seconds == pytest.approx(0.02)
    assert row.spread == pytest.approx(2.5)
    assert row.first_seconds == pytest.approx(0.18)
    assert row.tokens_per_second == pytest.approx(500)
    assert row.mfu == pytest.approx(0.05)
    assert row.shares["data"] == pytest.approx(1)
    assert row.of_bandwidth is None


def test_how_much_longer_the_first_call_took_is_told_of_whole_calls(sleep):
    taken = iter([50, 20, 20])
    work = Work(
        lambda number, clock: sleep(next(taken)),
        reading=lambda whole, parts: whole / 10,
    )
    row = timing.measure("x", work, repeats=1, ceilings=Ceilings(1.0, 1.0))
    assert (row.seconds, row.first_seconds) == (2, 30)


def test_what_moves_bytes_is_compared_with_the_copy(sleep):
    work = Work(lambda number, clock: sleep(0.01), moved=1e6)
    row = timing.measure("x", work, repeats=1, ceilings=Ceilings(1e9, 1e9))
    assert row.of_bandwidth == pytest.approx(0.1)
    assert row.mfu is None and row.tokens_per_second is None and row.padding is None


def test_a_difference_that_comes_out_negative_has_no_rate():
    work = Work(lambda *_: None, tokens=1, reading=lambda whole, parts: -1.0)
    row = timing.measure("x", work, repeats=1, ceilings=Ceilings(1.0, 1.0))
    assert row.tokens_per_second is None


def test_ceilings_are_measured_on_random_numbers_and_on_the_mesh(monkeypatch):
    operands = []

    def best(program, argument, devices):
        operands.append(np.asarray(argument, np.float32))
        assert devices == expected
        return 1.0

    monkeypatch.setattr(timing, "_best", best)
    mesh = sharding.make_mesh(devices=jax.devices()[1:3], data=2)
    expected = [jax.devices()[1]]
    one = timing.ceilings(mesh, "bfloat16", small=True)
    assert one == Ceilings(2 * 128**3, 2 * 2**16)
    assert all(len(np.unique(each)) > 1000 for each in operands)
    monkeypatch.setattr(sharding, "platform", lambda mesh: "gpu")
    expected = jax.devices()[1:3]
    two = timing.ceilings(mesh, "float32", small=True)
    assert two == Ceilings(2 * one.flops, 2 * one.bytes)


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


@pytest.mark.parametrize("shared", [True, False])
def test_prompts_are_shared_as_asked(shared):
    asking = micro("rloo", share_prompts=shared)
    model = Footing(asking).ground.group_logps_fn(2)
    assert isinstance(model, SharedPrompts) == shared


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "default"),
        (["--share-prompts"], "True"),
        (["--no-share-prompts"], "False"),
    ],
)
def test_the_command_passes_on_whether_prompts_are_shared(
    words, expected, monkeypatch, capsys
):
    monkeypatch.setattr(
        command,
        "run",
        lambda request, tell: made_up(share_prompts=request.share_prompts),
    )
    line = ["bench", "--only", "rloo", "--mesh", "data=1,fsdp=8", *words]
    assert main(line) == 0
    assert f"share_prompts {expected};" in capsys.readouterr().out


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


def test_what_ratios_compare_is_shown(tmp_path):
    path = tmp_path / "before.json"
    old = made_up(device="another", dtype="bfloat16", remat="full", share_prompts=True)
    new = made_up()
    shown = report.comparison(new, old, path)
    assert f"against {path}: {report.heading(old)}" in shown
    differing = shown.splitlines()[-1]
    assert "dtype bfloat16 -> float32" in differing
    assert "remat full -> none" in differing
    assert f"device another -> {new.device}" in differing
    assert "share_prompts True -> default" in differing
    assert "mesh" not in differing and "versions" not in differing
    other = made_up(mesh={"data": 1, "fsdp": 4, "tensor": 1}, versions={"jax": "0.1"})
    differing = report.comparison(new, other, path).splitlines()[-1]
    assert "mesh data=1,fsdp=4,tensor=1 -> data=1,fsdp=1,tensor=1" in differing
    assert "versions jax=0.1 -> gvjax=" in differing
    assert report.comparison(new, new, path).endswith("differing: nothing")


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
    for word in (*request.ROWS, "MFU", "--against before.json", "spread", "plan MiB"):
        assert word in shown


def test_the_command_prints_writes_and_compares(tmp_path, capsys):
    path = tmp_path / "before.json"
    line = ["bench", "--only", "encode", "--repeats", "1", "--batch", "8"]
    line += ["--mesh", "data=8"]
    assert main([*line, "--json", str(path)]) == 0
    assert main([*line, "--against", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "measured ceilings" in shown and "x faster" in shown
    assert f"against {path}" in shown
