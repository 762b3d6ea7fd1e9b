"""The quantities of the gap, against values worked out by hand."""

import math

import numpy as np
import pytest
from scipy import special

from gvjax.gap import quantities


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_the_scale_is_fitted_on_validation_pairs_and_applied_to_the_others():
    # Three right of four at one size: σ(s) = ¾, so s = ln 3.
    found = quantities.predict([1.0, 1.0, -1.0, 0.0], [1.0, 1.0, 1.0, -1.0])
    assert found.scale == pytest.approx(math.log(3), rel=1e-4)
    expected = (2 * math.log(0.75) + math.log(0.25) + math.log(0.5)) / 4
    assert found.log_likelihood == pytest.approx(expected, rel=1e-4)
    assert found.mean_likelihood == pytest.approx((1.5 + 0.25 + 0.5) / 4, rel=1e-4)
    assert found.accuracy == (2 + 0.5) / 4


def test_margins_that_point_the_wrong_way_are_scaled_to_nothing():
    found = quantities.predict([5.0, -3.0], [-1.0, -2.0, 0.5])
    assert found.scale == 0
    np.testing.assert_allclose(found.pair_log_likelihoods, math.log(0.5))


def curves(asymptotes, heights, c, sizes, seeds=4, pairs=200, noise=0.01):
    rng = np.random.default_rng(0)
    shared = rng.normal(0, noise, (seeds, 1, pairs))
    made = []
    for a, b in zip(asymptotes, heights):
        means = np.array([a + b * n**-c for n in sizes])
        made.append(means[None, :, None] + shared + 0 * shared)
    return made


SIZES = (125, 250, 500, 1000)


def test_the_data_multiplier_is_the_ratio_of_dimensions():
    # Excess loss d/2n: a policy of 26 parameters and a verifier of 3, at one asymptote.
    policy, verifier = curves((0.5, 0.5), (13.0, 1.5), 1.0, SIZES)
    found = quantities.data_multiplier(SIZES, policy, verifier)
    assert found.identified and found.reason == ""
    assert found.value == pytest.approx(26 / 3, rel=0.02)
    assert found.low <= found.value <= found.high
    assert found.gap[0] <= 0 <= found.gap[1]


def test_different_asymptotes_identify_no_multiplier():
    policy, verifier = curves((0.6, 0.5), (13.0, 1.5), 1.0, SIZES)
    found = quantities.data_multiplier(SIZES, policy, verifier)
    assert not found.identified and found.value is None
    assert "different asymptotes" in found.reason
    assert found.asymptotes == pytest.approx((0.6, 0.5), abs=0.01)


def test_two_seeds_rarely_see_different_asymptotes_where_there_is_one():
    rng, n = np.random.default_rng(0), np.array(SIZES, float)
    seen = covered = 0
    for _ in range(100):
        policy, verifier = (
            0.5 + height * n**-0.7 + rng.normal(0, 0.01, (2, n.size))
            for height in (2 * 4**0.7, 2.0)
        )
        found = quantities.data_multiplier(SIZES, policy[..., None], verifier[..., None])  # fmt: skip
        seen += not found.gap[0] <= 0 <= found.gap[1]
        covered += found.identified and found.low <= 4 <= found.high
    assert seen <= 10
    assert covered >= 80


def test_the_multiplier_has_students_interval_over_seeds():
    policy, verifier = curves((0.5, 0.5), (13.0, 1.5), 1.0, SIZES, seeds=3)
    # At one exponent log M is linear in the logs of the heights: seeds of 8, 13 and 18 times.
    policy = 0.5 + np.array([8.0, 13.0, 18.0])[:, None, None] * (policy - 0.5) / 13
    found = quantities.data_multiplier(SIZES, policy, verifier)
    logs = np.log(np.array([15.5, 13.0, 10.5]) / 1.5)
    error = (2 * logs.var()) ** 0.5
    half = special.stdtrit(2, 0.975) * error
    assert math.log(found.value) == pytest.approx(math.log(13 / 1.5), rel=0.01)
    assert math.log(found.high / found.low) == pytest.approx(2 * half, rel=0.05)


def test_curves_that_do_not_fall_and_single_seeds_identify_none():
    policy, verifier = curves((0.6, 0.5), (-5.0, 1.5), 1.0, SIZES)
    found = quantities.data_multiplier(SIZES, policy, verifier)
    assert "do not both fall" in found.reason
    policy, verifier = curves((0.5, 0.5), (13.0, 1.5), 1.0, SIZES, seeds=1)
    found = quantities.data_multiplier(SIZES, policy, verifier)
    assert not found.identified and "one seed" in found.reason
    with pytest.raises(ValueError, match="three sizes"):
        quantities.data_multiplier(SIZES[:2], policy[:, :2], verifier[:, :2])


def test_cue_drop_is_what_the_implicit_reward_loses_beyond_the_verifier():
    right, half = [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, -1.0, -1.0]
    three = [1.0, 1.0, 1.0, -1.0]
    assert quantities.cue_drop(right, half, right, three) == 0.5 - 0.25


def test_winrates_count_ties_half():
    wins = quantities.winrates([[1.0, 0.0, 2.0]], [[1.0, 0.0]])
    np.testing.assert_array_equal(wins, [[0.75, 0.25, 1.0]])
    with pytest.raises(ValueError, match="must both be"):
        quantities.winrates([[1.0]], [1.0])


def test_the_best_of_n_by_its_own_scorer_wins_n_over_n_plus_one():
    rng = np.random.default_rng(0)
    gold = rng.random((4000, 24))
    wins = quantities.winrates(gold[:, :16], gold[:, 16:])
    sizes = (1, 2, 4, 16)
    found = quantities.headroom(gold[:, :16], wins, sizes)
    np.testing.assert_allclose(
        found, [n / (n + 1) - 0.5 for n in sizes], atol=0.01, rtol=0
    )
    # A scorer that knows nothing gains nothing.
    none = quantities.headroom(rng.random((4000, 16)), wins, sizes)
    np.testing.assert_allclose(none, 0, atol=0.01)
    same = quantities.headroom(np.zeros((4000, 16)), wins, sizes)
    np.testing.assert_allclose(same, float(wins.mean()) - 0.5, atol=1e-9)


def test_n_is_chosen_by_the_mean_over_seeds():
    sizes = (1, 2, 4)
    assert quantities.chosen_size([[0.0, 0.3, 0.1], [0.0, 0.1, 0.2]], sizes) == 1
    # A verifier that chooses badly: one sample is no choice.
    assert quantities.chosen_size([[0.0, -0.1, -0.05]], sizes) == 2
    assert quantities.efficiency(0.1, 0.4) == 0.25
    assert quantities.efficiency(0.1, 0.001) is None


def test_the_gold_gap_of_a_filter():
    scores = [[3.0, 1.0, 2.0, 0.0]]
    gold = [[1.0, 0.0, 0.5, 0.5]]
    # The best half by score: gold 1 and ½; all: ½; the best possible is 1.
    found = quantities.gold_gap(scores, gold, [1.0], quantile=0.5)
    assert found.gap == 0.75 - 0.5
    assert found.relative == 0.25 / 0.5
    # Ties share the last place: 2 is in, and half of each of the 1s.
    found = quantities.gold_gap([[2.0, 1.0, 1.0, 0.0]], gold, [1.0], quantile=0.5)
    assert found.gap == pytest.approx((1.0 + 0.5 * 0.0 + 0.5 * 0.5) / 2 - 0.5)
    # Nothing left to gain.
    found = quantities.gold_gap(scores, [[1.0] * 4], [1.0], quantile=0.5)
    assert found.gap == 0 and found.relative is None


def test_shuffled_scores_close_the_gap():
    rng = np.random.default_rng(1)
    gold = rng.random((3000, 20))
    found = quantities.gold_gap(
        rng.random(gold.shape), gold, np.ones(3000), quantile=0.1
    )
    assert abs(found.gap) < 0.01 and abs(found.relative) < 0.02


def test_leads_are_of_winrates_over_one_opponent():
    lead = quantities.lead([1.0, 0.0, 2.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0])
    np.testing.assert_array_equal(lead, [1 - 1, 0 - 0.5, 1 - 0])
    assert quantities.normalised_lead(0.1, 0.2) == 0.5
    assert quantities.normalised_lead(0.1, 0.0) is None


def test_the_square_splits_into_samples_labels_and_their_interaction():
    found = quantities.square(0.5, 0.4, 0.9, 0.6)
    assert found.samples == pytest.approx((0.9 + 0.6 - 0.5 - 0.4) / 2)
    assert found.labels == pytest.approx((0.5 + 0.9 - 0.4 - 0.6) / 2)
    assert found.interaction == pytest.approx((0.9 - 0.5) - (0.6 - 0.4))


def test_over_optimisation_sets_in_at_the_peak_of_gold():
    gold, proxy = [0.3, 0.5, 0.4, 0.1], [0.0, 1.0, 2.0, 3.0]
    assert quantities.onset(gold, proxy, tolerance=0.05) == 1
    # Within noise, still rising, or a proxy that falls too: no onset.
    assert quantities.onset([0.3, 0.5, 0.48], [0, 1, 2], tolerance=0.05) is None
    assert quantities.onset([0.3, 0.4, 0.5], [0, 1, 2], tolerance=0.05) is None
    assert quantities.onset(gold, [0.0, 3.0, 2.0, 1.0], tolerance=0.05) is None
    assert quantities.onset([], [], tolerance=0.05) is None


def test_peak_distance_and_length_share():
    logps, gold = [[-1.0, -4.0, -1.0]], [[0.0, 1.0, 1.0]]
    # The two best share the place: −2.5, against −2 of all.
    assert quantities.peak_distance(logps, gold) == -2.5 + 2.0
    assert quantities.length_share([[1, 2, 3]], [[2.0, 4.0, 6.0]]) == pytest.approx(1)
    # Nothing to explain: the mean of equal values rounds.
    assert (
        quantities.length_share(np.arange(21).reshape(3, 7), np.full((3, 7), 0.1)) == 0
    )
    assert quantities.length_share([[5, 5, 5]], [[2.0, 4.0, 6.0]]) == 0
    # Between prompts it explains nothing: longer prompts may be the easier ones.
    lengths, gold = [[1, 2], [11, 12]], [[0.0, 0.0], [9.0, 9.0]]
    assert quantities.length_share(lengths, gold) == 0


def test_seeds_without_a_value_are_left_out():
    assert quantities.over_seeds([1.0, None, 3.0]).mean == 2
    assert quantities.over_seeds([None]) is None
