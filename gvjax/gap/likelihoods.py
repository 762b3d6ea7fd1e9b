"""Q1 to Q3: how well each scorer predicts held-out labels, and how many labels would make up for the verifier."""

import math
from collections.abc import Sequence

import numpy as np

from gvjax import config
from gvjax.gap import gathering, quantities, scorers
from gvjax.gap.findings import Multiplier, ScorerFinding, SeedValues
from gvjax.gap.measurement import MeasuredScene, sizes_of
from gvjax.gap.numbers import ADVANTAGE, CUES, SLOPE, Numbers


def add_likelihoods(
    settings: config.GapConfig,
    scenes: Sequence[MeasuredScene],
    numbers: Numbers,
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
            return numbers.per_seed([getattr(p, name) for p in predictions])

        tries = section.learning_rates
        return ScorerFinding(
            name=kind,
            description=scorers.DESCRIPTIONS[kind],
            pairs=count,
            log_likelihood=values("log_likelihood"),
            mean_likelihood=values("mean_likelihood"),
            accuracy=values("accuracy"),
            calibration_error=values("calibration_error"),
            learning_rate=numbers.per_seed([tries[t] for t, _ in chosen]),
            updates=numbers.per_seed([float(r["round"]) for _, r in chosen]),
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

    prompts = gathering.prompts_of(scenes[0].task)

    def add(key, name, unit, differences, margin=None):
        numbers.add_rows(key, name, unit, differences, prompts, margin)

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
        numbers.add_seeds("Q3", CUES, "accuracy", drops)
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
