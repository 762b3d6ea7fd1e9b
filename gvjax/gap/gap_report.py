"""The report of a measurement of the gap: one self-contained HTML page, verdict first, and a table for the terminal."""

import json
import pathlib
from typing import Any

from rich import box
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gvjax.gap import gap_figures, report
from gvjax.gap.figures import number
from gvjax.gap.findings import GapFindings, Multiplier, Quantity, TaskFinding
from gvjax.gap.results import chosen_on_test, write_whole

TONES = {
    "RL is likely to pay": "ahead",
    "DPO is enough": "behind",
    "fix the verifier first": "equal",
    "improve coverage first": "equal",
    "collect data": "equal",
    "inconclusive": "open",
}
HEADLINES = {
    "RL is likely to pay": "RL is likely to pay on this task",
    "DPO is enough": "DPO is enough on this task",
    "fix the verifier first": "Fix the reward model before thinking of RL",
    "improve coverage first": "Improve the SFT policy first",
    "collect data": "Collect more preference data first",
    "inconclusive": "Inconclusive: these numbers do not say which road pays",
}
BASES = {
    "observed": "from a pilot that took both roads",
    "predicted": "from scorers and samples; no RL run decides it",
}
PARTS = {
    "Q1": "Predicting labels",
    "Q3": "What the lead rests on",
    "Q4": "Choosing among samples",
    "Q5": "Filtering samples, in gold reward",
    "Q6": "The pilot",
    "Q7": "Samples or labels",
    "Q9": "Rival explanations",
    "Q10": "Smaller networks",
}


def render(findings: GapFindings, path: str | pathlib.Path) -> None:
    """Writes the report as one HTML page that needs no network, no scripts and no other file."""
    write_whole(path, page(findings))


def page(findings: GapFindings) -> str:
    """The report's HTML."""
    return report.template("gap.html").render(
        results=findings,
        advice=findings.advice,
        headline=HEADLINES[findings.advice.verdict],
        basis=BASES[findings.advice.basis],
        tone=TONES[findings.advice.verdict],
        tasks=[_task_context(findings, task) for task in findings.tasks],
        margins=findings.config["margins"],
        shared=any(task.prompts == "crossed" for task in findings.tasks),
        flattered=any(
            chosen_on_test(task.offline)
            for finding in findings.tasks
            if finding.pilot is not None
            for task in finding.pilot.tasks
        ),
        config=json.dumps(findings.config, indent=2, default=str),
        ledger_columns=list(report.LEDGER_COLUMNS.values()),
        seed_list=findings.seeds,
        roads=report.ROADS,
    )


def terminal_table(findings: GapFindings) -> Group:
    """The verdict and every number with its interval, for `rich.console.Console.print`."""
    advice = findings.advice
    colour = {"ahead": "green", "behind": "cyan", "equal": "yellow", "open": "magenta"}
    parts: list[Any] = [
        Panel(
            Text("\n".join(advice.sentences)),
            title=Text(HEADLINES[advice.verdict], style="bold"),
            subtitle=BASES[advice.basis],
            border_style=colour[TONES[advice.verdict]],
        )
    ]
    for task in findings.tasks:
        table = Table(
            title=Text(f"{task.task} ({task.role})"),
            title_justify="left",
            box=box.SIMPLE_HEAD,
        )
        for name in ("number", "unit", "estimate", "95% interval", "detectable"):
            left = name in ("number", "unit")
            table.add_column(name, justify="left" if left else "right")
        for quantity in task.quantities:
            row = _quantity_context(quantity)
            table.add_row(
                Text(quantity.name),
                Text(quantity.unit),
                row["estimate"],
                row["interval"],
                row["detectable"],
            )
        parts += [table, Text(f"data multiplier: {_multiplier(task.multiplier)}")]
    return Group(*parts)


def _task_context(findings: GapFindings, task: TaskFinding) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for quantity in task.quantities:
        rows.setdefault(PARTS[quantity.key], []).append(_quantity_context(quantity))
    margin = findings.config["margins"]["winrate"]
    pilot: dict[str, Any] | None = None
    if task.pilot is not None:
        result = task.pilot.tasks[0]
        pilot = report.task_context(result)
        # The scorers stand above, all of them.
        pilot["figures"] = [f for f in pilot["figures"] if "Scorers" not in f.title]
        pilot["forest"] = report.forests(task.pilot)[0][1]
        pilot["over"] = gap_figures.over_optimisation(result, task.onsets)
        pilot["square"] = _square(findings, task)
        pilot["bill"] = _bill(findings, task)
    return {
        "task": task,
        "parts": rows,
        "figures": gap_figures.of_task(task),
        "decisions": gap_figures.decisions(task.quantities, margin, task.task),
        "multiplier": _multiplier(task.multiplier),
        "scorers": [_scorer_context(scorer) for scorer in task.scorers],
        "pilot": pilot,
        "judge": [
            (name, _measure(*found))
            for name, found in (task.judge.measures.items() if task.judge else ())
        ],
    }


def _measure(value: float, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return number(value)
    return f"{number(value)} [{number(low)}, {number(high)}]"


def _quantity_context(quantity: Quantity) -> dict[str, Any]:
    def ends(low: float | None, high: float | None) -> str:
        if low is None or high is None:
            return "—"
        return f"[{number(low, 3, sign=True)}, {number(high, 3, sign=True)}]"

    p_value = quantity.p_value if quantity.p_holm is None else quantity.p_holm
    equivalent = {None: "—", True: "yes", False: "not shown"}[quantity.equivalent]
    margin = "" if quantity.margin is None else f"±{quantity.margin:g}: "
    estimate = "—"
    if quantity.estimate is not None:
        estimate = number(quantity.estimate, 3, sign=True)
    return {
        "quantity": quantity,
        "estimate": estimate,
        "interval": ends(quantity.low, quantity.high),
        "bounds": ends(quantity.bound_low, quantity.bound_high),
        "check": "" if quantity.check is None else ends(*quantity.check),
        "p": "—" if p_value is None else "<.001" if p_value < 0.001 else f"{p_value:.3f}".lstrip("0"),
        "equivalent": margin + equivalent,
        "detectable": "—" if quantity.detectable is None else number(quantity.detectable, 3),
        "seeds": [
            (seed, "—" if value is None else number(value, 3, sign=True))
            for seed, value in quantity.seeds.items()
        ],
    }  # fmt: skip


def _multiplier(multiplier: Multiplier | None) -> str:
    """How many times the labels the policy needs, in words."""
    if multiplier is None:
        return "not fitted: it takes three sizes of the data"
    if not multiplier.identified or multiplier.value is None:
        return f"not identified: {multiplier.reason}"
    low, high = multiplier.low or 0.0, multiplier.high or 0.0
    return f"{multiplier.value:.2g} [{low:.2g}, {high:.2g}] times the labels"


def _scorer_context(scorer) -> dict[str, Any]:
    def shown(values, digits: int = 3) -> list[tuple[str, str]]:
        return [(s, "—" if v is None else number(v, digits)) for s, v in values.items()]

    return {
        "scorer": scorer,
        "log_likelihood": shown(scorer.log_likelihood),
        "mean_likelihood": shown(scorer.mean_likelihood),
        "accuracy": shown(scorer.accuracy),
        "calibration_error": shown(scorer.calibration_error),
        "tries": [
            (seed, f"{rate:g} × {scorer.updates[seed]:g}")
            for seed, rate in scorer.learning_rate.items()
        ],
    }


def _square(findings: GapFindings, task: TaskFinding) -> list[list[str]] | None:
    """Winrates over the SFT policy of the four arms, completions by row, labels by column."""
    section = findings.config["pilot"]["square"]
    if section is None or task.pilot is None:
        return None
    arms = {row["arm"].name: row for row in _pilot_rows(task)}
    return [
        [
            f"{arms[section[f'{rows}_{labels}']]['winrate']} {arms[section[f'{rows}_{labels}']]['winrate_interval']}"
            for labels in ("gold", "model")
        ]
        for rows in ("offline", "online")
    ]


def _pilot_rows(task: TaskFinding) -> list[dict[str, Any]]:
    assert task.pilot is not None
    return report.task_context(task.pilot.tasks[0])["arms"]


def _bill(findings: GapFindings, task: TaskFinding) -> str:
    """What the online arm cost, in multiples of the cheapest offline arm."""
    assert task.pilot is not None
    result = task.pilot.tasks[0]

    def flops(arm) -> float:
        return sum(seed.ledger.flops for seed in arm.seeds) / len(arm.seeds)

    online = result.arm(findings.config["pilot"]["online"])
    offline = min((arm for arm in result.arms if arm.road == "offline"), key=flops)
    ratio = flops(online) / flops(offline) if flops(offline) else float("inf")
    return (
        f"{online.name} took {ratio:.2g} times the floating-point operations of {offline.name}, its reward model and sampling"
        " included."
    )
