"""Exact policies on a token tree, and what is asked of them: expectations, entropy, KL, gradients.

A policy is written in one of two ways, both as natural logarithms in float64: by token, `[..., S, V]`, or by
completion, `[..., N]`. A plain list of N arms is a tree of horizon 1.
"""

import numpy as np
from scipy.special import log_softmax, logsumexp, xlogy

from gvjax.tabular.tree import Tree


def random_policy(
    rng: np.random.Generator, tree: Tree, *prompts: int, scale: float = 1.0
) -> np.ndarray:
    """f64[*prompts, S, V]: token log-probabilities, softmax of Gaussian logits with standard deviation `scale`."""
    logits = scale * rng.standard_normal((*prompts, len(tree.states), tree.vocabulary))
    return log_softmax(logits, axis=-1)


def along_paths(tree: Tree, values: np.ndarray) -> np.ndarray:
    """f64[..., N, H]: values[..., state, token] met along each completion; 0 behind its end."""
    return np.where(tree.mask, values[..., tree.paths, tree.tokens], 0.0)


def completion_logps(tree: Tree, token_logps: np.ndarray) -> np.ndarray:
    """f64[..., N]: log P(completion) = Σ_h log π(a_h | s_h), from token log-probabilities [..., S, V]."""
    return along_paths(tree, token_logps).sum(axis=-1)


def state_logps(tree: Tree, logps: np.ndarray) -> np.ndarray:
    """f64[..., S]: log-probability of passing through each state, from completion log-probabilities [..., N]."""
    through = [
        (tree.mask & (tree.paths == state)).any(axis=1)
        for state in range(len(tree.states))
    ]
    return np.stack(
        [logsumexp(logps[..., leaves], axis=-1) for leaves in through], axis=-1
    )


def conditionals(tree: Tree, logps: np.ndarray) -> np.ndarray:
    """f64[..., S, V]: the token policy whose completions have these log-probabilities [..., N].

    log π(a | s) = log P(pass through sa) − log P(pass through s): any distribution over completions is
    autoregressive. Of one that never reaches a state several token policies are, and none is chosen.

    Raises:
      ValueError: a state has probability 0.
    """
    states = state_logps(tree, logps)
    unreached = np.isneginf(states).reshape(-1, len(tree.states)).any(axis=0)
    if unreached.any():
        raise ValueError(
            f"no completion that begins with {tree.states[unreached.argmax()]} has a probability above 0, so nothing says how "
            "likely its next token is; give one of them some"
        )
    child = tree.children
    below = np.where(
        child >= 0,
        states[..., np.maximum(child, 0)],
        logps[..., np.maximum(-1 - child, 0)],
    )
    return below - states[..., None]


def expectation(logps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """f64[...]: E_P[values], over the last axis."""
    return (np.exp(logps) * values).sum(axis=-1)


def entropy(logps: np.ndarray) -> np.ndarray:
    """f64[...]: −Σ P log P, nats, over the last axis; a probability of 0 counts 0."""
    probabilities = np.exp(logps)
    return -xlogy(probabilities, probabilities).sum(axis=-1)


def kl(logps: np.ndarray, other_logps: np.ndarray) -> np.ndarray:
    """f64[...]: KL(P ‖ Q) = Σ P (log P − log Q), nats, over the last axis; a P of 0 counts 0."""
    probabilities = np.exp(logps)
    possible = probabilities > 0
    difference = np.where(possible, logps, 0.0) - np.where(possible, other_logps, 0.0)
    return (probabilities * difference).sum(axis=-1)


def total_variation(logps: np.ndarray, other_logps: np.ndarray) -> np.ndarray:
    """f64[...]: ½ Σ |P − Q|, over the last axis."""
    return 0.5 * np.abs(np.exp(logps) - np.exp(other_logps)).sum(axis=-1)


def action_values(
    tree: Tree, token_logps: np.ndarray, rewards: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Undiscounted Q[..., S, V] and V[..., S] of a policy whose reward [..., N] comes with the last token."""
    q = np.zeros(token_logps.shape)
    v = np.zeros(token_logps.shape[:-1])
    # States are ordered by length, so a child is always finished before its parent.
    for state in reversed(range(len(tree.states))):
        for token, child in enumerate(tree.children[state]):
            q[..., state, token] = (
                v[..., child] if child >= 0 else rewards[..., -1 - child]
            )
        v[..., state] = expectation(token_logps[..., state, :], q[..., state, :])
    return q, v


def policy_gradient(
    tree: Tree, token_logps: np.ndarray, rewards: np.ndarray
) -> np.ndarray:
    """f64[..., S, V]: exact gradient of E_π[r] with respect to the logits whose softmax is the policy.

        ∂J/∂logit(s, a) = P(pass through s) π(a | s) (Q(s, a) − V(s))

    References:
      Sutton et al., 2000, "Policy gradient methods for reinforcement learning with function approximation", Theorem 1.
    """
    q, v = action_values(tree, token_logps, rewards)
    visits = np.exp(state_logps(tree, completion_logps(tree, token_logps)))
    return visits[..., None] * np.exp(token_logps) * (q - v[..., None])
