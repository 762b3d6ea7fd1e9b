"""Bradley–Terry preferences: exact probabilities, and maximum likelihood by Newton's method.

    P(i beats j) = σ(r_i − r_j)

Rewards are identified up to a constant per prompt, and only when the comparisons identify them at all: ask
`strongly_connected` (one reward per completion) or `separable` (rewards linear in features) first, or add a ridge.

References:
  Bradley and Terry, 1952, "Rank analysis of incomplete block designs: I".
  Ford, 1957, "Solution of a ranking problem from binary comparisons" (when the maximum exists).
"""

import dataclasses

import numpy as np
from scipy.optimize import linprog
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, log_expit


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """Pairs of completions with how often each won.

    Attributes:
      first, second: int[M], the completions compared (across prompts, number them consecutively).
      wins, losses: f64[M] >= 0, weight with which `first` won and lost: counts, or probabilities of a population.
    """

    first: np.ndarray
    second: np.ndarray
    wins: np.ndarray
    losses: np.ndarray


def all_pairs(size: int) -> tuple[np.ndarray, np.ndarray]:
    """int[M], int[M] with M = size·(size−1)/2: the two members of every unordered pair."""
    return np.triu_indices(size, k=1)


def population(rewards: np.ndarray, sampler_logps: np.ndarray) -> Comparisons:
    """Comparisons: every pair, weighted by how often a sampler draws it, won as the rewards say.

    Args:
      rewards: f64[N].
      sampler_logps: f64[N], log-probabilities of the completions, drawn independently for the two places.
    """
    first, second = all_pairs(len(rewards))
    weight = 2 * np.exp(sampler_logps[first] + sampler_logps[second])
    probability = expit(rewards[first] - rewards[second])
    return Comparisons(first, second, weight * probability, weight * (1 - probability))


def sample(
    rng: np.random.Generator, rewards: np.ndarray, sampler_logps: np.ndarray, pairs: int
) -> Comparisons:
    """Comparisons: `pairs` labelled pairs of different completions, drawn as in `population`, counted per pair."""
    expected = population(rewards, sampler_logps)
    outcomes = np.concatenate([expected.wins, expected.losses])
    counts = rng.multinomial(pairs, outcomes / outcomes.sum()).astype(float)
    wins, losses = np.split(counts, 2)
    return dataclasses.replace(expected, wins=wins, losses=losses)


def negative_log_likelihood(rewards: np.ndarray, data: Comparisons) -> float:
    """f64[], nats per comparison: −Σ (wins log σ(Δr) + losses log σ(−Δr)) / Σ (wins + losses)."""
    margin = rewards[data.first] - rewards[data.second]
    total = (data.wins * log_expit(margin) + data.losses * log_expit(-margin)).sum()
    return -total / (data.wins.sum() + data.losses.sum())


def fit(
    features: np.ndarray,
    data: Comparisons,
    *,
    ridge: float = 0.0,
    tolerance: float = 1e-8,
    max_steps: int = 60,
) -> np.ndarray:
    """f64[D]: weights of the linear reward r = features · w with the highest likelihood, by damped Newton steps.

    With features = the identity this is a reward per completion. Directions that no comparison touches (the constant)
    stay at 0.

    Args:
      features: f64[N, D].
      data: Comparisons of the N completions.
      ridge: >= 0; ridge/2·|w|² is added to the loss per comparison. Needed when the maximum is at infinity.
      tolerance: > 0, on the last Newton step, after which the error is about its square.
      max_steps: before giving up.

    Raises:
      ValueError: if the maximum was not reached, which is how unidentified rewards show.
    """
    compared = data.wins + data.losses > 0
    wins, losses = data.wins[compared], data.losses[compared]
    weight = wins + losses
    total = weight.sum()
    differences = (features[data.first] - features[data.second])[compared]
    # Coordinates in which the comparisons have no flat direction; what is lost is orthogonal and stays 0.
    _, scales, rows = np.linalg.svd(differences, full_matrices=False)
    basis = rows[scales > 1e-10 * scales.max(initial=0.0)]
    if not len(basis):
        return np.zeros(features.shape[1])
    design = differences @ basis.T

    def loss(theta: np.ndarray) -> float:
        margin = design @ theta
        log_likelihood = wins * log_expit(margin) + losses * log_expit(-margin)
        return -log_likelihood.sum() / total + 0.5 * ridge * theta @ theta

    theta = np.zeros(len(basis))
    for _ in range(max_steps):
        probability = expit(design @ theta)
        # Not weight·probability − wins, which cancels when the probability is near 1.
        residual = losses * probability - wins * expit(-(design @ theta))
        gradient = design.T @ residual / total + ridge * theta
        curvature = weight * probability * (1 - probability)
        hessian = (design.T * curvature) @ design / total + ridge * np.eye(len(theta))
        try:
            step = np.linalg.solve(hessian, gradient)
        except np.linalg.LinAlgError:
            break
        if np.abs(step).max() <= tolerance:
            return basis.T @ (theta - step)
        size, before = 1.0, loss(theta)
        while loss(theta - size * step) > before + 1e-15 and size > 1e-10:
            size /= 2
        theta = theta - size * step
    raise ValueError(
        f"no finite maximum of the likelihood within {max_steps} Newton steps: the comparisons do not identify the "
        "rewards (see strongly_connected, separable); add a ridge, or compare sets of optima"
    )


def strongly_connected(size: int, data: Comparisons) -> bool:
    """Whether a reward per completion has a finite maximum likelihood, unique up to a constant.

    It has if from every completion a chain of "beats" leads to every other (Ford, 1957).
    """
    beats = np.zeros((size, size))
    np.add.at(beats, (data.first, data.second), data.wins)
    np.add.at(beats, (data.second, data.first), data.losses)
    count, _ = connected_components(beats, directed=True, connection="strong")
    return count == 1


def separable(features: np.ndarray, data: Comparisons) -> bool:
    """Whether some linear reward explains every comparison without a mistake (then the maximum is at infinity).

    A linear programme: is there w with Δφ·w >= 0 for every observed win, > 0 for at least one?
    """
    differences = features[data.first] - features[data.second]
    observed = np.concatenate(
        [differences[data.wins > 0], -differences[data.losses > 0]]
    )
    solution = linprog(
        -observed.sum(axis=0),
        A_ub=-observed,
        b_ub=np.zeros(len(observed)),
        bounds=[(-1.0, 1.0)] * features.shape[1],
    )
    return bool(-solution.fun > 1e-9)
