"""Intervals and tests for comparing arms: float64 on the host, nothing trained here.

Two things vary when an arm is trained again: the training seed, and the prompts it is tested on. An interval that
forgets one of them is too narrow, so both are random effects here. When all seeds share their test prompts the two
are *crossed*; when every seed draws its own task and prompts, prompts are *nested* in seeds, and the seeds' means are
the only independent values.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

Array = npt.NDArray[np.float64]
Prompts = Literal["crossed", "nested"]

ONE_SEED = "seed variance unknown: one seed"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with what is known about its error.

    Attributes:
      mean: the estimate.
      standard_error: of the mean; None with one seed.
      degrees_of_freedom: of its t distribution; None with one seed.
      method: how the standard error was made.
      reason: why there is no standard error, or ''.
    """

    mean: float
    standard_error: float | None
    degrees_of_freedom: float | None
    method: str
    reason: str = ""

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """mean ± t · standard error; None with one seed."""
        if self.standard_error is None:
            return None
        half = self._quantile((1 + level) / 2) * self.standard_error
        return self.mean - half, self.mean + half

    def p_value(self, null: float = 0.0) -> float | None:
        """Two-sided p-value of `mean = null`; None with one seed."""
        if self.standard_error is None:
            return None
        return float(2 * self._tail(abs(self.mean - null)))

    def equivalence_p_value(self, margin: float) -> float | None:
        """p-value of the two one-sided tests of |true mean| >= margin; None with one seed.

            p = max(P(T >= (mean + margin)/se), P(T >= (margin − mean)/se))

        Below .05 exactly when the 90% interval lies inside (−margin, margin).

        Raises:
          ValueError: margin is not positive.

        References:
          Schuirmann, 1987, https://doi.org/10.1007/BF01068419.
        """
        if not margin > 0:
            raise ValueError(
                f"margin {margin} is not positive; equivalence needs a range to be equal within"
            )
        if self.standard_error is None:
            return None
        return float(
            max(self._tail(self.mean + margin), self._tail(margin - self.mean))
        )

    def detectable(self, power: float = 0.8, level: float = 0.95) -> float | None:
        """The smallest true mean that a study of this precision finds with the given power; None with one seed.

        Solves P(T' > t) = power for the noncentral t distribution T' with noncentrality δ/se, where t is the
        two-sided critical value.
        """
        if self.standard_error is None:
            return None
        if self.standard_error == 0:
            return 0.0
        df, critical = self.degrees_of_freedom, self._quantile((1 + level) / 2)

        def shortfall(noncentrality: float) -> float:
            return float(1 - special.nctdtr(df, noncentrality, critical)) - power

        root = optimize.brentq(shortfall, 0.0, 10 * critical + 10)
        return float(root) * self.standard_error

    def _quantile(self, probability: float) -> float:
        return float(special.stdtrit(self.degrees_of_freedom, probability))

    def _tail(self, distance: float) -> float:
        if not self.standard_error:
            return 0.5 if distance == 0 else float(distance < 0)
        return float(
            special.stdtr(self.degrees_of_freedom, -distance / self.standard_error)
        )


def paired_mean(differences: npt.ArrayLike, *, prompts: Prompts) -> Estimate:
    """Mean of paired differences over seeds and prompts.

    Crossed, with x[s, p] = μ + seed_s + prompt_p + residual_sp:

        variance = (MS_seed + MS_prompt − MS_residual) / (S P)
        df = (S P variance)² / (MS_seed²/(S−1) + MS_prompt²/(P−1) + MS_residual²/((S−1)(P−1)))

    The sum of mean squares may come out below MS_seed when prompts hardly differ; the variance is then kept at
    MS_seed / (S P), so that an interval is never narrower than the seeds' means alone would make it. Where neither factor
    has an effect of its own, as in a difference of log-likelihoods, keeping it at MS_prompt / (S P) too would make
    95% intervals cover 98%.
    Nested: `seed_mean` of each seed's mean difference.

    Args:
      differences: [seeds, prompts], a − b; nested prompts may be ragged (a list of rows).
      prompts: "crossed" if column p is the same prompt in every row, "nested" if each row has its own prompts.

    Returns:
      Estimate.

    Raises:
      ValueError: crossed rows differ in length, a row is empty, or a value is not finite.

    References:
      Satterthwaite, 1946, https://doi.org/10.2307/3002019. Baayen et al., 2008,
      https://doi.org/10.1016/j.jml.2007.12.005, on why both factors must be random.
    """
    rows = _rows(differences)
    if prompts == "nested":
        return seed_mean([float(row.mean()) for row in rows])
    if prompts != "crossed":
        raise ValueError(f"prompts={prompts!r}; give 'crossed' or 'nested'")
    matrix = _matrix(rows)
    num_seeds, num_prompts = matrix.shape
    mean, method = float(matrix.mean()), "seeds × prompts"
    if num_seeds < 2:
        return Estimate(mean, None, None, method, ONE_SEED)
    if num_prompts < 2:
        return seed_mean(matrix[:, 0])
    variance, df = _crossed_variance(matrix)
    return Estimate(mean, float(variance) ** 0.5, float(df), method)


def _crossed_variance(x: Array) -> tuple[Array, Array]:
    """Variance of the grand mean and its degrees of freedom, of float64[..., seeds, prompts]."""
    num_seeds, num_prompts = x.shape[-2:]
    mean = x.mean((-2, -1), keepdims=True)
    by_seed, by_prompt = x.mean(-1, keepdims=True), x.mean(-2, keepdims=True)
    df_seed, df_prompt = num_seeds - 1, num_prompts - 1
    df_residual = df_seed * df_prompt
    ms_seed = num_prompts * ((by_seed - mean) ** 2).sum((-2, -1)) / df_seed
    ms_prompt = num_seeds * ((by_prompt - mean) ** 2).sum((-2, -1)) / df_prompt
    residual = x - by_seed - by_prompt + mean
    ms_residual = (residual**2).sum((-2, -1)) / df_residual
    summed = ms_seed + ms_prompt - ms_residual
    spread = (
        ms_seed**2 / df_seed + ms_prompt**2 / df_prompt + ms_residual**2 / df_residual
    )
    scale = np.maximum(summed, ms_seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        df = np.where(spread > 0, scale**2 / spread, df_seed)
    return scale / (num_seeds * num_prompts), np.maximum(df, 1.0)


def seed_mean(values: npt.ArrayLike) -> Estimate:
    """Mean over seeds with Student's t: standard error sd/√S, S − 1 degrees of freedom."""
    values = np.asarray(values, np.float64)
    _check_finite(values)
    if values.ndim != 1 or not values.size:
        raise ValueError(
            f"values have shape {values.shape}; give one value per seed, at least one"
        )
    mean, method = float(values.mean()), "t over seeds"
    if values.size < 2:
        return Estimate(mean, None, None, method, ONE_SEED)
    error = float(values.std(ddof=1)) / values.size**0.5
    return Estimate(mean, error, float(values.size - 1), method)


def pigeonhole_interval(
    differences: npt.ArrayLike,
    *,
    prompts: Prompts,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile bootstrap that resamples seeds and prompts together; a cross-check, erratic below five seeds.

    Crossed: rows and columns are drawn independently. Nested: rows are drawn, and prompts within each row (once per
    row, so a row drawn twice counts the same prompts twice). None with one seed.

    References:
      Owen, 2007, https://doi.org/10.1214/07-AOAS122.
    """
    rows = _rows(differences)
    if len(rows) < 2:
        return None
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(rows), size=(resamples, len(rows)))
    if prompts == "crossed":
        matrix = _matrix(rows)
        num_prompts = matrix.shape[1]
        shares = np.eye(len(rows))[drawn].mean(1)  # [resamples, seeds]
        by_prompt = shares @ matrix
        columns = generator.integers(num_prompts, size=(resamples, num_prompts))
        means = np.take_along_axis(by_prompt, columns, -1).mean(-1)
    else:
        within = np.stack(
            [
                row[generator.integers(row.size, size=(resamples, row.size))].mean(-1)
                for row in rows
            ],
            axis=-1,
        )
        means = np.take_along_axis(within, drawn, -1).mean(-1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given.

        p̃_(i) = max_{j<=i} min(1, (m − j + 1) p_(j))

    References:
      Holm, 1979, https://www.jstor.org/stable/4615733.
    """
    values = np.asarray(p_values, np.float64)
    order = np.argsort(values, kind="stable")
    factors = values.size - np.arange(values.size)
    adjusted = np.maximum.accumulate(np.minimum(1.0, factors * values[order]))
    result = np.empty_like(adjusted)
    result[order] = adjusted
    return [float(p) for p in result]


def wilson_interval(
    successes: float, trials: int, level: float = 0.95
) -> tuple[float, float]:
    """Wilson's score interval for one proportion of independent trials.

        (p̂ + z²/2n ± z √(p̂(1 − p̂)/n + z²/4n²)) / (1 + z²/n)

    Args:
      successes: in [0, trials]; ties may count ½.
      trials: >= 1.

    References:
      Wilson, 1927, https://doi.org/10.1080/01621459.1927.10502953.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"{successes} successes in {trials} trials; need trials >= 1 and 0 <= successes <= trials"
        )
    z = float(special.ndtri((1 + level) / 2))
    share = successes / trials
    centre = share + z**2 / (2 * trials)
    half = z * (share * (1 - share) / trials + z**2 / (4 * trials**2)) ** 0.5
    scale = 1 + z**2 / trials
    # At 0 and at 1 the end is exact, which rounding would miss.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == trials else (centre + half) / scale
    return low, high


def win_scores(a: npt.ArrayLike, b: npt.ArrayLike) -> Array:
    """float64[...]: 1 where a > b, ½ where they tie, 0 where a < b; their mean is a's winrate against b."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(
            f"shapes {a.shape} and {b.shape} differ; winrates are paired by prompt"
        )
    _check_finite(a)
    _check_finite(b)
    return (np.sign(a - b) + 1) / 2


@dataclasses.dataclass(frozen=True)
class MatchedKl:
    """Difference of two gold-vs-KL curves at one KL.

    Attributes:
      difference: a − b there; None where one of the curves does not reach it.
      reason: why there is no difference, or ''.
    """

    difference: float | None
    reason: str = ""


def matched_kl_difference(
    kl_a: npt.ArrayLike,
    gold_a: npt.ArrayLike,
    kl_b: npt.ArrayLike,
    gold_b: npt.ArrayLike,
    *,
    at: float,
) -> MatchedKl:
    """Difference in gold of two arms at the same KL to the SFT policy; never extrapolated.

    Each curve's evaluations are sorted by KL and joined by straight lines; evaluations at the same KL are averaged. A KL
    below 0 is a sample's estimate of one near 0, and is read as 0.
    Gold usually grows like a concave function of KL, and then a straight line lies below the truth: an arm that was
    evaluated rarely is shown worse than it is.

    Args:
      kl_a, gold_a: [points of a], nats and gold reward; include the SFT policy at KL 0 where it is the start.
      kl_b, gold_b: [points of b].
      at: nats, the KL to compare at.
    """
    golds = []
    at = max(at, 0.0)
    for name, kl, gold in [("a", kl_a, gold_a), ("b", kl_b, gold_b)]:
        curve = _curve(kl, gold)
        if curve is None:
            return MatchedKl(None, f"{name} has no evaluation with finite KL and gold")
        knots, heights = curve
        if not knots[0] <= at <= knots[-1]:
            return MatchedKl(
                None,
                f"{name} was evaluated from {knots[0]:.2f} to {knots[-1]:.2f} nats, not at {at:.2f}",
            )
        golds.append(float(np.interp(at, knots, heights)))
    return MatchedKl(golds[0] - golds[1])


def _curve(kl: npt.ArrayLike, gold: npt.ArrayLike) -> tuple[Array, Array] | None:
    kl, gold = np.asarray(kl, np.float64), np.asarray(gold, np.float64)
    if kl.shape != gold.shape or kl.ndim != 1:
        raise ValueError(
            f"kl has shape {kl.shape} and gold {gold.shape}; give one gold value per KL"
        )
    keep = np.isfinite(kl) & np.isfinite(gold)
    if not keep.any():
        return None
    knots, which = np.unique(np.maximum(kl[keep], 0.0), return_inverse=True)
    return knots, np.bincount(which, gold[keep]) / np.bincount(which)


def best_of_n(scores: npt.ArrayLike, gold: npt.ArrayLike, n: int) -> Array:
    """Unbiased expected gold of the best of n samples by a scorer, from M >= n samples of each prompt.

        Σ_{i=n}^{M} C(i−1, n−1)/C(M, n) · gold_(i),   i = rank by score, ascending

    the average over all subsets of n samples. Samples whose scores tie share their ranks' total weight equally, as
    if the scorer broke the tie at random.

    Args:
      scores: [prompts, M], what the scorer says.
      gold: [prompts, M], gold reward of the same samples.
      n: in [1, M].

    Returns:
      float64[prompts].

    References:
      Nakano et al., 2021, https://arxiv.org/abs/2112.09332, appendix I.
    """
    scores, gold = np.asarray(scores, np.float64), np.asarray(gold, np.float64)
    if scores.shape != gold.shape or scores.ndim != 2:
        raise ValueError(
            f"scores {scores.shape} and gold {gold.shape} must both be [prompts, samples]"
        )
    num_samples = scores.shape[1]
    if not 1 <= n <= num_samples:
        raise ValueError(
            f"n = {n} of {num_samples} samples; give 1 <= n <= {num_samples}, or draw more samples"
        )
    _check_finite(scores)
    _check_finite(gold)
    rank = np.arange(1, num_samples + 1)
    # comb is exact enough as a ratio in logs, and does not overflow for hundreds of samples.
    log_weight = np.where(
        rank >= n, _log_comb(np.maximum(rank - 1, n - 1), n - 1), -np.inf
    ) - _log_comb(num_samples, n)
    cumulative = np.concatenate([[0.0], np.cumsum(np.exp(log_weight))])
    below = (scores[:, None, :] < scores[:, :, None]).sum(-1)
    tied = (scores[:, None, :] == scores[:, :, None]).sum(-1)
    weight = (cumulative[below + tied] - cumulative[below]) / tied
    return (weight * gold).sum(-1)


def _log_comb(n: npt.ArrayLike, k: npt.ArrayLike) -> Array:
    n, k = np.asarray(n, np.float64), np.asarray(k, np.float64)
    return special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)


def expected_calibration_error(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike, *, num_bins: int = 10
) -> float:
    """Expected calibration error over equal-width bins.

        Σ_bins (pairs in bin / pairs) · |mean label − mean probability|

    Args:
      probabilities: [pairs] in [0, 1], predicted probability of label 1. Show each pair in one random order, or
        both, else the labels are all 1 and only one side of ½ is tested.
      labels: [pairs] in [0, 1].
      num_bins: > 0.

    References:
      Guo et al., 2017, https://arxiv.org/abs/1706.04599, Eq. 3, for two classes.
    """
    p = np.asarray(probabilities, np.float64)
    y = np.asarray(labels, np.float64)
    if p.shape != y.shape or p.ndim != 1 or not p.size:
        raise ValueError(
            f"probabilities {p.shape} and labels {y.shape} must both be [pairs], not empty"
        )
    if not (np.all((p >= 0) & (p <= 1)) and np.all((y >= 0) & (y <= 1))):
        raise ValueError("probabilities and labels must lie in [0, 1]")
    bins = np.minimum((p * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, y - p, minlength=num_bins)
    return float(np.abs(gaps).sum() / p.size)


def pair_log_likelihoods(margins: npt.ArrayLike) -> Array:
    """float64[...]: log σ(margin), the log-probability that Bradley–Terry gives the label.

    Args:
      margins: score of the chosen minus score of the rejected completion.
    """
    return -np.logaddexp(0.0, -np.asarray(margins, np.float64))


def paired_nll_difference(
    log_likelihoods_a: npt.ArrayLike,
    log_likelihoods_b: npt.ArrayLike,
    *,
    prompts: Prompts,
) -> Estimate:
    """Mean of NLL_b − NLL_a = log-likelihood of a − that of b, in nats per pair: positive where scorer a is better.

    Args:
      log_likelihoods_a, log_likelihoods_b: [seeds, pairs], log-probability of each label; pair p is the same in
        both, and with `prompts="crossed"` in all seeds. With several pairs per prompt, average them first: the
        prompt is what was drawn at random.
      prompts: as in `paired_mean`.
    """
    a, b = _rows(log_likelihoods_a), _rows(log_likelihoods_b)
    if [row.size for row in a] != [row.size for row in b]:
        raise ValueError(
            f"pairs per seed differ: {[row.size for row in a]} and {[row.size for row in b]}; score the same pairs"
        )
    return paired_mean([x - y for x, y in zip(a, b)], prompts=prompts)


def _rows(values: npt.ArrayLike) -> list[Array]:
    rows = [np.asarray(row, np.float64) for row in values]  # type: ignore[union-attr]
    if not rows:
        raise ValueError("no seeds; give at least one row of differences")
    for index, row in enumerate(rows):
        if row.ndim != 1 or not row.size:
            raise ValueError(
                f"seed {index} has values of shape {row.shape}; give one value per prompt"
            )
        _check_finite(row)
    return rows


def _matrix(rows: list[Array]) -> Array:
    sizes = [row.size for row in rows]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"crossed prompts, but the seeds have {sizes} prompts; use prompts='nested'"
        )
    return np.stack(rows)


def _check_finite(values: Array) -> None:
    bad = np.count_nonzero(~np.isfinite(values))
    if bad:
        raise ValueError(f"{bad} of {values.size} values are not finite")
