"""Learning a reward model: the verifier of the online road."""

import functools

import jax
import jax.numpy as jnp
import optax

from gvjax.losses.contract import require_smoothing
from gvjax.losses.reward import bradley_terry_loss, centering_penalty
from gvjax.masked import Max, Min, at_least_float32
from gvjax.steps.core import make_train_step
from gvjax.steps.sequences import (
    check_floats,
    check_sequences,
    interleave,
    row_mean,
    row_weights,
)
from gvjax.types import Objective, Params, PreferenceBatch, RewardFn, Step


def paired_rewards(
    reward_fn: RewardFn, params: Params, batch: PreferenceBatch
) -> tuple[jax.Array, jax.Array]:
    """(chosen f32[B], rejected f32[B]): rewards of both completions of every pair, in one forward pass."""
    check_sequences(chosen=batch.chosen, rejected=batch.rejected)
    both = interleave(batch.chosen, batch.rejected)
    if both.segments is not None:
        raise ValueError(
            "these pairs are packed (they have `segments`); a reward belongs to one completion a row"
        )
    rewards = reward_fn(params, both.tokens, both.completion_mask)
    if rewards.shape != both.tokens.shape[:1]:
        raise ValueError(
            f"the reward function returned shape {rewards.shape} for {both.tokens.shape[0]} completions; return one"
            " number a completion"
        )
    chosen, rejected = at_least_float32(rewards).reshape(-1, 2).T
    return chosen, rejected


def reward_objective(
    reward_fn: RewardFn,
    *,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
) -> Objective:
    """The Bradley–Terry loss over pairs, with TRL's metrics; see `losses.reward.bradley_terry_loss`.

    Pairs of which a completion is empty weigh nothing.

    Args:
      reward_fn: the model.
      label_smoothing: in [0, 0.5), share of labels taken to be flipped.
      centering: >= 0, weight of the squared sum of both rewards, which pins their otherwise free level at 0.

    Returns:
      `(params, PreferenceBatch) -> (Mean over pairs, metrics)`.

    Raises:
      ValueError: if centering is negative, or label_smoothing outside [0, 0.5).
    """
    require_smoothing(label_smoothing)
    if centering < 0:
        raise ValueError(
            f"centering is {centering}; it must not be negative, and 0 switches it off"
        )

    def objective(params: Params, batch: PreferenceBatch):
        chosen, rejected = paired_rewards(reward_fn, params, batch)
        filled = jnp.any(batch.chosen.completion_mask, axis=1) & jnp.any(
            batch.rejected.completion_mask, axis=1
        )
        weight = row_weights(batch.weight, filled)
        kept = weight > 0
        check_floats(
            chosen, margin=batch.margin, chosen_probability=batch.chosen_probability
        )
        # Before the loss and not after it: the gradient of what a row of weight 0 holds may be NaN, and stops here.
        chosen, rejected = (jnp.where(kept, x, 0.0) for x in (chosen, rejected))
        losses = bradley_terry_loss(
            chosen,
            rejected,
            margin=batch.margin,
            chosen_probability=batch.chosen_probability,
            label_smoothing=label_smoothing,
        )
        if centering:
            losses = losses + centering * centering_penalty(chosen, rejected)
        mean = functools.partial(row_mean, weight=weight)
        lower = jnp.where(kept, jnp.minimum(chosen, rejected), jnp.inf)
        upper = jnp.where(kept, jnp.maximum(chosen, rejected), -jnp.inf)
        metrics = {
            "accuracy": mean((chosen > rejected) * 1.0),
            "margin": mean(chosen - rejected),
            "mean_reward": mean((chosen + rejected) / 2),
            "min_reward": Min(jnp.min(lower)),
            "max_reward": Max(jnp.max(upper)),
        }
        return mean(losses), metrics

    return objective


def make_reward_step(
    reward_fn: RewardFn,
    tx: optax.GradientTransformation,
    *,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
    num_microbatches: int = 1,
) -> Step:
    """Builds the reward-model step, `(state, PreferenceBatch) -> (state, metrics)`.

    Args:
      reward_fn: the model.
      tx: optax transform.
      label_smoothing, centering: see `reward_objective`.
      num_microbatches: see `make_train_step`.
    """
    objective = reward_objective(
        reward_fn, label_smoothing=label_smoothing, centering=centering
    )
    return make_train_step(objective, tx, num_microbatches=num_microbatches)
