"""One battery over every step: a new step, or a new loss in one, gets all of it for one row of the table."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gvjax
from gvjax import losses, masked, steps
from gvjax.steps import core
from gvjax.types import (
    ActorCriticBatch,
    PolicyBatch,
    PreferenceBatch,
    SequenceBatch,
    UnpairedBatch,
)

V, B, T = 7, 8, 9
POISON = 0
"""A token of probability 0: its log-probability is −inf wherever it stands."""


def logps_fn(params, tokens):
    """The smallest model that reads what stands before: logits are a row of a table."""
    logits = params["table"][tokens]
    return gvjax.token_logps(
        jnp.where(jnp.arange(V) == POISON, -jnp.inf, logits), tokens
    )


def packed_logps_fn(params, tokens, segments=None):
    return logps_fn(params, tokens)


def reward_fn(params, tokens, completion_mask):
    return masked.sum(params["scores"][tokens], completion_mask, axis=1)


def values_fn(params, tokens):
    values = jnp.where(tokens == POISON, jnp.inf, params["scores"][tokens])
    return jnp.pad(values[:, :-1], ((0, 0), (1, 0)))


@functools.cache
def sequences(seed):
    """Ragged prompts and completions; row 1 has no completion."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(1, 4, B)
    ends = starts + rng.integers(1, T - 4, B)
    ends[1] = starts[1]
    places = np.arange(T)
    return SequenceBatch(
        tokens=jnp.asarray(rng.integers(1, V, (B, T)), jnp.int32),
        completion_mask=jnp.asarray(
            (places >= starts[:, None]) & (places < ends[:, None])
        ),
    )


def parameters():
    rng = np.random.default_rng(0)
    draw = functools.partial(rng.normal, size=(V, V))
    policy = {"table": jnp.asarray(draw(), jnp.float32)}
    value = {"scores": jnp.asarray(rng.normal(size=V), jnp.float32)}
    return policy, value


POLICY, VALUE = parameters()
REFERENCE = {"table": POLICY["table"] * 0.7 + 0.1}


def rows(seed, low=-1.0, high=1.0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.uniform(low, high, B), jnp.float32)


@functools.cache
def preference_batch():
    pairs = PreferenceBatch(
        sequences(1),
        sequences(2),
        chosen_probability=rows(3, 0.0),
        margin=rows(4),
        weight=rows(5, 0.5, 2.0).at[3].set(0.0),
        chosen_from_reference=rows(6) > 0,
    )
    return gvjax.with_ref_logps(logps_fn, REFERENCE, pairs)


@functools.cache
def coupled_batch():
    """Without row weights, and no row empty: to a loss that couples rows all belong."""
    pairs = preference_batch()
    chosen, rejected = (
        dataclasses.replace(
            part, completion_mask=part.completion_mask.at[1, 4:6].set(True)
        )
        for part in (pairs.chosen, pairs.rejected)
    )
    pairs = dataclasses.replace(pairs, chosen=chosen, rejected=rejected, weight=None)
    return gvjax.with_ref_logps(logps_fn, REFERENCE, pairs)


@functools.cache
def unpaired_batch():
    batch = UnpairedBatch(
        sequences(1),
        jnp.arange(B) % 3 > 0,
        kl_sequences=sequences(2),
        weight=rows(5, 0.5, 2.0).at[3].set(0.0),
    )
    return gvjax.with_ref_logps(logps_fn, REFERENCE, batch)


@functools.cache
def packed_batch():
    whole = sequences(1)
    segments = jnp.where(jnp.arange(T) < 5, 1, 2) + jnp.zeros((B, 1), jnp.int32)
    return dataclasses.replace(whole, segments=segments)


@functools.cache
def policy_gradient_batch():
    batch = sequences(1)
    noise = np.random.default_rng(7).normal(0, 0.3, (2, B, T)).astype(np.float32)
    ready = PolicyBatch(
        batch.tokens,
        batch.completion_mask,
        old_logps=gvjax.completion_logps(logps_fn, POLICY, batch) + noise[0],
        advantages=rows(8)[:, None] + jnp.zeros((B, T)),
    )
    return gvjax.with_ref_logps(logps_fn, REFERENCE, ready)


@functools.cache
def actor_critic_batch():
    policy = policy_gradient_batch()
    values = values_fn(VALUE, policy.tokens)
    noise = np.random.default_rng(9).normal(0, 0.3, (2, B, T)).astype(np.float32)
    return ActorCriticBatch(
        policy, old_values=values + noise[0], returns=values + noise[1]
    )


PAIR_METRICS = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
}
UNPAIRED_METRICS = PAIR_METRICS - {"rewards/accuracies"}
RATIO_METRICS = {
    "sampling/importance_sampling_ratio/mean",
    "sampling/importance_sampling_ratio/min",
    "sampling/importance_sampling_ratio/max",
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
}
POLICY_METRICS = {"policy_loss", "entropy", "kl", *RATIO_METRICS}
CLIP_METRICS = {
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A step, and what the battery must know about it.

    Attributes:
      make: `(tx, num_microbatches=...) -> step`.
      batch: makes its batch.
      params: what it trains.
      metrics: names beside `loss`, `grad_norm` and `skipped`.
      coupled: whether its loss couples rows, and so cannot be cut into micro-batches.
    """

    make: Callable[..., Any]
    batch: Callable[[], Any]
    params: Any
    metrics: set[str]
    coupled: bool = False


def preference(loss, batch=preference_batch, **known):
    make = functools.partial(gvjax.make_preference_step, logps_fn, loss=loss)
    return Case(make, batch, POLICY, PAIR_METRICS, **known)


def unpaired(loss, more=(), **known):
    make = functools.partial(gvjax.make_unpaired_step, logps_fn, loss=loss)
    return Case(make, unpaired_batch, POLICY, UNPAIRED_METRICS | set(more), **known)


def policy_gradient(loss, normaliser, more=(), **known):
    make = functools.partial(
        gvjax.make_policy_gradient_step,
        logps_fn,
        loss=loss,
        normaliser=normaliser,
        kl_coef=0.1,
    )
    metrics = POLICY_METRICS | set(more)
    return Case(make, policy_gradient_batch, POLICY, metrics, **known)


def plain_batch():
    return sequences(1)


def supervised(batch=plain_batch, model=logps_fn, **given):
    make = functools.partial(gvjax.make_supervised_step, model, **given)
    metrics = {"completions/mean_length"}
    return Case(make, batch, POLICY, metrics)


dapo = functools.partial(losses.clipped_policy_loss, epsilon=0.1, epsilon_high=0.28)
CASES = {
    "supervised": supervised(),
    "supervised_packed": supervised(packed_batch, packed_logps_fn),
    "supervised_dft": supervised(loss=losses.dft_loss),
    "reward": Case(
        functools.partial(
            gvjax.make_reward_step, reward_fn, label_smoothing=0.1, centering=0.01
        ),
        preference_batch,
        VALUE,
        {"accuracy", "margin", "mean_reward", "min_reward", "max_reward"},
    ),
    "dpo": Case(
        functools.partial(gvjax.make_dpo_step, logps_fn, label_smoothing=0.1),
        preference_batch,
        POLICY,
        PAIR_METRICS,
    ),
    "ipo": preference(losses.ipo_loss),
    "soft_dpo": preference(losses.soft_dpo_loss),
    "exo": preference(losses.exo_loss),
    "simpo": preference(losses.simpo_loss),
    "orpo": preference(losses.orpo_loss),
    "mpo": preference(losses.mpo_loss),
    "rebel": preference(functools.partial(losses.rebel_loss, eta=1.0)),
    "xpo": preference(functools.partial(losses.xpo_loss, alpha=0.1)),
    "aot": preference(losses.aot_loss, coupled_batch, coupled=True),
    "aot_unpaired": preference(losses.aot_unpaired_loss, coupled_batch, coupled=True),
    "kto": unpaired(losses.kto_loss, {"kl"}),
    "bco": unpaired(functools.partial(losses.bco_unpaired_loss, delta=0.1)),
    "apo_zero_unpaired": unpaired(losses.apo_zero_unpaired_loss),
    "ppo_clip": policy_gradient(
        losses.clipped_policy_loss, losses.per_sequence_mean, CLIP_METRICS
    ),
    "dapo": policy_gradient(dapo, losses.per_token, CLIP_METRICS),
    "dr_grpo": policy_gradient(
        losses.clipped_policy_loss, losses.constant(6), CLIP_METRICS
    ),
    "reinforce": policy_gradient(losses.reinforce_loss, losses.per_sequence_sum),
    "gspo": policy_gradient(losses.gspo_loss, losses.per_sequence_mean, CLIP_METRICS),
    "rloo": policy_gradient(
        losses.sequence_clipped_loss, losses.per_sequence_mean, CLIP_METRICS
    ),
    "cispo": policy_gradient(losses.cispo_loss, losses.per_token),
    "ppo": Case(
        functools.partial(gvjax.make_ppo_step, logps_fn, values_fn),
        actor_critic_batch,
        {"policy": POLICY, "value": VALUE},
        {
            "loss/policy_avg",
            "loss/value_avg",
            "policy/approxkl_avg",
            "policy/clipfrac_avg",
            "policy/entropy_avg",
            "val/clipfrac_avg",
            "val/ratio",
            *RATIO_METRICS,
        },
    ),
}
every_step = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
ONE_OF_EACH = ["supervised", "reward", "dpo", "aot", "kto", "ppo_clip", "ppo"]
every_kind = pytest.mark.parametrize(
    "case", [CASES[name] for name in ONE_OF_EACH], ids=ONE_OF_EACH
)
SGD = optax.sgd(0.5)


@functools.cache
def jitted(make, num_microbatches=1):
    return jax.jit(make(SGD, num_microbatches=num_microbatches))


def run(case, batch=None, *, params=None, num_microbatches=1):
    """(params after one update, metrics), as numpy arrays."""
    state = gvjax.init_train_state(case.params if params is None else params, SGD)
    batch = case.batch() if batch is None else batch
    state, metrics = jitted(case.make, num_microbatches)(state, batch)
    return jax.tree.map(np.asarray, (state.params, metrics))


def assert_same(one, other, tolerance=1e-6):
    for params, same in zip(jax.tree.leaves(one[0]), jax.tree.leaves(other[0])):
        np.testing.assert_allclose(same, params, atol=tolerance, rtol=tolerance)
    for name, value in one[1].items():
        np.testing.assert_allclose(
            other[1][name], value, atol=5e-6, rtol=5e-6, err_msg=name
        )


@every_step
def test_its_metrics_are_finite_and_named_as_they_should_be(case):
    params, metrics = run(case)
    assert set(metrics) == case.metrics | {"loss", "grad_norm", "skipped"}
    for name, value in metrics.items():
        assert value.shape == () and value.dtype == np.float32, name
        assert np.isfinite(value), name
    assert metrics["grad_norm"] > 0
    moved = [
        np.any(new != old)
        for new, old in zip(jax.tree.leaves(params), jax.tree.leaves(case.params))
    ]
    assert all(moved)


@every_step
def test_four_micro_batches_change_nothing(case):
    if case.coupled:
        with pytest.raises(ValueError, match="compares rows with each other"):
            case.make(SGD, num_microbatches=4)
        return
    assert_same(run(case), run(case, num_microbatches=4))


@every_kind
def test_two_micro_batches_change_nothing(case):
    if not case.coupled:
        assert_same(run(case), run(case, num_microbatches=2))


def undivided(objective, params, batch):
    """(loss Mean, gradient of its total), without jit: what micro-batches add up."""

    def total(params):
        loss, _ = objective(params, batch)
        return loss.total, loss

    gradient, loss = jax.grad(total, has_aux=True)(params)
    return loss, gradient


def objectives():
    """Every loss that TRL names and that micro-batches may cut, and XPO: (objective, batch) by name."""
    pairs = {**losses.TRL_NAMES, "xpo": functools.partial(losses.xpo_loss, alpha=0.1)}
    for name, loss in pairs.items():
        # KTO and its kin are in the table above: their reference point belongs to the whole batch.
        if name in ("kto", "apo_zero_unpaired", "bco") or losses.couples_rows(loss):
            continue
        yield name, steps.preference_objective(logps_fn, loss=loss), preference_batch
    for name, (loss, normaliser) in losses.TRL_POLICY_LOSSES.items():
        objective = steps.policy_gradient_objective(
            logps_fn, loss=loss, normaliser=normaliser, kl_coef=0.1
        )
        yield f"policy {name}", objective, policy_gradient_batch


@pytest.mark.parametrize(
    ("objective", "batch"),
    [pytest.param(*parts, id=name) for name, *parts in objectives()],
)
def test_every_loss_of_trl_adds_over_parts_of_a_batch(objective, batch):
    whole = undivided(objective, POLICY, poisoned(batch()))
    assert np.isfinite(whole[0].value) and np.any(np.asarray(whole[1]["table"]) != 0)
    first, second = (
        jax.tree.map(lambda leaf, part=part: leaf[part], core.split(batch(), 2))
        for part in (0, 1)
    )
    parts = [undivided(objective, POLICY, part) for part in (first, second)]
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(added(*parts))):
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=1e-5)


def added(one, other):
    return jax.tree.map(jnp.add, one, other)


@every_step
def test_the_order_of_rows_changes_nothing(case):
    order = np.random.default_rng(0).permutation(B)
    permuted = jax.tree.map(lambda leaf: leaf[order], case.batch())
    assert_same(run(case), run(case, permuted))


@every_step
def test_more_padding_changes_nothing(case):
    def pad(leaf):
        return jnp.pad(leaf, ((0, 0), (0, 3))) if leaf.ndim == 2 else leaf

    assert_same(run(case), run(case, jax.tree.map(pad, case.batch())))


def poisoned(batch):
    """Inf, NaN and impossible tokens wherever a mask or a weight of 0 says that nothing stands."""
    if isinstance(batch, SequenceBatch):
        kept = np.asarray(batch.completion_mask)
        after = np.cumsum(kept[:, ::-1], axis=1)[:, ::-1] == 0
        return dataclasses.replace(batch, tokens=jnp.where(after, POISON, batch.tokens))
    if isinstance(batch, PolicyBatch):
        bad = jnp.where(jnp.arange(T) % 2, jnp.nan, jnp.inf)
        hidden = {
            name: jnp.where(batch.completion_mask, getattr(batch, name), bad)
            for name in ("old_logps", "advantages", "ref_logps")
        }
        tokens = poisoned(SequenceBatch(batch.tokens, batch.completion_mask)).tokens
        return dataclasses.replace(batch, tokens=tokens, **hidden)
    if isinstance(batch, ActorCriticBatch):
        mask = batch.policy.completion_mask
        return ActorCriticBatch(
            poisoned(batch.policy),
            jnp.where(mask, batch.old_values, jnp.nan),
            jnp.where(mask, batch.returns, jnp.inf),
        )
    dead = jnp.zeros(B, bool)
    if batch.weight is not None:
        dead = dead.at[1].set(True) | (batch.weight == 0)
    changes = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, SequenceBatch):
            clean = poisoned(value)
            # A row of weight 0 may hold a completion that cannot be.
            lost = (batch.weight == 0)[:, None] if batch.weight is not None else False
            tokens = jnp.where(
                lost & value.completion_mask & (jnp.arange(T) > 0), POISON, clean.tokens
            )
            changes[field.name] = dataclasses.replace(clean, tokens=tokens)
        elif (
            value is not None and value.dtype == jnp.float32 and field.name != "weight"
        ):
            bad = jnp.where(jnp.arange(B) % 2, jnp.nan, jnp.inf)
            changes[field.name] = jnp.where(dead, bad, value)
    return dataclasses.replace(batch, **changes)


@every_step
def test_nothing_behind_a_mask_or_a_weight_of_0_is_seen(case):
    batch = poisoned(case.batch())
    assert_same(run(case), run(case, batch), tolerance=0)


@every_step
def test_without_jit_it_is_the_same_even_on_numpy_batches(case):
    state = gvjax.init_train_state(case.params, SGD)
    batch = jax.tree.map(np.asarray, case.batch())
    state, metrics = case.make(SGD)(state, batch)
    assert_same(run(case), jax.tree.map(np.asarray, (state.params, metrics)))


@every_kind
def test_bfloat16_params_still_have_float32_losses(case):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), case.params)
    updated, metrics = run(case, params=params)
    widened, same = run(
        case, params=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    )
    for leaf, wide in zip(jax.tree.leaves(updated), jax.tree.leaves(widened)):
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_allclose(leaf.astype(np.float32), wide, atol=0.02, rtol=0.01)
    # Gathered in bfloat16 but computed in float32, so the loss is the same to float32's last digits.
    for name in ("loss", "grad_norm"):
        assert metrics[name].dtype == np.float32
    np.testing.assert_allclose(metrics["loss"], same["loss"], rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(metrics["grad_norm"], same["grad_norm"], rtol=2e-2)


@pytest.mark.parametrize(
    "name", ["supervised", "reward", "dpo", "xpo", "aot", "bco", "dapo", "gspo", "ppo"]
)
def test_its_gradient_is_the_derivative_of_its_loss(name):
    case = CASES[name]
    rng, size = np.random.default_rng(1), 1e-6
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), case.params)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)

    def loss_at(distance):
        moved = jax.tree.map(lambda p, d: p + distance * d, params, direction)
        return run(case, params=moved)[1]["loss"]

    # In float64, so that the step may be too small to cross a clip or a tie.
    with jax.enable_x64(True):
        numeric = (loss_at(size) - loss_at(-size)) / (2 * size)
        updated, _ = run(case, params=params)
    # SGD with learning rate 0.5 moved the params by half the gradient.
    analytic = sum(
        np.sum((old - new) * 2 * d)
        for old, new, d in zip(
            *(jax.tree.leaves(tree) for tree in (params, updated, direction))
        )
    )
    np.testing.assert_allclose(analytic, numeric, rtol=1e-5, atol=1e-7)


def emptied(batch):
    def clear(leaf):
        return jnp.zeros_like(leaf) if leaf.dtype == bool and leaf.ndim == 2 else leaf

    return jax.tree.map(clear, batch)


@every_step
def test_a_batch_without_completions_moves_nothing(case):
    params, metrics = run(case, emptied(case.batch()))
    jax.tree.map(np.testing.assert_array_equal, params, case.params)
    assert metrics["grad_norm"] == 0
    assert np.all(np.isfinite(list(metrics.values())))
    if not case.coupled:
        assert metrics["loss"] == 0


@pytest.mark.parametrize("name", ["supervised", "dpo", "kto", "dapo", "reward", "ppo"])
def test_a_batch_that_does_not_divide_is_refused(name):
    case = CASES[name]
    state = gvjax.init_train_state(case.params, SGD)
    with pytest.raises(ValueError, match=r"batch size 8 .* num_microbatches 3; use 6"):
        case.make(SGD, num_microbatches=3)(state, case.batch())


@every_step
def test_another_kind_of_batch_is_named(case):
    state = gvjax.init_train_state(case.params, SGD)
    right = type(case.batch())
    kinds = (sequences(0), preference_batch())
    wrong = next(each for each in kinds if not isinstance(each, right))
    message = f"is a {type(wrong).__name__}; give a {right.__name__}"
    with pytest.raises(TypeError, match=message):
        case.make(SGD)(state, wrong)


AT_REFERENCE = {
    "dpo": (gvjax.make_dpo_step, preference_batch, math.log(2)),
    "conservative": (
        functools.partial(gvjax.make_dpo_step, label_smoothing=0.3),
        preference_batch,
        math.log(2),
    ),
    "ipo": (
        functools.partial(
            gvjax.make_preference_step, loss=functools.partial(losses.ipo_loss, tau=0.2)
        ),
        preference_batch,
        1 / (4 * 0.2**2),
    ),
    "nca": (
        functools.partial(gvjax.make_preference_step, loss=losses.nca_loss),
        preference_batch,
        2 * math.log(2),
    ),
    "aot": (
        functools.partial(gvjax.make_preference_step, loss=losses.aot_loss),
        coupled_batch,
        math.log(2),
    ),
    "kto": (gvjax.make_unpaired_step, unpaired_batch, 0.5),
    "bco": (
        functools.partial(gvjax.make_unpaired_step, loss=losses.bco_unpaired_loss),
        unpaired_batch,
        math.log(2),
    ),
}


@pytest.mark.parametrize(
    ("make", "batch", "first"), AT_REFERENCE.values(), ids=AT_REFERENCE
)
def test_first_loss_at_the_reference_policy(make, batch, first):
    state = gvjax.init_train_state(REFERENCE, SGD)
    _, metrics = jax.jit(make(logps_fn, SGD))(state, batch())
    np.testing.assert_allclose(metrics["loss"], first, rtol=2e-6)
    np.testing.assert_allclose(metrics["rewards/margins"], 0, atol=1e-6)


def test_first_losses_of_constant_models():
    uniform = {"table": jnp.zeros((V, V))}
    _, metrics = run(CASES["supervised"], params=uniform)
    np.testing.assert_allclose(metrics["loss"], math.log(V - 1), rtol=1e-6)
    pairs = dataclasses.replace(preference_batch(), margin=None)
    _, metrics = run(CASES["reward"], pairs, params={"scores": jnp.zeros(V)})
    np.testing.assert_allclose(metrics["loss"], math.log(2), rtol=1e-6)
    assert metrics["accuracy"] == 0, "a tie is not a win"
