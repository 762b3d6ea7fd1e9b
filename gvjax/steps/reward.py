"""Learning a reward model: the verifier of the online road."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from gvjax.losses.contract import require_smoothing
from gvjax.losses.reward import bradley_terry_loss, centering_penalty
from gvjax.masked import Max, Min, at_least_float32
from gvjax.steps.core import make_train_step
from gvjax.steps.sequences import (
    by_pair,
    check_floats,
    check_kind,
    check_sequences,
    flat,
    interleave,
    pairs_per_row,
    row_mean,
    row_weights,
    sums_by_pair,
)
from gvjax.types import Objective, Params, PreferenceBatch, RewardFn, Step


def paired_rewards(
    reward_fn: RewardFn, params: Params, batch: PreferenceBatch
) -> tuple[jax.Array, jax.Array]:
    """(chosen f32[B], rejected f32[B]): rewards of both completions of every pair, in one forward pass.

    Packed pairs need a reward function that also takes `segments` and `num_segments`, and returns f32[B, S].
    """
    check_sequences(chosen=batch.chosen, rejected=batch.rejected)
    both = interleave(batch.chosen, batch.rejected)
    shape = both.tokens.shape[:1]
    if both.segments is None:
        rewards = reward_fn(params, both.tokens, both.completion_mask)
    else:
        count = pairs_per_row(batch)
        shape = (*shape, count)
        packed: Callable[..., jax.Array] = reward_fn
        rewards = packed(
            params,
            both.tokens,
            both.completion_mask,
            segments=both.segments,
            num_segments=count,
        )
    if rewards.shape != shape:
        raise ValueError(
            f"the reward function returned shape {rewards.shape} for completions of shape {shape}; return one number a"
            " completion"
        )
    return by_pair(batch, at_least_float32(rewards))


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
        check_kind(PreferenceBatch, batch=batch)
        chosen, rejected = paired_rewards(reward_fn, params, batch)
        both = interleave(batch.chosen, batch.rejected)
        sizes = sums_by_pair(batch, both.completion_mask * 1.0)
        weight = row_weights(flat(batch.weight), (sizes[0] > 0) & (sizes[1] > 0))
        kept = weight > 0
        margin, probability = flat(batch.margin), flat(batch.chosen_probability)
        check_floats(chosen, margin=margin, chosen_probability=probability)
        # Before the loss and not after it: the gradient of what a row of weight 0 holds may be NaN, and stops here.
        chosen, rejected = (jnp.where(kept, x, 0.0) for x in (chosen, rejected))
        losses = bradley_terry_loss(
            chosen,
            rejected,
            margin=margin,
            chosen_probability=probability,
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
