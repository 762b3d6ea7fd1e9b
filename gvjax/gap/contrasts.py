"""What the data say about the declared contrasts, in numbers and in words no stronger than the intervals."""

import dataclasses
import math
from typing import Literal

import numpy as np

from gvjax.gap import statistics
from gvjax.gap.figures import number
from gvjax.gap.results import (
    BEST_OFFLINE,
    ArmResult,
    Contrast,
    Outcome,
    SeedResult,
    StudyResults,
    TaskResult,
    chosen_on_test,
)
from gvjax.gap.statistics import Estimate

LEVEL = 0.05
"""Two-sided level of every test; intervals are 95%."""

Tone = Literal["ahead", "behind", "equal", "open"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The study in a sentence or two.

    Attributes:
      headline: a few words.
      sentences: what it rests on: the primary contrast, the same at matched KL, and the twins.
      tone: which way the headline goes.
      would_change: what would make it a different verdict.
    """

    headline: str
    sentences: tuple[str, ...]
    tone: Tone
    would_change: tuple[str, ...]


def analyse(results: StudyResults) -> StudyResults:
    """The results with `outcomes` filled: each declared contrast in gold, then at matched KL.

    There is no matched KL against the SFT policy. Holm's correction covers the primary raw contrasts that have a p-value.
    """
    outcomes = []
    for contrast in results.contrasts:
        task = results.task(contrast.task)
        outcomes.append(_with_checks(gold_outcome(task, contrast), task))
        if task.start.name not in (contrast.a, contrast.b):
            # At the SFT policy's own KL, 0, every arm *is* the SFT policy.
            outcomes.append(matched_kl_outcome(task, contrast))
    family = [
        i
        for i, outcome in enumerate(outcomes)
        if outcome.contrast.primary
        and outcome.measure == "gold"
        and outcome.p_value is not None
    ]
    p_values = [outcomes[i].p_value for i in family]
    for i, p in zip(family, statistics.holm([p for p in p_values if p is not None])):
        outcomes[i] = dataclasses.replace(outcomes[i], p_holm=p)
    return dataclasses.replace(results, outcomes=tuple(outcomes))


def gold_outcome(task: TaskResult, contrast: Contrast) -> Outcome:
    """a − b in gold reward, paired by seed and prompt."""
    a, b, missing = _paired(task, contrast)
    differences = {}
    for seed in a:
        golds = a[seed].gold, b[seed].gold
        if len(golds[0]) != len(golds[1]):
            raise ValueError(
                f"{contrast.a!r} has {len(golds[0])} test prompts and {contrast.b!r} {len(golds[1])} "
                f"in seed {seed} of {task.task!r}; test both on the same prompts"
            )
        differences[seed] = np.subtract(*golds)
    if not differences:
        return Outcome(contrast, "gold", None, reason="no seed has both arms")
    broken = [seed for seed, d in differences.items() if not np.isfinite(d).all()]
    if broken:
        reason = f"gold is not finite in seed {', '.join(map(str, broken))}"
        return Outcome(contrast, "gold", None, reason=reason)
    means = {seed: float(row.mean()) for seed, row in differences.items()}
    same = _same_checkpoint(a, b)
    if len(same) == len(means):
        return _nothing_to_test(contrast, "gold", means)
    estimate = statistics.paired_mean(list(differences.values()), prompts=task.prompts)
    if same:
        also = f"the same checkpoint in seed {', '.join(map(str, same))}"
        missing = "; ".join(part for part in (missing, also) if part)
    return _outcome(contrast, "gold", estimate, means, missing)


def _with_checks(outcome: Outcome, task: TaskResult) -> Outcome:
    """The outcome with two further intervals: over seeds only, and by bootstrap."""
    if outcome.low is None:
        return outcome
    a, b, _ = _paired(task, outcome.contrast)
    rows = [np.subtract(a[seed].gold, b[seed].gold) for seed in a]
    checks = {
        "t over seeds": statistics.seed_mean([row.mean() for row in rows]).interval(),
        "bootstrap of seeds and prompts": statistics.pigeonhole_interval(
            rows, prompts=task.prompts
        ),
    }
    checks.pop(outcome.method, None)
    return dataclasses.replace(
        outcome, checks={name: ends for name, ends in checks.items() if ends}
    )


def matched_kl_outcome(task: TaskResult, contrast: Contrast) -> Outcome:
    """a − b in gold reward at the KL of whichever reported checkpoint spent less, seed by seed.

    The other arm's gold there is interpolated on its own training curve. A difference that is gone here was bought
    with KL, not with a better use of it.
    """
    a, b, missing = _paired(task, contrast)
    measure: Literal["gold at matched KL"] = "gold at matched KL"
    if a and len(_same_checkpoint(a, b)) == len(a):
        return _nothing_to_test(contrast, measure, dict.fromkeys(a, 0.0))
    differences: dict[int, float | None] = {}
    reasons = [missing] if missing else []
    for seed in a:
        start = task.start.seed(seed)
        at = min(a[seed].kl, b[seed].kl)
        matched = statistics.matched_kl_difference(
            *_frontier(a[seed], start), *_frontier(b[seed], start), at=at
        )
        differences[seed] = matched.difference
        if matched.difference is None:
            reason = matched.reason.replace("a was", f"{contrast.a} was", 1)
            reason = reason.replace("b was", f"{contrast.b} was", 1)
            reasons.append(f"seed {seed}: {reason}")
    found = [d for d in differences.values() if d is not None]
    if not found:
        reason = "; ".join(reasons) or "no seed has both arms"
        return Outcome(
            contrast, measure, None, seeds=_by_name(differences), reason=reason
        )
    estimate = statistics.seed_mean(found)
    return _outcome(contrast, measure, estimate, differences, "; ".join(reasons))


def arm_estimate(task: TaskResult, arm: ArmResult) -> Estimate:
    """Mean gold reward of one arm."""
    return statistics.paired_mean(
        [np.asarray(seed.gold) for seed in arm.seeds], prompts=task.prompts
    )


def winrate_estimate(task: TaskResult, arm: ArmResult) -> Estimate:
    """How often the arm's completion has the higher gold reward than the start's, ties counting ½.

    The interval is of the mean over seeds and prompts; it may leave [0, 1] only when nearly every prompt is won.
    """
    scores = [
        statistics.win_scores(seed.gold, task.start.seed(seed.seed).gold)
        for seed in arm.seeds
    ]
    return statistics.paired_mean(scores, prompts=task.prompts)


def describe(outcome: Outcome, unit: str = "gold") -> str:
    """One outcome in words: "RLOO is ahead of the best offline arm by 0.22 [0.17, 0.27] gold"."""
    a, b = _the(outcome.contrast.a), _the(outcome.contrast.b)
    where = " at matched KL" if outcome.measure == "gold at matched KL" else ""
    if outcome.estimate is None:
        return f"{a} and {b} cannot be compared{where} ({outcome.reason})"
    if outcome.same_checkpoint:
        return f"{a} and {b} kept the same checkpoint{where}: nothing to test"
    mean, signed = outcome.estimate, number(outcome.estimate, sign=True)
    if outcome.low is None or outcome.high is None:
        return (
            f"inconclusive{where}: {a} minus {b} is {signed} {unit} ({outcome.reason})"
        )
    interval = f"[{number(outcome.low, sign=True)}, {number(outcome.high, sign=True)}]"
    tone = tone_of(outcome)
    if tone in ("ahead", "behind"):
        verb = "is ahead of" if tone == "ahead" else "is behind"
        low, high = sorted([abs(outcome.low), abs(outcome.high)])
        text = (
            f"{a} {verb} {b} by {abs(mean):.2f} [{low:.2f}, {high:.2f}] {unit}{where}"
        )
    elif tone == "equal":
        text = f"{a} equals {b} within ±{outcome.contrast.margin:g} {unit}{where} ({signed} {interval})"
    elif outcome.low > 0 or outcome.high < 0:
        text = (
            f"no difference between {a} and {b} survives correction for the declared tests{where} "
            f"({signed} {interval} {unit}, corrected p = {outcome.p_holm:.2g})"
        )
    else:
        largest = max(abs(outcome.low), abs(outcome.high))
        text = (
            f"no difference detected between {a} and {b}{where} ({signed} {interval} {unit}); "
            f"differences smaller than {largest:.2f} are not excluded"
        )
    return text


def tone_of(outcome: Outcome) -> Tone:
    """Which way an outcome goes; "open" whenever the interval or Holm's correction leaves it open."""
    if outcome.estimate is None or outcome.low is None or outcome.high is None:
        return "open"
    significant = outcome.p_holm is None or outcome.p_holm < LEVEL
    if outcome.equivalent:
        return "equal"
    if outcome.low > 0 and significant:
        return "ahead"
    if outcome.high < 0 and significant:
        return "behind"
    return "open"


def verdict(results: StudyResults) -> Verdict:
    """What the study says, from the outcomes of `analyse`.

    "Ahead" needs the first primary contrast on a main task to be ahead, and its estimate to reach the margin; the
    headline then adds what is left of that at matched KL. "Enough" needs equivalence, or an upper bound below the margin. Everything
    else is inconclusive.
    """
    mains = {task.task for task in results.tasks if task.role == "main"}
    primary = [o for o in results.outcomes if o.contrast.primary]
    raws = [o for o in primary if o.measure == "gold" and o.contrast.task in mains]
    if not raws:
        return Verdict(
            "Nothing was declared",
            ("No primary contrast on a main task was declared before the run.",),
            "open",
            ("Declare a primary contrast in the study's config.",),
        )
    raw = raws[0]
    matched = next(
        (
            o
            for o in results.outcomes
            if o.contrast == raw.contrast and o.measure == "gold at matched KL"
        ),
        Outcome(
            raw.contrast,
            "gold at matched KL",
            None,
            reason="one of them is where all arms start",
        ),
    )
    headline, tone = _headline(raw, matched)
    task = results.task(raw.contrast.task)
    sentences = [f"On {task.task}, {describe(raw)}{_over(len(raw.seeds))}."]
    if _flattered(task, raw):
        sentences.append(
            "The best offline arm was chosen for each seed on the test prompts themselves, which flatters it: these "
            "results hold no gold on validation prompts."
        )
    if not raw.same_checkpoint:
        sentences.append(_capital(describe(matched)) + ".")
    for other in raws[1:]:
        sentences.append(f"On {other.contrast.task}, {describe(other)}.")
    for outcome in primary:
        if outcome.measure == "gold" and outcome.contrast.task not in mains:
            sentences.append(
                f"On the twin {outcome.contrast.task}, {describe(outcome)}."
            )
            if tone_of(outcome) == "ahead":
                sentences.append(
                    "The twin was built to have no such lead, so do not put the lead down to easy verification."
                )
    return Verdict(
        headline, tuple(sentences), tone, tuple(_would_change(task, raw, matched))
    )


def _headline(raw: Outcome, matched: Outcome) -> tuple[str, Tone]:
    tone, margin = tone_of(raw), raw.contrast.margin or 0.0
    a, b = _the(raw.contrast.a), _the(raw.contrast.b)
    if raw.same_checkpoint:
        return f"{_capital(a)} and {b} kept the same checkpoint", "open"
    if raw.estimate is None or raw.low is None or raw.high is None:
        return "Inconclusive", "open"
    if tone == "equal" or (raw.high < margin and tone != "behind"):
        return f"{_capital(b)} was enough", "equal"
    if tone == "behind":
        return f"{_capital(b)} is ahead", "behind"
    if tone == "ahead" and raw.estimate < margin:
        return f"{_capital(a)} is ahead, perhaps by too little to matter", "open"
    if tone == "ahead":
        at_matched_kl = {
            "ahead": "",
            "behind": ", but behind at matched KL",
            "equal": ", but equal at matched KL",
            "open": "; at matched KL that is open",
        }
        return f"{_capital(a)} is ahead{at_matched_kl[tone_of(matched)]}", "ahead"
    return "Inconclusive", "open"


def _would_change(task: TaskResult, raw: Outcome, matched: Outcome) -> list[str]:
    lines = []
    a, b = _the(raw.contrast.a), _the(raw.contrast.b)
    seeds = [d for d in raw.seeds.values() if d is not None]
    if raw.same_checkpoint:
        lines.append(
            f"Settings with which {a} and {b} end elsewhere: they kept the same checkpoint in every seed."
        )
        return lines
    if raw.estimate is None or raw.low is None or raw.high is None:
        lines.append(
            "At least two seeds, better five: with one, nobody knows how much of the difference is luck of the seed."
        )
        return lines
    tone = tone_of(raw)
    if tone in ("ahead", "behind"):
        other = b if tone == "ahead" else a
        gap = min(abs(raw.low), abs(raw.high))
        lines.append(
            f"Better tuning of {other}: {gap:.2f} more gold would reach the edge of the interval, "
            f"{abs(raw.estimate):.2f} would close the gap."
        )
        agreeing = sum(d * raw.estimate > 0 for d in seeds)
        lines.append(
            f"{agreeing} of {len(seeds)} seeds point the same way; they range from {number(min(seeds), sign=True)} to {number(max(seeds), sign=True)}."
        )
    else:
        if raw.detectable is not None:
            lines.append(
                f"More seeds: these {len(seeds)} would have found a true difference of {raw.detectable:.2f} in 80% of "
                "such studies, and miss smaller ones more often."
            )
        if raw.estimate and raw.detectable:
            needed = math.ceil(len(seeds) * (raw.detectable / raw.estimate) ** 2)
            if len(seeds) < needed <= 1000:
                lines.append(
                    f"If the true difference is the {number(raw.estimate, sign=True)} seen here, about {needed} seeds would show it."
                )
    if matched.estimate is None:
        lines.append(
            "Curves that overlap in KL: without them, a lead may only mean a longer walk from the SFT policy."
        )
    elif tone_of(matched) != tone:
        lines.append(
            "A limit on KL: at equal distance from the SFT policy the data do not say the same."
        )
    if _flattered(task, raw):
        lines.append(
            "Not a fairer choice of the offline arm, on other prompts than it is tested on: that could only widen the lead."
            if tone == "ahead"
            else "A choice of the offline arm on other prompts than it is tested on: that could only help the other arm."
        )
    lines.append(
        "Another task. An advantage seen here is evidence about this gold reward and this amount of data, not about others."
    )
    return lines


def _flattered(task: TaskResult, outcome: Outcome) -> bool:
    """Whether the second arm was chosen on the prompts it is tested on."""
    return outcome.contrast.b == BEST_OFFLINE and chosen_on_test(task.offline)


def _paired(
    task: TaskResult, contrast: Contrast
) -> tuple[dict[int, SeedResult], dict[int, SeedResult], str]:
    a = {seed.seed: seed for seed in task.arm(contrast.a).seeds}
    b = {seed.seed: seed for seed in task.arm(contrast.b).seeds}
    both = [seed for seed in a if seed in b]
    alone = sorted(set(a) ^ set(b))
    missing = f"only one arm has seed {', '.join(map(str, alone))}" if alone else ""
    return {s: a[s] for s in both}, {s: b[s] for s in both}, missing


def _same_checkpoint(a: dict[int, SeedResult], b: dict[int, SeedResult]) -> list[int]:
    """Seeds in which two arms kept one policy: as many updates, and every completion judged and measured the same."""

    def kept(result: SeedResult):
        return result.step, result.gold, result.kl, result.length

    return [seed for seed in a if kept(a[seed]) == kept(b[seed])]


def _nothing_to_test(
    contrast: Contrast,
    measure: Literal["gold", "gold at matched KL"],
    seeds: dict[int, float],
) -> Outcome:
    reason = "both arms kept the same checkpoint in every seed"
    return Outcome(
        contrast,
        measure,
        0.0,
        seeds=_by_name(seeds),
        same_checkpoint=True,
        reason=reason,
    )


def _frontier(result: SeedResult, start: SeedResult) -> tuple[list[float], list[float]]:
    points = [(start.kl, start.mean_gold), (result.kl, result.mean_gold)]
    points += [(point.kl, point.gold) for point in result.curve]
    return [kl for kl, _ in points], [gold for _, gold in points]


def _outcome(
    contrast: Contrast,
    measure: Literal["gold", "gold at matched KL"],
    estimate: Estimate,
    seeds: dict[int, float] | dict[int, float | None],
    reason: str,
) -> Outcome:
    low, high = estimate.interval() or (None, None)
    equivalent = None
    if contrast.margin is not None and low is not None:
        p = estimate.equivalence_p_value(contrast.margin)
        equivalent = p is not None and p < LEVEL
    return Outcome(
        contrast=contrast,
        measure=measure,
        estimate=estimate.mean,
        low=low,
        high=high,
        method=estimate.method,
        p_value=estimate.p_value(),
        degrees_of_freedom=estimate.degrees_of_freedom,
        equivalent=equivalent,
        detectable=estimate.detectable(),
        seeds=_by_name(seeds),
        reason="; ".join(part for part in (estimate.reason, reason) if part),
    )


def _by_name(
    seeds: dict[int, float] | dict[int, float | None],
) -> dict[str, float | None]:
    return {str(seed): value for seed, value in seeds.items()}


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _the(arm: str) -> str:
    return "the best offline arm" if arm == BEST_OFFLINE else arm


def _over(seeds: int) -> str:
    return f", over {seeds} seeds" if seeds > 1 else ""
