"""Hand values for every formula, and simulated studies for the claim that 95% intervals cover 95%."""

import math

import numpy as np
import pytest
from scipy import stats

from gvjax.gap import statistics
from gvjax.gap.statistics import Estimate


def test_crossed_mean_by_hand():
    x = np.array([[1.0, 2.0, 4.0], [2.0, 2.0, 7.0]])
    # Row means 7/3 and 11/3, column means 1.5, 2, 5.5, grand mean 3.
    ms_seed = 3 * 2 * (2 / 3) ** 2 / 1
    ms_prompt = 2 * (1.5**2 + 1 + 2.5**2) / 2
    residual = np.array([[1 / 6, 2 / 3, -5 / 6], [-1 / 6, -2 / 3, 5 / 6]])
    ms_residual = (residual**2).sum() / 2
    total = ms_seed + ms_prompt - ms_residual
    df = total**2 / (ms_seed**2 / 1 + ms_prompt**2 / 2 + ms_residual**2 / 2)
    estimate = statistics.paired_mean(x, prompts="crossed")
    assert estimate.mean == pytest.approx(3.0)
    assert estimate.standard_error == pytest.approx(math.sqrt(total / 6))
    assert estimate.degrees_of_freedom == pytest.approx(df)
    low, high = estimate.interval()
    half = stats.t.ppf(0.975, df) * math.sqrt(total / 6)
    assert (low, high) == pytest.approx((3 - half, 3 + half))


def test_without_prompt_differences_crossed_is_the_t_interval_over_seeds():
    per_seed = np.array([0.1, 0.3, 0.2, 0.6])
    x = np.repeat(per_seed[:, None], 50, axis=1)
    crossed = statistics.paired_mean(x, prompts="crossed")
    assert crossed.interval() == pytest.approx(
        statistics.seed_mean(per_seed).interval()
    )


def test_seed_mean_is_students_t():
    values = [0.2, 0.3, 0.25, 0.15]
    estimate = statistics.seed_mean(values)
    expected = stats.ttest_1samp(values, 0.0)
    assert estimate.interval() == pytest.approx(
        tuple(expected.confidence_interval(0.95))
    )
    assert estimate.p_value() == pytest.approx(expected.pvalue)


def test_nested_prompts_use_seed_means_only():
    rows = [[1.0, 3.0], [0.0, 0.0, 3.0], [3.0]]
    nested = statistics.paired_mean(rows, prompts="nested")
    assert nested == statistics.seed_mean([2.0, 1.0, 3.0])


def simulate(key, studies, seeds, prompts, seed_sd, prompt_sd, residual_sd):
    generator = np.random.default_rng(key)
    return (
        0.1
        + seed_sd * generator.standard_normal((studies, seeds, 1))
        + prompt_sd * generator.standard_normal((studies, 1, prompts))
        + residual_sd * generator.standard_normal((studies, seeds, prompts))
    )


@pytest.mark.parametrize("seeds", [3, 5, 8])
@pytest.mark.parametrize("seed_sd", [0.015, 0.03])
def test_crossed_intervals_cover_95_percent(seeds, seed_sd):
    # Prompt sd .3 and residual sd .4 over 400 prompts: a winrate's spread.
    x = simulate(7, 4000, seeds, 400, seed_sd, 0.3, 0.4)
    variance, df = statistics._crossed_variance(x)
    half = stats.t.ppf(0.975, df) * np.sqrt(variance)
    covered = np.mean(np.abs(x.mean((1, 2)) - 0.1) <= half)
    assert 0.93 <= covered <= 0.97
    # One study through the public door gives the same numbers.
    estimate = statistics.paired_mean(x[0], prompts="crossed")
    assert estimate.standard_error == pytest.approx(math.sqrt(variance[0]))
    assert estimate.degrees_of_freedom == pytest.approx(df[0])


@pytest.mark.parametrize("seeds", [5, 8])
def test_crossed_intervals_without_effects_are_not_much_too_wide(seeds):
    # A difference of log-likelihoods: neither seeds nor pairs have an effect of their own.
    x = simulate(10, 4000, seeds, 400, 0.0, 0.0, 0.4)
    variance, df = statistics._crossed_variance(x)
    half = stats.t.ppf(0.975, df) * np.sqrt(variance)
    assert 0.95 <= np.mean(np.abs(x.mean((1, 2)) - 0.1) <= half) <= 0.973


def test_prompt_only_intervals_would_not_cover():
    """The reason for all this: with 5 seeds, forgetting the seed factor loses coverage."""
    x = simulate(8, 2000, 5, 400, 0.03, 0.3, 0.4)
    by_prompt = x.mean(1)
    half = 1.96 * by_prompt.std(-1, ddof=1) / math.sqrt(400)
    assert np.mean(np.abs(x.mean((1, 2)) - 0.1) <= half) < 0.9


@pytest.mark.parametrize("prompts", ["crossed", "nested"])
def test_pigeonhole_covers_roughly(prompts):
    x = simulate(9, 150, 8, 60, 0.05, 0.3 if prompts == "crossed" else 0.0, 0.4)
    hits = 0
    for study in x:
        low, high = statistics.pigeonhole_interval(
            study, prompts=prompts, resamples=400
        )
        hits += low <= 0.1 <= high
    assert 0.88 <= hits / 150 <= 1.0


def test_pigeonhole_resamples_both_factors():
    def width(matrix):
        low, high = statistics.pigeonhole_interval(matrix, prompts="crossed")
        return high - low

    values = np.linspace(-1.0, 1.0, 6)
    flat = np.zeros((6, 6))
    assert width(flat) == 0.0
    assert width(flat + values[:, None]) > 0.5
    assert width(flat + values) > 0.5


def test_one_seed_has_no_interval():
    for prompts in ("crossed", "nested"):
        estimate = statistics.paired_mean([[0.0, 1.0, 1.0]], prompts=prompts)
        assert estimate.mean == pytest.approx(2 / 3)
        assert estimate.interval() is None
        assert estimate.p_value() is None
        assert estimate.equivalence_p_value(0.1) is None
        assert estimate.detectable() is None
        assert estimate.reason == "seed variance unknown: one seed"
        assert statistics.pigeonhole_interval([[0.0, 1.0]], prompts=prompts) is None


def test_equivalence_is_two_one_sided_tests():
    values = np.array([0.01, -0.02, 0.0, 0.015, -0.005])
    estimate = statistics.seed_mean(values)
    upper = stats.ttest_1samp(values, 0.03, alternative="less").pvalue
    lower = stats.ttest_1samp(values, -0.03, alternative="greater").pvalue
    assert estimate.equivalence_p_value(0.03) == pytest.approx(max(lower, upper))
    # Below .05 exactly when the 90% interval lies inside.
    low, high = estimate.interval(0.9)
    edge = max(-low, high)
    assert estimate.equivalence_p_value(edge) == pytest.approx(0.05)
    with pytest.raises(ValueError, match=r"margin 0\.0 is not positive"):
        estimate.equivalence_p_value(0.0)


def test_no_spread_at_all():
    same = statistics.seed_mean([0.5, 0.5])
    assert same.interval() == (0.5, 0.5)
    assert same.p_value() == 0.0
    assert same.p_value(null=0.5) == 1.0
    assert same.detectable() == 0.0
    assert same.equivalence_p_value(0.4) == 1.0
    assert same.equivalence_p_value(0.6) == 0.0


def test_detectable_effect_is_detected_in_80_percent_of_studies():
    estimate = Estimate(0.0, 1 / math.sqrt(5), 4.0, "t over seeds")
    delta = estimate.detectable()
    generator = np.random.default_rng(3)
    x = delta + generator.standard_normal((20000, 5))
    t = x.mean(1) / (x.std(1, ddof=1) / math.sqrt(5))
    assert np.mean(t > stats.t.ppf(0.975, 4)) == pytest.approx(0.8, abs=0.01)


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.6, 0.5]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_wilson_by_hand():
    expected = stats.binomtest(7, 10).proportion_ci(method="wilson")
    assert statistics.wilson_interval(7, 10) == pytest.approx(tuple(expected))
    assert statistics.wilson_interval(0, 10)[0] == 0.0
    assert statistics.wilson_interval(10, 10)[1] == 1.0
    with pytest.raises(ValueError, match="11 successes in 10 trials"):
        statistics.wilson_interval(11, 10)


def test_win_scores_count_ties_half():
    scores = statistics.win_scores([1.0, 0.5, 0.0], [0.0, 0.5, 1.0])
    assert scores.tolist() == [1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="paired by prompt"):
        statistics.win_scores([1.0], [1.0, 2.0])


def test_matched_kl_interpolates_inside_and_never_outside():
    kl_a, gold_a = [0.0, 2.0, 4.0], [0.3, 0.5, 0.7]
    kl_b, gold_b = [1.0, 0.0], [0.4, 0.3]
    matched = statistics.matched_kl_difference(kl_a, gold_a, kl_b, gold_b, at=1.0)
    assert matched.difference == pytest.approx(0.0)
    matched = statistics.matched_kl_difference(kl_a, gold_a, kl_b, gold_b, at=0.5)
    assert matched.difference == pytest.approx(0.35 - 0.35)
    matched = statistics.matched_kl_difference(kl_b, gold_a[:2], kl_b, gold_b, at=1.0)
    assert matched.difference == pytest.approx(0.3 - 0.4)
    outside = statistics.matched_kl_difference(kl_a, gold_a, kl_b, gold_b, at=1.5)
    assert outside.difference is None
    assert outside.reason == "b was evaluated from 0.00 to 1.00 nats, not at 1.50"


def test_a_kl_below_0_is_read_as_0():
    # An estimate from samples; the arm is next to the start, and is compared there, not left out.
    near, far = ([0.0, -0.01], [0.3, 0.5]), ([0.0, 1.0], [0.3, 0.6])
    matched = statistics.matched_kl_difference(*far, *near, at=-0.01)
    assert matched.difference == pytest.approx(0.3 - (0.3 + 0.5) / 2)


def test_matched_kl_averages_repeats_and_drops_what_is_not_finite():
    kl = [1.0, 1.0, math.nan, 2.0]
    matched = statistics.matched_kl_difference(
        kl, [0.2, 0.4, 9.0, math.inf], [1.0], [0.0], at=1.0
    )
    assert matched.difference == pytest.approx(0.3)
    nothing = statistics.matched_kl_difference([math.inf], [0.0], [1.0], [0.0], at=1.0)
    assert nothing.reason == "a has no evaluation with finite KL and gold"


def test_best_of_n_averages_over_all_subsets():
    from itertools import combinations

    scores = np.array([[0.1, 0.9, 0.5, 0.7]])
    gold = np.array([[1.0, 2.0, 4.0, 8.0]])
    for n in range(1, 5):
        picks = [
            gold[0, max(subset, key=lambda i: scores[0, i])]
            for subset in combinations(range(4), n)
        ]
        assert statistics.best_of_n(scores, gold, n) == pytest.approx([np.mean(picks)])


def test_best_of_n_breaks_ties_at_random():
    gold = np.array([[0.0, 1.0, 5.0]])
    # All tied: the scorer knows nothing, so any n gives the mean.
    assert statistics.best_of_n(np.zeros((1, 3)), gold, 2) == pytest.approx([2.0])
    # Two tied at the top: each is picked half the time when both are present.
    scores = np.array([[0.0, 1.0, 1.0]])
    expected = np.mean([1.0, 5.0, (1.0 + 5.0) / 2])
    assert statistics.best_of_n(scores, gold, 2) == pytest.approx([expected])
    with pytest.raises(ValueError, match="n = 4 of 3 samples"):
        statistics.best_of_n(scores, gold, 4)


def test_best_of_n_does_not_overflow():
    generator = np.random.default_rng(0)
    scores = generator.standard_normal((2, 2000))
    best = statistics.best_of_n(scores, scores, 1000)
    assert np.all(np.isfinite(best))
    assert np.all(best <= scores.max(1) + 1e-9)
    assert statistics.best_of_n(scores, np.ones_like(scores), 700) == pytest.approx(
        [1.0, 1.0], abs=1e-8
    )


def test_calibration_error_by_hand():
    p, y = [0.15, 0.15, 0.95, 0.95], [0.0, 1.0, 1.0, 0.0]
    expected = 0.5 * abs(0.5 - 0.15) + 0.5 * abs(0.5 - 0.95)
    assert statistics.expected_calibration_error(p, y) == pytest.approx(expected)
    assert statistics.expected_calibration_error([1.0, 0.0], [1, 0]) == 0.0
    with pytest.raises(ValueError, match="must lie in"):
        statistics.expected_calibration_error([1.5], [1])


def test_nll_difference_is_paired():
    a = statistics.pair_log_likelihoods([[0.0, 2.0], [1.0, 3.0]])
    assert a[0, 0] == pytest.approx(math.log(0.5))
    assert statistics.pair_log_likelihoods(-800.0) == pytest.approx(-800.0)
    estimate = statistics.paired_nll_difference(a, a - 0.25, prompts="crossed")
    assert estimate.mean == pytest.approx(0.25)
    assert estimate.standard_error == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="score the same pairs"):
        statistics.paired_nll_difference(a, a[:, :1], prompts="nested")


@pytest.mark.parametrize(
    ("rows", "prompts", "message"),
    [
        ([[1.0], [1.0, 2.0]], "crossed", "use prompts='nested'"),
        ([[1.0, math.nan]], "nested", "1 of 2 values are not finite"),
        ([], "nested", "no seeds"),
        ([[]], "crossed", "seed 0"),
        ([[1.0]], "paired", "prompts='paired'"),
    ],
)
def test_bad_input_is_refused(rows, prompts, message):
    with pytest.raises(ValueError, match=message):
        statistics.paired_mean(rows, prompts=prompts)
