"""Hand values, symmetries, and intervals that cover what they should in simulation."""

import math

import numpy as np
import pytest
from scipy import optimize

from gvjax.gap.statistics import wilson_interval
from gvjax.judges.agreement import (
    Measured,
    label_agreement,
    length_bias,
    length_effect,
    likes_length,
    prediction_powered_winrate,
    self_consistency,
)

Z = 1.959963984540054


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def ends(measured):
    return measured.low, measured.high


def covered(measured, truth):
    return measured.low <= truth <= measured.high


def test_self_consistency_by_hand():
    found = self_consistency([1, 1, 0, 0.5, 1], [1, 0, 0, 0.5, 0.5])
    assert found.agreement.value == pytest.approx(3 / 5)
    assert ends(found.agreement) == pytest.approx(wilson_interval(3, 5))
    # Shown first: 1, then b's (1 − 1); 1, 1; 0, 1; ½, ½; 1, ½.
    assert found.first.value == pytest.approx((0.5 + 1 + 0.5 + 0.5 + 0.75) / 5)
    assert found.comparisons == 5


def test_a_judge_of_places():
    always_first = self_consistency(np.ones(40), np.zeros(40))
    assert always_first.agreement.value == 0 and always_first.agreement.low == 0
    assert always_first.first.value == 1.0 and always_first.first.low is None
    assert "no comparison differs" in always_first.first.reason
    perfect = self_consistency(np.ones(40), np.ones(40))
    assert perfect.agreement.high == 1.0
    assert perfect.first.value == 0.5


@pytest.mark.parametrize(("hits", "trials"), [(0, 7), (3, 10), (10, 10), (81, 263)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_shares_have_wilsons_interval(hits, trials, level):
    said = np.arange(trials) < hits
    found = self_consistency(said, np.ones(trials), level=level).agreement
    assert ends(found) == pytest.approx(wilson_interval(hits, trials, level), abs=1e-12)


def test_kappa_by_hand():
    judge = [1] * 25 + [0] * 25
    labels = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    found = label_agreement(judge, labels)
    assert found.agreement.value == 0.7
    assert ends(found.agreement) == pytest.approx(wilson_interval(35, 50))
    # p_e = ½·.6 + ½·.4 = ½.
    assert found.kappa.value == pytest.approx((0.7 - 0.5) / (1 - 0.5))
    # Fleiss, Cohen and Everitt's variance, term by term.
    table = np.array([[20, 5], [10, 15]]) / 50
    p, q, kappa = table.sum(1), table.sum(0), 0.4
    diagonal = sum(
        table[i, i] * (1 - (p[i] + q[i]) * (1 - kappa)) ** 2 for i in range(2)
    )
    off = (1 - kappa) ** 2 * sum(
        table[i, j] * (q[i] + p[j]) ** 2 for i in range(2) for j in range(2) if i != j
    )
    last = (kappa - 0.5 * (1 - kappa)) ** 2
    error = math.sqrt((diagonal + off - last) / 50) / (1 - 0.5)
    assert ends(found.kappa) == pytest.approx((0.4 - Z * error, 0.4 + Z * error))


def test_agreement_is_on_who_is_preferred():
    found = label_agreement([0.75, 0.5, 0.25, 1.0], [1.0, 0.5, 0.0, 0.5])
    assert found.agreement.value == 0.75
    assert found.comparisons == 4


def test_kappa_at_its_ends():
    labels = np.tile([1.0, 0.0], 30)
    for judge, value in ((labels, 1.0), (1 - labels, -1.0)):
        found = label_agreement(judge, labels).kappa
        # Nothing tells how far off it could be; an interval without width would say that it cannot be.
        reason = "agreement is the same in every comparison"
        assert found == Measured(value, None, None, reason)
    few = np.array([1, 0, 1, 0, 1.0])
    assert label_agreement(few, [1, 0, 1, 0, 0]).kappa.high == 1.0
    assert label_agreement(1 - few, [1, 0, 1, 0, 0]).kappa.low == -1.0
    same = label_agreement(np.ones(9), np.ones(9))
    assert same.agreement.value == 1.0
    assert math.isnan(same.kappa.value) and "every comparison" in same.kappa.reason
    assert same.kappa.low is None


def test_the_regression_is_the_maximum_likelihood():
    rng = np.random.default_rng(0)
    x = rng.normal(size=80)
    y = rng.choice([0.0, 0.5, 1.0], 80)
    found = length_effect(y, x, scale=2.0)

    def loss(w):
        logits = w[0] + w[1] * x / 2
        return (np.logaddexp(0, logits) - y * logits).sum()

    alpha, beta = optimize.minimize(loss, np.zeros(2), tol=1e-12).x
    assert found.coefficient.value == pytest.approx(beta, abs=1e-5)
    assert found.winrate.value == pytest.approx(sigmoid(alpha), abs=1e-5)
    assert found.raw_winrate.value == y.mean()


def test_one_step_of_length_by_hand():
    """With two lengths the model is saturated: σ(α ± β) are the two groups' shares."""
    x = np.repeat([1.0, -1.0], 10)
    y = np.concatenate([np.arange(10) < 8, np.arange(10) < 3]).astype(float)
    found = length_effect(y, x)
    high, low = math.log(0.8 / 0.2), math.log(0.3 / 0.7)
    assert found.scale == 1.0
    assert found.coefficient.value == pytest.approx((high - low) / 2)
    assert found.winrate.value == pytest.approx(sigmoid((high + low) / 2))
    # Delta method on the two shares, times N/(N − 2).
    error = math.sqrt((1 / (10 * 0.16) + 1 / (10 * 0.21)) / 4 * 20 / 18)
    middle = found.coefficient.value
    assert ends(found.coefficient) == pytest.approx(
        (middle - Z * error, middle + Z * error)
    )
    middle = (high + low) / 2
    assert ends(found.winrate) == pytest.approx(
        (sigmoid(middle - Z * error), sigmoid(middle + Z * error))
    )


def two_lengths(at_0, at_1):
    """Wins among 10 pairs of equal length and among 20 where a is longer by 3."""
    wins = [np.arange(10) < at_0, np.arange(20) < at_1]
    return np.concatenate(wins).astype(float)


LONGER = np.repeat([0.0, 3.0], [10, 20])


def logit(p):
    return math.log(p / (1 - p))


def test_unequal_groups_by_hand():
    """α is the first group's log-odds, β the difference: their errors differ."""
    found = length_effect(two_lengths(4, 15), LONGER)
    assert found.scale == pytest.approx(3 * math.sqrt(2 / 3))
    alpha, beta = logit(0.4), (logit(0.75) - logit(0.4)) * math.sqrt(2 / 3)
    error_0, error_1 = (
        math.sqrt(1 / (n * p * (1 - p)) * 30 / 28) for n, p in ((10, 0.4), (20, 0.75))
    )
    assert ends(found.winrate) == pytest.approx(
        (sigmoid(alpha - Z * error_0), sigmoid(alpha + Z * error_0))
    )
    half = Z * math.hypot(error_0, error_1) * math.sqrt(2 / 3)
    assert found.coefficient.value == pytest.approx(beta)
    assert ends(found.coefficient) == pytest.approx((beta - half, beta + half))


def test_length_bias_by_hand():
    judge, labels = two_lengths(4, 15), two_lengths(5, 8)
    found = length_bias(judge, labels, LONGER, scale=3.0)
    value = (logit(0.75) - logit(0.4)) - (logit(0.4) - logit(0.5))
    variance = 0.0
    for rows, p, q in ((slice(10), 0.4, 0.5), (slice(10, 30), 0.75, 0.4)):
        moved = (judge[rows] - p) / (p * (1 - p)) - (labels[rows] - q) / (q * (1 - q))
        variance += (moved**2).sum() / moved.size**2 * 30 / 28
    half = Z * math.sqrt(variance)
    assert found.value == pytest.approx(value)
    assert ends(found) == pytest.approx((value - half, value + half))


def test_names_and_units_do_not_matter():
    rng = np.random.default_rng(1)
    x = rng.normal(size=60)
    y = (rng.random(60) < sigmoid(0.5 + x)).astype(float)
    found, other, words = (
        length_effect(y, x),
        length_effect(1 - y, -x),
        length_effect(y, 7 * x),
    )
    assert other.coefficient.value == pytest.approx(found.coefficient.value)
    assert other.winrate.value == pytest.approx(1 - found.winrate.value)
    assert words.scale == pytest.approx(7 * found.scale)
    assert ends(words.coefficient) == pytest.approx(ends(found.coefficient))


@pytest.mark.parametrize(
    ("scores", "lengths", "reason"),
    [
        ([1, 1, 0, 0], [2, 1, -1, -2], "length decides"),
        ([1, 1, 1, 1], [2, 1, -1, -3], "all preferences"),
        ([1, 0, 1, 0], [5, 5, 5, 5], "all length differences"),
        ([1, 0], [1, 2], "2 comparisons"),
        ([0, 1, 0, 1], [0, 0, 0, 0], "all length differences"),
    ],
)
def test_no_fit_has_a_reason(scores, lengths, reason):
    found = length_effect(scores, lengths)
    for measured in (
        found.coefficient,
        found.winrate,
        length_bias(scores, scores, lengths),
    ):
        assert math.isnan(measured.value) and measured.low is None
        assert reason in measured.reason
    assert found.raw_winrate.value == np.mean(scores)


def test_length_coverage():
    """The intervals hold the truth in 95% of simulated samples, for averaged scores too."""
    rng = np.random.default_rng(0)
    alpha, beta, hits = 0.4, 0.8, []
    for _ in range(600):
        x = rng.normal(size=150)
        p = sigmoid(alpha + beta * x)
        orders = rng.random((2, 150)) < p
        found = length_effect(orders.mean(0), x, scale=1.0)
        hits.append(
            (
                covered(found.coefficient, beta),
                covered(found.winrate, sigmoid(alpha)),
            )
        )
    assert np.mean(hits, 0).min() >= 0.92 and np.mean(hits, 0).max() <= 0.98


def test_a_long_completion_does_not_make_lengths_decide():
    """Lengths have heavy tails: one row may be certain, and the fit is still there."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(20):
        x = np.subtract(*rng.lognormal(5, 0.8, (2, 1000)))
        scores = rng.random(1000) < sigmoid(3 * x / np.sqrt((x**2).mean()))
        found.append(length_effect(scores, x).coefficient)
    assert np.mean([covered(each, 3.0) for each in found]) >= 0.8
    assert max(np.abs(each.value - 3) for each in found) < 1
    overlap = length_effect([1, 0, 1, 0, 1, 0], [9, 9, 1, 1, -1, -9]).coefficient
    assert np.isfinite(overlap.value)


def test_rows_of_one_cluster_count_together():
    """Copies of every row, said to belong together, change nothing but the correction for few clusters."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=400)
    luck = rng.random((2, 400))
    judge, labels = (luck < sigmoid(0.3 + x)).astype(float)
    copied = {"clusters": np.tile(np.arange(400), 5)}

    def widths(judge, labels, x, **options):
        agreed = label_agreement(judge, labels, **options)
        effect = length_effect(judge, x, **options)
        itself = self_consistency(judge, labels, **options)
        measured = (
            agreed.agreement,
            agreed.kappa,
            effect.coefficient,
            effect.winrate,
            effect.raw_winrate,
            length_bias(judge, labels, x, **options),
            itself.agreement,
            itself.first,
        )
        return np.array([each.high - each.low for each in measured])

    once = widths(judge, labels, x)
    together = widths(np.tile(judge, 5), np.tile(labels, 5), np.tile(x, 5), **copied)
    apart = widths(np.tile(judge, 5), np.tile(labels, 5), np.tile(x, 5))
    np.testing.assert_allclose(together, once, rtol=0.01)
    np.testing.assert_allclose(apart, once / np.sqrt(5), rtol=0.02)
    with pytest.raises(ValueError, match="clusters has shape"):
        label_agreement(judge, labels, clusters=[1, 2])


def test_clusters_that_do_not_differ_count_as_one_row_each():
    judge, labels, prompts = [1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1]
    found = label_agreement(judge, labels, clusters=prompts).agreement
    assert found.value == 0.5 and found.low < 0.1 and found.high > 0.9
    itself = self_consistency(judge, labels, clusters=prompts)
    assert itself.agreement.value == 0.5 and itself.agreement.low < 0.1


def test_coverage_of_clusters():
    """Five arms share what is hard about a prompt: their rows overlap, and the intervals still cover."""
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(400):
        hard = rng.normal(size=(60, 1))
        shown = np.sqrt(0.7) * hard + np.sqrt(0.3) * rng.normal(size=(60, 5))
        judge = (shown + rng.normal(size=(60, 5)) > 0).astype(float).ravel()
        prompts = np.repeat(np.arange(60), 5)
        raw = length_effect(judge, rng.normal(size=300), clusters=prompts).raw_winrate
        itself = self_consistency(judge, np.ones(300), clusters=prompts).agreement
        hits.append((covered(raw, 0.5), covered(itself, 0.5)))
    assert np.mean(hits, 0).min() >= 0.92 and np.mean(hits, 0).max() <= 0.98


def test_length_bias_is_against_the_labels():
    rng = np.random.default_rng(0)
    hits, found_bias, false_alarms = [], [], []
    for _ in range(300):
        x = rng.normal(size=200)
        luck = rng.random(200)
        labels = (luck < sigmoid(0.2 + 0.5 * x)).astype(float)
        biased = (luck < sigmoid(0.2 + 1.5 * x)).astype(float)
        found = length_bias(biased, labels, x, scale=1.0)
        hits.append(covered(found, 1.0))
        found_bias.append(found.low > 0)
        honest = np.where(
            rng.random(200) < 0.8, labels, rng.random(200) < sigmoid(0.2 + 0.5 * x)
        )
        false_alarms.append(length_bias(honest, labels, x, scale=1.0).low > 0)
    assert 0.91 <= np.mean(hits) <= 0.985
    assert np.mean(found_bias) > 0.9
    assert np.mean(false_alarms) < 0.06
    same = length_bias(labels, labels, x)
    assert ends(same) == (0.0, 0.0)


@pytest.mark.parametrize("taste", [-0.6, -0.3, 0.0, 0.3])
def test_errors_at_random_are_no_taste_for_length(taste):
    rng = np.random.default_rng(0)
    warned, biased = [], []
    for _ in range(200):
        x = rng.normal(size=400)
        labels = (rng.random(400) < sigmoid(taste * x)).astype(float)
        errs = np.abs(labels - (rng.random(400) < 0.15))
        likes = np.where(rng.random(400) < 0.3, x > 0, errs).astype(float)
        for judge, said in ((errs, warned), (likes, biased)):
            effect = length_effect(judge, x)
            said.append(likes_length(effect, length_bias(judge, labels, x)))
    assert np.mean(warned) < 0.06
    # What prefers the longer one in a third of the comparisons is found where labels do not hate it.
    assert taste < -0.3 or np.mean(biased) > 0.5


def test_correction_by_hand():
    labels, judge = np.array([1, 0, 1, 0.0]), np.array([1, 1, 1, 0.0])
    rest = np.array([1, 1, 0, 1, 1, 0.0])
    found = prediction_powered_winrate(labels, judge, rest, weight=1.0)
    value = 4 / 6 + (0 - 1 + 0 + 0) / 4
    variance = (4 / 6 * 2 / 6 * 6 / 5) / 6 + (3 / 16 * 4 / 3) / 4
    assert found.winrate.value == pytest.approx(value)
    half = Z * math.sqrt(variance)
    assert ends(found.winrate) == pytest.approx((value - half, value + half))
    assert found.labels_only.value == 0.5
    assert found.judge_only.value == pytest.approx(7 / 10)
    alone = prediction_powered_winrate(labels, judge, rest, weight=0.0)
    assert alone.winrate == alone.labels_only


def test_the_weight_by_hand():
    labels, judge, rest = (
        np.array([1, 0, 1, 0.0]),
        np.array([1, 1, 1, 0.0]),
        np.tile([1, 0.0], 4),
    )
    found = prediction_powered_winrate(labels, judge, rest)
    together = (1 + 0 + 1 + 0) / 3 - 4 / 3 * 0.5 * 0.75
    spread = np.var([1, 1, 1, 0, *rest], ddof=1)
    assert found.weight == pytest.approx(together / ((1 + 4 / 8) * spread))


def test_a_perfect_judge_is_believed_and_a_useless_one_is_not():
    rng = np.random.default_rng(0)
    labels = (rng.random(100) < 0.6).astype(float)
    rest = (rng.random(100_000) < 0.6).astype(float)
    perfect = prediction_powered_winrate(labels, labels, rest)
    assert perfect.weight > 0.9
    assert perfect.winrate.high - perfect.winrate.low < 0.1 * (
        perfect.labels_only.high - perfect.labels_only.low
    )
    against = prediction_powered_winrate(labels, 1 - labels, 1 - rest)
    assert against.weight == 0.0
    constant = prediction_powered_winrate(labels, np.ones(100), np.ones(100))
    assert constant.weight == 0.0
    assert constant.winrate == constant.labels_only


@pytest.mark.parametrize("weight", [None, 1.0])
def test_correction_coverage(weight):
    """A judge that is right in 80% of one kind of pair and 95% of the other is off by far more than its own interval
    says; the corrected interval holds the truth."""
    rng = np.random.default_rng(0)
    hits, judge_hits, widths = [], [], []
    for _ in range(600):
        y = (rng.random(1100) < 0.55).astype(float)
        right = rng.random(1100) < np.where(y == 1, 0.95, 0.8)
        judge = np.where(right, y, 1 - y)
        found = prediction_powered_winrate(
            y[:100], judge[:100], judge[100:], weight=weight
        )
        hits.append(covered(found.winrate, 0.55))
        judge_hits.append(covered(found.judge_only, 0.55))
        widths.append(
            (found.winrate.high - found.winrate.low)
            / (found.labels_only.high - found.labels_only.low)
        )
    assert 0.92 <= np.mean(hits) <= 0.975
    assert np.mean(judge_hits) < 0.5
    assert np.mean(widths) < 0.8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: self_consistency([1, 0], [1]), "same comparisons"),
        (lambda: self_consistency([0.25], [1]), "0.25"),
        (lambda: self_consistency([], []), "at least one"),
        (lambda: self_consistency([1], [1], level=1.0), "level"),
        (lambda: label_agreement([np.nan], [1]), "outside"),
        (lambda: label_agreement([1, 1], [1]), "same comparisons"),
        (lambda: label_agreement([2], [1]), "outside"),
        (lambda: length_effect([1, 0, 1], [1, 2]), "same comparisons"),
        (lambda: length_effect([1, 0, 1], [1, 2, np.inf]), "not finite"),
        (lambda: length_effect([1, 0, 1], [1, 2, 3], scale=0.0), "scale"),
        (lambda: prediction_powered_winrate([1], [1], [1, 0]), "two"),
        (lambda: prediction_powered_winrate([1, 0], [1, 0], [1]), "two"),
        (lambda: prediction_powered_winrate([1, 0], [1], [1, 0]), "same comparisons"),
        (
            lambda: prediction_powered_winrate([1, 0], [1, 0], [1, 0], weight=2.0),
            "weight",
        ),
    ],
)
def test_impossible_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call()
