"""The committed results say what the README and configs/results say they do, recomputed from every seed's raw values."""

import gzip
import pathlib
import types

import numpy as np
import pytest

from gvjax import config
from gvjax.gap import contrasts, quantities, statistics, weighing
from gvjax.gap.findings import GapFindings
from gvjax.gap.judging import Judged
from gvjax.gap.numbers import (
    ADVANTAGE,
    DIFFERENCE,
    EFFICIENCY,
    HEADROOM,
    MATCHED,
    Number,
    Numbers,
)
from gvjax.gap.pilot import add_pilot
from gvjax.gap.results import StudyResults, chosen_on_test

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
RESULTS = CONFIGS / "results"


@pytest.fixture(scope="module")
def tour() -> StudyResults:
    return load("tour")


def load(name: str) -> StudyResults:
    return StudyResults.from_json(
        gzip.decompress((RESULTS / f"{name}.json.gz").read_bytes()).decode()
    )


def difference(results: StudyResults, task: str, a: str, b: str):
    """The declared contrast on raw gold, computed anew."""
    analysed = contrasts.analyse(results)
    for outcome in analysed.outcomes:
        declared = outcome.contrast
        if (declared.task, declared.a, declared.b, outcome.measure) == (
            task,
            a,
            b,
            "gold",
        ):
            return outcome
    raise AssertionError(f"{a} − {b} on {task} was not declared")


def test_the_seeds_are_new_and_enough(tour):
    seeds = [seed.seed for seed in tour.task("tour").start.seeds]
    assert len(seeds) >= 8
    assert not set(seeds) & set(range(5)), "seeds 0 to 4 were used to choose settings"


def test_the_online_road_is_ahead_on_tour(tour):
    found = difference(tour, "tour", "RLOO", "best offline")
    assert found.low > 0.05
    assert round(found.estimate, 3) == 0.148
    assert (round(found.low, 3), round(found.high, 3)) == (0.109, 0.188)


def test_the_advantage_is_gone_where_no_verifier_can_be_learned(tour):
    found = difference(tour, "hidden_goals", "RLOO", "best offline")
    assert abs(found.estimate) <= 0.06
    scorers = {each.name: each for each in tour.task("hidden_goals").scorers}
    accuracies = [seed.accuracy for seed in scorers["reward model"].seeds]
    assert abs(np.mean(accuracies) - 0.5) <= 0.06


def test_the_reward_model_predicts_better_than_dpos_implicit_reward_on_every_seed(tour):
    scorers = {each.name: each for each in tour.task("tour").scorers}
    for verifier, implicit in zip(
        scorers["reward model"].seeds, scorers["DPO implicit reward"].seeds
    ):
        assert verifier.seed == implicit.seed
        assert verifier.log_likelihood > implicit.log_likelihood


def test_what_did_not_come_out_for_the_online_road_stands_there_too(tour):
    hard = difference(tour, "tour", "online DPO", "best offline")
    assert hard.low < 0 < hard.high
    assert difference(tour, "tour", "GRPO", "best offline").high < 0


def head_of(name: str) -> str:
    """The comment that a config begins with, on one line."""
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return " ".join(
        " ".join(line.lstrip("#") for line in lines if line[:1] == "#").split()
    )


def plain(*values: float, digits: int) -> str:
    mean, low, high = (f"{value:.{digits}f}".replace("0.", ".", 1) for value in values)
    return f"{mean} [{low}, {high}]"


def as_then(now, then):
    """A config without the settings that results made earlier do not know, all of which are off."""
    if isinstance(now, dict) and isinstance(then, dict):
        later = {key: now[key] for key in now.keys() - then.keys()}
        assert all(value is None or value is False for value in later.values()), later
        return {key: as_then(now[key], then[key]) for key in now.keys() & then.keys()}
    return now


def test_the_first_command_of_the_readme_gave_what_its_config_says():
    results, head = load("quickstart"), head_of("quickstart")
    task = results.task("tour")
    for name in ("SFT", "DPO", "DPO + NLL", "online DPO", "RLOO"):
        arm = task.start if name == "SFT" else task.arm(name)
        found = contrasts.arm_estimate(task, arm)
        assert f"{name} {plain(found.mean, *found.interval(), digits=3)}" in head
    ahead = difference(results, "tour", "RLOO", "best offline")
    assert ahead.low > 0.05
    shown = plain(ahead.estimate, ahead.low, ahead.high, digits=2)
    assert f"ahead of the best offline arm by {shown}" in head
    twin = difference(results, "hidden_goals", "RLOO", "best offline")
    assert abs(twin.low) <= 0.06 and abs(twin.high) <= 0.06
    now = config.resolved(config.load(CONFIGS / "quickstart.yaml"))
    # A setting that came later leaves by default what was done before.
    fields = config.StudyConfig.model_fields
    then = {key: results.config.get(key, fields[key].default) for key in now}
    assert as_then(now, then) == then


# What `gvjax gap` said of the quickstart and its twins.

TWINS = {
    "gap_quickstart": [],
    "gap_hidden": ["run_dir=runs/gap_hidden", "task.name=hidden_goals"],
    "gap_short": [
        "run_dir=runs/gap_short",
        "task.name=plan",
        "task.options.write_content=false",
    ],
}
DECISIVE = {
    ADVANTAGE: 3,
    HEADROOM: 3,
    EFFICIENCY: 2,
    DIFFERENCE: 3,
    MATCHED: 3,
}
"""Numbers of the table, with their decimals, in its order."""


def cell(quantity, digits: int) -> str:
    def shown(value):
        if value is None:
            return "—"
        text = f"{value:+.{digits}f}" if digits == 3 else f"{value:.{digits}f}"
        return text.replace("0.", ".", 1).replace("-", "−")

    if quantity.low is None:
        return shown(quantity.estimate)
    return f"{shown(quantity.estimate)} [{shown(quantity.low)}, {shown(quantity.high)}]"


def measured(name: str) -> GapFindings:
    text = gzip.decompress((RESULTS / f"{name}.json.gz").read_bytes()).decode()
    return GapFindings.from_json(text)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("gap_*.json.gz")), ids=str)
def test_the_table_of_measurements_says_what_was_found(path):
    name = path.name.removesuffix(".json.gz")
    findings = measured(name)
    (task,) = findings.tasks
    cells = [cell(task.quantity(q), digits) for q, digits in DECISIVE.items()]
    row = f"| `{name}` | {findings.advice.verdict} | {' | '.join(cells)} |"
    assert row in (RESULTS / "README.md").read_text(encoding="utf-8")


def read_again(findings: GapFindings):
    """(verdict, quantities) of a measurement's rows as they are weighed now: the best offline arm is chosen on validation gold."""
    (task,) = findings.tasks
    assert task.pilot is not None and task.judge.kind == "gold"
    (pilot,) = task.pilot.tasks
    assert not chosen_on_test(pilot.offline)
    settings = types.SimpleNamespace(
        seeds=findings.seeds,
        pilot=types.SimpleNamespace(
            online=findings.config["pilot"]["online"], square=None
        ),
        margins=config.MarginsSection(**findings.config["margins"]),
    )
    wins = {
        (arm.name, each.seed): statistics.win_scores(
            each.gold, pilot.start.seed(each.seed).gold
        )
        for arm in pilot.arms
        for each in arm.seeds
    }
    numbers = Numbers(findings.seeds)
    numbers.by_name |= {
        q.name: Number(
            q.key,
            q.unit,
            q.seeds,
            quantities.over_seeds(list(q.seeds.values())),
            q.margin,
        )
        for q in task.quantities
        if q.key not in ("Q6", "Q7")
    }
    add_pilot(settings, pilot, Judged(wins, task.judge), numbers)
    bounds, made = numbers.quantities()
    judged = Judged({}, task.judge)
    advice = weighing._advice(settings, bounds, made, task.multiplier, judged)
    return advice.verdict, made


@pytest.mark.parametrize("path", sorted(RESULTS.glob("gap_*.json.gz")), ids=str)
def test_the_table_of_measurements_read_again_says_what_their_rows_do(path):
    name = path.name.removesuffix(".json.gz")
    findings = measured(name)
    verdict, made = read_again(findings)
    cells = [cell(made[q], 3) for q in (DIFFERENCE, MATCHED)]
    if name.startswith("gap_again"):
        # Run under the rule of now: there is no other reading.
        assert verdict == findings.advice.verdict
        for question in (DIFFERENCE, MATCHED):
            assert made[question] == findings.tasks[0].quantity(question)
    else:
        row = f"| `{name}` | {verdict} | {' | '.join(cells)} |"
        assert row in (RESULTS / "README.md").read_text(encoding="utf-8")
    # What decides nothing in the pilot comes out as the run had it.
    for quantity in findings.tasks[0].quantities:
        if quantity.key not in ("Q6", "Q7") and quantity.low != quantity.high:
            assert made[quantity.name].low == pytest.approx(quantity.low)
    if name in TWINS:
        head = (CONFIGS / "gap" / "quickstart.yaml").read_text(encoding="utf-8")
        (task,) = findings.tasks
        assert f"{task.task}: {verdict}" in " ".join(head.replace("#", "").split())


@pytest.mark.parametrize(
    "name", [name for name in TWINS if (RESULTS / f"{name}.json.gz").exists()]
)
def test_the_config_as_it_stands_is_what_was_measured(name):
    findings = measured(name)
    (task,) = findings.tasks
    head = (CONFIGS / "gap" / "quickstart.yaml").read_text(encoding="utf-8")
    assert f"{task.task}: {findings.advice.verdict}" in head
    declared = config.load(CONFIGS / "gap" / "quickstart.yaml", TWINS[name])
    now = config.resolved(declared)
    for part in ("seeds", "task", "sft", "scorers", "samples", "pilot", "margins"):
        then = findings.config[part]
        assert as_then(now[part], then) == then, part


@pytest.mark.parametrize("name", ["ultrafeedback", "hh"])
def test_what_was_found_on_real_rows_stands_there(name):
    findings = measured(f"rows_{name}")
    (task,) = findings.tasks
    lead = cell(task.quantity(ADVANTAGE), 3)
    assert lead in (RESULTS / "README.md").read_text(encoding="utf-8")
    assert findings.advice.verdict == "inconclusive"
    now = config.resolved(config.load(CONFIGS / "gap" / f"{name}.yaml"))
    for part in ("seeds", "task", "model", "sft", "pairs", "scorers", "margins"):
        then = findings.config[part]
        assert as_then(now[part], then) == then, part
