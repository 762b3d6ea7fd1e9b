"""`gvjax verify`: it passes, it fails when a sign is flipped, and it judges a user's loss."""

import ast
import inspect
import json
import textwrap

import jax
import numpy as np
import pytest

from gvjax import losses
from gvjax.usage import ExitCode
from gvjax.verify import checks, main, signs
from gvjax.verify.check import Row, distance

GOOD = """
import jax

def my_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.5):
    gap = chosen_logps - ref_chosen_logps - rejected_logps + ref_rejected_logps
    return -jax.nn.log_sigmoid(beta * gap)
"""
BAD = {
    "my_flipped": ("beta * gap", "-beta * gap", "prefers the chosen completion"),
    "my_reduced": (
        "-jax.nn.log_sigmoid(beta * gap)",
        "-jax.nn.log_sigmoid(beta * gap).mean()",
        "one loss per pair",
    ),
    "my_coupled": ("beta * gap", "beta * (gap - gap.mean())", "rows are independent"),
    "my_overflow": (
        "-jax.nn.log_sigmoid(beta * gap)",
        "jax.numpy.log(1 + jax.numpy.exp(-beta * gap))",
        "finite at extremes",
    ),
    "my_stopped": (
        "beta * gap",
        "beta * jax.lax.stop_gradient(gap)",
        "gradient is the derivative",
    ),
}


def flips(function):
    """Every copy of a function with one sign flipped: a minus dropped or added, a difference made a sum."""
    module = inspect.getmodule(function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    positions = [
        number
        for number, node in enumerate(ast.walk(tree))
        if (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub))
        or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub))
    ]
    for position in positions:
        mutated = ast.parse(textwrap.dedent(inspect.getsource(function)))
        node = list(ast.walk(mutated))[position]
        if isinstance(node, ast.UnaryOp):
            node.op = ast.UAdd()
        else:
            node.op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
        space = dict(vars(module))
        exec(compile(mutated, module.__name__, "exec"), space)
        yield ast.unparse(node), space[function.__name__]


def row(output, name):
    return next(line for line in output.splitlines() if name in line)


def test_a_fast_subset_passes(capsys, tmp_path):
    file = tmp_path / "rows.json"
    assert main(["--only", "E1", "--json", str(file)]) == 0
    output = capsys.readouterr().out
    assert "pass" in row(output, "E10 generation-verification gap")
    assert "E_P[r] − β KL" in output
    record = json.loads(file.read_text())
    assert record["passed"]
    assert {
        "E1 soft RL is a reverse-KL projection",
        "E10 generation-verification gap",
    } <= {found["check"] for found in record["checks"]}
    assert all(found["error"] <= found["tolerance"] for found in record["checks"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_everything_passes(seed):
    assert main(["--seed", str(seed)]) == 0


def test_list_names_every_check_and_runs_none(capsys):
    assert main(["--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert names == [check.name for check in checks()]
    assert len(set(names)) == len(names)
    for number in range(1, 13):
        assert any(name.startswith(f"E{number} ") for name in names)


def test_every_exported_loss_has_a_row():
    named = {check.name for check in checks()}
    exported = {name for name in losses.__all__ if name.endswith("_loss")}
    assert len(exported) > 35
    assert exported <= named


def test_a_new_loss_without_a_formula_fails(monkeypatch, capsys):
    monkeypatch.setattr(losses, "__all__", [*losses.__all__, "brand_new_loss"])
    assert main(["--only", "brand_new"]) == 1
    assert "no formula" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["dpo_loss", "kto_loss", "orpo_loss", "rebel_loss", "clipped_policy_loss"]
)
def test_verify_fails_when_a_sign_is_flipped(name, monkeypatch, capsys):
    loss = getattr(losses, name)
    monkeypatch.setattr(losses, name, lambda *args, **kwargs: -loss(*args, **kwargs))
    # The original's signature tells which arrays to pass.
    getattr(losses, name).__signature__ = inspect.signature(loss)
    assert main(["--only", name]) == 1
    assert "FAIL" in row(capsys.readouterr().out, name)


@pytest.mark.parametrize(
    "name",
    # A weighted sum has no signs of its own.
    [name for name in signs.exported() if name != "mpo_loss"],
)
def test_every_flipped_sign_inside_any_loss_is_seen(name, monkeypatch):
    rows = [check for check in signs.checks() if check.name.startswith(name)]
    assert rows
    with jax.enable_x64(True):
        for place, mutant in flips(getattr(losses, name)):
            monkeypatch.setattr(losses, name, mutant)
            assert any(not row.error(0) <= row.tolerance for row in rows), place


def test_theorems_notice_a_flipped_sign(monkeypatch, capsys):
    loss = losses.rebel_loss
    monkeypatch.setattr(
        losses, "rebel_loss", lambda margin, **rest: loss(margin=-margin, **rest)
    )
    assert main(["--only", "rebel_loss at its optimum"]) == 1


def test_estimators_notice_a_flipped_sign(monkeypatch):
    loss = losses.reinforce_loss
    monkeypatch.setattr(losses, "reinforce_loss", lambda *arrays: -loss(*arrays))
    assert main(["--only", "GRPO without scaling"]) == 1


def test_a_crash_is_a_failed_row(monkeypatch, capsys):
    def broken(log_ratios):
        raise RuntimeError("out of [order]")

    monkeypatch.setattr(losses, "reverse_kl", broken)
    assert main(["--only", "reverse_kl"]) == 1
    assert "out of [order]" in capsys.readouterr().out


def test_nothing_to_run_is_an_error(capsys):
    assert main(["--only", "no such check"]) == ExitCode.USER_ERROR
    assert "--list" in capsys.readouterr().err


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def to(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        return f"{name}:my_loss"

    return to


def test_a_good_loss_of_ones_own(write, capsys):
    assert main(["--loss", write("my_good", GOOD)]) == 0
    output = capsys.readouterr().out
    assert "0.6931" in row(output, "value at the reference")
    assert "-0.25, 0.25" in row(output, "slope at the reference")
    assert "β = 0.5 " in row(output, "tabular optimum")
    assert "FAIL" not in output


@pytest.mark.parametrize("name", BAD)
def test_a_bad_loss_of_ones_own(name, write, capsys):
    right, wrong, failing = BAD[name]
    assert (
        main(["--loss", write(name, GOOD.replace(right, wrong)), "--only", failing])
        == 1
    )
    assert "FAIL" in row(capsys.readouterr().out, failing)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_losses", "package.module:function"),
        ("no_such_module:my_loss", "no module named 'no_such_module'"),
        ("gvjax.losses:no_such_loss", "has no 'no_such_loss'"),
        ("gvjax.losses:VOCABULARY", "cannot be called"),
        ("gvjax.losses:kto_loss", "which no batch supplies"),
    ],
)
def test_a_wrong_path_is_explained(path, message, capsys):
    assert main(["--loss", path]) == ExitCode.USER_ERROR
    assert message in capsys.readouterr().err


def test_nan_is_never_within_tolerance():
    assert distance(np.nan, 0.0) == np.inf
    assert Row("", "", float("nan"), 1.0).passed is False
