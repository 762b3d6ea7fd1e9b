"""Scorers of completions behind one interface, and the training of those that learn: same data, start and budget."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
import optax

from gvjax import config, steps
from gvjax.models.heads import Pooling
from gvjax.recipes import loop
from gvjax.recipes.evaluation import evaluate_margins
from gvjax.recipes.ground import Ground, cached, make_optimizer
from gvjax.recipes.inputs import Inputs
from gvjax.recipes.pairs import Pairs
from gvjax.recipes.programs import reward_all, score_all
from gvjax.recipes.rows import role_key, role_rng, rows_at, sequences
from gvjax.tasks.task import Completions, Prompts, Task
from gvjax.types import Params

Score = Callable[[Prompts, Completions], np.ndarray]
"""`(prompts, completions, a row each) -> f64[N]`, higher is better; its level is free."""

Untrained = Literal["gold", "own log-probability"]
UNTRAINED: tuple[Untrained, ...] = ("gold", "own log-probability")
"""Scorers that learn nothing: the judge itself, and the null verifier that a policy always has."""


def untrained_of(task: Task) -> tuple[Untrained, ...]:
    """Those that a task has: without a gold reward, the policy's own log-probability alone."""
    return UNTRAINED if task.reward_range is not None else UNTRAINED[1:]


DESCRIPTIONS = {
    "global reward model": "reward model whose head reads the completion as a whole",
    "local reward model": "reward model that is a sum of token terms",
    "DPO implicit reward": "log-ratio of a DPO policy and the SFT policy",
    "shuffled reward model": "the verifier trained on shuffled labels: must be worth nothing",
    "frozen features": "a head on the SFT policy's features, which stay as they are",
    "own log-probability": "the SFT policy's own log-probability",
    "gold": "the task's gold reward, as a perfect judge",
}


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Something that says how good a completion is.

    Attributes:
      name: of `DESCRIPTIONS`.
      score: see `Score`.
    """

    name: str
    score: Score

    def margins(self, pairs: Pairs) -> np.ndarray:
        """f64[N]: score of chosen less that of rejected."""
        chosen = self.score(pairs.prompts, pairs.chosen)
        return chosen - self.score(pairs.prompts, pairs.rejected)


class _Gold(Scorer):
    """Of pairs it says what they hold: they have forgotten their rows, by which a dataset's rewards go."""

    def margins(self, pairs: Pairs) -> np.ndarray:
        return pairs.chosen_gold.astype(np.float64) - pairs.rejected_gold


def pooling_of(kind: config.Trainable, section: config.ScorersSection) -> Pooling:
    """What the head of a reward model reads; a probe that is not the verifier reads what the verifier does not."""
    if kind == "local reward model":
        return "sum"
    if kind == "global reward model":
        return "last" if section.pooling == "sum" else section.pooling
    return section.pooling


def trained_scorer(
    kind: config.Trainable,
    section: config.ScorersSection,
    ground: Ground,
    params: Params,
    policy: Params,
) -> Scorer:
    """A scorer from what its training came to.

    Args:
      kind: which.
      section: gives the pooling.
      ground: the network.
      params: of a policy for the implicit reward, else of a reward model.
      policy: the SFT policy, reference of the implicit reward.
    """
    if kind == "DPO implicit reward":
        after, before = log_probability(ground, params), log_probability(ground, policy)
        return Scorer(kind, lambda *rows: after(*rows) - before(*rows))
    pooling = pooling_of(kind, section)

    def score(prompts: Prompts, completions: Completions) -> np.ndarray:
        rows = sequences(prompts, completions, ground.pad_id)
        return np.asarray(reward_all(ground, pooling, params, rows), np.float64)

    return Scorer(kind, score)


def untrained_scorer(
    kind: Untrained, task: Task, ground: Ground, policy: Params
) -> Scorer:
    """The gold reward, or the SFT policy's own log-probability."""
    if kind == "own log-probability":
        return Scorer(kind, log_probability(ground, policy))
    return _Gold(kind, lambda *rows: np.asarray(task.reward(*rows), np.float64))


def log_probability(ground: Ground, policy: Params) -> Score:
    """Summed log-probability of completions under a policy, nats."""

    def score(prompts: Prompts, completions: Completions) -> np.ndarray:
        rows = sequences(prompts, completions, ground.pad_id)
        return np.asarray(score_all(ground, policy, rows), np.float64)

    return score


def train(
    kind: config.Trainable,
    section: config.ScorersSection,
    inputs: Inputs,
    run: loop.Run,
    *,
    learning_rate: float,
) -> loop.Trained:
    """Trains a scorer at one learning rate; keeps the checkpoint with the best likelihood of validation labels.

    The likelihood is taken at the scale that validation pairs like best, for every scorer: no β and no learning rate
    makes a scorer look better or worse by its scale alone.

    Args:
      kind: which.
      section: the budget, the same for all.
      inputs: the training pairs, and held-out ones to choose on.
      run: where it is kept.
      learning_rate: of the grid.
    """
    ground, pairs, heldout = inputs.ground, inputs.required_pairs(), inputs.heldout
    if heldout is None:
        raise ValueError("a scorer is chosen on held-out pairs, and none were given")
    if kind == "shuffled reward model":
        rng = role_rng(inputs.seed, "shuffled labels")
        pairs = pairs.swapped(rng.random(len(pairs)) < 0.5)
        # Chosen on true labels, the luckiest of its checkpoints would be worth something.
        heldout = heldout.swapped(rng.random(len(heldout)) < 0.5)
    batch_of = pairs.batches(ground.pad_id)
    compiled, schedule = _program(
        ground, kind, section.beta, pooling_of(kind, section), section.steps, learning_rate
    )  # fmt: skip
    start = inputs.policy
    if kind != "DPO implicit reward":
        key = role_key(inputs.seed, "reward head")
        start = ground.init_reward_model(key, inputs.policy, zero_head=True)

    def advance(state, round_):
        rows = rows_at(
            inputs.seed, "scorer order", len(pairs), section.batch_size, round_
        )
        return compiled.step(state, ground.put(batch_of(rows)))

    def evaluate(params):
        scorer = trained_scorer(kind, section, ground, params, inputs.policy)
        margins = scorer.margins(heldout)
        found = evaluate_margins(margins, margins, fit_scale=True)
        return {"log_likelihood": found.log_likelihood, "accuracy": found.accuracy}

    return loop.train(
        run,
        compiled.start(start),
        advance,
        rounds=section.steps,
        evaluate=evaluate,
        evaluate_every=section.evaluate_every,
        select="best",
        select_by="log_likelihood",
        shown=("loss", "log_likelihood"),
        learning_rate=schedule,
        trained_on=compiled.trained_on,
    )


@cached
def _program(
    ground: Ground,
    kind: config.Trainable,
    beta: float,
    pooling: Pooling,
    updates: int,
    learning_rate: float,
):
    tx, schedule = make_optimizer(
        config.OptimizerSection(learning_rate=learning_rate), updates
    )
    if kind == "DPO implicit reward":
        make_step = functools.partial(steps.make_dpo_step, tx=tx, beta=beta)
        return ground.compiler(make_step, tx), schedule
    if kind == "frozen features":
        tx = optax.multi_transform(
            {"head": tx, "trunk": optax.set_to_zero()}, _part_of_reward_model
        )
    step = steps.make_reward_step(ground.reward_fn(pooling), tx)
    return ground.compiler(lambda _: step, tx), schedule


def _part_of_reward_model(params: Params) -> Params:
    """`head` or `trunk` for every array."""
    return {
        part: jax.tree.map(lambda _, part=part: part, params[part]) for part in params
    }
