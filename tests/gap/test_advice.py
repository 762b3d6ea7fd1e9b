"""Each rule, its edges, and that less certainty never says more."""

import dataclasses
import math

import numpy as np
import pytest

from gvjax.gap import statistics
from gvjax.gap.advice import Advice, Margins, Tier1, Tier2, advise
from gvjax.gap.bounds import Bounds, simultaneous

OPEN = "inconclusive"
RL = "RL is likely to pay"
DPO = "DPO is enough"
FIX = "fix the verifier first"
COVERAGE = "improve coverage first"
COLLECT = "collect data"
TINY = 1e-9


def around(point, half=0.01):
    return Bounds(point, point - half, point + half)


def change(tier, **bounds):
    return dataclasses.replace(tier, **bounds)


def verdict(*tiers, **settings):
    return advise(*tiers, **settings).verdict


# Everything points to RL.
PAYS = Tier1(
    3,
    advantage=around(0.05),
    headroom=around(0.15),
    lead=around(0.08),
    oracle=around(0.3),
    efficiency=around(0.5),
    turn=around(0.0),
)
# The verifier is no better than the policy.
EQUAL = Tier1(
    3,
    advantage=around(0.0, 0.005),
    headroom=around(0.1),
    lead=around(0.0),
    oracle=around(0.3),
    efficiency=around(0.33, 0.05),
    turn=around(0.0),
)
# Only the oracle gains.
BLIND = change(
    PAYS, lead=around(0.0, 0.1), headroom=around(0.03), efficiency=around(0.1)
)
# Nobody gains.
POOR = change(
    PAYS, headroom=around(0.0), oracle=around(0.01), efficiency=around(0.0, 0.5)
)
# Nothing to extract, and whether the oracle does better is open.
DRY = change(
    PAYS, headroom=around(0.01), oracle=around(0.05, 0.04), efficiency=around(0.3, 0.3)
)
FALLING = Tier1(3, slope=around(-0.05), data_multiplier_identified=False)

WON = Tier2(5, difference=around(0.1), matched_kl=around(0.06))
LOST = Tier2(5, difference=around(-0.1), matched_kl=around(-0.1))
EVEN = Tier2(5, difference=around(0.0), matched_kl=around(0.0))
UNDECIDED = Tier2(5, difference=around(0.03, 0.04), matched_kl=around(0.02, 0.04))


@pytest.mark.parametrize(
    ("tier1", "tier2", "expected", "basis"),
    [
        (PAYS, None, RL, "predicted"),
        (EQUAL, None, DPO, "predicted"),
        (BLIND, None, FIX, "predicted"),
        (POOR, None, COVERAGE, "predicted"),
        (DRY, None, DPO, "predicted"),
        (FALLING, None, COLLECT, "predicted"),
        (Tier1(3), None, OPEN, "predicted"),
        (None, WON, RL, "observed"),
        (None, LOST, DPO, "observed"),
        (None, EVEN, DPO, "observed"),
        (None, UNDECIDED, OPEN, "observed"),
        (None, Tier2(5), OPEN, "observed"),
        # The pilot decides, whatever was predicted.
        (PAYS, EVEN, DPO, "observed"),
        (EQUAL, WON, RL, "observed"),
        (BLIND, WON, RL, "observed"),
        (BLIND, LOST, DPO, "observed"),
        # What the pilot looked for and did not see is not predicted.
        (PAYS, UNDECIDED, OPEN, "observed"),
        (EQUAL, UNDECIDED, OPEN, "observed"),
        (DRY, UNDECIDED, OPEN, "observed"),
        # What it did not look for still is.
        (BLIND, UNDECIDED, FIX, "predicted"),
        (POOR, UNDECIDED, COVERAGE, "predicted"),
        (FALLING, UNDECIDED, COLLECT, "predicted"),
    ],
)
def test_each_verdict(tier1, tier2, expected, basis):
    advice = advise(tier1, tier2)
    assert (advice.verdict, advice.basis) == (expected, basis)
    assert advice.sentences and advice.would_change and advice.not_evidence_of
    if tier2 is None and expected == RL:
        assert (
            "predicted" in advice.sentences[0] and "not observed" in advice.sentences[0]
        )


def test_what_is_open_says_what_speaks_for_either_road():
    ahead = Tier2(5, difference=around(0.14, 0.1), matched_kl=around(0.02, 0.1))
    advice = advise(PAYS, ahead)
    assert advice.verdict == OPEN
    lead = "the online policy's lead in winrate over the best offline one is 0.14 [0.04, 0.24]"
    assert advice.sentences == (
        "The intervals leave open which road pays.",
        f"For “{RL}”: {lead}, above 0.",
        f"Against “{RL}”: the same lead at equal KL to the SFT policy is 0.02 [−0.08, 0.12], not all above 0.",
        f"Against “{DPO}”: {lead}, not all below 0.03.",
    )
    # Nothing is said of numbers that nobody knows.
    assert advise(Tier1(3)).sentences == ("The intervals leave open which road pays.",)


def test_a_verifier_that_chooses_like_the_policys_own_log_probability_is_pointed_out():
    lines = advise(change(PAYS, null_lead=around(0.0, 0.02))).not_evidence_of
    assert any(
        "its lead" not in line and "0 [−0.02, 0.02] here" in line for line in lines
    )
    assert any(
        "chooses as well; that was not" in n for n in advise(PAYS).not_evidence_of
    )


# (evidence that holds the rule by a hair, the same on the other side of it)
EDGES = {
    "advantage above 0": (
        change(PAYS, advantage=Bounds(0.05, TINY, 0.1)),
        change(PAYS, advantage=Bounds(0.05, 0.0, 0.1)),
        RL,
    ),
    "headroom at least the margin": (
        change(PAYS, headroom=Bounds(0.15, 0.03, 0.2)),
        change(PAYS, headroom=Bounds(0.15, 0.03 - TINY, 0.2)),
        RL,
    ),
    "lead above 0": (
        change(PAYS, lead=Bounds(0.08, TINY, 0.1)),
        change(PAYS, lead=Bounds(0.08, 0.0, 0.1)),
        RL,
    ),
    "a lead that matters, in nats": (
        change(PAYS, lead=Bounds(0.01, 0.001, 0.1), advantage=Bounds(0.01, 0.001, 0.1)),
        change(
            PAYS,
            lead=Bounds(0.01, 0.001, 0.1),
            advantage=Bounds(0.01 - TINY, 0.001, 0.1),
        ),
        RL,
    ),
    "a lead that matters, in winrate": (
        change(
            PAYS, advantage=Bounds(0.002, 0.001, 0.1), lead=Bounds(0.03, 0.001, 0.1)
        ),
        change(
            PAYS,
            advantage=Bounds(0.002, 0.001, 0.1),
            lead=Bounds(0.03 - TINY, 0.001, 0.1),
        ),
        RL,
    ),
    "the oracle is not below it": (
        change(PAYS, oracle=Bounds(0.03, 0.0, 0.3)),
        change(PAYS, oracle=Bounds(0.03 - TINY, 0.0, 0.3)),
        RL,
    ),
    "efficiency is not low": (
        change(PAYS, efficiency=Bounds(0.25, 0.0, 1.0)),
        change(PAYS, efficiency=Bounds(0.25 - TINY, 0.0, 1.0)),
        RL,
    ),
    "the curve does not turn down": (
        change(PAYS, turn=Bounds(-0.03 + TINY, -0.1, 0.1)),
        change(PAYS, turn=Bounds(-0.03, -0.1, 0.1)),
        RL,
    ),
    "A above −its margin": (
        change(EQUAL, advantage=Bounds(0.0, -0.01 + TINY, 0.005)),
        change(EQUAL, advantage=Bounds(0.0, -0.01, 0.005)),
        DPO,
    ),
    "A below its margin": (
        change(EQUAL, advantage=Bounds(0.0, -0.005, 0.01 - TINY)),
        change(EQUAL, advantage=Bounds(0.0, -0.005, 0.01)),
        DPO,
    ),
    "lead below the margin": (
        change(EQUAL, lead=Bounds(0.0, -0.1, 0.03 - TINY)),
        change(EQUAL, lead=Bounds(0.0, -0.1, 0.03)),
        DPO,
    ),
    "the oracle gains": (
        change(BLIND, oracle=Bounds(0.3, 0.03, 0.4)),
        change(BLIND, oracle=Bounds(0.3, 0.03 - TINY, 0.4)),
        FIX,
    ),
    "efficiency is low": (
        change(BLIND, efficiency=Bounds(0.1, 0.0, 0.25 - TINY)),
        change(BLIND, efficiency=Bounds(0.1, 0.0, 0.25)),
        FIX,
    ),
    "the curve turns down for certain": (
        change(PAYS, turn=Bounds(-0.05, -0.1, -TINY)),
        change(PAYS, turn=Bounds(-0.05, -0.1, 0.0)),
        FIX,
    ),
    "it turns down by enough": (
        change(PAYS, turn=Bounds(-0.03, -0.1, -0.01), headroom=Bounds(0.1, 0.0, 0.2)),
        change(
            PAYS, turn=Bounds(-0.03 + TINY, -0.1, -0.01), headroom=Bounds(0.1, 0.0, 0.2)
        ),
        FIX,
    ),
    "the oracle gains nothing": (
        change(POOR, oracle=Bounds(0.01, 0.0, 0.03 - TINY), headroom=None),
        change(POOR, oracle=Bounds(0.01, 0.0, 0.03), headroom=None),
        COVERAGE,
    ),
    "nothing to extract": (
        change(DRY, headroom=Bounds(0.01, 0.0, 0.03 - TINY)),
        change(DRY, headroom=Bounds(0.01, 0.0, 0.03)),
        DPO,
    ),
    "falling steeply": (
        change(FALLING, slope=Bounds(-0.05, -0.1, -0.01 - TINY)),
        change(FALLING, slope=Bounds(-0.05, -0.1, -0.01)),
        COLLECT,
    ),
    "multiplier identified": (
        FALLING,
        change(FALLING, data_multiplier_identified=True),
        COLLECT,
    ),
    "multiplier unknown": (
        FALLING,
        change(FALLING, data_multiplier_identified=None),
        COLLECT,
    ),
    "D above 0": (
        change(WON, difference=Bounds(0.1, TINY, 0.2)),
        change(WON, difference=Bounds(0.1, 0.0, 0.2)),
        RL,
    ),
    "D at least the margin": (
        change(WON, difference=Bounds(0.03, 0.01, 0.2)),
        change(WON, difference=Bounds(0.03 - TINY, 0.01, 0.2)),
        RL,
    ),
    "matched KL above 0": (
        change(WON, matched_kl=Bounds(0.1, TINY, 0.2)),
        change(WON, matched_kl=Bounds(0.1, 0.0, 0.2)),
        RL,
    ),
    "matched KL at least the margin": (
        change(WON, matched_kl=Bounds(0.03, 0.01, 0.2)),
        change(WON, matched_kl=Bounds(0.03 - TINY, 0.01, 0.2)),
        RL,
    ),
    "matched KL was measured": (WON, change(WON, matched_kl=None), RL),
    "D below the margin": (
        change(EVEN, difference=Bounds(0.0, -0.1, 0.03 - TINY)),
        change(EVEN, difference=Bounds(0.0, -0.1, 0.03)),
        DPO,
    ),
}


@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge):
    inside, outside, expected = EDGES[edge]
    tiers = [
        (tier, None) if isinstance(tier, Tier1) else (None, tier)
        for tier in (inside, outside)
    ]
    assert verdict(*tiers[0]) == expected
    assert verdict(*tiers[1]) == OPEN


@pytest.mark.parametrize(
    "name", ["advantage", "headroom", "lead", "oracle", "efficiency", "turn"]
)
def test_rl_is_not_predicted_from_parts(name):
    assert verdict(change(PAYS, **{name: None})) == OPEN
    assert verdict(change(PAYS, **{name: Bounds(getattr(PAYS, name).point)})) == OPEN


def test_margins_are_the_callers():
    assert verdict(PAYS, margins=Margins(winrate=0.13)) == RL
    assert verdict(PAYS, margins=Margins(winrate=0.2)) == DPO
    assert verdict(None, WON, margins=Margins(winrate=0.2)) == DPO
    assert verdict(PAYS, margins=Margins(low_efficiency=0.6)) == FIX
    assert verdict(EQUAL, margins=Margins(nats=0.001)) == OPEN
    assert verdict(FALLING, margins=Margins(nats_per_doubling=0.05)) == OPEN
    for name in ("winrate", "nats", "low_efficiency", "nats_per_doubling"):
        with pytest.raises(ValueError, match=name):
            Margins(**{name: 0.0})
    with pytest.raises(ValueError, match="oracle"):
        Margins(low_efficiency=1.0)


@pytest.mark.parametrize("tier", [PAYS, EQUAL, BLIND, POOR, DRY, FALLING])
def test_one_seed_of_scorers_says_nothing(tier):
    advice = advise(change(tier, seeds=1))
    assert advice.verdict == OPEN
    assert any("seed variance unknown" in text for text in advice.sentences)
    assert verdict(change(tier, seeds=2)) != OPEN


@pytest.mark.parametrize("tier", [WON, LOST, EVEN])
def test_one_seed_of_rl_says_nothing(tier):
    assert verdict(None, change(tier, seeds=1)) == OPEN
    # Nor does it let the scorers speak in its place.
    assert verdict(PAYS, change(tier, seeds=1)) == OPEN
    assert verdict(change(PAYS, seeds=1), change(tier, seeds=1)) == OPEN


def test_few_seeds_are_told():
    assert any("2 seeds" in text for text in advise(change(PAYS, seeds=2)).sentences)
    assert any(
        "4 seeds" in text for text in advise(None, change(WON, seeds=4)).sentences
    )
    assert not any("seeds" in text for text in advise(PAYS, WON).sentences)


def without_intervals(tier):
    return change(
        tier,
        **{
            field.name: Bounds(value.point)
            for field in dataclasses.fields(tier)
            if isinstance(value := getattr(tier, field.name), Bounds)
        },
    )


@pytest.mark.parametrize("tier1", [None, PAYS, EQUAL, BLIND, POOR, DRY, FALLING])
@pytest.mark.parametrize("tier2", [None, WON, LOST, EVEN, UNDECIDED])
def test_no_interval_no_verdict(tier1, tier2):
    if tier1 is None and tier2 is None:
        return
    bare = [
        None if tier is None else without_intervals(tier) for tier in (tier1, tier2)
    ]
    assert verdict(*bare) == OPEN


MEASURES = {
    Tier1: ["advantage", "headroom", "lead", "oracle", "efficiency", "turn", "slope"],
    Tier2: ["difference", "matched_kl"],
}


def random_bounds(rng):
    point = rng.choice(
        [-0.1, -0.03, -0.01, 0.0, 0.005, 0.01, 0.03, 0.1, 0.3]
    ) + rng.choice([0.0, rng.normal(scale=0.02)])
    return Bounds(point, *(point + rng.exponential(0.02, 2) * [-1, 1]))


def random_tier(rng, kind):
    values = {
        name: random_bounds(rng) for name in MEASURES[kind] if rng.random() < 0.95
    }
    if kind is Tier1:
        values["data_multiplier_identified"] = bool(rng.integers(2))
    return kind(3, **values)


def widened(rng, tier):
    """One number's interval made wider, lost, or lost with its estimate."""
    name = rng.choice([name for name in MEASURES[type(tier)] if getattr(tier, name)])
    bounds = getattr(tier, name)
    add = rng.exponential(0.05, 2) * rng.choice(
        [0.0, 1.0, math.inf], 2, p=[0.2, 0.7, 0.1]
    )
    add = np.nan_to_num(add, nan=0.0, posinf=math.inf)
    new = [
        Bounds(bounds.point, bounds.low - add[0], bounds.high + add[1]),
        Bounds(bounds.point),
        None,
    ][rng.choice(3, p=[0.8, 0.1, 0.1])]
    return change(tier, **{name: new})


def near(rng):
    """A pair of tiers, half of the time close to one that has a verdict."""
    if rng.random() < 0.5:
        one = random_tier(rng, Tier1)
    else:
        one = [PAYS, EQUAL, BLIND, POOR, DRY, FALLING][rng.integers(6)]
        names = [name for name in MEASURES[Tier1] if getattr(one, name)]
        one = change(one, **{rng.choice(names): random_bounds(rng)})
    two = [None, random_tier(rng, Tier2), WON, UNDECIDED][
        rng.choice(4, p=[0.5, 0.3, 0.1, 0.1])
    ]
    return one, two


@pytest.mark.parametrize("seed", range(4))
def test_less_certainty_never_says_more(seed):
    rng = np.random.default_rng(seed)
    seen = {}
    for _ in range(1500):
        one, two = near(rng)
        before = verdict(one, two)
        which = (
            two is not None
            and rng.random() < 0.5
            and any(getattr(two, name) for name in MEASURES[Tier2])
        )
        if which:
            two = widened(rng, two)
        elif any(getattr(one, name) for name in MEASURES[Tier1]):
            one = widened(rng, one)
        after = verdict(one, two)
        if before == OPEN:
            assert after == OPEN, (one, two)
        if before != RL:
            assert after != RL, (one, two)
        seen[before] = seen.get(before, 0) + (after == OPEN)
    # The search saw every verdict, and saw each of them lost.
    assert (
        set(seen) == {OPEN, RL, DPO, FIX, COVERAGE, COLLECT} and min(seen.values()) > 0
    )


def test_what_must_shrink_and_by_how_much():
    advice = advise(None, change(WON, difference=Bounds(0.1, -0.1, 0.3)))
    assert advice.verdict == OPEN
    (line,) = advice.would_change
    # The half-width .2 must become .1: half, so four times the data.
    assert RL in line and "0.1 [−0.1, 0.3]" in line
    assert "50% of its width" in line and "4.0 times" in line
    # A lower estimate is on the side of "DPO is enough", where .01 must become .02.
    low = advise(None, change(WON, difference=Bounds(0.01, -0.1, 0.05)))
    (line,) = low.would_change
    assert DPO in line and "50% of its width" in line


def test_what_is_missing_is_named():
    lines = advise(change(PAYS, oracle=None)).would_change
    assert any("a perfect judge" in line and "not measured" in line for line in lines)
    lines = advise(change(PAYS, seeds=1)).would_change
    assert any("at least two seeds" in line for line in lines)
    between = advise(None, Tier2(5, around(0.1), Bounds(0.02, 0.01, 0.03))).would_change
    assert "Not narrower intervals" in between[0]
    endless = advise(None, change(WON, difference=Bounds(0.1, -math.inf, math.inf)))
    assert "no end" in endless.would_change[0]


def test_the_numbers_are_in_the_sentences():
    text = " ".join(advise(None, WON).sentences)
    assert "0.1 [0.09, 0.11]" in text and "0.06 [0.05, 0.07]" in text
    assert "equal KL" in text


def test_what_it_is_not_evidence_of():
    bare = " ".join(advise(PAYS).not_evidence_of)
    for words in (
        "neither necessary nor sufficient",
        "not probed",
        "was not measured",
        "gold judge",
    ):
        assert words in bare
    probed = change(
        PAYS,
        cue_drop=Bounds(0.2, 0.1, 0.3),
        length_share=Bounds(0.4, 0.3, 0.5),
        peak_distance=Bounds(-3.0, -4.0, -2.0),
    )
    warning = "The judge likes length more than its labels do."
    advice = advise(probed, judge_warnings=[warning])
    assert advice.verdict == RL
    text = " ".join(advice.not_evidence_of)
    assert "loses 0.2 [0.1, 0.3] more accuracy" in text and "and here" in text
    assert "0.4 [0.3, 0.5] of its variance" in text
    assert "−3 [−4, −2] nats" in text
    assert advice.not_evidence_of[-1] == warning
    unsure = advise(change(probed, cue_drop=Bounds(0.2, -0.1, 0.3))).not_evidence_of
    assert not any("and here it loses" in line for line in unsure)
    assert isinstance(advise(None, WON), Advice)
    assert len(advise(None, WON).not_evidence_of) == 6


def test_why_a_pilot_cannot_say_that_rl_pays_is_told():
    tier2 = Tier2(8, Bounds(0.2, 0.19, 0.21), unmatched="the judge is not gold")
    advice = advise(tier2=tier2)
    assert advice.verdict == "inconclusive"
    assert any(
        "(the judge is not gold): not measured" in t for t in advice.would_change
    )


def test_simultaneous_bounds():
    estimates = {
        "a": statistics.Estimate(0.1, 0.02, 30.0, "t"),
        "b": statistics.Estimate(0.2, 0.01, 4.0, "t"),
        "c": statistics.Estimate(0.3, None, None, "t", "one seed"),
    }
    bounds = simultaneous(estimates, level=0.9)
    for name in ("a", "b"):
        each = estimates[name].interval(1 - 0.1 / 3)
        assert (bounds[name].low, bounds[name].high) == pytest.approx(each)
        narrow = estimates[name].interval(0.9)
        assert bounds[name].low < narrow[0] and bounds[name].high > narrow[1]
    assert bounds["c"] == Bounds(0.3)
    assert simultaneous({}) == {}


def test_simultaneous_bounds_hold_together():
    rng = np.random.default_rng(0)
    together = []
    for _ in range(400):
        draws = rng.normal(size=(4, 6))
        found = simultaneous(
            {str(i): statistics.seed_mean(row) for i, row in enumerate(draws)}
        )
        together.append(all(b.low <= 0 <= b.high for b in found.values()))
    assert 0.92 <= np.mean(together) <= 0.985


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: advise(), "nothing was measured"),
        (lambda: advise(Tier1(0)), "tier1 has 0 seeds"),
        (lambda: advise(PAYS, Tier2(0)), "tier2 has 0 seeds"),
        (lambda: Bounds(math.nan), "NaN"),
        (lambda: Bounds(0.0, 0.0), "both"),
        (lambda: Bounds(0.0, 0.1, 0.2), "outside"),
        (lambda: Bounds(0.0, math.nan, 0.2), "outside"),
    ],
)
def test_impossible_inputs(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


def test_an_interval_without_width_on_the_wrong_side_cannot_shrink():
    exact = change(EQUAL, efficiency=Bounds(1.0, 1.0, 1.0), lead=around(0.0, 0.1))
    lines = advise(exact).would_change
    assert lines and not any(
        "perfect judge gains, which takes" in line for line in lines
    )
