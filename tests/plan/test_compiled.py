"""Programs really compiled for machines that are not there: TPUs where libtpu is installed, GPUs where JAX's CUDA plugin is.

The golden peaks are at O0: `python -m gvjax plan tests/plan/tiny.yaml --on v5e-4 --json` prints them.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from gvjax.plan import command, compiling
from gvjax.usage import ExitCode

ROOT = pathlib.Path(__file__).parents[2]
TINY = "tests/plan/tiny.yaml"
STUDY = "tests/plan/tiny_study.yaml"
VOCABULARY, WIDTH = 768, 256

PROGRAMS = "sample 64 x 2", "start", "train step", "sample 64 x 1", "score 64"
PEAKS = {
    "0.0.42": (19_485_184, 6_839_296, 60_027_392, 18_399_744, 16_629_248),
    "0.0.50": (14_701_568, 6_839_296, 60_027_392, 14_141_440, 14_574_592),
}
"""Bytes per device on v5e-4 by version of libtpu: those that jax 0.10.2 and 0.12.0 ask for."""


def is_there(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


needs_tpu = pytest.mark.skipif(
    not is_there("libtpu"), reason="libtpu is not installed: gvjax[plan]"
)
needs_gpu = pytest.mark.skipif(
    not is_there("jax_plugins.xla_cuda12"),
    reason="JAX's CUDA plugin is not installed: gvjax[plan-gpu]",
)


def planned(*words, config=TINY):
    """(exit code, JSON) of `gvjax plan`."""
    done = subprocess.run(
        [sys.executable, "-m", "gvjax", "plan", str(config), *words, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def programs_of(plan, name=None):
    """Program -> its row, of the stage of a name or the only one."""
    (stage,) = [each for each in plan["stages"] if name in (None, each["stage"])]
    return {row["program"]: row for row in stage["programs"]}


def no_logits_are_gathered(plan):
    """Nobody gets the whole vocabulary of more rows than the matrix has that makes it."""
    for name, row in programs_of(plan).items():
        for each in row["collectives"]:
            if each["kind"] != "all-gather":
                continue
            shape = [int(n) for n in re.findall(r"\d+", each["largest"].split("[")[1])]
            assert shape[-1:] != [VOCABULARY] or shape[0] <= WIDTH, (name, each)


STUDY_PROGRAMS = [
    *(("sft", name) for name in ("init", "train step")),
    *(("DPO", name) for name in ("train step", "sample 64 x 1", "score 64")),
    *(("online DPO", name) for name in ("sample 64 x 2", "reward scoring 128")),
    *(("online DPO", name) for name in ("pair up", "reference scoring")),
    ("online DPO", "train step"),
]
"""Of `STUDY`: all that SFT, DPO and online DPO do again and again, and what makes the first parameters."""

SCORED = ("train step", "reference scoring")
"""Those that take the logits of 128 rows, 64 of them on each device, with half of the vocabulary."""


COMPILERS = [("v5e-4", "libtpu"), ("4xh100", "jax_plugins.xla_cuda12")]
"""(target, the module that compiles for it)."""


def planned_study(target):
    only = (("--only", name) for name in ("sft", "DPO", "online DPO"))
    words = [word for pair in only for word in pair]
    code, plan = planned("--on", target, "--no-search", *words, config=STUDY)
    assert code == ExitCode.DONE
    return plan


@pytest.fixture(scope="module", params=COMPILERS, ids=dict(COMPILERS))
def study(request):
    target, module = request.param
    if not is_there(module):
        pytest.skip(f"{module} is not installed")
    return planned_study(target)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "program"), STUDY_PROGRAMS)
def test_no_program_of_a_study_asks_the_host_or_holds_all_logits(study, stage, program):
    """Nor is any array as large as all logits; the largest is a part of them where logits are taken."""
    row = programs_of(study, stage)[program]
    assert row["host_calls"] == []
    shape = [int(n) for n in re.findall(r"\d+", row["largest_array"].split("[")[1])]
    # Of 128 rows each device has half, of the vocabulary too; a row's last position predicts nothing.
    assert math.prod(shape) <= 64 * 127 * 4096 / 2, row["largest_array"]
    if program in SCORED:
        assert shape[-1] == 4096, "this looks at the wrong program"


@pytest.fixture(scope="module")
def tpu():
    code, plan = planned("--on", "v5e-4")
    assert code == ExitCode.DONE
    return plan


@needs_tpu
@pytest.mark.slow
class TestTpu:
    def test_it_fits_with_room(self, tpu):
        (stage,) = tpu["stages"]
        assert tpu["fits"]
        assert stage["headroom"] == stage["usable"] - stage["peak"] > 0
        assert set(programs_of(tpu)) == set(PROGRAMS)

    def test_that_it_need_not_recompute_is_told(self, tpu):
        (stage,) = tpu["stages"]
        change, peak = stage["cheaper"]
        assert change == "model.remat=none"
        assert stage["peak"] < peak <= stage["usable"]
        assert stage["remedies"] == []

    @pytest.mark.parametrize("program", PROGRAMS)
    def test_peaks_are_those_known(self, tpu, program):
        version = ".".join(importlib.metadata.version("libtpu").split(".")[:3])
        if version not in PEAKS:
            pytest.skip(f"what libtpu {version} says is not known")
        found = programs_of(tpu)[program]["peak"]
        known = dict(zip(PROGRAMS, PEAKS[version], strict=True))
        assert found == pytest.approx(known[program], rel=0.05)

    def test_no_logits_are_gathered(self, tpu):
        no_logits_are_gathered(tpu)

    def test_attention_is_splash(self, tpu):
        rows = programs_of(tpu)
        # Forward, its repetition for the gradient, and two backward kernels, in one scanned layer.
        assert rows["train step"]["kernels"] == {"tpu_custom_call": 4}
        assert rows["score 64"]["kernels"] == {"tpu_custom_call": 1}
        # Prefill, in the first of two layers: of the last one only each prompt's last token is asked for.
        assert rows["sample 64 x 2"]["kernels"] == {"tpu_custom_call": 1}

    def test_donation_is_complete(self, tpu):
        step = programs_of(tpu)["train step"]
        # Vectors are padded to the chip's tiles, so a little more than the state's bytes.
        assert step["donated"] <= step["aliased"] <= 1.01 * step["donated"]

    def test_collectives_are_named_by_axis(self, tpu):
        step = programs_of(tpu)["train step"]["collectives"]
        found = {(each["kind"], each["axes"]): each for each in step}
        # Seven matrices in each of two layers, there and back, and embedding and unembedding.
        assert found["all-gather", "fsdp"]["count"] == 2 * 2 * 7 + 2
        assert ("all-reduce", "tensor") in found
        assert {"all-reduce", "reduce-scatter"} & {k for k, a in found if a == "fsdp"}


@needs_tpu
@pytest.mark.slow
def test_what_does_not_fit_is_told_by_the_exit_code(tmp_path):
    """19 GB of state on a chip of 15.75: the compiler refuses the update, and the plan goes on."""
    config = tmp_path / "large.yaml"
    config.write_text(
        "run_dir: runs/large\n"
        "task: {name: lengths, options: {prompt_length: 8, completion_length: 8}}\n"
        "model: {embed_dim: 256, num_layers: 8, num_heads: 2, mlp_dim: 262144, scan_layers: true}\n"
        "settings: {recipe: sft, batch_size: 1}\n"
    )
    code, plan = planned("--on", "v5e-1", "--no-search", config=config)
    assert code == ExitCode.DOES_NOT_FIT
    step = programs_of(plan)["train step"]
    assert step["refused"]
    assert step["peak"] > plan["stages"][0]["usable"]


@pytest.fixture
def long_rows(tmp_path):
    """A config whose rows take more than a gigabyte each, so that few of them fit and the search is short."""
    config = tmp_path / "rows.yaml"
    config.write_text(
        "run_dir: runs/rows\n"
        "task: {name: lengths, options: {vocab_size: 256, prompt_length: 4064, completion_length: 32}}\n"
        "model: {embed_dim: 128, num_layers: 1, num_heads: 1, mlp_dim: 32768}\n"
        "settings: {recipe: sft, batch_size: 8}\n"
    )
    return config


@needs_tpu
@pytest.mark.exhaustive
def test_the_largest_batch_fits_and_one_row_more_does_not(long_rows):
    code, plan = planned("--on", "v5e-1", "--max-batch", config=long_rows)
    assert code == ExitCode.DONE
    field, rows = plan["stages"][0]["largest_batch"]
    assert field == "batch_size"
    assert 8 < rows < 16
    more = f"settings.batch_size={rows + 1}"
    code, _ = planned("--on", "v5e-1", "--no-search", more, config=long_rows)
    assert code == ExitCode.DOES_NOT_FIT


@needs_tpu
@pytest.mark.exhaustive
def test_the_whole_pipeline_needs_about_what_the_quick_one_says(tpu):
    """Less, for steps and samples; `start`, which draws a tiny model's parameters, needs 8% more."""
    code, plan = planned("--on", "v5e-4", "--full")
    assert (code, plan["pipeline"], tpu["pipeline"]) == (ExitCode.DONE, "full", "O0")
    quick, full = programs_of(tpu), programs_of(plan)
    assert full.keys() == quick.keys()
    for name, row in full.items():
        assert 0.5 * quick[name]["peak"] < row["peak"] <= 1.1 * quick[name]["peak"]
        assert row["aliased"] >= row["donated"]


@needs_tpu
def test_slices_are_joined_over_data():
    """jax.make_mesh refuses several slices; data, or fsdp, spans them and tensor does not."""
    script = (
        "from gvjax import sharding\n"
        "from gvjax.plan import compiling, targets\n"
        "devices = compiling.devices(targets.target('v5e-4', 2))\n"
        "for sizes in ({'data': 2, 'fsdp': 2, 'tensor': 2}, {'data': 1, 'fsdp': 8}):\n"
        "    mesh = sharding.make_mesh(**sizes, devices=devices).devices\n"
        "    of = [[d.slice_index for d in row.flat] for row in mesh.reshape(2, 4)]\n"
        "    assert of == [[0] * 4, [1] * 4], of\n"
        "try:\n"
        "    sharding.make_mesh(data=1, tensor=8, devices=devices)\n"
        "except ValueError as error:\n"
        "    assert 'stays inside a slice' in str(error)\n"
        "else:\n"
        "    raise AssertionError('tensor spans slices')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **command.ENVIRONMENT},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@needs_gpu
@pytest.mark.slow
def test_on_gpus_attention_is_cudnn_and_no_logits_are_gathered():
    code, plan = planned("--on", "4xh100")
    assert code == ExitCode.DONE
    no_logits_are_gathered(plan)
    kernels = programs_of(plan)["train step"]["kernels"]
    assert any(name.startswith("__cudnn$fmha") for name in kernels), kernels
    step = programs_of(plan)["train step"]
    assert step["donated"] <= step["aliased"] <= 1.01 * step["donated"]


def test_a_compiler_of_another_version_is_named():
    """What libtpu 0.0.52 wrote of some programs stopped jaxlib 0.10.2, whose jax asks for 0.0.42."""

    class Unreadable:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure (a.cc:1)")

    with pytest.raises(compiling.UnavailableError, match=r"'gvjax\[plan\]' brings"):
        compiling._text(Unreadable())


@pytest.mark.skipif(is_there("libtpu"), reason="libtpu is installed")
def test_without_the_compiler_the_extra_is_named():
    done = subprocess.run(
        [sys.executable, "-m", "gvjax", "plan", TINY, "--on", "v5e-4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == ExitCode.USER_ERROR
    assert "pip install 'gvjax[plan]'" in done.stderr


@pytest.mark.skipif(is_there("jax_plugins.xla_cuda12"), reason="the plugin is there")
def test_without_the_cuda_plugin_the_extra_is_named():
    done = subprocess.run(
        [sys.executable, "-m", "gvjax", "plan", TINY, "--on", "4xh100"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == ExitCode.USER_ERROR
    assert "pip install 'gvjax[plan-gpu]'" in done.stderr
