"""What the stages left, weighed: matched KL in winrates, onsets, tests and bounds, by hand; and the page that shows it."""

import dataclasses
import json
import math
import re
import types

import pytest
from made_up import study

from gvjax import config
from gvjax.gap import gap_report, judging, pilot, quantities, statistics
from gvjax.gap.advice import Tier1, Tier2, advise
from gvjax.gap.findings import (
    ChoiceCurve,
    GapFindings,
    JudgeFinding,
    Multiplier,
    ScorerFinding,
    TaskFinding,
)
from gvjax.gap.numbers import (
    _DECISIVE,
    ADVANTAGE,
    DIFFERENCE,
    FLATTERED,
    HEADROOM,
    LEAD,
    MATCHED,
    Number,
    Numbers,
)
from gvjax.gap.results import CurvePoint, SeedResult

SEEDS = ("5", "6", "7", "8", "9")


def policy(kl, points) -> SeedResult:
    curve = tuple(
        CurvePoint(i, gold, at, 10.0, winrate, proxy)
        for i, (at, gold, winrate, proxy) in enumerate(points)
    )
    return SeedResult(5, (0.4, 0.6), kl, 10.0, curve=curve)


def test_winrates_at_equal_kl_are_read_off_the_curves():
    online = policy(4.0, [(2.0, 0.5, 0.7, 0.0), (4.0, 0.6, 0.8, 1.0)])
    offline = policy(1.0, [(0.5, 0.4, 0.52, 0.0)])
    found = pilot.matched_winrate(online, 0.8, offline, 0.55)
    # At KL 1 the online policy is half way from ½ at KL 0 to .7 at KL 2.
    assert found.difference == pytest.approx((0.5 + 0.7) / 2 - 0.55)
    # The other way round: never extrapolated.
    short = policy(0.2, [])
    far = dataclasses.replace(short, kl=0.4)
    assert pilot.matched_winrate(far, 0.6, short, 0.5).difference == pytest.approx(0.05)  # fmt: skip
    # A curve without winrates is left out, not taken for gold.
    bare = policy(2.0, [(1.0, 0.9, None, None)])
    other = policy(1.0, [])
    found = pilot.matched_winrate(bare, 0.7, other, 0.5)
    assert found.difference == pytest.approx(0.6 - 0.5)


def pilot_numbers(kind="gold", prompts="nested", silent=()):
    """What a made-up pilot weighs, with `silent` (arm, seed, prompt) unanswered by the judge."""
    task = dataclasses.replace(study().tasks[0], prompts=prompts)
    dpo = task.arm("DPO")
    seeds = (
        dataclasses.replace(seed, extra={"validation_gold": 1.0}) for seed in dpo.seeds
    )
    # Not the best on the test prompts, and the best on validation ones.
    dpo = dataclasses.replace(dpo, seeds=tuple(seeds))
    arms = tuple(dpo if each.name == "DPO" else each for each in task.arms)
    task = dataclasses.replace(task, arms=arms)
    wins = {
        (arm.name, seed.seed): statistics.win_scores(
            seed.gold, task.start.seed(seed.seed).gold
        )
        for arm in arms
        for seed in arm.seeds
    }
    for arm, seed, prompt in silent:
        wins[arm, seed][prompt] = math.nan
    settings = types.SimpleNamespace(
        pilot=types.SimpleNamespace(online="RLOO", square=None),
        seeds=tuple(int(seed) for seed in SEEDS),
        margins=config.MarginsSection(),
    )
    numbers = Numbers(settings.seeds)
    judged = judging.Judged(wins, JudgeFinding(kind, 0, {}))
    pilot.add_pilot(settings, task, judged, numbers)
    return numbers, wins


def test_the_pilot_holds_the_online_arm_against_the_one_that_validation_prompts_choose():
    numbers, wins = pilot_numbers()
    lead = numbers[DIFFERENCE]
    for seed, value in lead.values.items():
        pair = wins["RLOO", int(seed)] - wins["DPO", int(seed)]
        assert value == pytest.approx(pair.mean())
    assert lead.estimate == numbers["RLOO's lead over DPO"].estimate
    # Beside it, over whichever is lucky: never more.
    flattered = numbers[FLATTERED]
    assert all(flattered.values[seed] <= lead.values[seed] for seed in SEEDS)
    assert flattered.estimate.mean < lead.estimate.mean
    assert FLATTERED not in _DECISIVE
    assert numbers[MATCHED].estimate is not None


def test_another_judge_than_gold_has_no_lead_at_equal_kl():
    numbers, _ = pilot_numbers("llm")
    matched = numbers[MATCHED]
    assert matched.estimate is None and set(matched.values.values()) == {None}
    assert matched.reason == (
        "seed 5, 6, 7, 8, 9: training curves have winrates in gold, not by this judge"
    )
    _, made = numbers.quantities()
    assert made[MATCHED].reason == matched.reason


def test_seeds_that_share_their_prompts_are_crossed_on_those_judged_in_all():
    numbers, wins = pilot_numbers("llm", "crossed", [("RLOO", 5, 0), ("DPO", 7, 3)])
    lead = numbers[DIFFERENCE]
    assert lead.estimate.method == "seeds × prompts"
    assert lead.reason == "on the 118 of 120 prompts that were judged in every seed"
    kept = [1, 2, *range(4, 120)]
    expected = [(wins["RLOO", s] - wins["DPO", s])[kept] for s in range(5, 10)]
    assert lead.estimate == statistics.paired_mean(expected, prompts="crossed")
    _, made = numbers.quantities()
    assert made[DIFFERENCE].check == statistics.pigeonhole_interval(
        expected, prompts="crossed"
    )
    # Where few were judged in all seeds there is no number, and no crash.
    rows = [("RLOO", 5 + i % 5, i) for i in range(100)]
    lead = pilot_numbers("llm", "crossed", rows)[0][DIFFERENCE]
    assert lead.estimate is None and set(lead.values.values()) == {None}
    assert lead.reason == "only 20 of 120 prompts that were judged in every seed"
    # Prompts of their own: each seed keeps all that it has.
    lead = pilot_numbers("llm", "nested", [("RLOO", 5, 0)])[0][DIFFERENCE]
    assert [row.size for row in lead.rows] == [119, 120, 120, 120, 120]
    assert lead.estimate.method == "t over seeds" and lead.reason == ""


def test_onsets_are_kls_where_gold_falls_for_good():
    task = study().tasks[0]
    rises = [(1.0, 0.3, 0.5, 0.0), (2.0, 0.5, 0.6, 1.0)]
    falls = [*rises, (3.0, 0.2, 0.4, 2.0)]
    arm = task.arm("RLOO")
    seeds = (policy(3.0, falls), dataclasses.replace(policy(2.0, rises), seed=6))
    arms = (task.start, dataclasses.replace(arm, seeds=seeds))
    found = pilot.onsets(dataclasses.replace(task, arms=arms), prompts=10_000)
    assert found == {"RLOO": {"5": 2.0, "6": None}}


def number(values, key="Q1", margin=0.03, unit="winrate"):
    return Number(
        key,
        unit,
        dict(zip(SEEDS, values)),
        statistics.seed_mean(values),
        margin,
    )


def of(found: dict[str, Number]) -> Numbers:
    numbers = Numbers([int(seed) for seed in SEEDS])
    numbers.by_name |= found
    return numbers


LEADS = [0.10, 0.12, 0.08, 0.11, 0.09]


def test_bounds_hold_together_and_holm_covers_the_decision_tests():
    numbers = of(
        {
            ADVANTAGE: number(LEADS),
            LEAD: number([0.01, -0.02, 0.03, 0.0, -0.01]),
            "something else": number(LEADS),
        }
    )
    bounds, made = numbers.quantities()
    lead = statistics.seed_mean(LEADS)
    low, high = lead.interval(1 - 0.05 / 2)
    assert (bounds[ADVANTAGE].low, bounds[ADVANTAGE].high) == (low, high)  # fmt: skip
    shown = made[ADVANTAGE]
    assert (shown.low, shown.high) == lead.interval()
    assert shown.low > shown.bound_low and shown.detectable > 0
    assert shown.p_holm == pytest.approx(2 * lead.p_value())
    other = made["something else"]
    assert other.p_holm is None and other.bound_low is None
    assert other.equivalent is False
    assert made[LEAD].p_holm == made[LEAD].p_value


def test_seeds_that_agree_exactly_give_no_interval():
    # As when nothing was learnt: no advice may rest on it.
    bounds, made = of({DIFFERENCE: number([0.0] * 5)}).quantities()
    assert bounds[DIFFERENCE].low is None
    assert "agree exactly" in made[DIFFERENCE].reason
    advice = advise(tier2=Tier2(5, difference=bounds[DIFFERENCE]))
    assert advice.verdict == "inconclusive"


def scorer(name, pairs, likelihood) -> ScorerFinding:
    values = {seed: likelihood - 0.001 * i for i, seed in enumerate(SEEDS)}
    return ScorerFinding(
        name,
        "made up",
        pairs,
        values,
        {seed: math.exp(v) for seed, v in values.items()},
        dict.fromkeys(SEEDS, 0.7),
        dict.fromkeys(SEEDS, 0.02),
        dict.fromkeys(SEEDS, 1e-3) if pairs else {},
        dict.fromkeys(SEEDS, 60.0) if pairs else {},
    )


@pytest.fixture(scope="module")
def findings() -> GapFindings:
    """Made up: no number here was measured."""
    taken = study()
    taken = dataclasses.replace(taken, tasks=taken.tasks[:1], contrasts=taken.contrasts[:1])  # fmt: skip
    _, made = of(
        {
            ADVANTAGE: number(LEADS, unit="nats per pair"),
            HEADROOM: number(LEADS, "Q4", unit="winrate − ½, n = 4"),
            DIFFERENCE: number(LEADS, "Q6"),
        }
    ).quantities()
    curves = [
        scorer(name, pairs, top + slope / pairs)
        for name, top, slope in (
            ("local reward model", -0.6, -10),
            ("DPO implicit reward", -0.65, -5),
        )
        for pairs in (250, 500, 1000)
    ]
    task = TaskFinding(
        "tour",
        "main",
        "Made up.",
        tuple(made.values()),
        (scorer("gold", 0, -0.5), curves[2], curves[5]),
        tuple(curves),
        Multiplier(True, 3.0, 2.0, 4.0, -0.6, -0.6, (-0.1, 0.1), ""),
        (ChoiceCurve("gold", (1, 2), ((0.5, 0.6),) * 5, ((0.3, 0.4),) * 5),),
        2,
        taken,
        {"RLOO": {"5": taken.tasks[0].arm("RLOO").seeds[0].curve[2].kl}},
        JudgeFinding("llm", 100, {"agrees with the gold reward": (0.9, 0.8, 1.0)}),
    )
    return GapFindings(
        "made up",
        {
            "margins": config.MarginsSection().model_dump(),
            "pilot": {
                "online": "RLOO",
                "square": {
                    "offline_gold": "DPO",
                    "offline_model": "HyPO",
                    "online_gold": "Online DPO",
                    "online_model": "RLOO",
                },
            },
        },
        "0123456789abcdef",
        {"gvjax": "0"},
        "2026-01-01T00:00:00+00:00",
        tuple(int(seed) for seed in SEEDS),
        (task,),
        advise(Tier1(5), judge_warnings=("The judge likes <b>length</b>.",)),
    )


def test_the_json_comes_back(findings):
    assert GapFindings.from_json(findings.to_json()) == findings
    value = json.loads(findings.to_json())
    value["advise"] = 1
    with pytest.raises(ValueError, match="did you mean 'advice'"):
        GapFindings.from_json(json.dumps(value))


def test_the_page_says_the_verdict_first_and_keeps_its_data(findings):
    page = gap_report.page(findings)
    assert page.index("Inconclusive: these") < page.index("What would change")
    assert "The judge likes &lt;b&gt;length&lt;/b&gt;." in page
    for text in (
        "0123456789abcdef",
        "3 [2, 4] times the labels",
        "winrate 0.03",
        "completions of the SFT policy",
        "agrees with the gold reward",
        "0.90 [0.80, 1.00]",
        "times the floating-point operations of DPO",
        "online − best offline",
    ):
        assert text in page, text
    assert "RLOO, seed 5: gold falls from KL" in page
    figures = len(re.findall(r"<figure>", page))
    assert page.count('download="') == figures >= 8
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page)
    assert "<script" not in page


def test_the_page_says_what_seeds_share_and_where_the_offline_arm_was_chosen(findings):
    own = "Each seed draws its own task instance"
    page = gap_report.page(findings)
    assert own in page and "crossed random factors" not in page
    assert "chosen by gold on validation prompts." in " ".join(page.split())
    shared = dataclasses.replace(findings.tasks[0], prompts="crossed")
    page = gap_report.page(dataclasses.replace(findings, tasks=(shared,)))
    assert own not in page and "crossed random factors" in page
    (pilot,) = shared.pilot.tasks
    bare = tuple(
        dataclasses.replace(
            arm, seeds=tuple(dataclasses.replace(s, extra={}) for s in arm.seeds)
        )
        for arm in pilot.arms
    )
    pilot = dataclasses.replace(
        shared.pilot, tasks=(dataclasses.replace(pilot, arms=bare),)
    )
    shared = dataclasses.replace(shared, pilot=pilot)
    page = gap_report.page(dataclasses.replace(findings, tasks=(shared,)))
    assert "test prompts themselves, which flatters it" in " ".join(page.split())


def test_every_scorer_has_a_mark_of_its_own():
    from gvjax.gap import gap_figures, scorers

    assert set(gap_figures.MARKS) == set(scorers.DESCRIPTIONS)
    assert len(set(gap_figures.MARKS.values())) == len(gap_figures.MARKS)
    assert quantities.EXPONENTS[0] > 0
