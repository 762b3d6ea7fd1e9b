"""Every command in launch/README.md works, and prints the lines shown under it."""

import math
import re
import shlex
from pathlib import Path

import pytest

from gvjax import config
from launch import __main__ as main_lib

ROOT = Path(__file__).parents[2]
README = ROOT / "launch" / "README.md"


def _examples():
    for block in re.findall(r"```console\n(.*?)```", README.read_text(), re.DOTALL):
        for example in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = example.partition("\n")
            yield command, [line for line in output.splitlines() if line != "..."]


EXAMPLES = list(_examples())


def test_every_backend_is_shown():
    shown = " ".join(command for command, _ in EXAMPLES)
    for backend in ("local", "tpu-vm", "gke", "slurm", "sky", "xpk"):
        assert f"--dry-run --backend {backend} " in shown


@pytest.mark.parametrize(("command", "lines"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_readme_example(command, lines, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("GVJAX_LAUNCH_STATE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "launch"]
    refused = any("nothing was started" in line for line in lines)
    # An example that would start something is no example to run here.
    assert refused or "--dry-run" in words or words[3] in ("--help", "hardware")
    try:
        code = main_lib.main(words[3:])
    except SystemExit as ended:
        code = ended.code
    shown = capsys.readouterr()
    assert code == (64 if refused else 0), shown.err
    rest = (shown.out + shown.err).splitlines()
    for line in lines:
        assert line in rest, f"not printed, or not in this order: {line}"
        rest = rest[rest.index(line) + 1 :]


PROGRAMS = [command for command, _ in EXAMPLES if " --dry-run " in command]


@pytest.mark.parametrize("command", PROGRAMS, ids=range(len(PROGRAMS)))
def test_the_program_of_an_example_runs_on_its_machine(command):
    """Its config is there, its mesh is all of the devices, and its batches divide over them."""
    words = shlex.split(command)[3:]
    spec = main_lib._job_from(main_lib._parser().parse_args(words))
    program = [*spec.command]
    at = next(n for n, word in enumerate(program) if word in ("run", "compare"))
    path = ROOT / program[at + 1].removeprefix("gvjax/")
    settings = config.load(str(path), program[at + 2 :])
    sizes = [settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor]
    rest = spec.num_devices // math.prod(size for size in sizes if size > 0)
    data, fsdp, tensor = (rest if size == -1 else size for size in sizes)
    assert data * fsdp * tensor == spec.num_devices
    trained = [settings.settings] if program[at] == "run" else recipes(settings)
    for section in trained:
        for name in ("batch_size", "prompts_per_step"):
            assert getattr(section, name, 0) % (data * fsdp) == 0
    assert settings.model["num_heads"] % tensor == 0
    assert settings.run_dir == program[-1].removeprefix("run_dir=")


def recipes(study: config.StudyConfig) -> list[config.Section]:
    """Everything that a study trains."""
    arms = [each for arm in study.arms.values() for each in config.arm_settings(arm)]
    return [study.sft, study.reward, *arms]
