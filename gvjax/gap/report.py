"""The report of a comparison study: one self-contained HTML page, and a table for the terminal."""

import json
import math
import pathlib
import statistics as stdlib_statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jinja2
from markupsafe import Markup
from rich import box
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gvjax.gap import contrasts, figures, statistics
from gvjax.gap.figures import Figure, number
from gvjax.gap.results import (
    BEST_OFFLINE,
    ArmResult,
    Contrast,
    Ledger,
    Outcome,
    StudyResults,
    TaskResult,
    chosen_on_test,
    write_whole,
)
from gvjax.gap.statistics import Estimate

ROADS = {
    "start": "where all arms start",
    "offline": "learning from the pairs alone",
    "relabelled": "offline, on samples labelled by the reward model",
    "online": "learning from its own samples",
    "selection": "choosing among samples, no training",
}
"""The roads in the order they are shown, in words."""

ROLES = {"main": "main task", "twin": "control twin"}
CHANCE = math.log(0.5)


def render(results: StudyResults, path: str | pathlib.Path) -> None:
    """Writes the report as one HTML page that needs no network, no scripts and no other file.

    Args:
      results: of the study; its outcomes are computed anew.
      path: of the page to write, in one piece.
    """
    write_whole(path, page(results))


def page(results: StudyResults) -> str:
    """The report's HTML."""
    results = contrasts.analyse(results)
    return template("report.html").render(
        results=results,
        verdict=contrasts.verdict(results),
        tasks=[task_context(task) for task in results.tasks],
        twins=forests(results),
        has_offline=any(task.offline for task in results.tasks),
        flattered=any(chosen_on_test(task.offline) for task in results.tasks),
        outcomes=[_outcome_context(outcome) for outcome in results.outcomes],
        config=json.dumps(results.config, indent=2, default=str),
        ledger_columns=list(LEDGER_COLUMNS.values()),
        seed_list=sorted(
            {s.seed for task in results.tasks for arm in task.arms for s in arm.seeds}
        ),
        roads=ROADS,
        roles=ROLES,
    )


def template(name: str) -> jinja2.Template:
    """A page's template; a name that it lacks is an error, and values are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gvjax.gap"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def terminal_table(results: StudyResults) -> Group:
    """The verdict, the arms of every task and the declared contrasts, for `rich.console.Console.print`."""
    results = contrasts.analyse(results)
    verdict = contrasts.verdict(results)
    colour = {"ahead": "green", "behind": "yellow", "equal": "cyan", "open": "magenta"}
    parts: list[Any] = [
        Panel(
            Text("\n".join(verdict.sentences)),
            title=Text(verdict.headline, style="bold"),
            border_style=colour[verdict.tone],
        )
    ]
    for task in results.tasks:
        table = Table(
            title=Text(f"{task.task} ({ROLES[task.role]})"),
            title_justify="left",
            box=box.SIMPLE_HEAD,
        )
        for name in ("arm", "gold", "95% interval", "KL", "length", "wins vs SFT"):
            table.add_column(name, justify="left" if name == "arm" else "right")
        for arm in _by_road(task.arms):
            row = _arm_context(task, arm)
            table.add_row(
                Text(arm.name),
                row["gold"],
                row["interval"],
                row["kl"],
                row["length"],
                row["winrate"],
            )
        parts.append(table)
    if results.outcomes:
        table = Table(
            title="declared contrasts", title_justify="left", box=box.SIMPLE_HEAD
        )
        for name in ("task", "a − b", "measure", "difference", "95% interval", "p"):
            table.add_column(
                name,
                justify="left" if name in ("task", "a − b", "measure") else "right",
            )
        for outcome in results.outcomes:
            row = _outcome_context(outcome)
            table.add_row(
                Text(outcome.contrast.task),
                Text(row["name"]),
                outcome.measure,
                row["difference"],
                row["interval"],
                row["p"],
            )
        parts.append(table)
    return Group(*parts)


def task_context(task: TaskResult) -> dict[str, Any]:
    """What a page shows of one task: arms, figures, samples and ledger."""
    arms = _by_road(task.arms)
    shown = [arm.name for arm in arms]
    samples = [
        {
            "prompt": sample.prompt,
            "rows": [
                (
                    name,
                    sample.completions[name],
                    number(sample.gold[name]) if name in sample.gold else None,
                )
                for name in sorted(
                    sample.completions,
                    key=lambda name: shown.index(name) if name in shown else len(shown),
                )
            ],
        }
        for sample in task.samples
    ]
    plots = [_frontier(task), _learning_curves(task), _scorers(task), _best_of_n(task)]
    return {
        "task": task,
        "arms": [_arm_context(task, arm) for arm in arms],
        "tiles": _tiles(task),
        "figures": [plot for plot in plots if plot is not None],
        "ledger": [_ledger_context(arm) for arm in arms],
        "samples": samples,
    }


def _by_road(arms: Iterable[ArmResult]) -> list[ArmResult]:
    return sorted(arms, key=lambda arm: list(ROADS).index(arm.road))


def _arm_context(task: TaskResult, arm: ArmResult) -> dict[str, Any]:
    kl = stdlib_statistics.fmean(seed.kl for seed in arm.seeds)
    length = stdlib_statistics.fmean(seed.length for seed in arm.seeds)
    row = {
        "arm": arm,
        "key": figures.legend_marker(*reversed(_mark(task, arm))),
        "gold": "not finite",
        "interval": "—",
        "seeds": [(s.seed, number(s.mean_gold, 3)) for s in arm.seeds],
        "kl": number(kl),
        "length": number(length, 1),
        "winrate": "—",
        "winrate_interval": "",
        "settings": [
            (s.seed, ", ".join(f"{k} {_short(v)}" for k, v in s.setting.items()))
            for s in arm.seeds
            if s.setting
        ],
    }
    if all(math.isfinite(g) for seed in arm.seeds for g in seed.gold):
        estimate = contrasts.arm_estimate(task, arm)
        row["gold"] = number(estimate.mean, 3)
        row["interval"] = _interval(estimate)
        if arm.road != "start":
            winrate = contrasts.winrate_estimate(task, arm)
            row["winrate"] = f"{100 * winrate.mean:.0f}%"
            ends = winrate.interval()
            if ends is not None:
                low, high = (min(max(100 * end, 0), 100) for end in ends)
                row["winrate_interval"] = f"[{low:.0f}, {high:.0f}]"
    return row


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _interval(estimate: Estimate, digits: int = 3, sign: bool = False) -> str:
    ends = estimate.interval()
    if ends is None:
        return "one seed"
    low, high = (number(end, digits, sign) for end in ends)
    return f"[{low}, {high}]"


def _outcome_context(outcome: Outcome) -> dict[str, Any]:
    p_value = outcome.p_holm if outcome.p_holm is not None else outcome.p_value
    checks = [
        f"{name} [{number(low, sign=True)}, {number(high, sign=True)}]"
        for name, (low, high) in outcome.checks.items()
    ]
    interval = "the same checkpoint" if outcome.same_checkpoint else "—"
    if outcome.low is not None and outcome.high is not None:
        interval = (
            f"[{number(outcome.low, sign=True)}, {number(outcome.high, sign=True)}]"
        )
    equivalent = {None: "—", True: "yes", False: "not shown"}[outcome.equivalent]
    margin = outcome.contrast.margin
    return {
        "outcome": outcome,
        "name": f"{outcome.contrast.a} − {outcome.contrast.b}",
        "difference": "—"
        if outcome.estimate is None
        else number(outcome.estimate, sign=True),
        "interval": interval,
        "p": "—"
        if p_value is None
        else ("<.001" if p_value < 0.001 else f"{p_value:.3f}".lstrip("0")),
        "corrected": outcome.p_holm is not None,
        "equivalent": equivalent if margin is None else f"±{margin:g}: {equivalent}",
        "detectable": "—" if outcome.detectable is None else number(outcome.detectable),
        "seeds": [
            (seed, "—" if value is None else number(value, sign=True))
            for seed, value in outcome.seeds.items()
        ],
        "checks": "; ".join(checks),
        "tone": contrasts.tone_of(outcome),
    }


LEDGER_COLUMNS = {
    "labels": "labels",
    "prompts": "prompts",
    "sampled_tokens": "tokens sampled",
    "trained_tokens": "tokens trained",
    "reward_model_calls": "reward model calls",
    "gold_calls": "gold reward calls",
    "flops": "FLOPs",
    "seconds": "seconds",
}


def _ledger_context(arm: ArmResult) -> dict[str, Any]:
    total = sum((seed.ledger for seed in arm.seeds), Ledger())
    cells = [
        _amount(getattr(total, field) / len(arm.seeds)) for field in LEDGER_COLUMNS
    ]
    return {"arm": arm, "cells": cells}


def _amount(value: float) -> str:
    """A count in three digits: 1,000, then 76.8 k, 1.2 M, and 3.1e17 beyond 1e15."""
    if value == 0:
        return "—"
    if value >= 1e15:
        return f"{value:.1e}".replace("e+", "e")
    for scale, suffix in [(1e12, "T"), (1e9, "G"), (1e6, "M")]:
        if value >= scale:
            return f"{value / scale:.3g} {suffix}"
    if value >= 1e4:
        return f"{value / 1e3:.3g} k"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _tiles(task: TaskResult) -> list[tuple[str, str, str]]:
    """(label, number, note) of the few numbers that say most."""
    best: list[tuple[str, ArmResult]] = [("SFT start", task.start)]
    if task.offline:
        best.append((BEST_OFFLINE, task.arm(BEST_OFFLINE)))
    online = [arm for arm in task.arms if arm.road == "online"]
    if online:
        top = max(online, key=_validation_gold(online))
        best.append((f"best online: {top.name}", top))
    tiles = []
    for label, arm in best:
        mean = _mean_gold(arm)
        kl = stdlib_statistics.fmean(seed.kl for seed in arm.seeds)
        note = "" if arm.road == "start" else f"KL {number(kl, 1)} nats"
        tiles.append((label, number(mean, 2), note))
    if task.optimum is not None:
        tiles.append(("optimum", number(task.optimum, 2), ""))
    return tiles


def _validation_gold(arms: Sequence[ArmResult]) -> Callable[[ArmResult], float]:
    """What to choose among arms by: mean gold on validation prompts, on the test prompts where some lack it."""
    if chosen_on_test(arms):
        return _mean_gold
    return lambda arm: stdlib_statistics.fmean(
        seed.extra.get("validation_gold", 0.0) for seed in arm.seeds
    )


def _mean_gold(arm: ArmResult) -> float:
    mean = stdlib_statistics.fmean(seed.mean_gold for seed in arm.seeds)
    return mean if math.isfinite(mean) else -math.inf


def _mark(task: TaskResult, arm: ArmResult) -> tuple[str, str]:
    """(CSS class, marker shape): colour by road, shape by the arm's place on its road."""
    road = [other.name for other in task.arms if other.road == arm.road]
    place = road.index(arm.name) if arm.name in road else 0
    return f"road-{arm.road}", figures.SHAPES[place % len(figures.SHAPES)]


def forests(results: StudyResults) -> list[tuple[TaskResult, Figure]]:
    """Every arm's difference to the best offline one, one figure per task over one common range."""
    found = []
    for task in results.tasks:
        reference = BEST_OFFLINE if task.offline else task.start.name
        rows = []
        for arm in _by_road(task.arms):
            if arm.name == reference:
                continue
            outcome = contrasts.gold_outcome(
                task, Contrast(task.task, arm.name, reference)
            )
            rows.append((arm, outcome))
        found.append((task, reference, rows))
    values: list[float] = [0.0]
    for _, _, rows in found:
        for _, o in rows:
            ends = [o.estimate, o.low, o.high, *o.seeds.values()]
            values += [v for v in ends if v is not None]
    x_range = figures.padded(values, 0.03)
    forests = []
    for task, reference, rows in found:
        drawn = []
        data: list[tuple[object, ...]] = [
            ("arm", "road", "difference", "low", "high", "seed", "seed_difference")
        ]
        for arm, o in rows:
            css, shape = _mark(task, arm)
            interval = None
            shown = "not finite"
            if o.estimate is not None:
                shown = number(o.estimate, sign=True)
            if o.low is not None and o.high is not None:
                interval = (o.low, o.high)
                low, high = number(o.low, sign=True), number(o.high, sign=True)
                shown += f" [{low}, {high}]"
            seeds = tuple(
                (value, f"{arm.name}, seed {seed}: {number(value, 3, sign=True)}")
                for seed, value in o.seeds.items()
                if value is not None
            )
            value = math.nan if o.estimate is None else o.estimate
            drawn.append(
                figures.Row(arm.name, css, shape, value, interval, seeds, shown)
            )
            data += [
                (arm.name, arm.road, o.estimate, o.low, o.high, seed, value)
                for seed, value in o.seeds.items()
            ]
        svg = figures.forest(
            f"Differences in gold to {reference} on {task.task}",
            drawn,
            x_label=f"gold, minus {reference}",
            x_range=x_range,
            rule=(0.0, f"{reference} = 0"),
        )
        caption = "Bars are 95% intervals over seeds and prompts; small dots are single seeds."
        title = f"{task.task}: {ROLES[task.role]}"
        forests.append((task, Figure(title, caption, svg, tuple(data))))
    return forests


def _legend(
    task: TaskResult, arms: Sequence[ArmResult]
) -> tuple[tuple[Markup, str], ...]:
    keys = []
    for arm in arms:
        css, shape = _mark(task, arm)
        keys.append((figures.legend_marker(shape, css), arm.name))
    return tuple(keys)


def _frontier(task: TaskResult) -> Figure:
    """Gold against KL: every seed's curve and checkpoint, and the mean checkpoint of each arm."""
    series = []
    data: list[tuple[object, ...]] = [
        ("arm", "road", "seed", "step", "kl", "gold", "length", "reported")
    ]
    arms = _by_road(task.arms)
    for arm in arms:
        css, shape = _mark(task, arm)
        lines, marks = [], []
        for s in arm.seeds:
            start = task.start.seed(s.seed)
            points = [(start.kl, start.mean_gold)] if s.curve else []
            points += [(p.kl, p.gold) for p in s.curve]
            lines.append(tuple(points))
            where = f"gold {number(s.mean_gold, 3)}, KL {number(s.kl)}"
            marks.append((s.kl, s.mean_gold, f"{arm.name}, seed {s.seed}: {where}"))
            data += [
                (arm.name, arm.road, s.seed, p.step, p.kl, p.gold, p.length, 0)
                for p in s.curve
            ]
            data.append(
                (arm.name, arm.road, s.seed, s.step, s.kl, s.mean_gold, s.length, 1)
            )
        kl = stdlib_statistics.fmean(s.kl for s in arm.seeds)
        gold = stdlib_statistics.fmean(s.mean_gold for s in arm.seeds)
        tip = f"{arm.name}: gold {number(gold, 3)}, KL {number(kl)}"
        series.append(
            figures.Series(
                arm.name,
                css,
                shape,
                lines=tuple(lines),
                marks=tuple(marks),
                mean_marks=((kl, gold, tip),),
            )
        )
    svg = figures.xy(
        f"Gold reward against KL to the SFT policy on {task.task}",
        series,
        x_label="KL to the SFT policy, nats per completion",
        y_label="gold",
        root_x=True,
        rules=_optimum(task, arms),
    )
    caption = (
        "Higher at the same KL is a better use of it. KL goes with its square root, which gives small ones room. Lines are training runs from the SFT policy on, one per seed, "
        "on validation prompts; markers are the reported checkpoints on the test prompts, large ones their mean."
    )
    return Figure(
        f"Gold against KL, {task.task}", caption, svg, tuple(data), _legend(task, arms)
    )


def _optimum(task: TaskResult, arms: Sequence[ArmResult]) -> list[tuple[float, str]]:
    """The optimum as a rule, where it does not squeeze the data into a corner."""
    if task.optimum is None:
        return []
    golds = [s.mean_gold for arm in arms for s in arm.seeds]
    low, high = min(golds), max(golds)
    if task.optimum - high > 0.6 * (high - low):
        return []
    return [(task.optimum, "optimum")]


def _learning_curves(task: TaskResult) -> Figure | None:
    """Gold against optimizer updates."""
    arms = [arm for arm in _by_road(task.arms) if any(s.curve for s in arm.seeds)]
    if not arms:
        return None
    series = []
    data: list[tuple[object, ...]] = [("arm", "road", "seed", "step", "gold")]
    for arm in arms:
        css, shape = _mark(task, arm)
        curves = []
        for s in arm.seeds:
            start = task.start.seed(s.seed).mean_gold
            curve = [(p.step, p.gold) for p in s.curve]
            if curve and curve[0][0] > 0:
                curve.insert(0, (0, start))
            curves.append(tuple((float(x), y) for x, y in curve))
            data += [(arm.name, arm.road, s.seed, x, y) for x, y in curve]
        steps = {tuple(x for x, _ in curve) for curve in curves}
        mean: tuple[tuple[float, float], ...] = ()
        if len(steps) == 1 and len(curves) > 1:
            mean = tuple(
                (column[0][0], stdlib_statistics.fmean(y for _, y in column))
                for column in zip(*curves)
            )
        ends = tuple(
            (x, y, f"{arm.name}: {number(y, 3)} at step {x:g}") for x, y in mean[-1:]
        )
        series.append(
            figures.Series(
                arm.name, css, shape, lines=tuple(curves), mean=mean, mean_marks=ends
            )
        )
    svg = figures.xy(
        f"Gold reward during training on {task.task}",
        series,
        x_label="optimizer updates",
        y_label="gold",
        rules=_optimum(task, arms),
    )
    caption = (
        "On validation prompts. Thin lines are seeds; thick lines their mean, where all seeds were evaluated at the same steps. An arm whose "
        "line still rises at its end was stopped early."
    )
    return Figure(
        f"Learning curves, {task.task}", caption, svg, tuple(data), _legend(task, arms)
    )


def _scorers(task: TaskResult) -> Figure | None:
    """Held-out log-likelihood of every scorer, with its accuracy."""
    if not task.scorers:
        return None
    rows = []
    data: list[tuple[object, ...]] = [
        ("scorer", "seed", "log_likelihood", "accuracy", "gold_accuracy", "calibration_error")
    ]  # fmt: skip
    # Results of before both were kept have the second under the first one's name.
    by_labels = all(
        s.gold_accuracy is not None for scorer in task.scorers for s in scorer.seeds
    )
    right = "right" if by_labels else "right by gold"
    values = [CHANCE]
    for i, scorer in enumerate(task.scorers):
        likelihoods = [s.log_likelihood for s in scorer.seeds]
        data += [
            (
                scorer.name,
                s.seed,
                s.log_likelihood,
                s.accuracy if by_labels else None,
                s.gold_accuracy if by_labels else s.accuracy,
                s.calibration_error,
            )
            for s in scorer.seeds
        ]
        accuracy = stdlib_statistics.fmean(s.accuracy for s in scorer.seeds)
        value, interval = math.nan, None
        if all(math.isfinite(v) for v in likelihoods):
            estimate = statistics.seed_mean(likelihoods)
            value, interval = estimate.mean, estimate.interval()
        values += [*likelihoods, value, *(interval or ())]
        css = f"scorer-{i % 6}"
        shown = f"{number(value, 3)} · {100 * accuracy:.0f}% {right}"
        tips = tuple(
            (
                s.log_likelihood,
                f"{scorer.name}, seed {s.seed}: {number(s.log_likelihood, 3)}",
            )
            for s in scorer.seeds
        )
        shape = figures.SHAPES[i % len(figures.SHAPES)]
        rows.append(figures.Row(scorer.name, css, shape, value, interval, tips, shown))
    svg = figures.forest(
        f"Held-out log-likelihood of scorers on {task.task}",
        rows,
        x_label="held-out log-likelihood, nats per pair",
        x_range=figures.padded(values, 0.05),
        rule=(CHANCE, "coin flip"),
    )
    caption = (
        "How well each scorer predicts held-out labels; further right is better. If checking is easier than writing, "
        "the reward model stands right of the DPO policy's implicit reward. Bars are 95% t intervals over seeds. "
    )
    caption += (
        "Percentages are pairs in the order of their labels, which are noisy: nobody reaches 100."
        if by_labels
        else "Percentages are pairs in the order of their gold rewards, which no noise has touched."
    )
    return Figure(f"Scorers, {task.task}", caption, svg, tuple(data))


def _best_of_n(task: TaskResult) -> Figure | None:
    """Gold of the best of n samples, by who chooses."""
    if not task.best_of_n:
        return None
    series, legend = [], []
    data: list[tuple[object, ...]] = [("scorer", "seed_index", "n", "gold")]
    sizes: set[int] = set()
    order = [scorer.name for scorer in task.scorers]
    for i, curve in enumerate(task.best_of_n):
        place = order.index(curve.scorer) if curve.scorer in order else len(order) + i
        css, shape = f"scorer-{place % 6}", figures.SHAPES[place % len(figures.SHAPES)]
        lines = tuple(
            tuple((float(n), gold) for n, gold in zip(curve.n, golds))
            for golds in curve.gold
        )
        data += [
            (curve.scorer, index, n, gold)
            for index, golds in enumerate(curve.gold)
            for n, gold in zip(curve.n, golds)
        ]
        mean = tuple(
            (float(n), stdlib_statistics.fmean(column))
            for n, column in zip(curve.n, zip(*curve.gold))
        )
        tips = tuple(
            (x, y, f"{curve.scorer}, n = {x:g}: {number(y, 3)}") for x, y in mean
        )
        series.append(
            figures.Series(
                curve.scorer, css, shape, lines=lines, mean=mean, mean_marks=tips
            )
        )
        legend.append((figures.legend_marker(shape, css), curve.scorer))
        sizes.update(curve.n)
    svg = figures.xy(
        f"Gold of the best of n samples on {task.task}",
        series,
        x_label="n, samples of the SFT policy",
        y_label="gold of the chosen sample",
        log_x=True,
        x_ticks=sorted(sizes),
    )
    caption = (
        "What choosing alone can reach, without training. Gold's own choice is the ceiling; a curve that turns down "
        "is a scorer being over-optimised."
    )
    return Figure(f"Best of n, {task.task}", caption, svg, tuple(data), tuple(legend))
