"""Policy-gradient and KL estimators: their means, by enumerating every group of completions, against exact gradients.

Nothing here is sampled: each row of a batch is one way the samples could have fallen, weighted by its probability. The
losses, advantages and KL estimates are gvjax's own, differentiated by jax through the token log-probabilities.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import binom

from gvjax import advantages, logps, losses, tabular
from gvjax.masked import Mean
from gvjax.tabular import Tree
from gvjax.verify.check import Check, distance

GROUP = 3


class Bandit:
    """A policy on a tree, rewards for its completions, and every group of completions that could be drawn.

    Attributes:
      rows: int[R], leaf of each row; groups of `group_size` rows are consecutive.
      weights: f64[R], probability of the row's group / group_size.
    """

    def __init__(self, seed: int, tree: Tree, group_size: int = GROUP):
        rng = np.random.default_rng(seed)
        self.tree, self.group_size = tree, group_size
        self.policy = tabular.random_policy(rng, tree)
        self.rewards = rng.standard_normal(len(tree.leaves))
        self.behaviour = tabular.random_policy(rng, tree)
        groups = list(itertools.product(range(len(tree.leaves)), repeat=group_size))
        self.rows = np.array(groups).ravel()
        self.mask = tree.mask[self.rows]
        self.row_rewards = jnp.asarray(self.rewards[self.rows])

    @property
    def exact(self) -> np.ndarray:
        """f64[S, V]: the exact gradient of the expected reward."""
        return tabular.policy_gradient(self.tree, self.policy, self.rewards)

    def weights(self, policy: np.ndarray) -> np.ndarray:
        completions = tabular.completion_logps(self.tree, policy)[self.rows]
        groups = completions.reshape(-1, self.group_size).sum(axis=1)
        return np.repeat(np.exp(groups), self.group_size) / self.group_size

    def token_logps(self, logits: jax.Array) -> jax.Array:
        """f64[R, H]: as a scorer would return them, 0 behind the end."""
        policy = jax.nn.log_softmax(logits, axis=-1)
        along = policy[self.tree.paths, self.tree.tokens][self.rows]
        return jnp.where(self.mask, along, 0.0)

    def mean_gradient(
        self,
        loss: Callable[..., jax.Array],
        row_advantages: jax.Array,
        behaviour: np.ndarray | None = None,
        *,
        normaliser: Callable[..., Mean] | None = None,
    ) -> np.ndarray:
        """f64[S, V]: expected descent direction of a loss, over every group the behaviour policy could draw.

        Args:
          loss: (logps, old_logps, advantages, mask) -> [R, H].
          row_advantages: f64[R] or f64[R, H].
          behaviour: f64[S, V], the policy that samples; None means the policy itself.
          normaliser: (losses, mask) -> Mean over a group's rows; None sums tokens and averages rows.
        """
        sampler = self.policy if behaviour is None else behaviour
        weights, mask = jnp.asarray(self.weights(sampler)), jnp.asarray(self.mask)
        old_logps = self.token_logps(jnp.asarray(sampler))
        if row_advantages.ndim == 1:
            row_advantages = row_advantages[:, None]
        along = jnp.broadcast_to(row_advantages, mask.shape)

        def objective(logits: jax.Array) -> jax.Array:
            found = loss(self.token_logps(logits), old_logps, along, mask)
            if normaliser is None:
                return jnp.sum(weights[:, None] * jnp.where(mask, found, 0.0))
            grouped = (-1, self.group_size, mask.shape[1])
            means = jax.vmap(normaliser)(found.reshape(grouped), mask.reshape(grouped))
            return jnp.sum(weights[:: self.group_size] * self.group_size * means.value)

        return -np.asarray(jax.grad(objective)(jnp.asarray(self.policy)))


def _ragged(seed: int) -> Bandit:
    """Completions of one and two tokens: EOS at any depth, truncation at the end."""
    return Bandit(seed, tabular.token_tree(vocabulary=3, horizon=2, eos=0))


def _one_token(seed: int) -> Bandit:
    return Bandit(seed, tabular.token_tree(vocabulary=4, horizon=1), group_size=2)


def _rloo(bandit: Bandit) -> jax.Array:
    return advantages.leave_one_out(bandit.row_rewards, bandit.group_size)


def reinforce(seed: int) -> float:
    bandit = _ragged(seed)
    plain = bandit.mean_gradient(losses.reinforce_loss, bandit.row_rewards)
    shifted = bandit.mean_gradient(losses.reinforce_loss, bandit.row_rewards - 0.7)
    return max(distance(plain, bandit.exact), distance(shifted, bandit.exact))


def rloo(seed: int) -> float:
    bandit = _ragged(seed)
    found = bandit.mean_gradient(losses.reinforce_loss, _rloo(bandit))
    return distance(found, bandit.exact)


def group_relative_unscaled(seed: int) -> float:
    bandit, k = _ragged(seed), GROUP
    relative = advantages.group_relative(bandit.row_rewards, k, scale=False)
    found = bandit.mean_gradient(losses.reinforce_loss, relative)
    return distance(found, (k - 1) / k * bandit.exact)


def group_relative_scaled(seed: int) -> float:
    """With rewards in {0, 1} and p = E r, S ~ Binomial(k, p) successes: mean = E[σ²/(std + ε)]/(p(1−p)) ∇p.

    Given S the successes are independent draws from π(· | success), whose mean score is ∇p/p; likewise the failures.
    """
    bandit, k, epsilon = _ragged(seed), GROUP, 1e-4
    successes = (bandit.rewards > np.median(bandit.rewards)).astype(float)
    relative = advantages.group_relative(
        jnp.asarray(successes[bandit.rows]), k, scale=True, epsilon=epsilon
    )
    found = bandit.mean_gradient(losses.reinforce_loss, relative)
    leaf_logps = tabular.completion_logps(bandit.tree, bandit.policy)
    p = tabular.expectation(leaf_logps, successes)
    count = np.arange(k + 1)
    chance = binom(k, count) * p**count * (1 - p) ** (k - count)
    variance = count * (k - count) / k**2
    deviation = np.sqrt(variance * k / (k - 1))
    scale = chance @ (variance / (deviation + epsilon)) / (p * (1 - p))
    exact = tabular.policy_gradient(bandit.tree, bandit.policy, successes)
    return distance(found, scale * exact)


def _length_weighted(bandit: Bandit) -> np.ndarray:
    """Σ_y P(y) (r(y) − E r) ∇ log P(y) / |y|: the gradient of E[r] with the completion's length divided in."""
    leaf_logps = tabular.completion_logps(bandit.tree, bandit.policy)
    centred = bandit.rewards - tabular.expectation(leaf_logps, bandit.rewards)
    tilted = centred / bandit.tree.lengths
    # policy_gradient treats its rewards as constants, which is what the weights 1/|y| are.
    return tabular.policy_gradient(bandit.tree, bandit.policy, tilted)


def grpo_length_bias(seed: int) -> float:
    bandit, k = _ragged(seed), GROUP
    relative = advantages.group_relative(bandit.row_rewards, k, scale=False)
    found = bandit.mean_gradient(
        losses.clipped_policy_loss,
        relative,
        normaliser=losses.per_sequence_mean,
    )
    return distance(found, (k - 1) / k * _length_weighted(bandit))


def rloo_per_sequence_sum(seed: int) -> float:
    bandit = _ragged(seed)
    found = bandit.mean_gradient(
        losses.reinforce_loss,
        _rloo(bandit),
        normaliser=losses.per_sequence_sum,
    )
    return distance(found, bandit.exact)


def dr_grpo(seed: int) -> float:
    bandit, k, length = _ragged(seed), GROUP, 5
    relative = advantages.group_relative(bandit.row_rewards, k, scale=False)
    found = bandit.mean_gradient(
        losses.clipped_policy_loss,
        relative,
        normaliser=losses.constant(length),
    )
    return distance(found, (k - 1) / (k * length) * bandit.exact)


def dapo_per_token(seed: int) -> float:
    bandit = Bandit(seed, tabular.token_tree(vocabulary=2, horizon=2))
    found = bandit.mean_gradient(
        losses.clipped_policy_loss,
        _rloo(bandit),
        normaliser=losses.per_token,
    )
    return distance(found, bandit.exact / bandit.tree.horizon)


def _on_policy(loss_name: str, **hyper_parameters) -> Callable[[int], float]:
    def error(seed: int) -> float:
        bandit = _ragged(seed)

        def loss(*arrays):
            return getattr(losses, loss_name)(*arrays, **hyper_parameters)

        return distance(bandit.mean_gradient(loss, _rloo(bandit)), bandit.exact)

    return error


def gspo_on_policy(seed: int) -> float:
    """The sequence ratio's gradient is the mean token score, so a mean over tokens gives it back with 1/|y|."""
    bandit = _ragged(seed)
    leaf_logps = tabular.completion_logps(bandit.tree, bandit.policy)
    centred = bandit.rewards - tabular.expectation(leaf_logps, bandit.rewards)
    found = bandit.mean_gradient(
        losses.gspo_loss,
        jnp.asarray(centred[bandit.rows]),
        normaliser=losses.per_sequence_mean,
    )
    return distance(found, _length_weighted(bandit))


def whole_completion_ratio(seed: int) -> float:
    """The ratio of whole completions is the unbiased one, at any length and from any behaviour policy."""
    bandit = _ragged(seed)

    def unclipped(*arrays):
        return losses.sequence_clipped_loss(*arrays, epsilon=1e6)

    found = bandit.mean_gradient(
        unclipped,
        bandit.row_rewards,
        bandit.behaviour,
        normaliser=losses.per_sequence_mean,
    )
    return distance(found, bandit.exact)


def _off_policy(loss_name: str, **hyper_parameters) -> Callable[[int], float]:
    def error(seed: int) -> float:
        bandit = _one_token(seed)

        def loss(*arrays):
            return getattr(losses, loss_name)(*arrays, **hyper_parameters)

        found = bandit.mean_gradient(loss, bandit.row_rewards, bandit.behaviour)
        return distance(found, bandit.exact)

    return error


def _one_token_gradient(bandit: Bandit, leaf_weights: np.ndarray) -> np.ndarray:
    """Σ_a weight(a) ∇ log π(a) with respect to the logits of a one-token policy."""
    policy = np.exp(bandit.policy[0])
    return (leaf_weights - leaf_weights.sum() * policy)[None, :]


def _ratios(bandit: Bandit) -> tuple[np.ndarray, np.ndarray]:
    """(π/μ, μ) of each arm."""
    return np.exp(bandit.policy - bandit.behaviour)[0], np.exp(bandit.behaviour[0])


def clipping(seed: int) -> float:
    """PPO's clip stops the gradient where the ratio has already moved beyond the bound in the advantage's direction."""
    epsilon, epsilon_high = 0.2, 0.3
    errors = []
    for loss in (losses.clipped_policy_loss, losses.gspo_loss):
        bandit = _one_token(seed)
        ratio, behaviour = _ratios(bandit)
        arm_rewards = bandit.rewards[bandit.tree.tokens[:, 0]]
        stopped = np.where(
            arm_rewards > 0, ratio > 1 + epsilon_high, ratio < 1 - epsilon
        )
        weights = np.where(stopped, 0.0, behaviour * ratio * arm_rewards)

        def clipped(*arrays, loss=loss):
            return loss(*arrays, epsilon=epsilon, epsilon_high=epsilon_high)

        found = bandit.mean_gradient(clipped, bandit.row_rewards, bandit.behaviour)
        errors.append(distance(found, _one_token_gradient(bandit, weights)))
    return max(errors)


def generalised_advantages(seed: int) -> float:
    """With exact values every λ is unbiased; with wrong ones λ = 1 still is."""
    bandit = _ragged(seed)
    _, values = tabular.action_values(bandit.tree, bandit.policy, bandit.rewards)
    wrong = values + np.arange(len(values)) - 1.0
    paths, mask = bandit.tree.paths[bandit.rows], bandit.mask
    last = np.arange(mask.shape[1]) == mask.sum(axis=1, keepdims=True) - 1
    token_rewards = np.where(last, bandit.rewards[bandit.rows][:, None], 0.0)
    errors = []
    for critic, lam in ((values, 0.0), (values, 0.5), (values, 1.0), (wrong, 1.0)):
        estimated, _ = advantages.gae(
            jnp.asarray(token_rewards),
            jnp.asarray(np.where(mask, critic[paths], 0.0)),
            jnp.asarray(mask),
            gamma=1.0,
            lam=lam,
        )
        found = bandit.mean_gradient(losses.clipped_policy_loss, estimated)
        errors.append(distance(found, bandit.exact))
    return max(errors)


def _kl_means(seed: int, estimator: Callable, move: float = 1.0) -> tuple[float, float]:
    """(mean over completions of the summed estimate, exact KL), the policy moved that far from the reference."""
    bandit = _ragged(seed)
    tree, reference = bandit.tree, bandit.behaviour
    policy = np.asarray(
        jax.nn.log_softmax(reference + move * (bandit.policy - reference), axis=-1)
    )
    tokens = estimator(
        jnp.asarray(tabular.along_paths(tree, policy)),
        jnp.asarray(tabular.along_paths(tree, reference)),
    )
    completions = tabular.completion_logps(tree, policy)
    estimate = tabular.expectation(completions, np.asarray(tokens).sum(axis=1))
    exact = tabular.kl(completions, tabular.completion_logps(tree, reference))
    return float(estimate), float(exact)


def _unbiased(estimator_name: str) -> Callable[[int], float]:
    return lambda seed: distance(*_kl_means(seed, getattr(logps, estimator_name)))


def k2_order(seed: int) -> float:
    """k2's bias is third order in the distance to the reference, where KL itself is second.

    At distances t and −t the odd part of the bias falls as t³ and the even one as t⁴; halving t tells.
    """
    odd, even = [], []
    for move in (0.02, 0.01):
        biases = [
            np.subtract(*_kl_means(seed, logps.kl_k2, sign * move)) for sign in (1, -1)
        ]
        odd.append(biases[0] - biases[1])
        even.append(biases[0] + biases[1])
    return max(
        abs(np.log2(odd[0] / odd[1]) - 3.0), abs(np.log2(even[0] / even[1]) - 4.0)
    )


def _kl_loss_gradient(seed: int, estimator_name: str) -> tuple[np.ndarray, Bandit]:
    """(f64[1, V], bandit): mean gradient of a KL estimate used as a loss on one-token completions."""
    bandit = _one_token(seed)
    weights = jnp.asarray(bandit.weights(bandit.policy))
    ref_logps = bandit.token_logps(jnp.asarray(bandit.behaviour))

    def objective(logits: jax.Array) -> jax.Array:
        estimates = getattr(logps, estimator_name)(
            bandit.token_logps(logits), ref_logps
        )
        return jnp.sum(weights[:, None] * estimates)

    return np.asarray(jax.grad(objective)(jnp.asarray(bandit.policy))), bandit


def k1_loss(seed: int) -> float:
    return distance(_kl_loss_gradient(seed, "kl_k1")[0], 0.0)


def k2_loss(seed: int) -> float:
    found, bandit = _kl_loss_gradient(seed, "kl_k2")
    policy, log_ratio = np.exp(bandit.policy[0]), (bandit.policy - bandit.behaviour)[0]
    return distance(found, _one_token_gradient(bandit, policy * log_ratio))


def k3_loss(seed: int) -> float:
    found, bandit = _kl_loss_gradient(seed, "kl_k3")
    reference = np.exp(bandit.behaviour[0])
    return distance(found, _one_token_gradient(bandit, -reference))


def k1_in_reward(seed: int) -> float:
    """RLOO on r − c·k1, the estimate held constant: the gradient of E[r] − c KL(π ‖ π_ref) on whole completions."""
    bandit, kl_coef = _ragged(seed), 0.4
    estimates = logps.kl_k1(
        bandit.token_logps(jnp.asarray(bandit.policy)),
        bandit.token_logps(jnp.asarray(bandit.behaviour)),
    )
    penalised = bandit.row_rewards - kl_coef * jnp.sum(estimates, axis=1)
    relative = advantages.leave_one_out(penalised, bandit.group_size)
    found = bandit.mean_gradient(losses.reinforce_loss, relative)

    def value(logits: jax.Array) -> jax.Array:
        tokens = jax.nn.log_softmax(logits, axis=-1)
        along = jnp.where(
            bandit.tree.mask, tokens[bandit.tree.paths, bandit.tree.tokens], 0.0
        )
        completions = jnp.sum(along, axis=1)
        ref = tabular.completion_logps(bandit.tree, bandit.behaviour)
        gain = bandit.rewards - kl_coef * (completions - ref)
        return jnp.sum(jnp.exp(completions) * gain)

    return distance(found, jax.grad(value)(jnp.asarray(bandit.policy)))


EXACT = 1e-12

CHECKS = (
    Check(
        "REINFORCE",
        "E[r ∇log π] = ∇E[r], with and without a baseline",
        EXACT,
        reinforce,
    ),
    Check("RLOO", "mean over all groups = ∇E[r]", EXACT, rloo),
    Check(
        "RLOO, per_sequence_sum",
        "mean over all groups = ∇E[r]",
        EXACT,
        rloo_per_sequence_sum,
    ),
    Check(
        "GRPO without scaling", "mean = (k−1)/k ∇E[r]", EXACT, group_relative_unscaled
    ),
    Check(
        "GRPO with scaling, rewards 0 or 1",
        "mean = E[σ²/(std+ε)]/(p(1−p)) ∇p",
        EXACT,
        group_relative_scaled,
    ),
    Check(
        "GRPO, per_sequence_mean",
        "mean = (k−1)/k E[(r − E r) ∇log π / |y|]: length bias",
        EXACT,
        grpo_length_bias,
    ),
    Check("Dr. GRPO", "mean = (k−1)/(kL) ∇E[r], L the constant", EXACT, dr_grpo),
    Check("DAPO, per_token, equal lengths", "mean = ∇E[r]/H", EXACT, dapo_per_token),
    Check(
        "PPO at ratio 1",
        "mean = ∇E[r]",
        EXACT,
        _on_policy("clipped_policy_loss", epsilon=0.2),
    ),
    Check(
        "DAPO's asymmetric clip at ratio 1",
        "mean = ∇E[r]",
        EXACT,
        _on_policy("clipped_policy_loss", epsilon=0.2, epsilon_high=0.28),
    ),
    Check("CISPO at ratio 1", "mean = ∇E[r]", EXACT, _on_policy("cispo_loss")),
    Check("GSPO at ratio 1", "mean = E[(r − E r) ∇log π / |y|]", EXACT, gspo_on_policy),
    Check(
        "LUSPO at ratio 1",
        "GSPO's ratio, per_sequence_sum: mean = ∇E[r]",
        EXACT,
        _on_policy("gspo_loss"),
    ),
    Check(
        "whole-completion ratio off-policy, no clip",
        "E_μ[π(y)/μ(y) r ∇log π(y)] = ∇E[r] at any length",
        EXACT,
        whole_completion_ratio,
    ),
    Check(
        "PPO off-policy, no clip, one token",
        "E_μ[π/μ r ∇log π] = ∇E[r]",
        EXACT,
        _off_policy("clipped_policy_loss", epsilon=1e6),
    ),
    Check(
        "GSPO off-policy, no clip, one token",
        "E_μ[π/μ r ∇log π] = ∇E[r]",
        EXACT,
        _off_policy("gspo_loss", epsilon=1e6, epsilon_high=1e6),
    ),
    Check(
        "CISPO off-policy, no cap, one token",
        "E_μ[π/μ r ∇log π] = ∇E[r]",
        EXACT,
        _off_policy("cispo_loss", epsilon_high=1e6),
    ),
    Check(
        "PPO and GSPO clip",
        "no gradient where r > 0, ratio > 1+ε⁺ or r < 0, ratio < 1−ε",
        EXACT,
        clipping,
    ),
    Check(
        "PPO with GAE",
        "exact values: ∇E[r] for every λ; any values: for λ = 1",
        EXACT,
        generalised_advantages,
    ),
    Check("k1", "E_π[k1] = KL(π‖π_ref)", EXACT, _unbiased("kl_k1")),
    Check("k3", "E_π[k3] = KL(π‖π_ref)", EXACT, _unbiased("kl_k3")),
    Check(
        "k2",
        "bias is third order: at half the distance, |log₂ of its fall − 3|",
        0.05,
        k2_order,
    ),
    Check("k1 as a loss", "mean gradient = 0: it restrains nothing", EXACT, k1_loss),
    Check("k2 as a loss", "mean gradient = ∇KL(π‖π_ref)", EXACT, k2_loss),
    Check(
        "k3 as a loss",
        "mean gradient = ∇KL(π_ref‖π), the other direction",
        EXACT,
        k3_loss,
    ),
    Check(
        "k1 in the reward", "RLOO mean = ∇(E[r] − c KL(π‖π_ref))", EXACT, k1_in_reward
    ),
)
