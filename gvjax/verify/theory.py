"""What "All Roads Lead to Likelihood" proves, checked on trees small enough to enumerate.

Preference losses are gvjax's own, differentiated by jax; everything they are compared with is NumPy in float64.

References:
  Swamy et al., 2025, https://arxiv.org/abs/2503.01067.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from scipy import optimize
from scipy.special import expit

from gvjax import losses, tabular
from gvjax.tabular import bradley_terry
from gvjax.tabular.bradley_terry import Comparisons
from gvjax.verify.check import Check, descend, distance, minimise

BETA = 0.3
TREE = tabular.token_tree(vocabulary=3, horizon=3)


class World:
    """27 completions, a random autoregressive reference, a reward no feature explains, 300 labelled pairs."""

    def __init__(self, seed: int, features: int = 4, pairs: int = 300):
        self.rng = np.random.default_rng(seed)
        size = len(TREE.leaves)
        self.ref_tokens = tabular.random_policy(self.rng, TREE, scale=0.5)
        self.ref = tabular.completion_logps(TREE, self.ref_tokens)
        self.features = self.rng.standard_normal((size, features))
        self.rewards = self.rng.standard_normal(size)
        self.data = bradley_terry.sample(self.rng, self.rewards, self.ref, pairs)

    def log_linear(self, weights: ArrayLike) -> jax.Array:
        """The soft-optimal policies of linear rewards: π_w ∝ π_ref exp(w·φ/β)."""
        return jax.nn.log_softmax(
            self.ref + self.features @ jnp.asarray(weights) / BETA
        )


def variation(left: ArrayLike, right: ArrayLike) -> float:
    """Total variation between two lists of log-probabilities."""
    return float(tabular.total_variation(np.asarray(left), np.asarray(right)))


def dpo_objective(
    logps_of: Callable[[jax.Array], jax.Array],
    ref_logps: np.ndarray,
    data: Comparisons,
    beta: float,
) -> Callable[[jax.Array], jax.Array]:
    """gvjax's DPO loss per comparison, as a function of the parameters behind the completions' log-probabilities."""
    ref = jnp.asarray(ref_logps)

    def objective(parameters: jax.Array) -> jax.Array:
        logps = logps_of(parameters)

        def loss(chosen: np.ndarray, rejected: np.ndarray) -> jax.Array:
            return losses.dpo_loss(
                logps[chosen], logps[rejected], ref[chosen], ref[rejected], beta=beta
            )

        total = jnp.sum(data.wins * loss(data.first, data.second))
        total += jnp.sum(data.losses * loss(data.second, data.first))
        return total / (data.wins.sum() + data.losses.sum())

    return objective


def negative_value(
    logps_of: Callable[[jax.Array], jax.Array],
    ref_logps: np.ndarray,
    rewards: np.ndarray,
    beta: float,
) -> Callable[[jax.Array], jax.Array]:
    """−(E_π[r] − β KL(π ‖ π_ref)), exactly, as a function of the policy's parameters."""

    def objective(parameters: jax.Array) -> jax.Array:
        logps = logps_of(parameters)
        return -jnp.sum(jnp.exp(logps) * (rewards - beta * (logps - ref_logps)))

    return objective


def reverse_kl_identity(seed: int) -> float:
    world = World(seed)
    logps = tabular.completion_logps(TREE, tabular.random_policy(world.rng, TREE))
    best = tabular.gibbs(world.ref, world.rewards, BETA)
    log_z = np.log(np.sum(np.exp(world.ref + world.rewards / BETA)))
    return distance(
        tabular.regularised_value(logps, world.ref, world.rewards, BETA),
        BETA * log_z - BETA * tabular.kl(logps, best),
    )


def _trees(seed: int):
    """Trees with and without EOS, two prompts each: (tree, reference by token, rewards)."""
    rng = np.random.default_rng(seed)
    for eos in (None, 0):
        tree = tabular.token_tree(vocabulary=3, horizon=3, eos=eos)
        ref_tokens = tabular.random_policy(rng, tree, 2)
        yield tree, ref_tokens, rng.standard_normal((2, len(tree.leaves)))


def soft_bellman_is_gibbs(seed: int) -> float:
    errors = []
    for tree, ref_tokens, rewards in _trees(seed):
        _, policy = tabular.soft_bellman(tree, ref_tokens, rewards, BETA)
        ref = tabular.completion_logps(tree, ref_tokens)
        best = tabular.gibbs(ref, rewards, BETA)
        errors.append(distance(tabular.completion_logps(tree, policy), best))
    return max(errors)


def telescoping(seed: int) -> float:
    errors = []
    for tree, ref_tokens, rewards in _trees(seed):
        values, policy = tabular.soft_bellman(tree, ref_tokens, rewards, BETA)
        token_rewards = BETA * tabular.along_paths(tree, policy - ref_tokens)
        errors.append(distance(token_rewards.sum(axis=-1), rewards - values[:, :1]))
    return max(errors)


def rlhf_is_dpo(seed: int) -> float:
    world = World(seed)
    reward_model = bradley_terry.fit(world.features, world.data)
    rewards = world.features @ reward_model
    start = np.zeros(world.features.shape[1])
    rlhf = minimise(negative_value(world.log_linear, world.ref, rewards, BETA), start)
    dpo = minimise(dpo_objective(world.log_linear, world.ref, world.data, BETA), start)
    return variation(world.log_linear(rlhf), world.log_linear(dpo))


def rlhf_is_proper_learning(seed: int) -> float:
    world = World(seed, features=2)
    rewards = world.features @ bradley_terry.fit(world.features, world.data)
    _, policy = tabular.soft_bellman(TREE, world.ref_tokens, rewards, BETA)
    rlhf = tabular.completion_logps(TREE, policy)
    dpo = minimise(
        dpo_objective(world.log_linear, world.ref, world.data, BETA), np.zeros(2)
    )
    return variation(rlhf, world.log_linear(dpo))


def sft_is_max_min(seed: int) -> float:
    world = World(seed)
    demonstrations = world.rng.multinomial(500, np.exp(world.ref)) / 500
    wanted = demonstrations @ world.features
    counting = np.zeros_like(world.ref_tokens)

    def best_response(weights):
        rewards = world.features @ weights
        values, policy = tabular.soft_bellman(TREE, counting, rewards, 1.0)
        probabilities = np.exp(tabular.completion_logps(TREE, policy))
        return values[0] - wanted @ weights, probabilities

    def dual(weights):
        value, probabilities = best_response(weights)
        return value, probabilities @ world.features - wanted

    def curvature(weights):
        _, probabilities = best_response(weights)
        centred = world.features - probabilities @ world.features
        return (centred.T * probabilities) @ centred

    start = np.zeros(len(wanted))
    game = optimize.minimize(
        dual,
        start,
        jac=True,
        hess=curvature,
        method="trust-exact",
        options={"gtol": 1e-11},
    )

    def cross_entropy(weights: jax.Array) -> jax.Array:
        logps = jax.nn.log_softmax(world.features @ weights)
        return -jnp.sum(demonstrations * logps)

    sft = minimise(cross_entropy, start)
    probabilities = np.exp(jax.nn.log_softmax(world.features @ sft))
    moments = distance(probabilities @ world.features, wanted)
    return max(moments, distance(game.fun, cross_entropy(jnp.asarray(sft))))


def spin_step(seed: int) -> float:
    world = World(seed)
    data = tabular.completion_logps(
        TREE, tabular.random_policy(world.rng, TREE, scale=0.5)
    )
    size = len(data)
    chosen, rejected = np.divmod(np.arange(size * size), size)
    drawn = np.exp(data[chosen] + world.ref[rejected])
    pairs = Comparisons(chosen, rejected, drawn, np.zeros_like(drawn))
    objective = dpo_objective(jax.nn.log_softmax, world.ref, pairs, 1.0)
    found = jax.nn.log_softmax(minimise(objective, world.ref))
    return variation(found, data)


def _samplers(world: World) -> list[np.ndarray]:
    return [world.ref, np.full(len(world.ref), -np.log(len(world.ref)))]


def soft_labels(seed: int) -> float:
    world = World(seed)
    best = tabular.gibbs(world.ref, world.rewards, BETA)
    errors = []
    for sampler in _samplers(world):
        pairs = bradley_terry.population(world.rewards, sampler)
        drawn = pairs.wins + pairs.losses

        def objective(logits, pairs=pairs, drawn=drawn):
            logps, ref = jax.nn.log_softmax(logits), jnp.asarray(world.ref)
            found = losses.soft_dpo_loss(
                logps[pairs.first],
                logps[pairs.second],
                ref[pairs.first],
                ref[pairs.second],
                jnp.asarray(pairs.wins / drawn),
                beta=BETA,
            )
            return jnp.sum(drawn * found) / drawn.sum()

        found = jax.nn.log_softmax(minimise(objective, world.ref))
        errors.append(variation(found, best))
    return max(errors)


def hard_labels(seed: int) -> float:
    """How far from divergence: 0 when loss, parameters and policy all say that there is no finite optimum."""
    world, beta = World(seed), 1.0
    best = tabular.gibbs(world.ref, world.rewards, beta)
    pairs = bradley_terry.population(world.rewards, world.ref)
    first_wins = world.rewards[pairs.first] > world.rewards[pairs.second]
    drawn = pairs.wins + pairs.losses
    hard = Comparisons(
        pairs.first,
        pairs.second,
        np.where(first_wins, drawn, 0.0),
        np.where(first_wins, 0.0, drawn),
    )
    objective = dpo_objective(jax.nn.log_softmax, world.ref, hard, beta)
    start = world.ref - world.ref.mean()
    end = descend(objective, start, steps=200)
    # Along the ranking the loss falls to 0, and at no finite point is it 0.
    ranking = np.argsort(np.argsort(world.rewards)).astype(float)
    far = float(objective(jnp.asarray(start + 1e3 * ranking)))
    return max(
        0.0,
        far - 1e-12,
        end.fun - 1e-3,
        10 * np.abs(start).max() - np.abs(end.x).max(),
        0.1 - variation(jax.nn.log_softmax(end.x), best),
    )


def gap_identity(seed: int) -> float:
    world = World(seed)
    policy, weight = np.exp(world.ref), world.rng.uniform(size=len(world.ref))
    utility = world.rewards
    reweighted = policy * weight / (policy @ weight)
    covariance = policy @ ((weight - policy @ weight) * (utility - policy @ utility))
    return distance(
        reweighted @ utility - policy @ utility, covariance / (policy @ weight)
    )


BEST_OF = (2, 4, 16, 64)


def best_of_n_winrate(seed: int) -> float:
    """Largest deviation over n, in standard errors, of winrates from drawn completions."""
    rng, samples = np.random.default_rng(seed), 100_000
    size = len(tabular.token_tree(vocabulary=3, horizon=7).leaves)
    deviations = []
    for n in BEST_OF:
        best = rng.integers(size, size=(samples, n)).max(axis=1)
        fresh = rng.integers(size, size=samples)
        winrate = np.mean(best > fresh) + 0.5 * np.mean(best == fresh)
        expected = n / (n + 1)
        standard_error = np.sqrt(expected * (1 - expected) / samples)
        deviations.append(abs(winrate - expected) / standard_error)
    return float(max(deviations))


def best_of_n_exact(seed: int) -> float:
    """On 2187 equally likely completions, with what a tie costs there taken off; positive if KL exceeds its bound."""
    rng = np.random.default_rng(seed)
    size = len(tabular.token_tree(vocabulary=3, horizon=7).leaves)
    uniform, scores = np.full(size, -np.log(size)), rng.permutation(size).astype(float)
    errors = []
    for n in BEST_OF:
        logps = tabular.best_of_n(uniform, scores, n)
        winrate = np.exp(logps) @ ((scores + 0.5) / size)
        # A fresh sample ties with probability 1/N; half a win for it is the trapezoid rule for ∫ uⁿ du.
        trapezoid = 1 - np.trapezoid(np.linspace(0, 1, size + 1) ** n, dx=1 / size)
        errors.append(abs(winrate - trapezoid))
        errors.append(max(0.0, abs(winrate - n / (n + 1)) - n / (12 * size**2)))
        bound = np.log(n) - (n - 1) / n
        errors.append(max(0.0, tabular.kl(logps, uniform) - bound))
    return float(max(errors))


def strict_gap(seed: int) -> float:
    """Three arms; the one policy feature is orthogonal to the Borda scores, so preferences cannot move DPO."""
    rewards, uniform = np.array([3.0, 0.0, -1.0]), np.full(3, -np.log(3))
    borda = expit(rewards[:, None] - rewards).sum(axis=1)
    feature = np.cross(borda, np.ones(3))
    feature /= np.linalg.norm(feature) * np.sign(feature[0])

    def one_feature(theta: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(theta[0] * feature)

    data = bradley_terry.population(rewards, uniform)
    dpo = minimise(dpo_objective(one_feature, uniform, data, 1.0), np.array([0.3]))
    reward_model = bradley_terry.fit(np.eye(3), data)
    rlhf = minimise(
        negative_value(one_feature, uniform, reward_model, 1.0), np.array([0.3])
    )

    def slope(theta: float) -> float:
        policy = np.exp(theta * feature)
        policy /= policy.sum()
        centred = feature - policy @ feature
        return float(policy @ (centred * (rewards - theta * feature)))

    def value(theta: np.ndarray) -> float:
        logps = np.asarray(one_feature(jnp.asarray(theta)))
        return float(tabular.regularised_value(logps, uniform, rewards, 1.0))

    root = optimize.brentq(slope, 0.0, 1.0, xtol=1e-14)
    return max(
        distance(dpo, 0.0),
        distance(value(dpo), 2 / 3),
        distance(rlhf, root),
        # Published to five digits.
        distance(round(float(rlhf[0]), 5), 0.08629),
        distance(round(value(rlhf), 5), 0.66887),
    )


PROMPTS = 4


def _comparisons_of_prompts(
    rng: np.random.Generator, ref: np.ndarray, finite: bool
) -> Comparisons:
    """Labels of pairs of the same prompt, the completions of all prompts numbered consecutively."""
    size = len(TREE.leaves)
    parts = []
    for prompt in range(PROMPTS):
        rewards = rng.standard_normal(size)
        data = bradley_terry.population(rewards, ref[prompt])
        wins, defeats = data.wins, data.losses
        if finite:
            drawn = bradley_terry.sample(rng, rewards, ref[prompt], 1000)
            # Smoothed labels: without them 1000 pairs leave some completion undefeated.
            wins = 0.95 * drawn.wins + 0.05 * drawn.losses
            defeats = 0.95 * drawn.losses + 0.05 * drawn.wins
        parts.append(
            (data.first + prompt * size, data.second + prompt * size, wins, defeats)
        )
    return Comparisons(*(np.concatenate(part) for part in zip(*parts)))


@functools.cache
def isomorphic_classes(seed: int, finite: bool) -> tuple[float, float]:
    """(largest total variation, difference of optimal losses) between the two roads, over four prompts at once."""
    rng = np.random.default_rng(seed)
    beta = 0.5
    ref_tokens = tabular.random_policy(rng, TREE, PROMPTS, scale=0.5)
    ref = tabular.completion_logps(TREE, ref_tokens)
    data = _comparisons_of_prompts(rng, ref, finite)

    def autoregressive(logits: jax.Array) -> jax.Array:
        tokens = jax.nn.log_softmax(logits.reshape(ref_tokens.shape), axis=-1)
        return tokens[:, TREE.paths, TREE.tokens].sum(axis=-1).ravel()

    rewards = bradley_terry.fit(np.eye(ref.size), data)
    _, policy = tabular.soft_bellman(TREE, ref_tokens, rewards.reshape(ref.shape), beta)
    rlhf = tabular.completion_logps(TREE, policy)
    objective = dpo_objective(autoregressive, ref.ravel(), data, beta)
    dpo = descend(objective, ref_tokens.ravel(), steps=2000).x
    found = np.asarray(autoregressive(jnp.asarray(dpo))).reshape(ref.shape)
    nll = bradley_terry.negative_log_likelihood(rewards, data)
    return (
        float(tabular.total_variation(found, rlhf).max()),
        abs(float(objective(jnp.asarray(dpo))) - nll),
    )


def excess_losses(
    seed: int, arms: int, features: int, pairs: int, replicates: int
) -> tuple[np.ndarray, np.ndarray]:
    """Held-out excess loss, nats per pair, of a reward linear in k features and of one reward per arm.

    The truth is linear in the features; pairs are uniform. Returns f64[replicates] each, by exact expectation.
    """
    rng = np.random.default_rng(seed)
    uniform = np.full(arms, -np.log(arms))
    phi = rng.standard_normal((arms, features))
    rewards = phi @ rng.standard_normal(features) / np.sqrt(features)
    truth = bradley_terry.population(rewards, uniform)
    floor = bradley_terry.negative_log_likelihood(rewards, truth)
    results = np.zeros((2, replicates))
    for replicate in range(replicates):
        data = bradley_terry.sample(rng, rewards, uniform, pairs)
        for row, design in enumerate((phi, np.eye(arms))):
            fitted = design @ bradley_terry.fit(design, data)
            loss = bradley_terry.negative_log_likelihood(fitted, truth)
            results[row, replicate] = loss - floor
    return results[0], results[1]


def dimension_counting(seed: int) -> float:
    arms, features, pairs, replicates = 27, 3, 8000, 300
    simple, local = excess_losses(seed, arms, features, pairs, replicates)
    predicted = (arms - 1 - features) / (2 * pairs)
    standard_error = np.std(local - simple, ddof=1) / np.sqrt(replicates)
    return float(abs(np.mean(local - simple) - predicted) / standard_error)


def closed_gap(seed: int, arms: int) -> float:
    simple, local = excess_losses(seed, arms, arms - 1, 8000, 10)
    return distance(simple, local)


CHECKS = (
    Check(
        "E1 soft RL is a reverse-KL projection",
        "E_P[r] − β KL(P‖P_ref) = β log Z − β KL(P‖P*_r)",
        1e-12,
        reverse_kl_identity,
    ),
    Check(
        "E2 soft Bellman = Gibbs tilt",
        "log π* by backward sweep = log P_ref + r/β − log Z",
        1e-12,
        soft_bellman_is_gibbs,
    ),
    Check(
        "E3 a local reward model telescopes",
        "β Σ_h log π*/π_ref = r(ξ) − V(s₀)",
        1e-12,
        telescoping,
    ),
    Check(
        "E4 RLHF = DPO, misspecified, finite data",
        "TV(argmax E[r̂] − β KL, argmin dpo_loss), log-linear",
        1e-7,
        rlhf_is_dpo,
    ),
    Check(
        "E5 RLHF = likelihood over Π(R_sim)",
        "TV(soft RL on a 2-feature RM, dpo_loss over π_w)",
        1e-7,
        rlhf_is_proper_learning,
    ),
    Check(
        "E6 SFT = max-min game",
        "max_r min_π E_D[r] − E_π[r] − H(π) = SFT log-likelihood",
        1e-8,
        sft_is_max_min,
    ),
    Check(
        "E7 a SPIN step reaches the data",
        "argmin E[dpo_loss(data, own sample)], β = 1: TV to P_D",
        1e-6,
        spin_step,
    ),
    Check(
        "E8 online DPO, soft labels",
        "argmin E[soft_dpo_loss] = P*_r for every sampler: TV",
        1e-6,
        soft_labels,
    ),
    Check(
        "E9 online DPO, hard labels diverges",
        "loss → 0, |θ| → ∞, TV to P*_r > 0.1: shortfall",
        0.0,
        hard_labels,
    ),
    Check(
        "E10 generation-verification gap",
        "J(f[w]) − J(f) = Cov_f(w, u) / E_f[w]",
        1e-12,
        gap_identity,
    ),
    Check(
        "E11 best-of-n winrate, sampled",
        "n/(n+1), in standard errors",
        3.0,
        best_of_n_winrate,
    ),
    Check(
        "E11 best-of-n, enumerated",
        "winrate n/(n+1) ± n/12N², KL ≤ log n − (n−1)/n",
        1e-11,
        best_of_n_exact,
    ),
    Check(
        "E12 a policy class that cannot move",
        "3 arms: DPO θ = 0 (V ⅔), RLHF θ = 0.08629 (V 0.66887)",
        1e-6,
        strict_gap,
    ),
    Check(
        "isomorphic classes: policies, population",
        "TV(dpo_loss optimum, tabular RM + soft Bellman)",
        1e-4,
        lambda seed: isomorphic_classes(seed, finite=False)[0],
    ),
    Check(
        "isomorphic classes: losses, population",
        "|min dpo_loss − min Bradley–Terry loss|, nats",
        1e-8,
        lambda seed: isomorphic_classes(seed, finite=False)[1],
    ),
    Check(
        "isomorphic classes: policies, finite data",
        "TV(dpo_loss optimum, tabular RM + soft Bellman)",
        1e-4,
        lambda seed: isomorphic_classes(seed, finite=True)[0],
    ),
    Check(
        "isomorphic classes: losses, finite data",
        "|min dpo_loss − min Bradley–Terry loss|, nats",
        1e-8,
        lambda seed: isomorphic_classes(seed, finite=True)[1],
    ),
    Check(
        "the gap by counting dimensions",
        "NLL_local − NLL_global = (26 − 3)/2n, in standard errors",
        4.0,
        dimension_counting,
    ),
    Check(
        "gap closed by a complex verifier",
        "A = 27, k = 26: NLL_local = NLL_global",
        1e-9,
        lambda seed: closed_gap(seed, 27),
    ),
    Check(
        "gap closed by a short horizon",
        "A = 4, k = 3: NLL_local = NLL_global",
        1e-9,
        lambda seed: closed_gap(seed, 4),
    ),
)
