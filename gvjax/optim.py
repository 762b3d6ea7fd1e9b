"""The optimizer family both roads share: AdamW with a named schedule, warm-up and clipping."""

from typing import Literal

import optax

Schedule = Literal["constant", "linear", "cosine"]


def make_schedule(
    learning_rate: float,
    *,
    schedule: Schedule = "constant",
    steps: int,
    warmup_steps: int = 0,
) -> optax.Schedule:
    """The learning rate of every step: a linear rise from 0, then constant, or a fall to 0.

    Args:
      learning_rate: > 0, the peak.
      schedule: what follows the warm-up: "constant", or "linear" or "cosine" decay to 0 at `steps`.
      steps: > 0, updates in the whole run.
      warmup_steps: in [0, steps), updates of the linear rise; the first update after 0 of them has the peak.

    Raises:
      ValueError: a number outside its range, or an unknown schedule.
    """
    if not learning_rate > 0:
        raise ValueError(f"learning_rate is {learning_rate}; it must be positive")
    if steps < 1:
        raise ValueError(f"steps is {steps}; train for at least one step")
    if not 0 <= warmup_steps < steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps}; it must be at least 0 and less than steps, {steps}"
        )
    remaining = steps - warmup_steps
    after: dict[str, optax.Schedule] = {
        "constant": optax.constant_schedule(learning_rate),
        "linear": optax.linear_schedule(learning_rate, 0.0, remaining),
        "cosine": optax.cosine_decay_schedule(learning_rate, remaining),
    }
    if schedule not in after:
        raise ValueError(
            f"schedule {schedule!r} is unknown; use one of {', '.join(after)}"
        )
    if not warmup_steps:
        return after[schedule]
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, after[schedule]], [warmup_steps])


def make_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW with the gradient clipped by its global norm first.

    Args:
      learning_rate: a number or an optax schedule.
      b1, b2: in [0, 1), decay rates of the two moments.
      eps: > 0.
      weight_decay: >= 0, decoupled.
      max_grad_norm: > 0; infinity turns clipping off.

    Raises:
      ValueError: max_grad_norm is not positive.

    References:
      Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101.
    """
    if not max_grad_norm > 0:
        raise ValueError(
            f"max_grad_norm is {max_grad_norm}; it must be positive (.inf turns clipping off)"
        )
    adamw = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    if max_grad_norm == float("inf"):
        return adamw
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), adamw)
