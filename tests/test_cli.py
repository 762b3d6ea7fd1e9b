"""The command line: one recipe after the other as a user would, its refusals, and its exit codes."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

from gvjax import __main__ as entry
from gvjax import commands, config
from gvjax.judges.endpoint import BudgetError

ROOT = pathlib.Path(__file__).parents[1]
TOY = {
    "task": {
        "name": "tour",
        "options": {"num_nodes": 6, "horizon": 4, "num_goals": 2},
    },
    "model": {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32},
}
VALIDATION = {"validation_prompts": 16}
PAIRS = {"count": 32, "heldout": 16}
LOGGING = {"every": 2, "sample_every": 2}
RUNS = {
    "sft": {
        "settings": {"recipe": "sft", "steps": 20, "batch_size": 32},
        "logging": LOGGING,
    },
    "reward": {
        "start": "sft",
        "pairs": PAIRS,
        "settings": {
            "recipe": "reward",
            "steps": 4,
            "batch_size": 16,
            "evaluate_every": 2,
        },
        "logging": {"every": 2},
    },
    "dpo": {
        "start": "sft",
        "pairs": PAIRS,
        "select": "best",
        "evaluation": VALIDATION,
        "settings": {
            "recipe": "dpo",
            "steps": 4,
            "batch_size": 16,
            "evaluate_every": 2,
        },
        "logging": LOGGING,
    },
    "rloo": {
        "start": "sft",
        "reward_model": "reward",
        "evaluation": VALIDATION,
        "settings": {
            "recipe": "policy_gradient",
            "steps": 4,
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
            "evaluate_every": 4,
        },
        "logging": LOGGING,
    },
}


def write(directory, name, **changes):
    data = {"run_dir": name, **TOY, **RUNS[name], **changes}
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(data))


CHAIN = """
import contextlib, io, json, sys, time
from gvjax.__main__ import main

said = {}

def call(name, *arguments):
    out, err = io.StringIO(), io.StringIO()
    begun = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    said[name] = [code, out.getvalue(), err.getvalue(), time.monotonic() - begun]

for name in ("sft", "reward", "dpo", "rloo"):
    call(name, "run", f"{name}.yaml")
call("again", "run", "dpo.yaml")
call("other value", "run", "dpo.yaml", "settings.beta=0.7")
call("other logging", "run", "dpo.yaml", "logging.every=1")
call("sample", "sample", "rloo", "-n", "3", "-k", "2")
call("likeliest", "sample", "sft", "-n", "3", "-k", "2", "-t", "0")
call("sample of a reward model", "sample", "reward")
call("eval", "eval", "dpo", "--prompts", "16")
call("eval of the start", "eval", "sft", "--prompts", "16")
call("eval of a reward model", "eval", "reward", "--prompts", "16")
call("no run", "eval", "nothing")
call("another network", "run", "rloo.yaml", "run_dir=x", "model.mlp_dim=64")
call("a reward model as start", "run", "rloo.yaml", "run_dir=x", "start=reward")
call("a start that is none", "run", "dpo.yaml", "run_dir=x", "start=nothing")
call("corrected", "run", "dpo.yaml", "run_dir=x", "settings.steps=1")
call("a study's config", "compare", "sft.yaml")
json.dump(said, open("said.json", "w"))
"""


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """(directory, name -> (exit code, stdout, stderr, seconds)) of commands given one after the other."""
    where = tmp_path_factory.mktemp("cli")
    for name in RUNS:
        write(where, name)
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", CHAIN],
        cwd=where,
        env={
            **environment,
            "JAX_PLATFORMS": "cpu",
            "COLUMNS": "200",
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return where, json.loads((where / "said.json").read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_runs_and_keeps_what_it_made(name, chain):
    where, said = chain
    code, out, err, _ = said[name]
    assert code == 0, out + err
    assert f"kept in {name}" in out
    result = json.loads((where / name / "result.json").read_text())
    steps = RUNS[name]["settings"]["steps"]
    assert 0 < result["round"] <= steps
    logged = lines(where / name / "metrics.jsonl")
    assert [line["global_step"] for line in logged if "loss" in line][-1] == steps
    assert any((where / name / "tensorboard").iterdir())
    config.reread((where / name / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo", "rloo"])
def test_samples_are_shown_now_and_then_with_their_gold(name, chain):
    _, said = chain
    shown = re.findall(r".+  →  .+   gold -?\d\.\d\d", said[name][1])
    # Two prompts, every two rounds.
    assert len(shown) == RUNS[name]["settings"]["steps"]


@pytest.mark.slow
def test_times_are_split_among_generating_scoring_and_training(chain):
    where, _ = chain
    for line in lines(where / "rloo" / "timing.jsonl"):
        shares = {
            name: line[f"share/{name}"] for name in ("generate", "score", "train")
        }
        assert all(0 <= share <= 1 for share in shares.values())
        assert abs(sum(shares.values()) - 1) < 1e-6
        assert line["step_time"] > 0
    _, said = chain
    share = r"\d+%"
    line = rf"time of a round: generate {share}, score {share}, train {share}\n"
    assert re.search(line, said["rloo"][1])
    assert re.search(rf"time of a round: data {share}, train {share}\n", said["dpo"][1])


@pytest.mark.slow
def test_a_finished_run_returns_at_once(chain):
    _, said = chain
    assert said["again"][0] == 0
    assert said["again"][1].splitlines()[-2:] == said["dpo"][1].splitlines()[-2:]
    assert said["again"][3] < said["dpo"][3] / 5
    assert said["other logging"][0] == 0


@pytest.mark.slow
def test_a_run_of_another_config_is_refused_with_the_difference(chain):
    code, _, err, _ = chain[1]["other value"]
    assert code == 64
    assert "settings.beta was None and is 0.7" in err
    assert "Choose another run_dir" in err


@pytest.mark.slow
def test_samples_can_be_drawn_from_what_was_made(chain):
    _, said = chain
    assert said["sample"][0] == 0
    golds = re.findall(r"│ -?\d\.\d\d *│", said["sample"][1])
    assert len(golds) == 6
    rows = [row for row in said["likeliest"][1].splitlines() if "│" in row]
    assert len(rows) == 6
    # At temperature 0 both samples of a prompt are the same.
    assert rows[0::2] == rows[1::2]


@pytest.mark.slow
def test_policies_and_reward_models_can_be_judged(chain):
    _, said = chain
    for name in ("eval", "eval of the start"):
        assert said[name][0] == 0
        for quantity in ("gold reward", "KL to the starting policy", "length"):
            assert quantity in said[name][1]
    assert re.search(
        r"KL to the starting policy, nats *│ 0\.000", said["eval of the start"][1]
    )
    code, out, err, _ = said["eval of a reward model"]
    assert code == 0, err
    for quantity in ("log-likelihood of labels", "accuracy on gold order"):
        assert quantity in out


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, message",
    [
        ("sample of a reward model", "holds the result of recipe reward, not a policy"),
        ("no run", "nothing holds no finished run"),
        ("another network", "another network"),
        ("a reward model as start", "not a policy"),
        ("a start that is none", "nothing holds no finished run"),
        ("a study's config", "run it with `gvjax run`"),
    ],
)
def test_what_cannot_be_done_is_a_config_error(name, message, chain):
    code, _, err, _ = chain[1][name]
    assert code == 64
    assert message in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_refused_config_does_not_stand_in_the_way_of_the_corrected_one(chain):
    where, said = chain
    # Three others were refused with this run_dir before.
    assert said["corrected"][0] == 0
    assert (where / "x" / "result.json").exists()


@pytest.mark.parametrize("verb", ["gap", "compare", "run", "sample", "eval"])
def test_help_teaches_by_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        entry.main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"\n  gvjax {verb} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "config_file"),
    [
        ("run", "tour/sft.yaml"),
        ("compare", "quickstart.yaml"),
        ("gap", "gap/quickstart.yaml"),
    ],
)
def test_the_overrides_that_help_shows_are_keys_of_such_a_config(
    verb, config_file, capsys
):
    with pytest.raises(SystemExit):
        entry.main([verb, "--help"])
    (shown,) = re.findall(rf"gvjax {verb} CONFIG (.+)", capsys.readouterr().out)
    config.load(ROOT / "configs" / config_file, shown.split())


def test_what_lies_in_the_current_directory_can_be_named(tmp_path):
    """Without a PYTHONPATH, and it does not hide what is installed."""
    (tmp_path / "my_task.py").write_text("class Mine:\n    pass\n")
    (tmp_path / "yaml.py").write_text("raise ImportError('the wrong one')\n")
    run = {
        **TOY,
        "task": {"name": "my_task:Other"},
        "run_dir": "x",
        "settings": {"recipe": "sft"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    gvjax = os.path.join(os.path.dirname(sys.executable), "gvjax")
    command = [gvjax, "run", "run.yaml"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 64
    assert "module my_task has no 'Other'" in said.stderr


def test_help_of_the_whole_names_every_command(capsys):
    with pytest.raises(SystemExit):
        entry.main(["--help"])
    shown = capsys.readouterr().out
    for verb in ("gap", "compare", "run", "sample", "eval", "verify"):
        assert f"    {verb} " in shown


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["comapre"],
        ["run"],
        ["sample", "x", "-n", "0"],
        ["sample", "x", "-k", "-1"],
        ["sample", "x", "-t", "-1"],
        ["eval", "x", "--prompts", "0"],
        ["eval", "x", "--seed", "-1"],
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        entry.main(arguments)
    # Not argparse's own 2: what restarts a program must see that it is no use.
    assert stopped.value.code == 64
    assert "usage: gvjax" in capsys.readouterr().err


def raising(error):
    def verb(arguments):
        raise error

    return verb


@pytest.mark.parametrize(
    "error, code, message",
    [
        (config.ConfigError("seed is x"), 64, "gvjax eval: seed is x\n"),
        (commands.EXPECTED[0]("SFT failed"), 70, "gvjax eval: SFT failed\n"),
        (BudgetError("spent"), 64, "gvjax eval: spent\n"),
        (RuntimeError("a bug"), 70, "RuntimeError: a bug\n"),
        (
            KeyboardInterrupt(),
            130,
            "the same command goes on from the last checkpoint\n",
        ),
    ],
    ids=["config", "expected", "budget", "bug", "ctrl-c"],
)
def test_every_end_has_its_exit_code_and_words(
    error, code, message, capsys, monkeypatch
):
    monkeypatch.setattr(commands, "eval", raising(error))
    assert entry.main(["eval", "x"]) == code
    shown = capsys.readouterr().err
    assert shown.endswith(message)
    # A traceback for what nobody foresaw, and for nothing else.
    assert ("Traceback" in shown) == (message == "RuntimeError: a bug\n")


def test_a_config_that_is_refused_exits_with_64(tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text("run_dir: x\nsead: 1\n")
    assert entry.main(["run", str(path)]) == 64
    assert "gvjax run: " in capsys.readouterr().err
