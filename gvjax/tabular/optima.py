"""Closed-form optima of KL-regularised problems on a token tree."""

import numpy as np
from scipy.special import logsumexp

from gvjax.tabular.policies import expectation, kl
from gvjax.tabular.tree import Tree


def gibbs(ref_logps: np.ndarray, rewards: np.ndarray, beta: float) -> np.ndarray:
    """f64[..., N]: log-probabilities of the soft-optimal completions, the reference tilted by the reward.

        P*(ξ) = P_ref(ξ) exp(r(ξ)/β) / Z,   Z = Σ_ξ P_ref(ξ) exp(r(ξ)/β)

    The maximiser of `regularised_value`, and the policy DPO's implicit reward belongs to.

    Args:
      ref_logps: f64[..., N], nats.
      rewards: f64[..., N].
      beta: > 0.
    """
    tilted = ref_logps + rewards / beta
    return tilted - logsumexp(tilted, axis=-1, keepdims=True)


def regularised_value(
    logps: np.ndarray, ref_logps: np.ndarray, rewards: np.ndarray, beta: float
) -> np.ndarray:
    """f64[...]: E_P[r] − β KL(P ‖ P_ref)."""
    return expectation(logps, rewards) - beta * kl(logps, ref_logps)


def soft_bellman(
    tree: Tree, ref_token_logps: np.ndarray, rewards: np.ndarray, beta: float
) -> tuple[np.ndarray, np.ndarray]:
    """The same optimum token by token, by one backward sweep.

        V(leaf) = r,   V(s) = β log Σ_a π_ref(a|s) exp(V(sa)/β),   log π*(a|s) = log π_ref(a|s) + (V(sa) − V(s))/β

    Args:
      tree: where the policy lives.
      ref_token_logps: f64[..., S, V], nats. Zeros stand for the counting measure: then β H(π) replaces −β KL.
      rewards: f64[..., N].
      beta: > 0.

    Returns:
      Values f64[..., S] and the optimal policy's token log-probabilities f64[..., S, V].

    References:
      Ziebart, 2010, "Modeling purposeful adaptive behavior with the principle of maximum causal entropy".
    """
    shape = np.broadcast_shapes(ref_token_logps.shape[:-2], rewards.shape[:-1])
    values = np.zeros((*shape, len(tree.states)))
    policy = np.zeros((*shape, len(tree.states), tree.vocabulary))
    for state in reversed(range(len(tree.states))):
        following = np.stack(
            [
                values[..., child]
                if child >= 0
                else np.broadcast_to(rewards[..., -1 - child], shape)
                for child in tree.children[state]
            ],
            axis=-1,
        )
        tilted = ref_token_logps[..., state, :] + following / beta
        log_sum = logsumexp(tilted, axis=-1)
        values[..., state] = beta * log_sum
        policy[..., state, :] = tilted - log_sum[..., None]
    return values, policy


def best_of_n(logps: np.ndarray, scores: np.ndarray, n: int) -> np.ndarray:
    """f64[N]: log-probabilities of the best of n independent completions, by a scorer without ties.

        P_n(ξ) = F(ξ)ⁿ − F(ξ⁻)ⁿ,   F the distribution function in order of score

    Args:
      logps: f64[N], nats.
      scores: f64[N], all different.
      n: >= 1.

    Raises:
      ValueError: if two scores are equal.
    """
    if np.unique(scores).size != scores.size:
        raise ValueError(
            "best_of_n needs different scores: ties have no order; add a small tie-break"
        )
    order = np.argsort(scores)
    cumulative = np.concatenate([[0.0], np.cumsum(np.exp(logps[order]))])
    result = np.empty(len(scores))
    with np.errstate(divide="ignore"):  # an impossible completion has log 0 = -inf
        result[order] = np.log(np.diff(cumulative**n))
    return result
