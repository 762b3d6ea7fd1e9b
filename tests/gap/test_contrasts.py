"""Outcomes by hand on small studies, and words that never outrun them."""

import dataclasses
import math

import numpy as np
import pytest

from gvjax.gap import contrasts, statistics
from gvjax.gap.results import (
    BEST_OFFLINE,
    ArmResult,
    Contrast,
    CurvePoint,
    SeedResult,
    StudyResults,
    TaskResult,
)

SEEDS = range(5)


def arm(name, road, golds, kl=1.0, curve=(), prompts=4):
    """An arm whose gold is the same on every prompt."""
    return ArmResult(
        name,
        road,
        tuple(
            SeedResult(seed, (gold,) * prompts, kl, 10.0, curve=curve)
            for seed, gold in zip(SEEDS, golds)
        ),
    )


def study(online, offline, *, online_curve=(), margin=0.05, more=(), kl=4.0):
    start = arm("SFT", "start", [0.3] * len(online), kl=0.0)
    arms = (
        start,
        arm("DPO", "offline", offline),
        arm("RLOO", "online", online, kl=kl, curve=online_curve),
    )
    return contrasts.analyse(
        StudyResults(
            "s",
            {},
            "h",
            {},
            "now",
            (TaskResult("tour", "main", arms, prompts="nested"),),
            (Contrast("tour", "RLOO", BEST_OFFLINE, margin), *more),
        )
    )


STEEP = (CurvePoint(50, 0.5, 1.0, 10.0),)
"""At the offline arm's KL of 1 the online arm already has .5."""

SHALLOW = (CurvePoint(50, 0.41, 1.0, 10.0),)

AHEAD = [0.60, 0.62, 0.64, 0.58, 0.61]
OFFLINE = [0.40, 0.41, 0.42, 0.40, 0.41]


def test_gold_outcome_is_the_paired_t_interval():
    outcome = study(AHEAD, OFFLINE).outcomes[0]
    expected = statistics.seed_mean(np.subtract(AHEAD, OFFLINE))
    assert outcome.estimate == pytest.approx(expected.mean)
    assert (outcome.low, outcome.high) == pytest.approx(expected.interval())
    assert outcome.p_holm == pytest.approx(expected.p_value())
    assert outcome.detectable == pytest.approx(expected.detectable())
    assert outcome.seeds["2"] == pytest.approx(0.22)
    assert list(outcome.checks) == ["bootstrap of seeds and prompts"]


def test_matched_kl_compares_at_the_smaller_kl():
    outcome = study(AHEAD, OFFLINE, online_curve=STEEP).outcomes[1]
    assert outcome.measure == "gold at matched KL"
    assert outcome.seeds["0"] == pytest.approx(0.5 - 0.40)
    # With no evaluation on the way, the straight line from the SFT policy at KL 0.
    outcome = study(AHEAD, OFFLINE).outcomes[1]
    assert outcome.seeds["0"] == pytest.approx(0.3 + (0.60 - 0.3) / 4 - 0.40)


def test_matched_kl_that_cannot_be_had_says_why():
    results = study(AHEAD, OFFLINE, kl=math.nan)
    outcome = results.outcomes[1]
    assert outcome.estimate is None
    assert "seed 0" in outcome.reason
    assert "cannot be compared at matched KL" in contrasts.describe(outcome)


def test_against_the_start_there_is_no_matched_kl():
    results = study(AHEAD, OFFLINE, more=[Contrast("tour", "RLOO", "SFT")])
    assert [o.measure for o in results.outcomes] == [
        "gold",
        "gold at matched KL",
        "gold",
    ]


def test_holm_covers_the_primary_gold_contrasts_only():
    more = [
        Contrast("tour", "RLOO", "SFT"),
        Contrast("tour", "DPO", "SFT", primary=False),
    ]
    outcomes = study(AHEAD, OFFLINE, more=more).outcomes
    gold = [o for o in outcomes if o.measure == "gold"]
    expected = statistics.holm([gold[0].p_value, gold[1].p_value])
    assert [o.p_holm for o in gold] == pytest.approx([*expected, None])
    assert outcomes[1].p_holm is None


def test_the_headline_says_what_is_left_at_matched_kl():
    verdict = contrasts.verdict(study(AHEAD, OFFLINE, online_curve=STEEP))
    assert (verdict.headline, verdict.tone) == ("RLOO is ahead", "ahead")
    assert verdict.sentences[0] == (
        "On tour, RLOO is ahead of the best offline arm by 0.20 [0.18, 0.22] gold, over 5 seeds."
    )
    verdict = contrasts.verdict(study(AHEAD, OFFLINE, online_curve=SHALLOW))
    assert verdict.headline == "RLOO is ahead, but equal at matched KL"
    results = study(AHEAD, OFFLINE, online_curve=SHALLOW, margin=None)
    assert (
        contrasts.verdict(results).headline
        == "RLOO is ahead; at matched KL that is open"
    )
    # The straight line from the SFT policy is all there is: .375 at KL 1, below .40.
    assert (
        contrasts.verdict(study(AHEAD, OFFLINE, margin=None)).headline
        == "RLOO is ahead, but behind at matched KL"
    )


def test_an_offline_arm_that_was_chosen_on_the_test_prompts_is_said_to_be():
    results = study(AHEAD, OFFLINE, online_curve=STEEP)
    start, dpo, rloo = results.tasks[0].arms
    nll = arm("DPO + NLL", "offline", OFFLINE[::-1])

    def told(*offline):
        task = dataclasses.replace(results.tasks[0], arms=(start, *offline, rloo))
        verdict = contrasts.verdict(
            contrasts.analyse(dataclasses.replace(results, tasks=(task,)))
        )
        return " ".join(verdict.sentences), " ".join(verdict.would_change)

    def validated(arm):
        return dataclasses.replace(
            arm,
            seeds=tuple(
                dataclasses.replace(s, extra={"validation_gold": 0.4})
                for s in arm.seeds
            ),
        )

    for each in (told(dpo), told(validated(dpo), validated(nll))):
        assert "chosen" not in each[0] and "choice" not in each[1]
    sentences, changes = told(dpo, nll)
    assert "chosen for each seed on the test prompts themselves" in sentences
    assert "could only widen the lead" in changes


def test_equivalence_is_said_only_within_the_margin():
    same = [0.401, 0.409, 0.421, 0.399, 0.411]
    verdict = contrasts.verdict(study(same, OFFLINE))
    assert (verdict.headline, verdict.tone) == (
        "The best offline arm was enough",
        "equal",
    )
    assert "equals the best offline arm within ±0.05" in verdict.sentences[0]
    verdict = contrasts.verdict(study(same, OFFLINE, margin=None))
    assert verdict.headline == "Inconclusive"
    assert "no difference detected" in verdict.sentences[0]


def test_the_same_checkpoint_is_said_and_not_tested():
    twice = arm("DPO, twice", "offline", OFFLINE)
    results = study(AHEAD, OFFLINE)
    start, dpo, rloo = results.tasks[0].arms

    def against_dpo(other):
        task = dataclasses.replace(results.tasks[0], arms=(start, dpo, rloo, other))
        declared = (Contrast("tour", other.name, "DPO", 0.05),)
        return contrasts.analyse(
            dataclasses.replace(results, tasks=(task,), contrasts=declared)
        )

    found = against_dpo(twice)
    for outcome in found.outcomes:
        assert outcome.same_checkpoint and outcome.estimate == 0.0
        assert (outcome.low, outcome.p_value, outcome.equivalent) == (None,) * 3
    verdict = contrasts.verdict(found)
    assert verdict.headline == "DPO, twice and DPO kept the same checkpoint"
    assert verdict.tone == "open"
    assert verdict.sentences == (
        "On tour, DPO, twice and DPO kept the same checkpoint: nothing to test, over 5 seeds.",
    )
    # Equal in gold, but elsewhere: tested, and equal.
    farther = dataclasses.replace(
        twice, seeds=tuple(dataclasses.replace(s, kl=2.0) for s in twice.seeds)
    )
    found = against_dpo(farther)
    assert contrasts.tone_of(found.outcomes[0]) == "equal"
    # The same in one seed of five.
    one = dataclasses.replace(twice, seeds=(twice.seeds[0], *farther.seeds[1:]))
    outcome = against_dpo(one).outcomes[0]
    assert outcome.reason == "the same checkpoint in seed 0"
    assert outcome.low is not None


def test_a_wide_interval_is_inconclusive():
    noisy = [0.2, 0.7, 0.5, 0.3, 0.6]
    verdict = contrasts.verdict(study(noisy, OFFLINE))
    assert (verdict.headline, verdict.tone) == ("Inconclusive", "open")
    assert "are not excluded" in verdict.sentences[0]
    assert any("80% of such studies" in line for line in verdict.would_change)


def test_behind_is_said():
    verdict = contrasts.verdict(study(OFFLINE, AHEAD))
    assert verdict.tone == "behind"
    assert verdict.headline == "The best offline arm is ahead"


def test_one_seed_is_inconclusive_whatever_the_lead():
    verdict = contrasts.verdict(study([0.99], [0.01]))
    assert (verdict.headline, verdict.tone) == ("Inconclusive", "open")
    assert "seed variance unknown" in verdict.sentences[0]


def test_holm_can_take_a_lead_back():
    outcome = study(AHEAD, OFFLINE).outcomes[0]
    weak = dataclasses.replace(outcome, p_holm=0.08)
    assert contrasts.tone_of(weak) == "open"
    assert "survives correction" in contrasts.describe(weak)


def test_a_lead_below_the_margin_is_not_called_one():
    slight = [g + 0.02 for g in OFFLINE]
    slight[0] += 0.001
    verdict = contrasts.verdict(study(slight, OFFLINE, margin=0.01))
    assert verdict.tone == "ahead"
    assert contrasts.verdict(study(slight, OFFLINE, margin=0.05)).tone == "equal"
    uneven = np.add(OFFLINE, [0.02, 0.02, 0.06, 0.09, 0.03])
    verdict = contrasts.verdict(study(uneven, OFFLINE, margin=0.05))
    assert verdict.headline == "RLOO is ahead, perhaps by too little to matter"
    assert verdict.tone == "open"


def test_gold_that_is_not_finite_gives_no_difference():
    outcome = study([math.nan, *AHEAD[1:]], OFFLINE).outcomes[0]
    assert outcome.estimate is None
    assert outcome.reason == "gold is not finite in seed 0"


def test_different_prompts_are_refused():
    results = study(AHEAD, OFFLINE)
    task = results.tasks[0]
    short = arm("RLOO", "online", AHEAD, prompts=3)
    task = dataclasses.replace(task, arms=(*task.arms[:2], short))
    with pytest.raises(ValueError, match="3 test prompts and 'best offline' 4"):
        contrasts.gold_outcome(task, results.contrasts[0])


def test_seeds_that_one_arm_lacks_are_named():
    results = study(AHEAD, OFFLINE)
    task = results.tasks[0]
    fewer = dataclasses.replace(task.arms[2], seeds=task.arms[2].seeds[:3])
    task = dataclasses.replace(task, arms=(*task.arms[:2], fewer))
    outcome = contrasts.gold_outcome(task, results.contrasts[0])
    assert list(outcome.seeds) == ["0", "1", "2"]
    assert outcome.reason == "only one arm has seed 3, 4"


def test_nothing_declared_gives_no_verdict():
    results = dataclasses.replace(study(AHEAD, OFFLINE), contrasts=(), outcomes=())
    assert contrasts.verdict(results).tone == "open"


def test_a_lead_on_the_twin_is_pointed_out():
    results = study(AHEAD, OFFLINE)
    twin = dataclasses.replace(results.tasks[0], task="hidden", role="twin")
    results = dataclasses.replace(
        results,
        tasks=(*results.tasks, twin),
        contrasts=(*results.contrasts, Contrast("hidden", "RLOO", BEST_OFFLINE)),
    )
    sentences = contrasts.verdict(contrasts.analyse(results)).sentences
    assert sentences[-2].startswith("On the twin hidden, RLOO is ahead of")
    assert "built to have no such lead" in sentences[-1]


def test_arms_that_are_equal_in_truth_are_rarely_called_different():
    generator = np.random.default_rng(4)
    tones = []
    for _ in range(400):
        x = generator.normal(0.4, 0.02, (2, 5))
        a, b = arm("RLOO", "online", x[0]), arm("DPO", "offline", x[1])
        start = arm("SFT", "start", [0.3] * 5)
        task = TaskResult("tour", "main", (start, b, a), prompts="nested")
        outcome = contrasts.matched_kl_outcome(task, Contrast("tour", "RLOO", "DPO"))
        tones.append(contrasts.tone_of(outcome))
    assert tones.count("ahead") / 400 <= 0.05
    assert tones.count("behind") / 400 <= 0.05
    assert "open" in tones
