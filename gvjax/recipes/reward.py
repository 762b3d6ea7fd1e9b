"""Training the verifier: a reward model on the preference pairs."""

import math

import numpy as np

from gvjax import config, steps
from gvjax.data.ahead import Ahead
from gvjax.recipes import checks, loop, packed
from gvjax.recipes.evaluation import ScorerEvaluation, evaluate_margins
from gvjax.recipes.ground import Ground, cached, make_optimizer
from gvjax.recipes.inputs import Inputs
from gvjax.recipes.pairs import Pairs
from gvjax.recipes.programs import reward_all
from gvjax.recipes.rows import role_key, rows_at
from gvjax.types import Params


def train(
    settings: config.RewardSection, inputs: Inputs, run: loop.Run
) -> loop.Trained:
    """Trains a reward model that starts from the policy's trunk.

    Args:
      settings: how.
      inputs: the pairs, and held-out ones for `early_stop` and the curve.
      run: where it is kept.
    """
    ground, pairs = inputs.ground, inputs.required_pairs()
    batch_of = pairs.batches(ground.pad_id)
    compiled, schedule = program(ground, settings)
    params = ground.init_reward_model(
        role_key(inputs.seed, "reward head"),
        inputs.policy,
        zero_head=settings.zero_head,
    )

    def batch_at(round_: int):
        rows = rows_at(
            inputs.seed, "reward order", len(pairs), settings.batch_size, round_
        )
        return batch_of(rows)

    feed = Ahead(batch_at, stop=settings.steps)
    if settings.packed_length is not None or settings.length_buckets is not None:
        rows = packed.pairs(pairs, ground, settings, inputs.seed, "packed reward pairs")
        feed = Ahead(rows.batch_at, stop=settings.steps)

    def advance(state, round_):
        with run.clock.part("data"):
            batch = ground.put(feed(round_))
        state, metrics = compiled.step(state, batch)
        if round_ == 0 and settings.zero_head and not settings.label_smoothing:
            checks.check_first_loss(float(metrics["loss"]), math.log(2), "reward")
        return state, metrics

    heldout = inputs.heldout

    def evaluate(params, heldout=heldout):
        found = evaluate_reward_model(ground, settings, params, heldout)
        numbers = {
            "log_likelihood": found.log_likelihood,
            "accuracy": found.accuracy,
        }
        if found.gold_accuracy is not None:
            numbers["gold_accuracy"] = found.gold_accuracy
        return numbers

    first = batch_at(0)
    checks.check_same_everywhere(first)
    checks.check_masks(first.chosen)
    for side in (first.chosen, first.rejected):
        checks.check_endings(ground, side)
    checks.check_reward_padding(ground, settings.pooling, params, first.chosen)
    state = compiled.start(params)
    # The state has its own copy; on a full device another one would cost a smaller batch.
    del params
    return loop.train(
        run,
        state,
        advance,
        rounds=settings.steps,
        evaluate=None if heldout is None else evaluate,
        evaluate_every=settings.evaluate_every,
        select="best" if settings.early_stop else "last",
        select_by="log_likelihood",
        shown=("loss", "accuracy"),
        learning_rate=schedule,
        trained_on=compiled.trained_on,
    )


def evaluate_reward_model(
    ground: Ground, settings: config.RewardSection, params: Params, heldout: Pairs
) -> ScorerEvaluation:
    """How well the reward model predicts held-out labels, at its own scale."""
    return evaluate_margins(
        reward_margins(ground, settings, params, heldout),
        heldout.chosen_gold - heldout.rejected_gold,
    )


def reward_margins(
    ground: Ground, settings: config.RewardSection, params: Params, pairs: Pairs
) -> np.ndarray:
    """f32[N]: the reward of chosen less that of rejected."""
    chosen, rejected = pairs.sequences(ground.pad_id)
    return reward_all(ground, settings.pooling, params, chosen) - reward_all(
        ground, settings.pooling, params, rejected
    )


@cached
def program(ground: Ground, settings: config.RewardSection):
    """The compiled step and its learning rate."""
    tx, schedule = make_optimizer(settings.optimizer, settings.steps)
    step = steps.make_reward_step(
        ground.reward_fn(settings.pooling),
        tx,
        label_smoothing=settings.label_smoothing,
        centering=settings.centering,
        num_microbatches=settings.num_microbatches,
    )
    # A reward model is trained whole, whatever the policy is.
    return ground.compiler(lambda _: step, tx), schedule
