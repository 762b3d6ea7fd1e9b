"""Q6 and Q7: what taking both roads showed, in winrates over the SFT policy's completions."""

from collections.abc import Sequence

import numpy as np

from gvjax import config
from gvjax.gap import quantities, statistics
from gvjax.gap.findings import SeedValues
from gvjax.gap.judging import Judged
from gvjax.gap.numbers import DIFFERENCE, FLATTERED, MATCHED, Numbers
from gvjax.gap.results import BEST_OFFLINE, ArmResult, SeedResult, TaskResult
from gvjax.gap.statistics import Prompts

ENOUGH = 0.5
"""The share of prompts that must have been judged in every seed, where seeds share them: what is left is a choice of prompts
too, by how hard they are to judge."""


def add_pilot(
    settings: config.GapConfig,
    task: TaskResult,
    judged: Judged,
    numbers: Numbers,
) -> None:
    """Q6 and Q7: what the pilot showed, in winrates over the SFT policy's completions."""
    pilot = settings.pilot
    assert pilot is not None
    seeds = settings.seeds
    margin = settings.margins.winrate
    online = task.arm(pilot.online)

    def wins(arm: str) -> list[np.ndarray]:
        """Of each seed, over the SFT policy on every judged prompt."""
        return [judged.wins[arm, seed] for seed in seeds]

    # Chosen on validation gold, once: what it is held against decides for the online road and against it.
    best = task.arm(BEST_OFFLINE)
    offline = [judged.wins[str(best.seed(s).setting["arm"]), s] for s in seeds]
    luckiest = [
        max(
            (judged.wins[arm.name, seed] for arm in task.offline),
            key=lambda row: float(np.nanmean(row)),
        )
        for seed in seeds
    ]

    def add(name, a, b, *, unit="winrate"):
        prompts = task.prompts
        rows, reason = _answered([x - y for x, y in zip(a, b)], prompts)
        if rows:
            numbers.add_rows("Q6", name, unit, rows, prompts, margin, reason)
        else:
            numbers.add_seeds("Q6", name, unit, [None] * len(a), margin, reason)

    add(DIFFERENCE, wins(pilot.online), offline)
    _matched(settings, online, best, judged, offline, numbers)
    add(FLATTERED, wins(pilot.online), luckiest)
    if judged.finding.kind == "gold":
        duels = [
            statistics.win_scores(online.seed(s).gold, best.seed(s).gold) for s in seeds
        ]
        evens = [np.full_like(row, 0.5) for row in duels]
        name = "head to head, online against the best offline policy"
        add(name, duels, evens, unit="winrate − ½")
    leads = [float(row.mean()) for row in numbers[DIFFERENCE].rows or ()]
    gains = [float(np.nanmean(row)) - 0.5 for row in offline]
    numbers.add_seeds(
        "Q6",
        "online policy's lead as a multiple of the offline gain",
        "times",
        [quantities.normalised_lead(a, b) for a, b in zip(leads, gains)],
        None,
        "the offline road gains next to nothing on some seeds",
        needs_all=True,
    )
    for arm in task.arms:
        if arm.name != pilot.online and arm.road != "start":
            name = f"{pilot.online}'s lead over {arm.name}"
            add(name, wins(pilot.online), wins(arm.name))
    if pilot.square is not None:
        corners = [
            [float(np.nanmean(row)) for row in wins(name)]
            for name in pilot.square.model_dump().values()
        ]
        each = [quantities.square(*values) for values in zip(*corners)]
        for name, field in (
            ("on-policy completions instead of offline ones", "samples"),
            ("gold labels instead of the verifier's", "labels"),
            ("on-policy completions, more with gold labels", "interaction"),
        ):
            values = [getattr(one, field) for one in each]
            numbers.add_seeds("Q7", name, "winrate", values, margin)


def _answered(
    rows: Sequence[np.ndarray], prompts: Prompts
) -> tuple[list[np.ndarray], str]:
    """The values that are no NaN, and a word on what is left where that matters.

    Where seeds share their prompts a column is one prompt, so one that lacks an answer in any seed is left out of all;
    nothing is left where that leaves too few.
    """
    answered = [np.isfinite(row) for row in rows]
    if prompts == "nested":
        return [row[kept] for row, kept in zip(rows, answered)], ""
    everywhere = np.all(answered, axis=0)
    reason = ""
    if not everywhere.all():
        reason = f"on the {everywhere.sum()} of {everywhere.size} prompts that were judged in every seed"
    if everywhere.mean() < ENOUGH:
        return [], f"only {reason.removeprefix('on the ')}"
    return [row[everywhere] for row in rows], reason


def _matched(
    settings: config.GapConfig,
    online: ArmResult,
    best: ArmResult,
    judged: Judged,
    offline: Sequence[np.ndarray],
    numbers: Numbers,
) -> None:
    """Adds the lead at equal KL; without a value unless the judge is gold, whose winrates the training curves have."""
    seeds = settings.seeds
    if judged.finding.kind == "gold":
        found = [
            matched_winrate(
                online.seed(seed),
                float(judged.wins[online.name, seed].mean()),
                best.seed(seed),
                float(row.mean()),
            )
            for seed, row in zip(seeds, offline)
        ]
    else:
        reason = "training curves have winrates in gold, not by this judge"
        found = [statistics.MatchedKl(None, reason)] * len(seeds)
    values = [each.difference for each in found]
    lacking: dict[str, list[str]] = {}
    for seed, each in zip(seeds, found):
        if each.reason:
            lacking.setdefault(each.reason, []).append(str(seed))
    kls = [max(min(online.seed(s).kl, best.seed(s).kl), 0.0) for s in seeds]
    unit = f"winrate, at KL {min(kls):.2g} to {max(kls):.2g}"
    margin = settings.margins.winrate
    reason = "; ".join(f"seed {', '.join(who)}: {why}" for why, who in lacking.items())
    numbers.add_seeds("Q6", MATCHED, unit, values, margin, reason)


def matched_winrate(
    online: SeedResult,
    online_winrate: float,
    offline: SeedResult,
    offline_winrate: float,
) -> statistics.MatchedKl:
    """Difference in gold winrate over the SFT policy at the KL of whichever policy spent less, along training curves.

    Points of curves are of validation prompts, the reported checkpoints' of test prompts.

    Args:
      online, offline: a seed's results; points of their curves without a winrate are left out.
      online_winrate, offline_winrate: of the reported checkpoints, in gold as the curves'.
    """

    def curve(result: SeedResult, winrate: float) -> tuple[list[float], list[float]]:
        points = [(0.0, 0.5), (result.kl, winrate)]
        points += [(p.kl, p.winrate) for p in result.curve if p.winrate is not None]
        return [kl for kl, _ in points], [value for _, value in points]

    found = statistics.matched_kl_difference(
        *curve(online, online_winrate),
        *curve(offline, offline_winrate),
        at=min(online.kl, offline.kl),
    )
    reason = found.reason.replace("a was", "online was", 1).replace(
        "b was", "offline was", 1
    )
    return statistics.MatchedKl(found.difference, reason)


def onsets(task: TaskResult, prompts: int) -> dict[str, SeedValues]:
    """Arm -> per seed, the KL at which gold starts to fall for good while the proxy goes on rising."""
    found: dict[str, SeedValues] = {}
    for arm in task.arms:
        values: SeedValues = {}
        for seed in arm.seeds:
            points = [p for p in seed.curve if p.proxy is not None]
            if not points:
                continue
            # Two standard errors of an evaluation, a mean over so many prompts: falls below it are noise.
            spread = float(np.std(seed.gold)) / prompts**0.5
            place = quantities.onset(
                [p.gold for p in points],
                [float(p.proxy or 0.0) for p in points],
                tolerance=2 * spread,
            )
            values[str(seed.seed)] = None if place is None else points[place].kl
        if values:
            found[arm.name] = values
    return found
