"""Full disks, missing permissions, jumping clocks, and things that change while a run is down."""

import contextlib
import json
import os
import re
import subprocess

import pytest
import yaml
from toy_runs import assert_same


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB of its own."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(where)]
    with contextlib.suppress(OSError):
        if (
            os.geteuid() == 0
            and not subprocess.run(mount, capture_output=True).returncode
        ):
            yield where
            subprocess.run(["umount", str(where)], check=True)
            return
    pytest.skip("needs the right to mount a file system")


def on_disk(preloaded, disk, *more, act=None):
    """SFT on the small disk, TensorBoard events included."""
    config = str(preloaded.directory / "sft.yaml")
    command = ["run", config, "run_dir=run", "logging.tensorboard=true"]
    return preloaded.start(*command, *more, act=act, cwd=disk)


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_nothing_where_the_config_goes_on(
    preloaded, whole, small_disk
):
    expected = whole("sft")
    more = ["checkpoints.on_full_disk=continue"]
    process = on_disk(preloaded, small_disk, *more, act=[("full_disk", [1, 6])])
    assert process.wait() == 0, process.said()
    said = process.said()
    assert "was not written because the disk is full" in said
    assert "going on without it" in said
    assert_same(small_disk / "run", expected)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_with_room_it_goes_on_to_the_same_bits(
    preloaded, whole, small_disk
):
    expected = whole("sft")
    process = on_disk(preloaded, small_disk, act=[("full_disk", [5, 100])])
    assert process.wait() == 70
    # The threads beneath have their say in that one line, too.
    said = process.said()
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    # The save of step 4 may have been under way still, in the background.
    assert re.match(r"gvjax run: the checkpoint of step [46] in", last)
    assert "because the disk is full" in last
    assert re.search(r"last good step is [24]$", last)
    (small_disk / "ballast").unlink()
    process = on_disk(preloaded, small_disk)
    assert process.wait() == 0, process.said()
    assert_same(small_disk / "run", expected)


def test_missing_permissions_are_said_in_a_line_before_anything_is_computed(
    preloaded, tmp_path
):
    (tmp_path / "locked" / "checkpoints").mkdir(parents=True)
    for path in ("locked/checkpoints", "locked"):
        (tmp_path / path).chmod(0o500)
    for locked in ("locked", "locked/deeper"):
        process = preloaded.start(
            "run",
            str(preloaded.directory / "sft.yaml"),
            f"run_dir={tmp_path / locked}",
            act=[("without_privileges", None)],
        )
        assert process.wait() == 64, process.said()
        assert "cannot be written to" in process.said()
        assert "Permission denied" in process.said()
        assert "Traceback" not in process.said()


def test_a_jumping_clock_changes_no_number(preloaded, whole):
    expected = whole("sft")
    act = [("jumping_clock", None)]
    process = preloaded.start("run", "sft.yaml", "run_dir=jumped", act=act)
    assert process.wait() == 0, process.said()
    assert_same(preloaded.directory / "jumped", expected)
    timing = (preloaded.directory / "jumped" / "timing.jsonl").read_text()
    times = [json.loads(line)["step_time"] for line in timing.splitlines()]
    assert all(0 < seconds < 1000 for seconds in times)


OWN_LOSS = """
from gvjax import losses

def loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1):
    return losses.dpo_loss(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=beta
    )
"""


@pytest.mark.slow
def test_a_changed_config_or_file_is_refused_with_a_diff_and_goes_on_by_force(
    preloaded, whole
):
    whole("sft")
    where = preloaded.directory
    (where / "own_loss.py").write_text(OWN_LOSS)
    config = yaml.safe_load((where / "dpo.yaml").read_text())
    config["settings"]["loss"] = "own_loss:loss"
    config["run_dir"] = "own"
    (where / "own.yaml").write_text(yaml.safe_dump(config))

    def run(*more, kill=None):
        act = [("own_code", None)] + ([("kill_at_round", kill)] if kill else [])
        process = preloaded.start("run", "own.yaml", *more, act=act)
        return process.wait(), process.said()

    assert run(kill=6)[0] == -9
    code, said = run("settings.optimizer.learning_rate=0.5")
    assert code == 64
    name = "settings.optimizer.learning_rate"
    assert f"{name} was 0.0003 and is 0.5" in said and f"--force {name}" in said
    code, said = run("--force", "settings.optimizer.learning_rat")
    assert code == 64 and "did you mean 'settings.optimizer.learning_rate'" in said

    (where / "own_loss.py").write_text(OWN_LOSS + "# another\n")
    code, said = run()
    assert code == 64 and "files.settings.loss was" in said
    code, said = run(f"{name}=0.5", "--force", name, "--force", "files.settings.loss")
    assert code == 0, said
    assert f"going on from {where}/own/checkpoints/" in said.replace("\n", "")
    lines = (where / "own" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    rates = [line["learning_rate"] for line in logged if "learning_rate" in line]
    assert len(rates) == 8 and rates[0] == pytest.approx(0.0003) and rates[-1] == 0.5
    code, said = run(f"{name}=0.7", "--force", name)
    assert code == 64 and "finished run" in said
