"""The figures of a measurement of the gap."""

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from gvjax.gap import figures, statistics
from gvjax.gap.figures import Figure, number
from gvjax.gap.findings import Quantity, ScorerFinding, SeedValues, TaskFinding
from gvjax.gap.results import ArmResult, TaskResult

CHANCE = math.log(0.5)
MARKS = {
    "gold": ("scorer-0", "circle"),
    "local reward model": ("scorer-1", "square"),
    "global reward model": ("scorer-5", "down"),
    "DPO implicit reward": ("scorer-2", "diamond"),
    "frozen features": ("scorer-3", "triangle"),
    "shuffled reward model": ("scorer-4", "cross"),
    "own log-probability": ("scorer-0", "cross"),
}
"""(colour class, marker shape) of every scorer: no two share both."""


SHORT = {
    "gain by choosing with the verifier": "best of n by the verifier",
    "gain by choosing with the DPO policy": "best of n by the DPO policy",
    "its lead over choosing with the DPO policy": "verifier − DPO policy",
    "its lead over choosing with the policy's own log-probability": "verifier − own log-probability",
    "gain by choosing with a perfect judge": "best of n by a perfect judge",
    "verifier's gain at the largest n, less that at the chosen n": "largest n − chosen n",
    "online policy's lead over the best offline one": "online − best offline",
    "the same at equal KL to the SFT policy": "the same at equal KL",
    "the same over the offline policy that wins most on these very prompts": "online − luckiest offline",
    "head to head, online against the best offline policy": "online against offline",
    "on-policy completions instead of offline ones": "own − SFT's completions",
    "gold labels instead of the verifier's": "gold − verifier's labels",
    "on-policy completions, more with gold labels": "interaction of both",
}
"""Names that leave room for the numbers beside them."""


def of_task(task: TaskFinding) -> list[Figure]:
    """What was measured without an RL run."""
    made = [_curves(task), _advantage(task), _scorers(task), _choices(task)]
    return [figure for figure in made if figure is not None]


def _values(values: SeedValues) -> list[float]:
    return [value for value in values.values() if value is not None]


def _mean(values: SeedValues) -> float:
    found = _values(values)
    return math.fsum(found) / len(found) if found else math.nan


def _legend(names: Iterable[str]) -> tuple[tuple[Markup, str], ...]:
    return tuple(
        (figures.legend_marker(shape, css), name)
        for name in names
        for css, shape in [MARKS[name]]
    )


def _names(task: TaskFinding) -> list[str]:
    """Of the scorers with learning curves: the verifier, then the DPO policy."""
    return list(dict.fromkeys(curve.name for curve in task.curves))


def _curves(task: TaskFinding) -> Figure | None:
    """Held-out NLL against the number of training pairs."""
    sizes = sorted({curve.pairs for curve in task.curves})
    if len(sizes) < 2:
        return None
    series = []
    data: list[tuple[object, ...]] = [("scorer", "pairs", "seed", "nll")]
    for name in _names(task):
        css, shape = MARKS[name]
        mine = sorted(
            (curve for curve in task.curves if curve.name == name),
            key=lambda curve: curve.pairs,
        )
        lines = tuple(
            tuple((float(c.pairs), -(c.log_likelihood[seed] or 0.0)) for c in mine)
            for seed in mine[0].log_likelihood
        )
        mean = tuple((float(c.pairs), -_mean(c.log_likelihood)) for c in mine)
        data += [
            (name, c.pairs, seed, -value)
            for c in mine
            for seed, value in c.log_likelihood.items()
            if value is not None
        ]
        tips = tuple(
            (x, y, f"{name}, {x:g} pairs: {number(y, 3)} nats") for x, y in mean
        )
        series.append(
            figures.Series(name, css, shape, lines=lines, mean=mean, mean_marks=tips)
        )
    rules = [(-CHANCE, "coin flip")]
    gold = next((s for s in task.scorers if s.name == "gold"), None)
    if gold is not None:
        rules.append((-_mean(gold.log_likelihood), "gold reward itself"))
    svg = figures.xy(
        f"Held-out loss against training pairs on {task.task}",
        series,
        x_label="labelled pairs",
        y_label="nats per held-out pair; lower is better",
        log_x=True,
        x_ticks=[float(size) for size in sizes],
        rules=rules,
    )
    caption = (
        "How much each learns from the same labels, after temperature scaling on validation pairs. Where the reward "
        "model's curve lies below the DPO policy's, checking is the easier thing to learn. Thin lines are seeds."
    )
    title = f"Learning to predict labels, {task.task}"
    return Figure(title, caption, svg, tuple(data), _legend(_names(task)))


def _advantage(task: TaskFinding) -> Figure | None:
    """A(N), the verifier's lead in likelihood, against N."""
    sizes = sorted({curve.pairs for curve in task.curves})
    if len(sizes) < 2:
        return None
    verifier, policy = _names(task)
    by = {(curve.name, curve.pairs): curve for curve in task.curves}
    seeds = list(task.curves[0].log_likelihood)

    def lead(seed: str, size: int) -> float:
        a = by[verifier, size].log_likelihood[seed]
        b = by[policy, size].log_likelihood[seed]
        return math.nan if a is None or b is None else a - b

    lines = tuple(tuple((float(n), lead(seed, n)) for n in sizes) for seed in seeds)
    mean = tuple(
        (float(n), math.fsum(lead(seed, n) for seed in seeds) / len(seeds))
        for n in sizes
    )
    tips = []
    data: list[tuple[object, ...]] = [("pairs", "seed", "advantage", "mean", "low", "high")]  # fmt: skip
    for n, y in mean:
        estimate = statistics.seed_mean([lead(seed, int(n)) for seed in seeds])
        low, high = estimate.interval() or (math.nan, math.nan)
        tips.append((n, y, f"{n:g} pairs: {number(y, 3)} [{number(low, 3)}, {number(high, 3)}]"))  # fmt: skip
        data += [(int(n), seed, lead(seed, int(n)), y, low, high) for seed in seeds]
    css, shape = MARKS[verifier]
    series = figures.Series(
        verifier, css, shape, lines=lines, mean=mean, mean_marks=tuple(tips)
    )
    svg = figures.xy(
        f"The verifier's lead in likelihood against training pairs on {task.task}",
        [series],
        x_label="labelled pairs",
        y_label="A(N), nats per held-out pair",
        log_x=True,
        x_ticks=[float(size) for size in sizes],
        rules=[(0.0, "no gap")],
    )
    caption = (
        "The distance between the two curves beside it: the verifier's advantage A(N). One that falls towards 0 says that "
        "more labels would do what the reward model does."
    )
    return Figure(f"The advantage A(N), {task.task}", caption, svg, tuple(data))


def _scorers(task: TaskFinding) -> Figure:
    """Held-out log-likelihood of every scorer."""
    rows = []
    data: list[tuple[object, ...]] = [
        ("scorer", "seed", "log_likelihood", "mean_likelihood", "accuracy", "calibration_error")
    ]  # fmt: skip
    values = [CHANCE]
    for scorer in task.scorers:
        likelihoods = _values(scorer.log_likelihood)
        estimate = statistics.seed_mean(likelihoods)
        interval = estimate.interval()
        values += [*likelihoods, *(interval or ())]
        css, shape = MARKS[scorer.name]
        shown = f"{number(estimate.mean, 3)} · {100 * _mean(scorer.accuracy):.0f}% right · ECE {number(_mean(scorer.calibration_error))}"  # fmt: skip
        tips = tuple(
            (value, f"{scorer.name}, seed {seed}: {number(value, 3)}")
            for seed, value in scorer.log_likelihood.items()
            if value is not None
        )
        rows.append(
            figures.Row(scorer.name, css, shape, estimate.mean, interval, tips, shown)
        )
        data += [_scorer_row(scorer, seed) for seed in scorer.log_likelihood]
    svg = figures.forest(
        f"Held-out log-likelihood of scorers on {task.task}",
        rows,
        x_label="log-likelihood of held-out labels, nats per pair",
        x_range=figures.padded(values, 0.05),
        rule=(CHANCE, "coin flip"),
    )
    caption = (
        "Same pairs, same start, same tuning budget. Gold is a perfect judge of noisy labels, so no scorer can stand right of "
        "it for long; the shuffled reward model must stand at the coin flip."
    )
    return Figure(f"Scorers, {task.task}", caption, svg, tuple(data))


def _scorer_row(scorer: ScorerFinding, seed: str) -> tuple[object, ...]:
    return (
        scorer.name,
        seed,
        scorer.log_likelihood[seed],
        scorer.mean_likelihood[seed],
        scorer.accuracy[seed],
        scorer.calibration_error[seed],
    )


def _choices(task: TaskFinding) -> Figure | None:
    """Winrate of the best of n samples, by who chooses."""
    if not task.choices:
        return None
    series = []
    data: list[tuple[object, ...]] = [("scorer", "seed_index", "n", "winrate", "gold")]
    sizes: set[int] = set()
    for curve in task.choices:
        css, shape = MARKS[curve.scorer]
        lines = tuple(
            tuple((float(n), 100 * w) for n, w in zip(curve.n, row))
            for row in curve.winrate
        )
        mean = tuple(
            (float(n), 100 * math.fsum(column) / len(column))
            for n, column in zip(curve.n, zip(*curve.winrate))
        )
        tips = tuple((x, y, f"{curve.scorer}, n = {x:g}: {y:.1f}%") for x, y in mean)
        series.append(
            figures.Series(
                curve.scorer, css, shape, lines=lines, mean=mean, mean_marks=tips
            )
        )
        sizes.update(curve.n)
        data += [
            (curve.scorer, index, n, w, g)
            for index, (wins, golds) in enumerate(zip(curve.winrate, curve.gold))
            for n, w, g in zip(curve.n, wins, golds)
        ]
    svg = figures.xy(
        f"Winrate of the best of n samples on {task.task}",
        series,
        x_label="n, samples of the SFT policy",
        y_label="wins over one sample, %",
        log_x=True,
        x_ticks=[float(size) for size in sorted(sizes)],
        rules=[(50.0, "no better than any sample")],
    )
    caption = (
        f"What choosing alone is worth, without any training. On validation prompts the verifier did best at n = "
        f"{task.chosen_n}. A curve that turns down is a scorer being over-optimised; gold's is the ceiling."
    )
    names = [curve.scorer for curve in task.choices]
    title = f"Best of n, {task.task}"
    return Figure(title, caption, svg, tuple(data), _legend(names))


def decisions(
    quantities: Sequence[Quantity], margin: float, task: str
) -> Figure | None:
    """Everything that is a winrate, with the bounds that hold together where there are such."""
    rows = []
    data: list[tuple[object, ...]] = [
        ("number", "estimate", "low", "high", "simultaneous_low", "simultaneous_high", "seed", "seed_value")
    ]  # fmt: skip
    values = [-margin, margin]
    for quantity in quantities:
        if not quantity.unit.startswith("winrate") or quantity.estimate is None:
            continue
        low = quantity.low if quantity.bound_low is None else quantity.bound_low
        high = quantity.high if quantity.bound_high is None else quantity.bound_high
        # A bound of few seeds may be wider than any winrate can be.
        interval = None if low is None or high is None else (max(low, -1.0), min(high, 1.0))  # fmt: skip
        css = "road-online" if quantity.key in ("Q6", "Q7") else "scorer-1"
        shape = "diamond" if quantity.bound_low is not None else "circle"
        shown = _interval(quantity.estimate, interval)
        tips = tuple(
            (value, f"seed {seed}: {number(value, 3, sign=True)}")
            for seed, value in quantity.seeds.items()
            if value is not None
        )
        values += [quantity.estimate, *(interval or ()), *(v for v, _ in tips)]
        rows.append(
            figures.Row(
                _short(quantity.name),
                css,
                shape,
                quantity.estimate,
                interval,
                tips,
                shown,
            )
        )
        data += [
            (quantity.name, quantity.estimate, quantity.low, quantity.high, quantity.bound_low, quantity.bound_high, seed, value)
            for seed, value in quantity.seeds.items()
        ]  # fmt: skip
    if not rows:
        return None
    svg = figures.forest(
        f"Winrates and their differences on {task}",
        rows,
        x_label="winrate, as a difference",
        x_range=figures.padded(values, 0.03),
        rule=(0.0, "no difference"),
    )
    caption = (
        f"Diamonds decide: their bars hold together with at least 95% probability. Bars of circles are single 95% intervals. "
        f"Small dots are seeds. What lies within ±{margin:g} was declared too small to matter."
    )
    return Figure(f"What the advice rests on, {task}", caption, svg, tuple(data))


def _short(name: str) -> str:
    name = SHORT.get(name, name.replace("'s lead over ", " − "))
    return name if len(name) <= 30 else name[:29] + "…"


def _interval(estimate: float, interval: tuple[float, float] | None) -> str:
    shown = number(estimate, sign=True)
    if interval is None:
        return f"{shown} (one seed)"
    low, high = (number(end, sign=True) for end in interval)
    return f"{shown} [{low}, {high}]"


def over_optimisation(task: TaskResult, onsets: dict[str, SeedValues]) -> list[Figure]:
    """Gold, proxy and length against KL along the training of online arms; onsets are flagged."""
    arms = [arm for arm in task.arms if arm.road == "online" and arm.name in onsets]
    if not arms:
        return []
    looks = [
        ("Gold", "gold reward", lambda p: p.gold),
        ("Proxy", "reward under the reward model", lambda p: p.proxy),
        ("Length", "tokens", lambda p: p.length),
    ]
    return [_panel(task, arms, onsets, *look) for look in looks]


def _panel(task: TaskResult, arms: Sequence[ArmResult], onsets, what, unit, of):
    series, legend = [], []
    data: list[tuple[object, ...]] = [("arm", "seed", "kl", what.lower(), "onset_kl")]
    for i, arm in enumerate(arms):
        css, shape = "road-online", figures.SHAPES[i % len(figures.SHAPES)]
        lines, flags = [], []
        for seed in arm.seeds:
            points = [(p.kl, of(p)) for p in seed.curve if of(p) is not None]
            lines.append(tuple(points))
            at = onsets[arm.name].get(str(seed.seed))
            data += [(arm.name, seed.seed, kl, value, at) for kl, value in points]
            tip = f"{arm.name}, seed {seed.seed}: gold falls from KL {at or 0:.1f} on"
            flags += [(kl, value, tip) for kl, value in points if kl == at]
        series.append(
            figures.Series(arm.name, css, shape, lines=tuple(lines), mean_marks=tuple(flags))
        )  # fmt: skip
        legend.append((figures.legend_marker(shape, css), arm.name))
    found = sum(v is not None for arm in arms for v in onsets[arm.name].values())
    svg = figures.xy(
        f"{what} against KL during training on {task.task}",
        series,
        x_label="KL to the SFT policy, nats per completion",
        y_label=unit,
    )
    caption = {
        "Gold": f"On validation prompts, a line per seed. Large markers flag the onset of over-optimisation, from where gold "
        f"falls for good while the proxy rises: {found or 'none'} found.",
        "Proxy": "What the online road is trained to raise. It must rise; read it beside gold.",
        "Length": "Where gold or proxy rise together with length, length may be what is paid for.",
    }[what]
    title = f"{what} against KL, online arms, {task.task}"
    return Figure(title, caption, svg, tuple(data), tuple(legend))
