"""How far a judge can be trusted: with itself, about length, and against labels; and a winrate corrected by labels.

Every row is one comparison, scored 1 where completion a was preferred, 0 where b was and ½ for a tie. Rows are taken as
independent unless `clusters` says which depend on each other, such as those of one prompt: what rows of one cluster add to
an estimate is then summed before it is squared (Liang and Zeger, 1986, https://doi.org/10.1093/biomet/73.1.13), and
Student's quantile of as many clusters is taken. Else intervals use the normal quantile, so they want some thirty rows and a
handful of the rarer answer; with fewer they come out too narrow, and where no two rows differ there is none.
"""

import dataclasses
import math
import statistics

import numpy as np
import numpy.typing as npt
from scipy import special

Array = npt.NDArray[np.float64]

Clusters = npt.NDArray[np.int64] | None
"""The number of each row's cluster, from 0 on."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A number with its interval.

    Attributes:
      value: the estimate; NaN where there is none.
      low, high: ends of the interval; None where there is none.
      reason: why something is missing, or ''.
    """

    value: float
    low: float | None = None
    high: float | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class SelfConsistency:
    """What a judge says when the order is swapped.

    Attributes:
      agreement: share of comparisons with the same answer in both orders (Wilson); ties agree with ties alone.
      first: mean score of the completion shown first, over both orders; ½ is no preference for a place.
      comparisons: how many.
    """

    agreement: Measured
    first: Measured
    comparisons: int


def self_consistency(
    a_first: npt.ArrayLike,
    b_first: npt.ArrayLike,
    *,
    level: float = 0.95,
    clusters: npt.ArrayLike | None = None,
) -> SelfConsistency:
    """Swap agreement and place bias.

        agreement = (1/N) Σ 1[a_first_i = b_first_i]
        first     = (1/N) Σ (a_first_i + 1 − b_first_i) / 2

    Args:
      a_first, b_first: [N] in {0, ½, 1}, a's score when it was shown first, and when it was shown second.
      level: of the intervals.
      clusters: [N], rows of one value depend on each other; None takes each row by itself.

    References:
      Zheng et al., 2023, https://arxiv.org/abs/2306.05685, section 3.4, on swapping positions.
    """
    a_first, b_first = _scores("a_first", a_first), _scores("b_first", b_first)
    _same_length("a_first", a_first, "b_first", b_first)
    first = (a_first + 1 - b_first) / 2
    numbers = _numbered(clusters, first.size)
    return SelfConsistency(
        _share(a_first == b_first, level, numbers),
        mean(first, level, clusters),
        a_first.size,
    )


@dataclasses.dataclass(frozen=True)
class LengthEffect:
    """What length has to do with preference.

    Attributes:
      coefficient: log-odds of preferring a per `scale` that a is longer; 0 is none.
      winrate: a's winrate where both are equally long.
      raw_winrate: a's winrate as it is.
      scale: the length difference that counts as 1.
    """

    coefficient: Measured
    winrate: Measured
    raw_winrate: Measured
    scale: float


def length_effect(
    scores: npt.ArrayLike,
    length_differences: npt.ArrayLike,
    *,
    scale: float | None = None,
    level: float = 0.95,
    clusters: npt.ArrayLike | None = None,
) -> LengthEffect:
    """Logistic regression of preference on length difference.

        P(a preferred) = σ(α + β · (length_a − length_b) / scale),   length-controlled winrate = σ(α)

    Standard errors are the robust (sandwich) ones, times N/(N − 2), since averaged scores are no coin flips; the winrate's
    interval is made on the log-odds. β ≠ 0 is not yet a bias: longer completions may be better. `length_bias` compares
    it with labels.
    As in AlpacaEval's length control, without its saturation of the difference and its difficulty per prompt.

    Args:
      scores: [N] in [0, 1], a's.
      length_differences: [N], length of a minus length of b, in any unit.
      scale: > 0; None takes the root mean square of the differences, so that β is per typical difference.
      level: of the intervals.
      clusters: [N], rows of one value depend on each other; None takes each row by itself.

    Returns:
      LengthEffect; estimates are NaN, with the reason, where lengths do not differ or decide every preference.

    References:
      Dubois et al., 2024, https://arxiv.org/abs/2404.04475. Papke and Wooldridge, 1996,
      https://doi.org/10.1002/(SICI)1099-1255(199611)11:6<619::AID-JAE418>3.0.CO;2-1, on shares as outcomes.
    """
    y, x, scale = _regression_inputs(scores, length_differences, scale)
    raw = mean(y, level, clusters)
    try:
        (alpha, beta), influence = _logistic(y, x)
    except _NoFit as no_fit:
        none = Measured(math.nan, reason=str(no_fit))
        return LengthEffect(none, none, raw, scale)
    numbers = _numbered(clusters, y.size)
    errors = _standard_errors(influence, numbers)
    z = _quantile(level, numbers)
    winrate = Measured(
        _sigmoid(alpha),
        _sigmoid(alpha - z * errors[0]),
        _sigmoid(alpha + z * errors[0]),
    )
    coefficient = Measured(beta, beta - z * errors[1], beta + z * errors[1])
    return LengthEffect(coefficient, winrate, raw, scale)


def length_bias(
    judge: npt.ArrayLike,
    labels: npt.ArrayLike,
    length_differences: npt.ArrayLike,
    *,
    scale: float | None = None,
    level: float = 0.95,
    clusters: npt.ArrayLike | None = None,
) -> Measured:
    """How much more the judge likes length than the labels do: β of `length_effect` of the judge minus that of the labels.

    Both are fitted to the same rows, and the interval is of their paired difference: row by row, from the influence of each
    row on both fits.

    Args:
      judge, labels: [N] in [0, 1], a's scores.
      length_differences, scale, level, clusters: as in `length_effect`.
    """
    fits, reasons = [], []
    for name, scores in (("judge", judge), ("labels", labels)):
        y, x, _ = _regression_inputs(scores, length_differences, scale)
        try:
            fits.append(_logistic(y, x))
        except _NoFit as no_fit:
            reasons.append(f"{name}: {no_fit}")
    if reasons:
        return Measured(math.nan, reason="; ".join(reasons))
    (judge_fit, judge_influence), (label_fit, label_influence) = fits
    difference = float(judge_fit[1] - label_fit[1])
    numbers = _numbered(clusters, len(judge_influence))
    error = _standard_errors(judge_influence - label_influence, numbers)[1]
    half = _quantile(level, numbers) * error
    return Measured(difference, difference - half, difference + half)


def likes_length(effect: LengthEffect, bias: Measured) -> bool:
    """Whether a judge is shown to like length for its own sake: both its β and the bias lie above 0.

    The bias alone does not say so. Errors at random draw β towards 0: where labels prefer the shorter one, a judge that
    errs has a β nearer to 0 than theirs, hence above it, and does not like length.

    Args:
      effect: `length_effect` of the judge.
      bias: its `length_bias`.
    """
    ends = (effect.coefficient.low, bias.low)
    return all(end is not None and end > 0 for end in ends)


@dataclasses.dataclass(frozen=True)
class LabelAgreement:
    """A judge against labels of the same comparisons.

    Attributes:
      agreement: share in which both prefer the same completion, or neither (Wilson).
      kappa: Cohen's: agreement beyond what their shares of a, b and ties would give by chance.
      comparisons: how many.
    """

    agreement: Measured
    kappa: Measured
    comparisons: int


def label_agreement(
    judge: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    level: float = 0.95,
    clusters: npt.ArrayLike | None = None,
) -> LabelAgreement:
    """Agreement with labels, raw and beyond chance, on who is preferred: a score above, at or below ½.

        κ = (p_o − p_e) / (1 − p_e),   p_o = share equal,   p_e = Σ_k (judge's share of k) · (labels' share of k)

    The interval of κ is the large-sample one, from its influence function

        ψ_i = (1[equal_i] − p_o)/(1 − p_e) − (1 − p_o)/(1 − p_e)² · (q(judge_i) + p(label_i) − 2 p_e)

    with p the judge's shares and q the labels'.

    Args:
      judge, labels: [N] in [0, 1], a's scores.
      level: of the intervals.
      clusters: [N], rows of one value depend on each other; None takes each row by itself.

    References:
      Cohen, 1960, https://doi.org/10.1177/001316446002000104. Fleiss, Cohen and Everitt, 1969,
      https://doi.org/10.1037/h0028106.
    """
    judge, labels = _shares("judge", judge), _shares("labels", labels)
    _same_length("judge", judge, "labels", labels)
    categories = np.array([-1.0, 0.0, 1.0])
    judge_is = np.sign(judge - 0.5)[:, None] == categories
    label_is = np.sign(labels - 0.5)[:, None] == categories
    equal = (judge_is & label_is).any(1)
    numbers = _numbered(clusters, judge.size)
    agreement = _share(equal, level, numbers)
    p, q = judge_is.mean(0), label_is.mean(0)
    observed, chance = float(equal.mean()), float(p @ q)
    if chance == 1:
        reason = "both prefer the same side in every comparison"
        return LabelAgreement(agreement, Measured(math.nan, reason=reason), judge.size)
    kappa = (observed - chance) / (1 - chance)
    influence = (equal - observed) / (1 - chance) - (1 - observed) / (
        1 - chance
    ) ** 2 * (judge_is @ q + label_is @ p - 2 * chance)
    half = _quantile(level, numbers) * float(_error(influence, numbers))
    if np.ptp(influence) < 1e-12:
        beyond = Measured(kappa, reason="agreement is the same in every comparison")
    else:
        beyond = Measured(kappa, max(-1.0, kappa - half), min(1.0, kappa + half))
    return LabelAgreement(agreement, beyond, judge.size)


@dataclasses.dataclass(frozen=True)
class CorrectedWinrate:
    """A winrate that rests on labels and borrows precision from the judge.

    Attributes:
      winrate: corrected for what the judge gets wrong.
      labels_only: from the labelled comparisons' labels.
      judge_only: from the judge's scores of all comparisons; off by the judge's bias.
      weight: λ, how far the judge was listened to.
    """

    winrate: Measured
    labels_only: Measured
    judge_only: Measured
    weight: float


def prediction_powered_winrate(
    labels: npt.ArrayLike,
    judge_labelled: npt.ArrayLike,
    judge_unlabelled: npt.ArrayLike,
    *,
    weight: float | None = None,
    level: float = 0.95,
) -> CorrectedWinrate:
    """Winrate over all comparisons from the judge's scores, corrected by the labels of some.

        θ̂ = λ · mean_N(judge) + mean_n(label − λ · judge)
        variance = λ² var_N(judge)/N + var_n(label − λ · judge)/n

    with n labelled and N unlabelled comparisons. λ = 1 is prediction-powered inference; λ = 0 the labels alone. By
    default λ is the one of least variance, cov_n(label, judge) / ((1 + n/N) · var(judge)), cut to [0, 1]: a useless
    judge is not listened to.

    Args:
      labels: [n], n >= 2, in [0, 1]; of comparisons drawn at random from all of them, or the correction is wrong.
      judge_labelled: [n] in [0, 1], the judge's scores of the same comparisons.
      judge_unlabelled: [N], N >= 2, in [0, 1], the judge's scores of the others.
      weight: λ in [0, 1]; None chooses it from the data.
      level: of the intervals.

    References:
      Angelopoulos et al., 2023, https://arxiv.org/abs/2301.09633, Prop. 1 (λ = 1). Angelopoulos, Duchi and Zrnic, 2023,
      https://arxiv.org/abs/2311.01453, on λ.
    """
    y = _shares("labels", labels)
    f = _shares("judge_labelled", judge_labelled)
    g = _shares("judge_unlabelled", judge_unlabelled)
    _same_length("labels", y, "judge_labelled", f)
    for name, values in (("labels", y), ("judge_unlabelled", g)):
        if values.size < 2:
            raise ValueError(
                f"{values.size} {name}; at least two are needed to know their spread"
            )
    if weight is None:
        spread = float(np.concatenate([f, g]).var(ddof=1))
        together = float(np.cov(y, f)[0, 1])
        best = together / ((1 + y.size / g.size) * spread) if spread else 0.0
        weight = min(1.0, max(0.0, best))
    elif not 0 <= weight <= 1:
        raise ValueError(
            f"weight is {weight}; it must lie in [0, 1], or be None to be chosen"
        )
    rest = y - weight * f
    value = weight * float(g.mean()) + float(rest.mean())
    variance = weight**2 * g.var(ddof=1) / g.size + rest.var(ddof=1) / y.size
    half = _quantile(level) * math.sqrt(float(variance))
    return CorrectedWinrate(
        Measured(value, value - half, value + half),
        mean(y, level),
        mean(np.concatenate([f, g]), level),
        weight,
    )


def _regression_inputs(
    scores: npt.ArrayLike, length_differences: npt.ArrayLike, scale: float | None
) -> tuple[Array, Array, float]:
    y = _shares("scores", scores)
    x = np.asarray(length_differences, np.float64)
    _same_length("scores", y, "length_differences", x)
    if not np.isfinite(x).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(x))} of {x.size} length differences are not finite"
        )
    if scale is None:
        scale = float(np.sqrt((x**2).mean())) or 1.0
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; it must be a positive length")
    return y, x / scale, scale


SEPARATED = "length decides every preference"
"""The reason of no fit where, at some difference of length, all preferences turn."""


class _NoFit(Exception):
    """The regression has no finite answer; says why."""


def _logistic(y: Array, x: Array) -> tuple[Array, Array]:
    """(α, β) and f64[N, 2], the influence of each row on them."""
    if y.size < 3:
        raise _NoFit(f"{y.size} comparisons do not tell two coefficients")
    if np.ptp(x) == 0:
        raise _NoFit("all length differences are the same")
    above, below = x[y > 0], x[y < 1]
    if not above.size or not below.size:
        raise _NoFit("all preferences are the same")
    if above.min() >= below.max() or below.min() >= above.max():
        # Albert and Anderson, 1984, https://doi.org/10.1093/biomet/71.1.1: then, and only then, no finite answer is best.
        raise _NoFit(SEPARATED)
    design = np.stack([np.ones_like(x), x], axis=1)
    weights: Array = np.zeros(2)
    loss = y.size * math.log(2)
    for _ in range(100):
        logits = design @ weights
        p = 1 / (1 + np.exp(-logits))
        hessian = (design * (p * (1 - p))[:, None]).T @ design
        step = np.linalg.solve(hessian, design.T @ (y - p))
        size = 1.0
        while size > 1e-10:
            trial = design @ (weights + size * step)
            trial_loss = float((np.logaddexp(0, trial) - y * trial).sum())
            if trial_loss <= loss:
                break
            size /= 2
        weights, loss = weights + size * step, trial_loss
        if np.abs(step).max() < 1e-10:
            break
    p = 1 / (1 + np.exp(-(design @ weights)))
    hessian = (design * (p * (1 - p))[:, None]).T @ design
    influence = y.size * np.linalg.solve(hessian, design.T * (y - p)).T
    return weights, np.asarray(influence, np.float64)


def _standard_errors(influence: Array, clusters: Clusters) -> Array:
    """Of estimates with two parameters, from f64[N, 2] influences."""
    rows = influence.shape[0]
    lost = rows if clusters is None else rows - 1
    return _error(influence, clusters) * math.sqrt(lost / (rows - 2))


def _error(influence: Array, clusters: Clusters) -> Array:
    """f64[...], the standard error of an estimate from the influence f64[N, ...] of each row on it."""
    rows = influence.shape[0]
    if clusters is None:
        return np.sqrt((influence**2).mean(0) / rows)
    count = int(clusters.max()) + 1
    sums = np.zeros((count, *influence.shape[1:]))
    np.add.at(sums, clusters, influence)
    return np.sqrt((sums**2).sum(0) * count / (count - 1)) / rows


def _numbered(clusters: npt.ArrayLike | None, rows: int) -> Clusters:
    """The number of each row's cluster, from 0 on; None where there is one cluster alone, whose rows are all there is."""
    if clusters is None:
        return None
    values = np.asarray(clusters)
    if values.shape != (rows,):
        raise ValueError(
            f"clusters has shape {values.shape}, but there are {rows} rows"
        )
    numbers = np.unique(values, return_inverse=True)[1].astype(np.int64)
    return numbers if numbers.max() else None


def _share(
    hits: npt.NDArray[np.bool_], level: float, clusters: Clusters = None
) -> Measured:
    """A share with Wilson's score interval; of clusters, for as many independent rows as would spread like them.

        (p̂ + z²/2n ± z √(p̂(1 − p̂)/n + z²/4n²)) / (1 + z²/n)

    References:
      Wilson, 1927, https://doi.org/10.1080/01621459.1927.10502953.
    """
    n, z = float(hits.size), _quantile(level, clusters)
    share = float(hits.mean())
    if clusters is not None:
        error = float(_error(hits.astype(np.float64) - share, clusters))
        # Where clusters do not differ there is no spread to look at: each counts as one row.
        alike = error < 1e-12
        count = float(clusters.max() + 1)
        n = count if alike else min(n, share * (1 - share) / error**2)
    centre = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    # At 0 and at 1 the end is exact, which rounding would miss.
    low = 0.0 if share == 0 else (centre - half) / scale
    high = 1.0 if share == 1 else (centre + half) / scale
    return Measured(share, low, high)


def mean(
    values: npt.ArrayLike, level: float = 0.95, clusters: npt.ArrayLike | None = None
) -> Measured:
    """A mean with its interval; none where no two values differ."""
    values = np.asarray(values, np.float64)
    numbers = _numbered(clusters, values.size)
    value = float(values.mean())
    if values.size < 2:
        return Measured(value, reason="one comparison")
    if np.ptp(values) == 0:
        return Measured(value, reason="no comparison differs from the others")
    if numbers is None:
        error = float(values.std(ddof=1)) / math.sqrt(values.size)
    else:
        error = float(_error(values - value, numbers))
    half = _quantile(level, numbers) * error
    return Measured(value, value - half, value + half)


def _quantile(level: float, clusters: Clusters = None) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie between 0 and 1, e.g. 0.95")
    if clusters is not None:
        return float(special.stdtrit(int(clusters.max()), (1 + level) / 2))
    return statistics.NormalDist().inv_cdf((1 + level) / 2)


def _sigmoid(value: float) -> float:
    return float(1 / (1 + np.exp(-value)))


def _shares(name: str, values: npt.ArrayLike) -> Array:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(
            f"{name} has shape {array.shape}; give one score per comparison, at least one"
        )
    bad = array[~((array >= 0) & (array <= 1))]
    if bad.size:
        raise ValueError(
            f"{name} has {bad.size} of {array.size} scores outside [0, 1], e.g. {bad[0]}; leave comparisons without a"
            " score out, and count them"
        )
    return array


def _scores(name: str, values: npt.ArrayLike) -> Array:
    array = _shares(name, values)
    bad = array[~np.isin(array, (0.0, 0.5, 1.0))]
    if bad.size:
        raise ValueError(
            f"{name} has the score {bad[0]}; single answers are 0, 0.5 or 1"
        )
    return array


def _same_length(name_a: str, a: Array, name_b: str, b: Array) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"{name_a} has shape {a.shape} and {name_b} {b.shape}; they are of the same comparisons"
        )
