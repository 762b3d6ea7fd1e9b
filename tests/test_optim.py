"""The shared optimizer: schedules at their known points, and AdamW by hand."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gvjax import optim


@pytest.mark.parametrize(
    "schedule, middle, end",
    [("constant", 2.0, 2.0), ("linear", 1.0, 0.0), ("cosine", 1.0, 0.0)],
)
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_rise_to_the_peak_and_fall_as_named(schedule, middle, end, warmup):
    rate = optim.make_schedule(
        2.0, schedule=schedule, steps=warmup + 10, warmup_steps=warmup
    )
    for step in range(warmup):
        np.testing.assert_allclose(rate(step), 2.0 * step / warmup, rtol=1e-6)
    np.testing.assert_allclose(rate(warmup), 2.0, rtol=1e-6)
    np.testing.assert_allclose(rate(warmup + 5), middle, rtol=1e-6)
    np.testing.assert_allclose(rate(warmup + 10), end, atol=1e-7)


def test_cosine_is_not_linear():
    rate = optim.make_schedule(1.0, schedule="cosine", steps=8)
    np.testing.assert_allclose(rate(2), (1 + np.cos(np.pi / 4)) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"learning_rate": 0.0, "steps": 5}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan"), "steps": 5}, "learning_rate is nan"),
        ({"learning_rate": 1.0, "steps": 0}, "steps is 0"),
        ({"learning_rate": 1.0, "steps": 5, "warmup_steps": 5}, "warmup_steps is 5"),
        ({"learning_rate": 1.0, "steps": 5, "warmup_steps": -1}, "warmup_steps is -1"),
        ({"learning_rate": 1.0, "steps": 5, "schedule": "step"}, "'step' is unknown"),
    ],
)
def test_impossible_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        optim.make_schedule(**options)


def adamw_by_hand(gradients, *, rate, b1, b2, eps, decay, clip, start=1.0):
    """Loshchilov and Hutter's Algorithm 2 on one number, the gradient clipped first."""
    x, m, v = start, 0.0, 0.0
    for t, gradient in enumerate(gradients, start=1):
        gradient *= min(1.0, clip / abs(gradient))
        m = b1 * m + (1 - b1) * gradient
        v = b2 * v + (1 - b2) * gradient**2
        step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        x -= rate * (step + decay * x)
    return x


BASE = {"rate": 0.1, "b1": 0.8, "b2": 0.95, "eps": 0.01, "decay": 0.3, "clip": 1.0}


@pytest.mark.parametrize(
    "change",
    [{}, {"b1": 0.1}, {"b2": 0.5}, {"eps": 0.5}, {"decay": 0.0}, {"clip": np.inf}],
    ids=str,
)
def test_adamw_is_adamw_with_the_gradient_clipped_first(change):
    settings = {**BASE, **change}
    gradients = [3.0, -0.5, 0.2]
    tx = optim.make_adamw(
        settings["rate"],
        b1=settings["b1"],
        b2=settings["b2"],
        eps=settings["eps"],
        weight_decay=settings["decay"],
        max_grad_norm=settings["clip"],
    )
    params = jnp.asarray(1.0)
    state = tx.init(params)
    for gradient in gradients:
        updates, state = tx.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, adamw_by_hand(gradients, **settings), rtol=1e-5)
    if change:
        # Every option matters.
        assert abs(params - adamw_by_hand(gradients, **BASE)) > 1e-3


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_clipping_to_nothing_is_refused(clip):
    with pytest.raises(ValueError, match="max_grad_norm is"):
        optim.make_adamw(1.0, max_grad_norm=clip)
