"""The quantities that say how much easier verifying is than generating: pure functions of margins, scores and gold rewards.

Likelihood and not accuracy: a verifier whose accuracy is a point better may be ten times closer to the truth in nats, and
that is what a policy that is trained against it feels. All scorers are rescaled on validation pairs first, so that no one
wins by a temperature.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import special

from gvjax.gap import statistics
from gvjax.gap.statistics import Estimate
from gvjax.recipes.evaluation import best_scale

Array = npt.NDArray[np.float64]

EXPONENTS = np.linspace(0.1, 2.0, 39)
"""Decay exponents c of a learning curve a + b N^−c that a fit looks at."""


# Q1: how well a scorer predicts held-out labels.


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A scorer's prediction of held-out labels, after temperature scaling.

    Attributes:
      scale: what margins were multiplied by, fitted on validation pairs; 0 where they point the wrong way.
      log_likelihood: nats per pair; ln ½ is chance.
      mean_likelihood: mean probability of the label, in [0, 1].
      accuracy: share in order, ties counting ½.
      calibration_error: expected calibration error, in [0, 1].
      pair_log_likelihoods: f64[N], log-probability of each label.
    """

    scale: float
    log_likelihood: float
    mean_likelihood: float
    accuracy: float
    calibration_error: float
    pair_log_likelihoods: Array


def predict(margins: npt.ArrayLike, validation_margins: npt.ArrayLike) -> Prediction:
    """Scales margins as validation pairs like best, and holds them against labels.

    Args:
      margins: [N], chosen less rejected, of the pairs that are reported.
      validation_margins: [M], the same of the pairs that the scale is fitted on.
    """
    margins = np.asarray(margins, np.float64)
    scale = best_scale(np.asarray(validation_margins, np.float64))
    scaled = scale * margins
    each = statistics.pair_log_likelihoods(scaled)
    return Prediction(
        scale=scale,
        log_likelihood=float(each.mean()),
        mean_likelihood=float(np.exp(each).mean()),
        accuracy=float(np.where(margins == 0, 0.5, margins > 0).mean()),
        calibration_error=statistics.expected_calibration_error(
            special.expit(np.concatenate([scaled, -scaled])),
            np.repeat([1.0, 0.0], len(scaled)),
        ),
        pair_log_likelihoods=each,
    )


# Q2: how many more labels the policy needs.


@dataclasses.dataclass(frozen=True)
class DataMultiplier:
    """How many times the verifier's data the policy needs to predict as well.

    Attributes:
      identified: whether there is such a number: both curves fall, and not to asymptotes that are shown to differ.
      value: N_policy / N_verifier at equal likelihood, from the fit with one asymptote; None where not identified.
      low, high: 95% interval, Student's t of log M over seeds.
      asymptotes: (policy's, verifier's), nats per pair, from the fit with two.
      gap: 95% interval of the policy's asymptote less the verifier's, Student's t over seeds.
      reason: why it is not identified, or ''.
    """

    identified: bool
    value: float | None
    low: float | None
    high: float | None
    asymptotes: tuple[float, float]
    gap: tuple[float, float]
    reason: str


def data_multiplier(
    sizes: Sequence[int],
    policy: npt.ArrayLike,
    verifier: npt.ArrayLike,
) -> DataMultiplier:
    """Fits NLL(N) = a + b N^−c to both learning curves and compares them.

        M = (b_policy / b_verifier)^(1/c)   with one a and one c for both

    c is found on a grid, a and b by least squares. A second fit with an asymptote each says whether one is enough: if the
    interval of their difference excludes 0, no amount of labels does what the verifier does, and M is not identified.
    Intervals are Student's t with S − 1 degrees of freedom around the fit of all S seeds, of the jackknife's error:

        se² = (S − 1)/S Σ_s (θ_(s) − mean θ)²,   θ_(s) the fit without seed s

    A percentile bootstrap of few seeds would be too narrow. Seeds that share their held-out pairs say nothing of other pairs.

    Args:
      sizes: K >= 3 numbers of training pairs, ascending.
      policy, verifier: [seeds, K, pairs], NLL of each held-out pair, nats.

    References:
      Tukey, 1958, https://doi.org/10.1214/aoms/1177706647.
    """
    n = np.asarray(sizes, np.float64)
    losses = np.stack(
        [np.asarray(policy, np.float64), np.asarray(verifier, np.float64)], axis=1
    )
    if losses.ndim != 4 or losses.shape[2] != n.size or n.size < 3:
        raise ValueError(
            f"losses [seeds, sizes, pairs] of policy and verifier have shape {losses.shape} with {n.size} sizes; give at"
            " least three sizes"
        )
    curves = _without_each(losses.mean(axis=3))
    one = _fit(n, curves, asymptotes=1)
    two = _fit(n, curves, asymptotes=2)
    gap = _jackknife(two["a"][:, 0] - two["a"][:, 1])
    reason = ""
    if losses.shape[0] < 2:
        reason = statistics.ONE_SEED
    elif not np.all(one["b"] > 0):
        reason = "the learning curves do not both fall with data"
    elif not gap[0] <= 0 <= gap[1]:
        reason = "the curves run to different asymptotes: no number of labels makes up for it"
    asymptotes = float(two["a"][0, 0]), float(two["a"][0, 1])
    if reason:
        return DataMultiplier(False, None, None, None, asymptotes, gap, reason)
    logs = (np.log(one["b"][:, 0]) - np.log(one["b"][:, 1])) / one["c"]
    with np.errstate(over="ignore"):
        value, low, high = (float(np.exp(v)) for v in (logs[0], *_jackknife(logs)))
    return DataMultiplier(True, value, low, high, asymptotes, gap, "")


def _without_each(curves: Array) -> Array:
    """f64[1 + S, ...]: the mean over all seeds of f64[S, ...], then that without each seed; only the first of one seed."""
    count, whole = len(curves), curves.mean(axis=0, keepdims=True)
    if count < 2:
        return whole
    return np.concatenate([whole, (count * whole - curves) / (count - 1)])


def _jackknife(values: Array) -> tuple[float, float]:
    """95% t interval around the first value, from those without each seed; see `_without_each`."""
    whole, without = float(values[0]), values[1:]
    if not without.size:
        return float("nan"), float("nan")
    error = float(np.sqrt(without.var() * (len(without) - 1)))
    estimate = Estimate(whole, error, float(len(without) - 1), "jackknife over seeds")
    low, high = estimate.interval() or (whole, whole)
    return low, high


def _fit(n: Array, curves: Array, *, asymptotes: int) -> dict[str, Array]:
    """Least squares with c on a grid: `a` f64[R, 2], `b` f64[R, 2], `c` f64[R] for f64[R, 2, sizes] curves."""
    size = n.size
    targets = curves.reshape(len(curves), -1).T
    best = np.full(len(curves), np.inf)
    kept = np.zeros((asymptotes + 2, len(curves)))
    exponents = np.zeros(len(curves))
    for c in EXPONENTS:
        design = np.zeros((2 * size, asymptotes + 2))
        design[:size, 0] = 1
        design[size:, asymptotes - 1] = 1
        design[:size, -2] = design[size:, -1] = n**-c
        found, *_ = np.linalg.lstsq(design, targets, rcond=None)
        error = ((design @ found - targets) ** 2).sum(axis=0)
        better = error < best
        best = np.where(better, error, best)
        kept = np.where(better, found, kept)
        exponents = np.where(better, c, exponents)
    a = kept[[0, asymptotes - 1]].T
    return {"a": a, "b": kept[-2:].T, "c": exponents}


# Q3: what a scorer's lead rests on.


def accuracy(margins: npt.ArrayLike) -> float:
    """Share of pairs in order, ties counting ½."""
    margins = np.asarray(margins, np.float64)
    return float(np.where(margins == 0, 0.5, margins > 0).mean())


def cue_drop(
    implicit: npt.ArrayLike,
    implicit_paraphrased: npt.ArrayLike,
    verifier: npt.ArrayLike,
    verifier_paraphrased: npt.ArrayLike,
) -> float:
    """How much more accuracy the implicit reward loses than the verifier when completions are paraphrased.

    Paraphrases keep the gold reward and change the tokens, so what is lost was read off the tokens themselves.

    Args:
      implicit, implicit_paraphrased, verifier, verifier_paraphrased: [pairs], margins.

    References:
      Razin et al., 2025, https://arxiv.org/abs/2507.07981.
    """
    lost = accuracy(implicit) - accuracy(implicit_paraphrased)
    return lost - (accuracy(verifier) - accuracy(verifier_paraphrased))


# Q4: what choosing among samples is worth.


def winrates(gold: npt.ArrayLike, opponents: npt.ArrayLike) -> Array:
    """f64[prompts, M]: how often each sample's gold reward beats one fresh sample's, ties counting ½.

    Args:
      gold: [prompts, M], of the samples.
      opponents: [prompts, B], of further samples of the same prompts.
    """
    gold, opponents = np.asarray(gold, np.float64), np.asarray(opponents, np.float64)
    if gold.ndim != 2 or opponents.ndim != 2 or len(gold) != len(opponents):
        raise ValueError(
            f"gold {gold.shape} and opponents {opponents.shape} must both be [prompts, samples]"
        )
    return ((np.sign(gold[:, :, None] - opponents[:, None]) + 1) / 2).mean(axis=-1)


def chosen(scores: npt.ArrayLike, worth: npt.ArrayLike, sizes: Sequence[int]) -> Array:
    """f64[sizes, prompts]: what the best of n samples by a scorer is worth, for every prompt; unbiased.

    Args:
      scores: [prompts, M], the scorer's.
      worth: [prompts, M], e.g. `winrates` or gold rewards.
      sizes: each in [1, M].
    """
    return np.stack([statistics.best_of_n(scores, worth, n) for n in sizes])


def headroom(scores: npt.ArrayLike, wins: npt.ArrayLike, sizes: Sequence[int]) -> Array:
    """f64[sizes]: winrate − ½ of the best of n samples by a scorer, over prompts; see `chosen`."""
    return chosen(scores, wins, sizes).mean(axis=1) - 0.5


def chosen_size(curves: npt.ArrayLike, sizes: Sequence[int]) -> int:
    """The place of the largest mean over seeds: the n to use, from validation prompts.

    Among one sample there is no choice, so n = 1 is not a candidate. A verifier that is worth nothing would choose it, and
    then a perfect judge, read at the same n, would seem to gain nothing either.

    Args:
      curves: [seeds, sizes], e.g. of `headroom`.
      sizes: the n, ascending, the last above 1.
    """
    means = np.asarray(curves, np.float64).mean(axis=0)
    return int(np.where(np.asarray(sizes) > 1, means, -np.inf).argmax())


def efficiency(headroom: float, oracle: float, *, least: float = 0.01) -> float | None:
    """The share of a perfect judge's gain that the verifier gets; None where there is next to none to get."""
    return headroom / oracle if oracle >= least else None


# Q5: the gap in gold reward.


@dataclasses.dataclass(frozen=True)
class GoldGap:
    """What filtering by a scorer adds to the gold reward.

    Attributes:
      gap: J(f[w]) − J(f), gold reward.
      relative: mean over prompts of the gap as a share of what is left up to the best reward; None where nothing is.
    """

    gap: float
    relative: float | None


def gold_gap(
    scores: npt.ArrayLike,
    gold: npt.ArrayLike,
    best: npt.ArrayLike,
    *,
    quantile: float,
    least: float = 1e-3,
) -> GoldGap:
    """The generation–verification gap, with the filter that keeps the samples of highest score.

        J(f[w]) − J(f) = E_w[gold] − E[gold],   relative: mean_x (J_w(x) − J(x)) / (U(x) − J(x))

    Prompts on which hardly anything is left to gain are left out of the relative gap. Ties share the last places.

    Args:
      scores, gold: [prompts, M].
      best: [prompts], the highest gold reward possible, or a bound of it.
      quantile: in (0, 1], the share of samples that is kept, at least one.
      least: > 0, gold reward; what must be left to gain.

    References:
      Song et al., 2024, https://arxiv.org/abs/2412.02674, Definition 2.1.
    """
    scores, gold = np.asarray(scores, np.float64), np.asarray(gold, np.float64)
    num_samples = scores.shape[1]
    kept = max(1, round(quantile * num_samples))
    below = (scores[:, None, :] < scores[:, :, None]).sum(-1)
    tied = (scores[:, None, :] == scores[:, :, None]).sum(-1)
    # Places from below to below + tied are this score's; the best `kept` places count.
    inside = np.clip(below + tied - np.maximum(below, num_samples - kept), 0, tied)
    weight = inside / tied / kept
    generated, filtered = gold.mean(axis=1), (weight * gold).sum(axis=1)
    left = np.asarray(best, np.float64) - generated
    open_ = left >= least
    relative = None
    if open_.any():
        relative = float(((filtered - generated)[open_] / left[open_]).mean())
    return GoldGap(float((filtered - generated).mean()), relative)


# Q6 and Q7: what the pilot showed.


def lead(online: npt.ArrayLike, offline: npt.ArrayLike, start: npt.ArrayLike) -> Array:
    """f64[prompts]: winrate of the online policy over the SFT policy less that of the offline one.

    Args:
      online, offline, start: [prompts], gold rewards on the same prompts.
    """
    return statistics.win_scores(online, start) - statistics.win_scores(offline, start)


def normalised_lead(
    lead: float, offline: float, *, least: float = 0.01
) -> float | None:
    """The lead as a multiple of what the offline road gains; None where that is next to nothing.

    Args:
      lead: winrate, online less offline.
      offline: winrate of the offline policy over the SFT policy, less ½.
      least: > 0, what the offline road must gain.
    """
    return lead / offline if offline >= least else None


@dataclasses.dataclass(frozen=True)
class Square:
    """Which ingredient pays, from four winrates: {offline, on-policy} completions × {gold, reward model} labels.

    Attributes:
      samples: on-policy less offline completions, mean over both kinds of labels.
      labels: gold less the reward model's labels, mean over both kinds of completions. On-policy gold labels are
        extra information.
      interaction: by how much on-policy completions gain more with gold labels than with the reward model's.
    """

    samples: float
    labels: float
    interaction: float


def square(
    offline_gold: float, offline_model: float, online_gold: float, online_model: float
) -> Square:
    """The two main effects and their interaction."""
    return Square(
        samples=(online_gold + online_model - offline_gold - offline_model) / 2,
        labels=(offline_gold + online_gold - offline_model - online_model) / 2,
        interaction=(online_gold - offline_gold) - (online_model - offline_model),
    )


def onset(
    gold: Sequence[float], proxy: Sequence[float], *, tolerance: float
) -> int | None:
    """The first evaluation from which on gold reward stays below its peak while the proxy is above its value there.

    Args:
      gold, proxy: of one training run's evaluations, in their order.
      tolerance: >= 0, gold reward; falls up to it are noise.

    Returns:
      Place of the peak before the fall, or None where gold ends at its peak: nothing was over-optimised.
    """
    values = np.asarray(gold, np.float64)
    if not values.size:
        return None
    peak = int(values.argmax())
    fallen = values[peak + 1 :] < values[peak] - tolerance
    if not fallen.size or not fallen[-1] or proxy[-1] <= proxy[peak]:
        return None
    return peak


# Q9: rival explanations.


def peak_distance(logps: npt.ArrayLike, gold: npt.ArrayLike) -> float:
    """Mean log-probability of each prompt's gold-best sample less that of all: how rare the good answers are, nats.

    Samples that tie for the best share its place.

    Args:
      logps: [prompts, M], under the SFT policy.
      gold: [prompts, M].

    References:
      Tajwar et al., 2024, https://arxiv.org/abs/2404.14367, on where the reward's peak lies.
    """
    logps, gold = np.asarray(logps, np.float64), np.asarray(gold, np.float64)
    best = gold == gold.max(axis=1, keepdims=True)
    of_best = np.where(best, logps, 0.0).sum(axis=1) / best.sum(axis=1)
    return float((of_best - logps.mean(axis=1)).mean())


def length_share(lengths: npt.ArrayLike, gold: npt.ArrayLike) -> float:
    """Share of the gold reward's variance among samples of one prompt that length explains, in [0, 1].

    Args:
      lengths, gold: [prompts, M].
    """
    x, y = (np.asarray(v, np.float64) for v in (lengths, gold))
    # From the first of each prompt: the mean of equal values rounds, and would be told apart from them.
    x, y = (v - v[:, :1] for v in (x, y))
    x, y = (v - v.mean(axis=1, keepdims=True) for v in (x, y))
    spread = (x**2).sum() * (y**2).sum()
    return float((x * y).sum() ** 2 / spread) if spread > 0 else 0.0


def over_seeds(values: Sequence[float | None]) -> Estimate | None:
    """Mean over seeds that have a value; None where none has."""
    found = [value for value in values if value is not None]
    return statistics.seed_mean(found) if found else None
