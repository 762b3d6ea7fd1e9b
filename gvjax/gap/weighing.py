"""From what the stages of a measurement left to numbers with intervals, and from those to advice."""

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence

import numpy as np

from gvjax import config
from gvjax.gap import gathering, judging, quantities, scorers, stages, statistics
from gvjax.gap.advice import (
    Advice,
    Bounds,
    Margins,
    Tier1,
    Tier2,
    advise,
    simultaneous,
)
from gvjax.gap.findings import (
    ChoiceCurve,
    GapFindings,
    Multiplier,
    Quantity,
    ScorerFinding,
    SeedValues,
    TaskFinding,
)
from gvjax.gap.judging import Judged
from gvjax.gap.measurement import GapPlan, MeasuredScene, sizes_of
from gvjax.gap.results import (
    BEST_OFFLINE,
    ArmResult,
    SeedResult,
    StudyResults,
    TaskResult,
)
from gvjax.gap.stages import Store
from gvjax.gap.statistics import Estimate, Prompts

LEVEL = 0.05

ADVANTAGE = "verifier's lead in likelihood"
HEADROOM = "gain by choosing with the verifier"
LEAD = "its lead over choosing with the DPO policy"
NULL_LEAD = "its lead over choosing with the policy's own log-probability"
ORACLE = "gain by choosing with a perfect judge"
EFFICIENCY = "verifier's share of the perfect judge's gain"
TURN = "verifier's gain at the largest n, less that at the chosen n"
SLOPE = "change of the lead with twice the data"
DIFFERENCE = "online policy's lead over the best offline one"
MATCHED = "the same at equal KL to the SFT policy"
FLATTERED = "the same over the offline policy that wins most on these very prompts"
CUES = "accuracy lost on paraphrases, DPO policy less verifier"
PEAK = "rarity of the best samples"
LENGTH = "share of gold explained by length"

_DECISIVE = (
    ADVANTAGE,
    HEADROOM,
    LEAD,
    ORACLE,
    EFFICIENCY,
    TURN,
    SLOPE,
    DIFFERENCE,
    MATCHED,
)
"""What the advice looks at: the bounds of those that were measured hold together."""
_TESTS = (ADVANTAGE, LEAD, DIFFERENCE, MATCHED)
"""Decision tests declared here and nowhere else: Holm's correction is over those that were measured."""


@dataclasses.dataclass
class _Number:
    """A number on its way to becoming a Quantity."""

    key: str
    unit: str
    values: SeedValues
    estimate: Estimate | None
    margin: float | None = None
    rows: list[np.ndarray] | None = None
    prompts: Prompts = "nested"
    reason: str = ""


def weigh(settings: config.GapConfig, plan: GapPlan, store: Store) -> GapFindings:
    """The findings of a measurement whose stages are all done.

    Args:
      settings: the measurement.
      plan: its stages.
      store: their results.

    Raises:
      LabelsWanted, JudgeError: see `judging.judge`.
    """
    tasks = []
    advice: Advice | None = None
    for number in range(len(plan.tasks)):
        task, its_advice = _task(settings, plan, store, number)
        tasks.append(task)
        advice = advice or its_advice
    assert advice is not None
    return GapFindings(
        name=settings.gap,
        config=config.resolved(settings),
        config_hash=config.config_hash(settings),
        versions=stages.versions_behind(plan.stages, store),
        started=store.started(),
        seeds=settings.seeds,
        tasks=tuple(tasks),
        advice=advice,
    )


def pilot_results(
    settings: config.GapConfig, plan: GapPlan, store: Store, number: int
) -> StudyResults | None:
    """Both roads on a task, where they were taken."""
    if not config.has_pilot(settings, number):
        return None
    study = config.study_of(settings, number)
    return gathering.gather(study, plan.tasks[number], store)


def _task(
    settings: config.GapConfig,
    plan: GapPlan,
    store: Store,
    number: int,
) -> tuple[TaskFinding, Advice]:
    scenes = [
        MeasuredScene(settings, plan.tasks[number], store, seed=seed, number=number)
        for seed in settings.seeds
    ]
    numbers: dict[str, _Number] = {}
    found, curves, multiplier = _likelihoods(settings, scenes, numbers)
    choices: tuple[ChoiceCurve, ...] = ()
    chosen_n = None
    if scenes[0].task.reward_range is not None:
        choices, chosen_n = _samples(settings, scenes, numbers)
        if number == 0:
            _sizes(settings, scenes, chosen_n, numbers)
    pilot = pilot_results(settings, plan, store, number)
    onsets: dict[str, SeedValues] = {}
    judged: Judged | None = None
    if pilot is not None:
        judged = judging.judge(settings, plan, store, number, pilot.tasks[0])
        onsets = _onsets(pilot.tasks[0], settings.evaluation.validation_prompts)
        _pilot(settings, pilot.tasks[0], judged, numbers)
    bounds, made = _quantities(numbers)
    advice = _advice(settings, bounds, made, multiplier, judged)
    task = scenes[0].task
    return (
        TaskFinding(
            task=config.gap_tasks(settings)[number].name,
            role="control" if number else "main",
            prompts=_prompts(scenes),
            description=(inspect.getdoc(inspect.getmodule(type(task))) or "").split(
                "\n"
            )[0],
            quantities=tuple(made.values()),
            scorers=found,
            curves=curves,
            multiplier=multiplier,
            choices=choices,
            chosen_n=chosen_n,
            pilot=pilot,
            onsets=onsets,
            judge=None if judged is None else judged.finding,
        ),
        advice,
    )


def _prompts(scenes: Sequence[MeasuredScene]) -> Prompts:
    return gathering.prompts_of(scenes[0].task)


def _per_seed(settings: config.GapConfig, values: Sequence[float | None]) -> SeedValues:
    return {str(seed): value for seed, value in zip(settings.seeds, values)}


def _likelihoods(
    settings: config.GapConfig,
    scenes: Sequence[MeasuredScene],
    numbers: dict[str, _Number],
) -> tuple[tuple[ScorerFinding, ...], tuple[ScorerFinding, ...], Multiplier | None]:
    """Q1 to Q3: predictions of held-out labels."""
    section, sizes = settings.scorers, sizes_of(settings)
    verifier, policy = section.trained[:2]
    predicted: dict[tuple[str, int], list[quantities.Prediction]] = {}
    margins: dict[str, list[dict[str, list[float]]]] = {}
    found, curves = [], []

    def finding(kind: str, count: int, chosen, each) -> ScorerFinding:
        predictions = [quantities.predict(m["test"], m["validation"]) for m in each]
        predicted[kind, count] = predictions

        def values(name: str) -> SeedValues:
            return _per_seed(settings, [getattr(p, name) for p in predictions])

        tries = section.learning_rates
        return ScorerFinding(
            name=kind,
            description=scorers.DESCRIPTIONS[kind],
            pairs=count,
            log_likelihood=values("log_likelihood"),
            mean_likelihood=values("mean_likelihood"),
            accuracy=values("accuracy"),
            calibration_error=values("calibration_error"),
            learning_rate=_per_seed(settings, [tries[t] for t, _ in chosen]),
            updates=_per_seed(settings, [float(r["round"]) for _, r in chosen]),
        )

    for null in scorers.untrained_of(scenes[0].task):
        untrained = [
            scene.store.result(scene.plan.of("untrained", scene.seed))["margins"][null]
            for scene in scenes
        ]
        found.append(finding(null, 0, [], untrained))
        margins[null] = untrained
    for kind in section.trained:
        chosen = [scene.chosen(kind, sizes[-1]) for scene in scenes]
        margins[kind] = [result["margins"] for _, result in chosen]
        found.append(finding(kind, sizes[-1], chosen, margins[kind]))
    for kind in (verifier, policy):
        for count in sizes[:-1]:
            chosen = [scene.chosen(kind, count) for scene in scenes]
            each = [result["margins"] for _, result in chosen]
            curves.append(finding(kind, count, chosen, each))
        curves.append(next(f for f in found if f.name == kind))

    def rows(kind: str, count: int) -> list[np.ndarray]:
        return [p.pair_log_likelihoods for p in predicted[kind, count]]

    def lead(a: str, b: str, count: int) -> list[np.ndarray]:
        return [x - y for x, y in zip(rows(a, count), rows(b, count))]

    prompts = _prompts(scenes)

    def add(key, name, unit, differences, margin=None):
        _add_rows(settings, numbers, key, name, unit, differences, prompts, margin)

    nats = settings.margins.nats
    full = lead(verifier, policy, sizes[-1])
    add("Q1", ADVANTAGE, "nats per pair", full, nats)
    if len(sizes) > 1:
        before = lead(verifier, policy, sizes[-2])
        doublings = math.log2(sizes[-1] / sizes[-2])
        slopes = [(a - b) / doublings for a, b in zip(full, before)]
        add("Q1", SLOPE, "nats per pair and doubling", slopes)
    if "shuffled reward model" in section.trained:
        shuffled = [r - math.log(0.5) for r in rows("shuffled reward model", sizes[-1])]
        add("Q1", "shuffled reward model's lead over chance", "nats per pair", shuffled, nats)  # fmt: skip
    for probe in ("global reward model", "local reward model", "frozen features"):
        if probe != verifier and probe in section.trained:
            whose = "a head on frozen features" if probe == "frozen features" else probe
            name = f"{whose}, lead over the DPO policy"
            add("Q3", name, "nats per pair", lead(probe, policy, sizes[-1]), nats)
    if "paraphrased" in margins[policy][0]:
        drops = [
            quantities.cue_drop(
                p["test"], p["paraphrased"], v["test"], v["paraphrased"]
            )
            for p, v in zip(margins[policy], margins[verifier])
        ]
        _add_seeds(settings, numbers, "Q3", CUES, "accuracy", drops)
    multiplier = None
    if len(sizes) >= 3:
        losses = [
            np.array([[-p.pair_log_likelihoods for p in predicted[kind, count]] for count in sizes])
            for kind in (policy, verifier)
        ]  # fmt: skip
        policy_losses, verifier_losses = (np.swapaxes(each, 0, 1) for each in losses)
        fit = quantities.data_multiplier(sizes, policy_losses, verifier_losses)
        multiplier = Multiplier(
            fit.identified,
            fit.value,
            fit.low,
            fit.high,
            *fit.asymptotes,
            fit.gap,
            fit.reason,
        )
    return tuple(found), tuple(curves), multiplier


def _add_rows(
    settings: config.GapConfig,
    numbers: dict[str, _Number],
    key: str,
    name: str,
    unit: str,
    rows: list[np.ndarray],
    prompts: Prompts,
    margin: float | None = None,
    reason: str = "",
) -> None:
    """Adds a number that is a mean over prompts or pairs, from every seed's values."""
    numbers[name] = _Number(
        key,
        unit,
        _per_seed(settings, [float(row.mean()) for row in rows]),
        statistics.paired_mean(rows, prompts=prompts),
        margin,
        rows,
        prompts,
        reason,
    )


def _add_seeds(
    settings: config.GapConfig,
    numbers: dict[str, _Number],
    key: str,
    name: str,
    unit: str,
    values: Sequence[float | None],
    margin: float | None = None,
    reason: str = "",
    *,
    needs_all: bool = False,
) -> None:
    """Adds a number that each seed has or lacks; with `needs_all` those that have one do not stand for the others."""
    missing = sum(value is None for value in values)
    if missing and not reason:
        reason = f"{missing} of {len(values)} seeds have no value"
    numbers[name] = _Number(
        key,
        unit,
        _per_seed(settings, values),
        None if missing and needs_all else quantities.over_seeds(values),
        margin,
        reason=reason if missing else "",
    )


def _samples(
    settings: config.GapConfig,
    scenes: Sequence[MeasuredScene],
    numbers: dict[str, _Number],
) -> tuple[tuple[ChoiceCurve, ...], int]:
    """Q4, Q5 and Q9: what can be chosen among samples of the SFT policy."""
    section = settings.samples
    verifier, policy = settings.scorers.trained[:2]
    sizes, most = section.best_of_n, section.per_prompt
    names = [*scorers.UNTRAINED, *settings.scorers.trained]
    # [sizes, prompts] for every seed, as the gold rewards beside them.
    wins: dict[str, list[np.ndarray]] = {name: [] for name in names}
    golds: dict[str, list[np.ndarray]] = {name: [] for name in names}
    gaps: dict[str, list[quantities.GoldGap]] = {name: [] for name in names}
    validation: list[np.ndarray] = []
    peaks: list[float] = []
    lengths: list[float] = []
    for scene in scenes:
        held, test = scene.samples("validation"), scene.samples("test")
        against = quantities.winrates(held["gold"][:, :most], held["gold"][:, most:])
        validation.append(quantities.headroom(held[verifier][:, :most], against, sizes))
        gold = test["gold"][:, :most]
        against = quantities.winrates(gold, test["gold"][:, most:])
        for name in names:
            scores = test[name][:, :most]
            wins[name].append(quantities.chosen(scores, against, sizes))
            golds[name].append(quantities.chosen(scores, gold, sizes))
            gaps[name].append(
                quantities.gold_gap(
                    scores, gold, test["optimum"], quantile=section.quantile
                )
            )
        peaks.append(
            quantities.peak_distance(test["own log-probability"][:, :most], gold)
        )
        lengths.append(quantities.length_share(test["length"][:, :most], gold))
    at = quantities.chosen_size(validation, sizes)
    margin = settings.margins.winrate

    prompts = _prompts(scenes)

    def add(key, name, unit, values, margin=None, reason=""):
        _add_seeds(settings, numbers, key, name, unit, values, margin, reason)

    def add_rows(name, unit, rows):
        _add_rows(settings, numbers, "Q4", name, unit, rows, prompts, margin)

    def at_n(name: str, place: int = at) -> list[np.ndarray]:
        return [each[place] - 0.5 for each in wins[name]]

    def lead(a: list[np.ndarray], b: list[np.ndarray]) -> list[np.ndarray]:
        return [x - y for x, y in zip(a, b)]

    unit = f"winrate − ½, n = {sizes[at]}"
    add_rows(HEADROOM, unit, at_n(verifier))
    add_rows("gain by choosing with the DPO policy", unit, at_n(policy))
    add_rows(LEAD, unit, lead(at_n(verifier), at_n(policy)))
    add_rows(NULL_LEAD, unit, lead(at_n(verifier), at_n("own log-probability")))
    add_rows(ORACLE, unit, at_n("gold"))
    shares = [
        quantities.efficiency(float(a.mean()), float(b.mean()))
        for a, b in zip(at_n(verifier), at_n("gold"))
    ]
    reason = "a perfect judge gains next to nothing on some seeds"
    add("Q4", EFFICIENCY, "share", shares, None, reason)
    unit = "winrate; the chosen n is the largest" if at == len(sizes) - 1 else "winrate"
    add_rows(TURN, unit, lead(at_n(verifier, -1), at_n(verifier)))
    for name in names:
        relative = [each.relative for each in gaps[name]]
        add(
            "Q5",
            f"gain in gold by filtering with {_article(name)}",
            "share of what is left to gain",
            relative,
            settings.margins.relative_gap,
            "nothing is left to gain",
        )
    add("Q9", PEAK, "nats, against all samples", peaks)
    add("Q9", LENGTH, "share of variance", lengths)
    curves = tuple(
        ChoiceCurve(
            name,
            sizes,
            *(
                tuple(tuple(float(v) for v in each.mean(axis=1)) for each in rows)
                for rows in (wins[name], golds[name])
            ),
        )
        for name in names
    )
    return curves, sizes[at]


def _sizes(
    settings: config.GapConfig,
    scenes: Sequence[MeasuredScene],
    chosen_n: int,
    numbers: dict[str, _Number],
) -> None:
    """Q10: whether it is the verifier or the policy that may be of another size."""
    at = settings.samples.best_of_n.index(chosen_n)
    full = list(numbers[HEADROOM].values.values())
    for place in range(len(settings.sizes)):
        results = [
            scene.store.result(scene.plan.of("resized", scene.seed, 0, "", place))
            for scene in scenes
        ]
        size = f"{results[0]['parameters'] / 1e3:.3g}k parameters"
        for role in ("verifier", "policy"):
            change = [r[role][at] - (f or 0.0) for r, f in zip(results, full)]
            name = f"{role} of {size} instead"
            unit = f"winrate, n = {chosen_n}"
            _add_seeds(
                settings, numbers, "Q10", name, unit, change, settings.margins.winrate
            )


def _article(name: str) -> str:
    return {"gold": "a perfect judge", "own log-probability": "its own log-probability"}.get(name, f"the {name}")  # fmt: skip


def _pilot(
    settings: config.GapConfig,
    task: TaskResult,
    judged: Judged,
    numbers: dict[str, _Number],
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
        _add_rows(settings, numbers, "Q6", name, unit, rows, prompts, margin, reason)

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
    _add_seeds(
        settings,
        numbers,
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
            _add_seeds(settings, numbers, "Q7", name, "winrate", values, margin)


def _answered(
    rows: Sequence[np.ndarray], prompts: Prompts
) -> tuple[list[np.ndarray], str]:
    """The values that are no NaN, and a word on what is left where that matters.

    Where seeds share their prompts a column is one prompt, so one that lacks an answer in any seed is left out of all.
    """
    answered = [np.isfinite(row) for row in rows]
    if prompts == "nested":
        return [row[kept] for row, kept in zip(rows, answered)], ""
    everywhere = np.all(answered, axis=0)
    reason = ""
    if not everywhere.all():
        reason = f"on the {everywhere.sum()} of {everywhere.size} prompts that were judged in every seed"
    return [row[everywhere] for row in rows], reason


def _matched(
    settings: config.GapConfig,
    online: ArmResult,
    best: ArmResult,
    judged: Judged,
    offline: Sequence[np.ndarray],
    numbers: dict[str, _Number],
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
    _add_seeds(settings, numbers, "Q6", MATCHED, unit, values, margin, reason)


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


def _onsets(task: TaskResult, prompts: int) -> dict[str, SeedValues]:
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


def _quantities(
    numbers: Mapping[str, _Number],
) -> tuple[dict[str, Bounds], dict[str, Quantity]]:
    """Simultaneous bounds of the numbers that decide, and all numbers with their intervals and tests."""
    for name, number in numbers.items():
        estimate = number.estimate
        if estimate is not None and estimate.standard_error == 0 and name != TURN:
            # Seeds that agree to the last bit, as when nothing was learnt, say nothing of how seeds differ.
            number.estimate = dataclasses.replace(
                estimate,
                standard_error=None,
                degrees_of_freedom=None,
                reason="all seeds agree exactly: no spread to make an interval of",
            )
    estimates = {
        name: estimate
        for name in _DECISIVE
        if name in numbers and (estimate := numbers[name].estimate) is not None
    }
    bounds = simultaneous(estimates)
    tested = {
        name: p
        for name in _TESTS
        if (estimate := estimates.get(name)) is not None
        and (p := estimate.p_value()) is not None
    }
    corrected = dict(zip(tested, statistics.holm(list(tested.values()))))
    made = {}
    for name, number in numbers.items():
        estimate = number.estimate
        base = Quantity(
            number.key,
            name,
            number.unit,
            None,
            margin=number.margin,
            seeds=number.values,
            reason=number.reason,
        )
        if estimate is None:
            made[name] = base
            continue
        low, high = estimate.interval() or (None, None)
        equivalent = None
        if number.margin is not None:
            p = estimate.equivalence_p_value(number.margin)
            equivalent = None if p is None else p < LEVEL
        bound = bounds.get(name)
        check = None
        if number.rows is not None:
            check = statistics.pigeonhole_interval(number.rows, prompts=number.prompts)
        made[name] = dataclasses.replace(
            base,
            estimate=estimate.mean,
            low=low,
            high=high,
            bound_low=None if bound is None else bound.low,
            bound_high=None if bound is None else bound.high,
            method=estimate.method,
            check=check,
            p_value=tested.get(name),
            p_holm=corrected.get(name),
            equivalent=equivalent,
            # Without any spread everything would be.
            detectable=estimate.detectable() or None,
            reason="; ".join(t for t in (number.reason, estimate.reason) if t),
        )
    return bounds, made


def _advice(
    settings: config.GapConfig,
    bounds: Mapping[str, Bounds],
    made: Mapping[str, Quantity],
    multiplier: Multiplier | None,
    judged: Judged | None,
) -> Advice:
    seeds = len(settings.seeds)

    def beside(name: str) -> Bounds | None:
        """Of numbers that decide nothing: their plain intervals."""
        quantity = made.get(name)
        if quantity is None or quantity.estimate is None:
            return None
        return Bounds(quantity.estimate, quantity.low, quantity.high)

    one = Tier1(
        seeds,
        advantage=bounds.get(ADVANTAGE),
        headroom=bounds.get(HEADROOM),
        lead=bounds.get(LEAD),
        oracle=bounds.get(ORACLE),
        efficiency=bounds.get(EFFICIENCY),
        turn=bounds.get(TURN),
        slope=bounds.get(SLOPE),
        data_multiplier_identified=None
        if multiplier is None
        else multiplier.identified,
        peak_distance=beside(PEAK),
        length_share=beside(LENGTH),
        null_lead=beside(NULL_LEAD),
        cue_drop=beside(CUES),
    )
    two = None
    warnings: tuple[str, ...] = ()
    if judged is not None:
        two = Tier2(
            seeds, difference=bounds.get(DIFFERENCE), matched_kl=bounds.get(MATCHED)
        )
        warnings = judged.finding.warnings
    margins = settings.margins
    return advise(
        one,
        two,
        margins=Margins(
            winrate=margins.winrate,
            nats=margins.nats,
            low_efficiency=margins.low_efficiency,
            nats_per_doubling=margins.nats_per_doubling,
        ),
        judge_warnings=warnings,
    )
