"""Rejection-sampling fine-tuning: SFT on the best of n samples of each training prompt, chosen by the rewards.

All samples come from the starting policy and are drawn once, before the first update: expert iteration with one round.
"""

import functools

import numpy as np

from gvjax import config, steps
from gvjax.recipes import checks, loop
from gvjax.recipes.best_of_n import winners
from gvjax.recipes.ground import Ground, cached, make_optimizer
from gvjax.recipes.inputs import Inputs
from gvjax.recipes.rows import rows_at
from gvjax.types import SequenceBatch


def train(
    settings: config.RejectionSection,
    inputs: Inputs,
    run: loop.Run,
    *,
    select: loop.Select = "last",
) -> loop.Trained:
    """Trains a policy on the winners among its starting point's samples.

    Args:
      settings: how many samples, and how the winners are learned.
      inputs: prompts, starting policy and reward model.
      run: where it is kept.
      select: see `loop.train`.
    """
    ground = inputs.ground
    compiled, schedule = program(ground, settings)
    state = compiled.start(inputs.trained)
    # A function of the seed alone, so that a resumed run learns from the same winners.
    best = winners(
        inputs, settings.rewards, inputs.prompts, n=settings.n, role="rejection"
    )

    def rows_of(round_: int) -> np.ndarray:
        return rows_at(
            inputs.seed,
            "winner order",
            len(inputs.prompts),
            settings.batch_size,
            round_,
        )

    def advance(state, round_):
        rows = rows_of(round_)
        batch = SequenceBatch(best.tokens[rows], best.completion_mask[rows])
        state, metrics = compiled.step(state, ground.put(batch), inputs.base)
        metrics["reward"] = np.mean(best.scored()[rows])
        if round_ == 0:
            sampled = best.logps[rows][batch.completion_mask]
            checks.check_first_loss(
                float(metrics["loss"]),
                float(-np.mean(sampled)),
                "rejection sampling",
                tolerance=checks.TOLERANCE[ground.model.dtype],
            )
        return state, metrics

    rows = rows_of(0)
    checks.check_same_everywhere((best.tokens[rows], best.completion_mask[rows]))
    checks.check_masks(SequenceBatch(best.tokens[rows], best.completion_mask[rows]))
    return loop.train(
        run,
        state,
        advance,
        rounds=settings.steps,
        evaluate=inputs.evaluate,
        evaluate_every=settings.evaluate_every,
        select=select,
        shown=("loss", "reward", "gold", "kl"),
        learning_rate=schedule,
        trained_on=compiled.trained_on,
        policy_of=inputs.policy_of,
    )


@cached
def program(ground: Ground, settings: config.RejectionSection):
    """The compiled step and its learning rate."""
    tx, schedule = make_optimizer(settings.optimizer, settings.steps)
    make_step = functools.partial(
        steps.make_supervised_step, tx=tx, num_microbatches=settings.num_microbatches
    )
    return ground.compiler(make_step, tx), schedule
