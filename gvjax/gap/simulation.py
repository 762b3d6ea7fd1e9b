"""Whole studies of both roads on made-up tasks whose truth is known, exact where a real one trains: milliseconds each.

A completion of a prompt has reward features and policy features. Gold is linear in reward features; a reward model is
fitted to the features that it sees, DPO's implicit reward to the policy's, both by maximum likelihood with a ridge from
one grid, chosen on validation pairs; and policies are their Gibbs policies, written down instead of trained. What then
happens is what happens to a real task: the same quantities, intervals and rules.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from gvjax.gap import advice, quantities, results, statistics
from gvjax.gap.bounds import simultaneous
from gvjax.gap.statistics import Estimate

Array = npt.NDArray[np.float64]
Rng = np.random.Generator


@dataclasses.dataclass(frozen=True)
class Table:
    """Prompts with all their completions.

    Attributes:
      ref_logps: f64[P, A], log-probabilities under the SFT policy.
      gold: f64[P, A], also the rewards by which a labeller prefers.
      seen: f64[P, A, K], what the reward model sees of a completion.
      steered: f64[P, A, D], along which the policy can be moved.
    """

    ref_logps: Array
    gold: Array
    seen: Array
    steered: Array


class World(Protocol):
    """A made-up task.

    Attributes:
      num_pairs: preference pairs that each seed trains on.
      betas: strengths of the KL among which both roads choose on validation prompts.
    """

    @property
    def num_pairs(self) -> int: ...
    @property
    def betas(self) -> tuple[float, ...]: ...

    def table(self, rng: Rng, prompts: int) -> Table:
        """New prompts."""
        ...

    def pairs(self, rng: Rng, count: int) -> Table:
        """New prompts with two samples of the SFT policy each, A = 2."""
        ...

    def online(self, table: Table, weights: Array, beta: float) -> Array:
        """f64[P, A], log-probabilities of the policy in reach that maximises E[seen · weights] − β KL."""
        ...


@dataclasses.dataclass(frozen=True)
class Features:
    """Completions with independent normal features.

    Attributes:
      paying: features that gold depends on, all alike.
      seen: the first so many of all features are the reward model's, in order; `steered` likewise the policy's.
      uncovered: so many of the policy's last features do not vary within the pairs, only elsewhere.
      strength: standard deviation of gold.
      num_pairs, betas: see World.
      completions: of each prompt, alike under the SFT policy.
    """

    paying: int
    seen: int
    steered: int
    uncovered: int = 0
    strength: float = 1.5
    num_pairs: int = 100
    betas: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    completions: int = 16

    def table(self, rng: Rng, prompts: int) -> Table:
        return self._draw(rng, prompts, self.completions)

    def pairs(self, rng: Rng, count: int) -> Table:
        drawn = self._draw(rng, count, 2)
        covered = np.arange(self.steered) < self.steered - self.uncovered
        return dataclasses.replace(drawn, steered=drawn.steered * covered)

    def online(self, table: Table, weights: Array, beta: float) -> Array:
        # What the reward model sees, the policy can follow: the Gibbs policy is in reach.
        return _gibbs(table.ref_logps, table.seen @ weights, beta)

    def _draw(self, rng: Rng, prompts: int, completions: int) -> Table:
        width = max(self.paying, self.seen, self.steered)
        features = rng.standard_normal((prompts, completions, width))
        weight = self.strength / self.paying**0.5
        return Table(
            np.full((prompts, completions), -np.log(completions)),
            weight * features[..., : self.paying].sum(-1),
            features[..., : self.seen],
            features[..., : self.steered],
        )


@dataclasses.dataclass(frozen=True)
class Kinds:
    """A few kinds of completion, the same for every prompt, and a policy that can only be moved along one feature.

    The reward model has a value for each kind. Swamy et al.'s setting without isomorphic classes, after Shi et al.: the
    feature is chosen so that the likelihood of pairs does not change along it to first order, and the reward does.

    Attributes:
      probabilities: of the kinds, under the SFT policy.
      gold: of the kinds.
      steered: of the kinds.
      num_pairs, betas: see World.

    References:
      Shi et al., 2025, https://arxiv.org/abs/2505.19770.
    """

    probabilities: tuple[float, ...]
    gold: tuple[float, ...]
    steered: tuple[float, ...]
    num_pairs: int = 20_000
    betas: tuple[float, ...] = (0.35,)

    @classmethod
    def unmoved(
        cls, probabilities: tuple[float, float, float], gold: tuple[float, float, float]
    ) -> "Kinds":
        """Three kinds, and the feature (2, −1, x) along which pairs do not move the policy.

        Σ_i p_i φ_i Σ_j p_j (σ(r_i − r_j) − ½) = 0,   which is the slope of DPO's likelihood at the SFT policy
        """
        p, r = np.asarray(probabilities), np.asarray(gold)
        borda = p * ((special.expit(r[:, None] - r) - 0.5) @ p)
        last = -(2 * borda[0] - borda[1]) / borda[2]
        return cls(probabilities, gold, (2.0, -1.0, float(last)))

    def table(self, rng: Rng, prompts: int) -> Table:
        return self._take(np.tile(np.arange(len(self.gold)), (prompts, 1)))

    def pairs(self, rng: Rng, count: int) -> Table:
        return self._take(
            rng.choice(len(self.gold), size=(count, 2), p=self.probabilities)
        )

    def online(self, table: Table, weights: Array, beta: float) -> Array:
        ref, reward, along = (
            table.ref_logps[0],
            (table.seen @ weights)[0],
            table.steered[0, :, 0],
        )

        def loss(theta: float) -> float:
            logps = _gibbs(ref, theta * along, 1.0)
            return float(np.exp(logps) @ (beta * (logps - ref) - reward))

        # Several valleys: the best of a grid, then its bottom.
        grid = np.linspace(-20, 20, 401)
        best = grid[np.argmin([loss(theta) for theta in grid])]
        theta = optimize.minimize_scalar(
            loss, bounds=(best - 0.1, best + 0.1), method="bounded"
        ).x
        return _gibbs(table.ref_logps, theta * table.steered[..., 0], 1.0)

    def _take(self, kinds: npt.NDArray[np.intp]) -> Table:
        logps, gold, steered = (
            np.asarray(each)
            for each in (np.log(self.probabilities), self.gold, self.steered)
        )
        # One indicator less than kinds: rewards have no zero point.
        seen = np.eye(len(self.gold))[:, :-1]
        return Table(logps[kinds], gold[kinds], seen[kinds], steered[kinds][..., None])


@dataclasses.dataclass(frozen=True)
class Design:
    """The size of a study: what the tool's own configs ask for, with fewer samples a prompt.

    Attributes:
      seeds: each draws its own prompts, pairs and training noise.
      prompts, validation_prompts: for best-of-n and policies.
      heldout: test pairs, and as many validation pairs.
      samples: of the SFT policy for each prompt.
      sizes: n of best-of-n.
      ridges: among which each scorer chooses on validation pairs: its tuning budget.
      noise: training noise of each run, as a share of a fit's own standard error.
      shuffled: whether the reward model's labels are coin flips.
    """

    seeds: int = 5
    prompts: int = 200
    validation_prompts: int = 100
    heldout: int = 300
    samples: int = 16
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    ridges: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    noise: float = 0.5
    shuffled: bool = False


@dataclasses.dataclass(frozen=True)
class Study:
    """What one simulated study came to.

    Attributes:
      estimates: by the names of `advice.Tier1` and `advice.Tier2`, `gold_gap`, and `largest`, the headroom at
        the largest n.
      predicted: the advice without a pilot.
      observed: the advice with it.
    """

    estimates: dict[str, Estimate]
    predicted: advice.Advice
    observed: advice.Advice


TIER1 = ("advantage", "headroom", "lead", "oracle", "efficiency", "turn")
TIER2 = ("difference", "matched_kl")


def study(world: World, design: Design, rng: Rng) -> Study:
    """One study of a world, from drawing its pairs to its advice."""
    seeds = [_seed(world, design, rng) for _ in range(design.seeds)]
    place = quantities.chosen_size([seed.validation for seed in seeds], design.sizes)
    values = {
        "advantage": [seed.advantage for seed in seeds],
        "headroom": [seed.headroom[place] for seed in seeds],
        "lead": [seed.headroom[place] - seed.implicit[place] for seed in seeds],
        "oracle": [seed.oracle[place] for seed in seeds],
        "efficiency": [
            quantities.efficiency(seed.headroom[place], seed.oracle[place])
            for seed in seeds
        ],
        "turn": [seed.headroom[-1] - seed.headroom[place] for seed in seeds],
        "difference": [seed.difference for seed in seeds],
        "matched_kl": [seed.matched_kl for seed in seeds],
        "gold_gap": [seed.gold_gap for seed in seeds],
        "largest": [seed.headroom[-1] for seed in seeds],
    }
    estimates = {
        name: found
        for name, each in values.items()
        if (found := quantities.over_seeds(each)) is not None
    }

    def bounds(names) -> dict[str, Any]:
        known = {name: estimates[name] for name in names if name in estimates}
        return dict(simultaneous(known))

    scorers = bounds(TIER1)
    both = bounds((*TIER1, *TIER2))
    return Study(
        estimates,
        advice.advise(advice.Tier1(design.seeds, **scorers)),
        advice.advise(
            advice.Tier1(design.seeds, **{k: both[k] for k in TIER1 if k in both}),
            advice.Tier2(design.seeds, **{k: both[k] for k in TIER2 if k in both}),
        ),
    )


@dataclasses.dataclass(frozen=True)
class Contenders:
    """A pilot with offline arms that are equal in truth, so that it cannot matter which of them is taken for the best.

    Gold rewards are normal: an arm then beats the SFT policy in exactly the share of prompts that is asked for.

    Attributes:
      arms: of the offline road.
      gain: winrate over the SFT policy, less ½, of each offline arm.
      lead: winrate of the online arm, less that of any offline one.
      spread: standard deviation of the lead between seeds.
      seeds, prompts, validation_prompts: see Design.
    """

    arms: int = 3
    gain: float = 0.05
    lead: float = advice.Margins().winrate
    spread: float = 0.01
    seeds: int = 5
    prompts: int = 600
    validation_prompts: int = 300

    def study(self, rng: Rng) -> Study:
        """One pilot, from the arms' gold rewards to its advice; nothing is known of scorers."""
        seeds = range(self.seeds)
        leads = rng.normal(self.lead, self.spread, self.seeds)
        start, online = self._arm(rng, 0 * leads), self._arm(rng, self.gain + leads)
        offline = [self._arm(rng, self.gain + 0 * leads) for _ in range(self.arms)]
        best = results.best_arm(offline, "best offline")
        rows = [
            quantities.lead(*(arm.seed(seed).gold for arm in (online, best, start)))
            for seed in seeds
        ]
        estimates = {"difference": statistics.paired_mean(rows, prompts="nested")}
        bounds = simultaneous(estimates)
        nothing = advice.Tier1(self.seeds)
        return Study(
            estimates,
            advice.advise(nothing),
            advice.advise(nothing, advice.Tier2(self.seeds, bounds["difference"])),
        )

    def _arm(self, rng: Rng, gains: Array) -> results.ArmResult:
        """An arm of such a gain in every seed; the difference of two normal rewards has standard deviation √2."""
        seeds = []
        for seed, shift in enumerate(2**0.5 * special.ndtri(0.5 + gains)):
            gold, validation = (
                rng.normal(shift, 1.0, count)
                for count in (self.prompts, self.validation_prompts)
            )
            extra = {"validation_gold": float(validation.mean())}
            seeds.append(results.SeedResult(seed, tuple(gold), 1.0, 1.0, extra=extra))
        return results.ArmResult("", "offline", tuple(seeds))


@dataclasses.dataclass(frozen=True)
class DimensionToy:
    """One prompt whose reward is linear in a few features, with as many numbers for the policy to learn as completions.

    The excess loss of a maximum-likelihood fit is its dimension over 2N, so to first order

        A(N) = (completions − 1 − features) / 2N

    Attributes:
      completions, features: of the one prompt.
      num_pairs: N.
      seeds: each draws its own pairs.
      heldout: pairs that all seeds are tested on.
    """

    completions: int = 27
    features: int = 3
    num_pairs: int = 4000
    seeds: int = 5
    heldout: int = 500

    @property
    def advantage(self) -> float:
        """A(N), nats per pair."""
        return (self.completions - 1 - self.features) / (2 * self.num_pairs)

    def study(self, rng: Rng) -> Estimate:
        """A(N) as it is estimated, seeds and held-out pairs crossed."""
        features = rng.standard_normal((self.completions, self.features))
        # Standard deviation 1: stronger ones leave completions that never lose, and no finite maximum.
        reward = features.sum(axis=1) / self.features**0.5
        ordered = np.array(
            [
                (i, j)
                for i in range(self.completions)
                for j in range(self.completions)
                if i != j
            ]
        )
        wins = special.expit(reward[ordered[:, 0]] - reward[ordered[:, 1]])
        counts = rng.multinomial(
            self.num_pairs, wins / wins.sum(), size=self.seeds
        ).astype(float)
        test = ordered[rng.choice(len(ordered), size=self.heldout, p=wins / wins.sum())]
        likelihoods = []
        # The policy's rewards have no zero point: one indicator less than completions.
        for columns in (features, np.eye(self.completions)[:, 1:]):
            differences = columns[ordered[:, 0]] - columns[ordered[:, 1]]
            weights, _ = maximum_likelihood(
                np.tile(differences, (self.seeds, 1, 1)), counts
            )
            scores = weights @ columns.T
            likelihoods.append(
                statistics.pair_log_likelihoods(
                    scores[:, test[:, 0]] - scores[:, test[:, 1]]
                )
            )
        return statistics.paired_nll_difference(*likelihoods, prompts="crossed")


@dataclasses.dataclass(frozen=True)
class _Seed:
    """The quantities of one seed; see `quantities`."""

    advantage: float
    validation: Array
    headroom: Array
    implicit: Array
    oracle: Array
    gold_gap: float
    difference: float
    matched_kl: float | None


def _seed(world: World, design: Design, rng: Rng) -> _Seed:
    train, validation, test = (
        _labelled(rng, world.pairs(rng, count))
        for count in (world.num_pairs, design.heldout, design.heldout)
    )
    seen, steered = (tuple(p[i] for p in (train, validation)) for i in (0, 1))
    if design.shuffled:
        # Those it is chosen on as well: chosen on true labels, it would be worth something.
        seen = tuple(
            rng.choice([-1.0, 1.0], size=(len(each), 1)) * each for each in seen
        )
    verifier, implicit = (_train(rng, design, *each) for each in (seen, steered))
    likelihoods = [
        quantities.predict(test[i] @ w, validation[i] @ w).log_likelihood
        for i, w in ((0, verifier), (1, implicit))
    ]

    prompts = {
        "validation": world.table(rng, design.validation_prompts),
        "test": world.table(rng, design.prompts),
    }
    chosen_on = _best_of_n(rng, design, prompts["validation"], {"verifier": verifier})
    curves = _best_of_n(
        rng, design, prompts["test"], {"verifier": verifier, "implicit": implicit}
    )
    arms = {
        "online": lambda table, beta: world.online(table, verifier, beta),
        "offline": lambda table, beta: _gibbs(
            table.ref_logps, table.steered @ implicit, beta
        ),
    }
    judged = {
        which: _Judged.of(rng, table, arms, world.betas)
        for which, table in prompts.items()
    }
    best = {name: judged["validation"].best(name, world.betas) for name in arms}
    return _Seed(
        advantage=likelihoods[0] - likelihoods[1],
        validation=chosen_on["verifier"],
        headroom=curves["verifier"],
        implicit=curves["implicit"],
        oracle=curves["oracle"],
        gold_gap=float(curves["gold_gap"]),
        difference=judged["test"].lead(best),
        matched_kl=judged["test"].matched(best, world.betas),
    )


def _labelled(rng: Rng, table: Table) -> tuple[Array, Array]:
    """Differences chosen − rejected, f64[P, K] of what the reward model sees and f64[P, D] of the policy's features."""
    first = rng.random(len(table.gold)) < special.expit(
        table.gold[:, 0] - table.gold[:, 1]
    )
    sign = np.where(first, 1.0, -1.0)[:, None]
    return (
        sign * (table.seen[:, 0] - table.seen[:, 1]),
        sign * (table.steered[:, 0] - table.steered[:, 1]),
    )


def _train(
    rng: Rng,
    design: Design,
    train: Array,
    validation: Array,
) -> Array:
    """f64[D]: weights of the ridge that predicts validation labels best, off by the noise of one training run."""
    ridges = np.asarray(design.ridges)
    weights, information = maximum_likelihood(
        np.broadcast_to(train, (len(ridges), *train.shape)), ridge=ridges
    )
    # Covariance noise² · information⁻¹.
    root = np.linalg.cholesky(information)
    normal = rng.standard_normal(weights.shape)
    error = np.linalg.solve(root.swapaxes(1, 2), normal[..., None])[..., 0]
    weights = weights + design.noise * error
    likelihoods = statistics.pair_log_likelihoods(weights @ validation.T).mean(axis=1)
    return weights[likelihoods.argmax()]


def maximum_likelihood(
    differences: Array,
    weights: Array | None = None,
    *,
    ridge: float | Array = 0.0,
    steps: int = 50,
    tolerance: float = 1e-8,
) -> tuple[Array, Array]:
    """Bradley–Terry fits of linear rewards, many at once, by damped Newton steps.

        maximise Σ_i c_i log σ(Δ_i · w) − (Σ_i c_i) ridge/2 |w|²

    Args:
      differences: [B, N, D], features chosen − rejected.
      weights: [B, N], c; None counts every pair once.
      ridge: >= 0, per pair; one, or [B].
      steps: at most.
      tolerance: of the last step.

    Returns:
      Weights f64[B, D] and f64[B, D, D], the information (the Hessian of the negative log-likelihood with its ridge).

    Raises:
      ValueError: a fit did not converge; its maximum is at infinity unless there is a ridge.
    """
    batch, count, width = differences.shape
    c = np.ones((batch, count)) if weights is None else weights
    total = c.sum(1)
    w = np.zeros((batch, width))
    ridge = np.broadcast_to(ridge, batch)[:, None]

    def loss(w: Array) -> Array:
        each = c * np.logaddexp(0, -(differences @ w[..., None])[..., 0])
        return each.sum(1) / total + ridge[:, 0] / 2 * (w**2).sum(1)

    identity = ridge[..., None] * np.eye(width)
    before = loss(w)
    for _ in range(steps):
        wrong = special.expit(-(differences @ w[..., None])[..., 0])
        gradient = (
            -((c * wrong)[:, None] @ differences)[:, 0] / total[:, None] + ridge * w
        )
        curvature = (c * wrong * (1 - wrong))[..., None] * differences
        hessian = (
            curvature.swapaxes(1, 2) @ differences / total[:, None, None] + identity
        )
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        size = np.ones((batch, 1))
        after = loss(w - step)
        while (worse := after > before + 1e-12).any() and size.min() > 1e-6:
            size = np.where(worse[:, None], size / 2, size)
            after = loss(w - size * step)
        w, before = w - size * step, after
        if np.abs(step).max() <= tolerance:
            return w, hessian * total[:, None, None]
    raise ValueError(
        f"no finite maximum of the likelihood within {steps} Newton steps; add a ridge"
    )


OPPONENTS = 4
"""Further samples of the SFT policy that the chosen one must beat."""


def _best_of_n(
    rng: Rng, design: Design, table: Table, learned: dict[str, Array]
) -> dict[str, Array]:
    """Headroom by each scorer and an oracle at all sizes, and the verifier's gap in gold reward."""
    uniform = rng.random((len(table.gold), design.samples + OPPONENTS))
    drawn = _sample(table.ref_logps, uniform)
    rows = np.arange(len(table.gold))[:, None]
    gold, against = np.split(table.gold[rows, drawn], [design.samples], axis=1)
    chosen = drawn[:, : design.samples]
    wins = quantities.winrates(gold, against)
    features = {"verifier": table.seen, "implicit": table.steered}
    scores = {name: (features[name] @ w)[rows, chosen] for name, w in learned.items()}
    gap = quantities.gold_gap(scores["verifier"], gold, gold.max(1), quantile=1 / 8)
    found = {
        name: quantities.headroom(each, wins, design.sizes)
        for name, each in {**scores, "oracle": gold}.items()
    }
    return {**found, "gold_gap": np.array(gap.gap)}


Policies = dict[str, Callable[[Table, float], Array]]


@dataclasses.dataclass(frozen=True)
class _Judged:
    """One completion of every policy for each prompt.

    Attributes:
      gold: (arm, β) -> f64[P].
      start: f64[P], of the SFT policy.
      wins: (arm, β) -> mean winrate over the SFT policy.
      kl: (arm, β) -> nats.
    """

    gold: dict[tuple[str, float], Array]
    start: Array
    wins: dict[tuple[str, float], float]
    kl: dict[tuple[str, float], float]

    @classmethod
    def of(
        cls, rng: Rng, table: Table, arms: Policies, betas: tuple[float, ...]
    ) -> "_Judged":
        rows = np.arange(len(table.gold))
        # The same random numbers for all arms, others for the opponent.
        draws = rng.random((2, len(rows), 1))
        start = table.gold[rows, _sample(table.ref_logps, draws[0])[:, 0]]
        gold, wins, kl = {}, {}, {}
        for name, policy in arms.items():
            for beta in betas:
                logps = policy(table, beta)
                picked = _sample(logps, draws[1])[:, 0]
                gold[name, beta] = table.gold[rows, picked]
                won = statistics.win_scores(gold[name, beta], start)
                wins[name, beta] = float(won.mean())
                each = (np.exp(logps) * (logps - table.ref_logps)).sum(1)
                kl[name, beta] = float(each.mean())
        return cls(gold, start, wins, kl)

    def best(self, arm: str, betas: tuple[float, ...]) -> float:
        """The β that wins most often."""
        return max(betas, key=lambda beta: self.wins[arm, beta])

    def lead(self, best: dict[str, float]) -> float:
        """Winrate of the online arm less that of the offline one, each at its β."""
        online, offline = (self.gold[arm, best[arm]] for arm in ("online", "offline"))
        return float(quantities.lead(online, offline, self.start).mean())

    def matched(self, best: dict[str, float], betas: tuple[float, ...]) -> float | None:
        """The same at the KL of whichever spent less; every β is a point of an arm's frontier."""
        curves: list[list[float]] = []
        for arm in ("online", "offline"):
            curves.append([0.0, *(self.kl[arm, beta] for beta in betas)])
            curves.append([0.5, *(self.wins[arm, beta] for beta in betas)])
        at = min(self.kl[arm, best[arm]] for arm in ("online", "offline"))
        return statistics.matched_kl_difference(*curves, at=at).difference


def _gibbs(ref_logps: Array, rewards: Array, beta: float) -> Array:
    return special.log_softmax(ref_logps + rewards / beta, axis=-1)


def _sample(logps: Array, uniform: Array) -> npt.NDArray[np.intp]:
    """int[P, M]: a completion for each uniform number, of log-probabilities f64[P, A]."""
    upper = np.cumsum(np.exp(logps), axis=1)
    found = (uniform[:, :, None] > upper[:, None, :-1]).sum(-1)
    return np.asarray(found, np.intp)
