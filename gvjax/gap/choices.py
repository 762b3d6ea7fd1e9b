"""Q4, Q5, Q9 and Q10: what can be gained by choosing among samples of the SFT policy, and with networks of another size."""

from collections.abc import Sequence

import numpy as np

from gvjax import config
from gvjax.gap import gathering, quantities, scorers
from gvjax.gap.findings import ChoiceCurve
from gvjax.gap.measurement import MeasuredScene
from gvjax.gap.numbers import (
    EFFICIENCY,
    HEADROOM,
    LEAD,
    LENGTH,
    NULL_LEAD,
    ORACLE,
    PEAK,
    TURN,
    Numbers,
)


def add_choices(
    settings: config.GapConfig,
    scenes: Sequence[MeasuredScene],
    numbers: Numbers,
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

    prompts = gathering.prompts_of(scenes[0].task)

    def add(key, name, unit, values, margin=None, reason=""):
        numbers.add_seeds(key, name, unit, values, margin, reason)

    def add_rows(name, unit, rows):
        numbers.add_rows("Q4", name, unit, rows, prompts, margin)

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


def add_sizes(
    settings: config.GapConfig,
    scenes: Sequence[MeasuredScene],
    chosen_n: int,
    numbers: Numbers,
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
            numbers.add_seeds("Q10", name, unit, change, settings.margins.winrate)


def _article(name: str) -> str:
    return {"gold": "a perfect judge", "own log-probability": "its own log-probability"}.get(name, f"the {name}")  # fmt: skip
