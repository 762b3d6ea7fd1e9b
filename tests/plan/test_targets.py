"""Names of machines: the table against the launcher's, and what is refused."""

import pytest

from gvjax.plan import command, targets
from gvjax.usage import ExitCode
from launch import hw


@pytest.mark.parametrize("name", targets.table())
def test_the_planner_and_the_launcher_mean_the_same_machine(name):
    target, row = targets.target(name), hw.accelerator(name)
    assert target.devices == row.devices
    assert target.chip.memory == row.hbm_gib
    if row.kind == "tpu":
        assert target.topology == row.topology
        assert target.host_bounds == row.host_bounds
        assert target.chip.chip_config == row.chip_config
    else:
        assert target.topology == f"1x{row.hosts}x{row.chips_per_host}"
        assert target.tensor_reach == row.chips_per_host


def test_every_accelerator_that_can_be_launched_on_can_be_planned_for():
    launched = {name for name, row in hw.table().items() if row.kind != "cpu"}
    assert launched == set(targets.table())


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("8xh100", "h100-8"),
        ("8xH100", "h100-8"),
        ("v5litepod-16", "v5e-16"),
        ("v5e:16x16", "v5e-256"),
        ("v5p-64", "v5p-64"),
    ],
)
def test_other_spellings(name, meant):
    assert targets.target(name).name == meant


def test_tensorcores_are_counted_as_google_does():
    assert targets.target("v5p-64").devices == 32
    assert targets.target("v5e-64").devices == 64
    assert targets.target("tpu7x-64").devices == 64


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("v5e-100", "v5e-64 or v5e-128"),
        ("v5ee-16", "v5e-16"),
        ("h100-12", "h100-8 or h100-16"),
        ("mi300-8", "h200-8 or h100-8"),
    ],
)
def test_unknown_names_show_near_misses(name, near):
    with pytest.raises(ValueError, match=f"no accelerator {name!r}.*{near}"):
        targets.target(name)


def test_gpus_do_not_come_in_slices():
    with pytest.raises(ValueError, match="h100-16"):
        targets.target("h100-8", slices=2)


RUN = "configs/tour/sft.yaml"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--on", "v5e-250"], "did you mean v5e-128 or v5e-256"),
        (["--on", "v5e-16", "--slices", "0"], "slices is 0"),
        (["--on", "v5e-16", "no_such=1"], "no_such is not a key"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(words, said, capsys, monkeypatch):
    monkeypatch.setattr(command, "events", lambda request: pytest.fail("started"))
    assert command.main([RUN, *words]) == ExitCode.USER_ERROR
    assert said in capsys.readouterr().err


def test_a_mesh_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main([RUN, "--on", "v5e-16", "--mesh", "model=4"])
    assert "must look like" in capsys.readouterr().err
