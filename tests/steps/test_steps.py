"""What is particular to single steps: donation, ratios, swapped pairs, and what they refuse."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import gvjax
from gvjax import losses, steps
from gvjax.types import (
    ActorCriticBatch,
    PolicyBatch,
    PreferenceBatch,
    SequenceBatch,
    UnpairedBatch,
)

V = 5
TABLE = {"table": jnp.asarray(np.random.default_rng(0).normal(size=(V, V)), "float32")}
SGD = optax.sgd(0.1)


@gvjax.logps_from_logits
def logps_fn(params, tokens):
    return params["table"][tokens]


def values_fn(params, tokens):
    return params["scores"][tokens]


def reward_fn(params, tokens, completion_mask):
    return gvjax.masked.sum(params["table"][tokens, 0], completion_mask, axis=1)


FIRST = SequenceBatch(
    jnp.array([[1, 2, 3, 4], [2, 2, 1, 0]]),
    jnp.array([[0, 1, 1, 1], [0, 0, 1, 0]], bool),
)
SECOND = SequenceBatch(
    jnp.array([[1, 4, 4, 0], [2, 2, 3, 1]]),
    jnp.array([[0, 1, 1, 0], [0, 0, 1, 1]], bool),
)
PAIRS = PreferenceBatch(
    FIRST,
    SECOND,
    ref_chosen_logps=jnp.array([-3.0, -1.0]),
    ref_rejected_logps=jnp.array([-2.0, -2.5]),
)
ROLLOUTS = PolicyBatch(
    FIRST.tokens,
    FIRST.completion_mask,
    old_logps=gvjax.completion_logps(logps_fn, TABLE, FIRST),
    advantages=jnp.array([[1.0], [-2.0]]) + jnp.zeros((2, 4)),
)


def first_metrics(step, batch, params=TABLE):
    return jax.jit(step)(gvjax.init_train_state(params, SGD), batch)[1]


def keeps_params():
    """An optimizer whose state is the parameters it was given, as averages of them are."""
    return optax.GradientTransformation(
        init=lambda params: params,
        update=lambda updates, state, params: (
            jax.tree.map(lambda u: -0.1 * u, updates),
            state,
        ),
    )


def test_a_donated_state_takes_nothing_from_the_caller():
    params = {"table": TABLE["table"] + 0.0}
    state = gvjax.init_train_state(params, keeps_params())
    step = gvjax.make_dpo_step(logps_fn, keeps_params())
    updated, _ = jax.jit(step, donate_argnums=0)(state, PAIRS)
    assert state.params["table"].is_deleted(), "or this test shows nothing"
    np.testing.assert_array_equal(params["table"], TABLE["table"])
    assert np.any(np.asarray(updated.params["table"]) != TABLE["table"])
    assert updated.step == 1


def test_parameters_given_away_are_held_once():
    params = {"table": TABLE["table"] + 0.0}
    state = gvjax.init_train_state(params, keeps_params(), copy=False)
    assert state.params["table"] is params["table"]
    step = gvjax.make_dpo_step(logps_fn, keeps_params())
    updated, _ = jax.jit(step, donate_argnums=0)(state, PAIRS)
    assert params["table"].is_deleted()
    np.testing.assert_array_equal(updated.opt_state["table"], TABLE["table"])


def test_a_swapped_pair_turns_the_margin_around():
    step = gvjax.make_dpo_step(logps_fn, SGD, beta=0.5)
    swapped = PreferenceBatch(
        SECOND, FIRST, PAIRS.ref_rejected_logps, PAIRS.ref_chosen_logps
    )
    one, other = first_metrics(step, PAIRS), first_metrics(step, swapped)
    np.testing.assert_allclose(other["rewards/margins"], -one["rewards/margins"])
    np.testing.assert_allclose(other["rewards/chosen"], one["rewards/rejected"])
    np.testing.assert_allclose(
        other["rewards/accuracies"], 1 - one["rewards/accuracies"]
    )
    assert one["rewards/margins"] != 0


def test_beta_of_a_partial_scales_the_rewards_too():
    step = functools.partial(gvjax.make_preference_step, logps_fn, SGD)
    bound = step(loss=functools.partial(losses.hinge_loss, beta=0.5))
    given = step(loss=losses.hinge_loss, beta=0.5)
    for name, value in first_metrics(bound, PAIRS).items():
        np.testing.assert_allclose(first_metrics(given, PAIRS)[name], value)


@pytest.mark.parametrize(
    ("loss", "beta"),
    [
        (losses.weighted_sum((1.0, losses.dpo_loss), (0.5, losses.nll_loss)), 0.1),
        (
            losses.weighted_sum(
                (0.5, losses.nll_loss),
                (1.0, functools.partial(losses.nca_loss, beta=0.3)),
                (1.0, losses.dpo_loss),
            ),
            0.3,
        ),
        (losses.reference_free(functools.partial(losses.dpo_loss, beta=0.7)), 0.7),
        (functools.partial(losses.TRL_NAMES["cpo_hinge"]), 0.1),
        (losses.TRL_NAMES["mpo"], 0.1),
        # τ is no β.
        (losses.TRL_NAMES["cpo_ipo"], 1.0),
    ],
)
def test_beta_of_a_composed_loss_is_that_of_its_first_part_with_one(loss, beta):
    step = functools.partial(gvjax.make_preference_step, logps_fn, SGD, loss=loss)
    own, given = first_metrics(step(), PAIRS), first_metrics(step(beta=beta), PAIRS)
    for name, value in own.items():
        np.testing.assert_allclose(given[name], value, err_msg=name)


def test_at_learning_rate_0_every_ratio_stays_1():
    still = optax.sgd(0.0)
    step = jax.jit(gvjax.make_policy_gradient_step(logps_fn, still))
    state = gvjax.init_train_state(TABLE, still)
    for _ in range(2):
        state, metrics = step(state, ROLLOUTS)
        for name in ("mean", "min", "max"):
            ratio = metrics[f"sampling/importance_sampling_ratio/{name}"]
            np.testing.assert_allclose(ratio, 1, rtol=1e-6)
        assert metrics["clip_ratio/region_mean"] == 0
        # Four tokens, three of advantage 1 and one of −2.
        np.testing.assert_allclose(metrics["loss"], -(3 * 1 - 2) / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "low", "high"),
    [
        # Row 0 (A = 1) has log-ratios 0.5, 0.1, 0; row 1 (A = −2) has −0.5.
        (functools.partial(losses.clipped_policy_loss, epsilon=0.3), 1 / 4, 1 / 4),
        (functools.partial(losses.clipped_policy_loss, epsilon=0.9), 0, 0),
        (functools.partial(losses.gspo_loss, epsilon=0.3, epsilon_high=0.3), 1 / 4, 0),
        (
            functools.partial(losses.gspo_loss, epsilon=0.3, epsilon_high=0.2),
            1 / 4,
            3 / 4,
        ),
        (
            functools.partial(losses.sequence_clipped_loss, epsilon=0.3),
            1 / 4,
            3 / 4,
        ),
    ],
)
def test_clip_ratios_are_those_of_the_ratio_that_the_loss_clips(loss, low, high):
    moved = jnp.array([[0, 0.5, 0.1, 0], [0, 0, -0.5, 0]])
    batch = dataclasses.replace(ROLLOUTS, old_logps=ROLLOUTS.old_logps - moved)
    metrics = first_metrics(
        gvjax.make_policy_gradient_step(logps_fn, SGD, loss=loss), batch
    )
    np.testing.assert_allclose(metrics["clip_ratio/low_mean"], low, rtol=1e-6)
    np.testing.assert_allclose(metrics["clip_ratio/high_mean"], high, rtol=1e-6)


def unpaired(**given):
    batch = UnpairedBatch(FIRST, jnp.array([True, False]), kl_sequences=SECOND, **given)
    return gvjax.with_ref_logps(logps_fn, {"table": jnp.zeros((V, V))}, batch)


def test_kto_by_hand():
    batch = unpaired()
    metrics = first_metrics(gvjax.make_unpaired_step(logps_fn, SGD, beta=0.5), batch)
    ratios = gvjax.summed_logps(logps_fn, TABLE, FIRST) - batch.ref_logps
    moved = gvjax.summed_logps(logps_fn, TABLE, SECOND) - batch.ref_kl_logps
    kl = max(0.0, float(np.mean(moved)))
    expected = np.mean(
        1 - 1 / (1 + np.exp(-0.5 * np.array([ratios[0] - kl, kl - ratios[1]])))
    )
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/chosen"], 0.5 * ratios[0], rtol=1e-6)
    np.testing.assert_allclose(
        metrics["rewards/margins"], 0.5 * (ratios[0] - ratios[1]), rtol=1e-6
    )


@pytest.mark.parametrize("kept", [0, 1])
def test_rows_of_weight_0_do_not_move_ktos_reference_point(kept):
    weight = jnp.zeros(2).at[kept].set(3.0)
    policy = {"table": TABLE["table"] * jnp.array([1, -1, 1, 1, 2.0])[:, None]}
    batch = unpaired(weight=weight)
    moved = gvjax.summed_logps(logps_fn, policy, SECOND) - batch.ref_kl_logps
    metrics = first_metrics(gvjax.make_unpaired_step(logps_fn, SGD), batch, policy)
    np.testing.assert_allclose(metrics["kl"], max(0, moved[kept]), rtol=1e-5)


def test_a_packed_row_counts_every_completion_it_holds():
    packed = SequenceBatch(
        jnp.array([[1, 2, 3, 1, 2, 2]]),
        jnp.array([[0, 1, 1, 0, 1, 0]], bool),
        segments=jnp.array([[1, 1, 1, 2, 2, 0]]),
    )

    def packed_logps_fn(params, tokens, segments=None):
        return logps_fn(params, tokens)

    metrics = first_metrics(gvjax.make_supervised_step(packed_logps_fn, SGD), packed)
    np.testing.assert_allclose(metrics["completions/mean_length"], 3 / 2)


REFUSED = {
    "float tokens": (
        gvjax.make_supervised_step(logps_fn, SGD),
        dataclasses.replace(FIRST, tokens=FIRST.tokens * 1.0),
        AssertionError,
        "batch.tokens",
    ),
    "int mask": (
        gvjax.make_dpo_step(logps_fn, SGD),
        dataclasses.replace(
            PAIRS, chosen=SequenceBatch(FIRST.tokens, FIRST.completion_mask * 1)
        ),
        AssertionError,
        "chosen.completion_mask",
    ),
    "short mask": (
        gvjax.make_supervised_step(logps_fn, SGD),
        SequenceBatch(FIRST.tokens, FIRST.completion_mask[:, 1:]),
        AssertionError,
        "batch.completion_mask",
    ),
    "one row": (
        gvjax.make_supervised_step(logps_fn, SGD),
        SequenceBatch(FIRST.tokens[0], FIRST.completion_mask[0]),
        AssertionError,
        "batch.tokens",
    ),
    "unequal pairs": (
        gvjax.make_dpo_step(logps_fn, SGD),
        dataclasses.replace(PAIRS, rejected=jax.tree.map(lambda x: x[:1], SECOND)),
        ValueError,
        "2 rows cannot be paired with 1",
    ),
    "reference a token": (
        gvjax.make_dpo_step(logps_fn, SGD),
        dataclasses.replace(PAIRS, ref_chosen_logps=jnp.zeros((2, 4))),
        AssertionError,
        "ref_chosen_logps",
    ),
    "no reference": (
        gvjax.make_dpo_step(logps_fn, SGD),
        PreferenceBatch(FIRST, SECOND),
        ValueError,
        "ref_chosen_logps, ref_rejected_logps, which the batch lacks; `with_ref_logps`",
    ),
    "no origin for XPO": (
        gvjax.make_preference_step(logps_fn, SGD, loss=losses.xpo_loss),
        PAIRS,
        ValueError,
        "asks for chosen_from_reference",
    ),
    "weighted AOT": (
        gvjax.make_preference_step(logps_fn, SGD, loss=losses.aot_loss),
        dataclasses.replace(PAIRS, weight=jnp.ones(2)),
        ValueError,
        "aot_loss compares rows with each other",
    ),
    "reduced loss": (
        gvjax.make_preference_step(
            logps_fn, SGD, loss=lambda chosen_logps: chosen_logps.mean()
        ),
        PAIRS,
        ValueError,
        "one loss a row",
    ),
    "logits for log-probabilities": (
        gvjax.make_supervised_step(lambda params, tokens: params["table"][tokens], SGD),
        FIRST,
        ValueError,
        "logps_from_logits",
    ),
    "packed pairs": (
        gvjax.make_dpo_step(logps_fn, SGD),
        dataclasses.replace(
            PAIRS,
            chosen=dataclasses.replace(FIRST, segments=jnp.ones((2, 4), int)),
            rejected=dataclasses.replace(SECOND, segments=jnp.ones((2, 4), int)),
        ),
        ValueError,
        "packed",
    ),
    "integer margin": (
        gvjax.make_reward_step(reward_fn, SGD),
        dataclasses.replace(PAIRS, margin=jnp.array([1, 2])),
        AssertionError,
        "margin",
    ),
    "token rewards": (
        gvjax.make_reward_step(lambda params, tokens, mask: mask * 1.0, SGD),
        PAIRS,
        ValueError,
        "one number a completion",
    ),
    "KTO without other completions": (
        gvjax.make_unpaired_step(logps_fn, SGD),
        UnpairedBatch(FIRST, jnp.array([True, False]), ref_logps=jnp.zeros(2)),
        ValueError,
        "kl_sequences",
    ),
    "integer desirable": (
        gvjax.make_unpaired_step(logps_fn, SGD, loss=losses.apo_zero_unpaired_loss),
        UnpairedBatch(FIRST, jnp.array([1, 0]), ref_logps=jnp.zeros(2)),
        AssertionError,
        "desirable",
    ),
    "one advantage a row": (
        gvjax.make_policy_gradient_step(logps_fn, SGD),
        dataclasses.replace(ROLLOUTS, advantages=jnp.ones(2)),
        AssertionError,
        "advantages",
    ),
    "KL without a reference": (
        gvjax.make_policy_gradient_step(logps_fn, SGD, kl_coef=0.1),
        ROLLOUTS,
        ValueError,
        "no ref_logps",
    ),
    "values of states only": (
        gvjax.make_ppo_step(
            lambda params, tokens: logps_fn(TABLE, tokens), values_fn, SGD
        ),
        ActorCriticBatch(ROLLOUTS, jnp.zeros((2, 3)), jnp.zeros((2, 4))),
        AssertionError,
        "old_values",
    ),
}


@pytest.mark.parametrize(
    ("step", "batch", "error", "text"), REFUSED.values(), ids=REFUSED
)
def test_bad_batches_are_refused_by_name(step, batch, error, text):
    params = {"policy": TABLE, "value": {"scores": jnp.zeros(V)}, **TABLE}
    with pytest.raises(error, match=text):
        first_metrics(step, batch, params)


def build(make, **settings):
    return functools.partial(make, logps_fn, SGD, **settings)


def preference(loss, **bound):
    return build(gvjax.make_preference_step, loss=functools.partial(loss, **bound))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (build(gvjax.make_dpo_step, beta=0.0), "beta is 0.0"),
        (build(gvjax.make_dpo_step, num_microbatches=0), "num_microbatches is 0"),
        (build(gvjax.make_unpaired_step, beta=-1), "beta is -1"),
        (build(gvjax.make_policy_gradient_step, kl_coef=-0.1), "kl_coef is -0.1"),
        (
            build(gvjax.make_preference_step, loss=lambda logprobs: logprobs),
            "requires 'logprobs'",
        ),
        (
            functools.partial(gvjax.make_reward_step, reward_fn, SGD, centering=-1),
            "centering is -1",
        ),
        (
            functools.partial(
                gvjax.make_ppo_step, logps_fn, values_fn, SGD, value_coef=-1
            ),
            "value_coef is -1",
        ),
        (
            functools.partial(
                gvjax.make_ppo_step, logps_fn, values_fn, SGD, value_epsilon=0
            ),
            "value_epsilon is 0",
        ),
        (
            functools.partial(
                gvjax.make_reward_step, reward_fn, SGD, label_smoothing=0.5
            ),
            "label_smoothing is 0.5",
        ),
        (build(gvjax.make_dpo_step, label_smoothing=0.7), "label_smoothing is 0.7"),
        # Bound to the loss beforehand.
        (preference(losses.dpo_loss, beta=0), "beta is 0"),
        (preference(losses.ipo_loss, tau=-1), "tau is -1"),
        (preference(losses.xpo_loss, alpha=-1), "alpha is -1"),
        (preference(losses.aot_loss, label_smoothing=0.5), "label_smoothing is 0.5"),
        (
            build(
                gvjax.make_unpaired_step,
                loss=functools.partial(losses.kto_loss, undesirable_weight=-1),
            ),
            "undesirable_weight is -1",
        ),
        (
            build(
                gvjax.make_policy_gradient_step,
                loss=functools.partial(losses.clipped_policy_loss, epsilon=-1),
            ),
            "epsilon is -1",
        ),
    ],
)
def test_bad_settings_are_refused_when_the_step_is_built(make, text):
    with pytest.raises(ValueError, match=text):
        make()


ROWS, TOKENS, KEPT = jnp.ones(2), jnp.ones((2, 4)), jnp.ones((2, 4), bool)
SAMPLED = gvjax.Rollouts(FIRST.tokens, FIRST.completion_mask, TOKENS)
WRONG = {
    "a row short": (lambda: gvjax.policy_batch(SAMPLED, jnp.ones(3)), "advantages"),
    "integers": (lambda: gvjax.policy_batch(SAMPLED, jnp.array([1, 2])), "advantages"),
    "summed reference": (
        lambda: gvjax.policy_batch(SAMPLED, ROWS, ref_logps=ROWS),
        "ref_logps",
    ),
    "a column of rewards": (
        lambda: steps.penalised_rewards(
            ROWS[:, None], TOKENS, TOKENS, KEPT, kl_coef=0.1
        ),
        "rewards",
    ),
    "one column more": (
        lambda: steps.penalised_rewards(
            ROWS, TOKENS, jnp.ones((2, 5)), KEPT, kl_coef=0.1
        ),
        "ref_logps",
    ),
    "rewards of another batch": (
        lambda: steps.token_rewards(jnp.ones(1), TOKENS, TOKENS, KEPT, kl_coef=0.1),
        "rewards",
    ),
    "a mask of numbers": (
        lambda: steps.token_rewards(ROWS, TOKENS, TOKENS, TOKENS, kl_coef=0.1),
        "mask",
    ),
    "integer rewards": (
        lambda: gvjax.advantages.leave_one_out(jnp.array([1, 2]), 2),
        "rewards",
    ),
    "values of one token less": (
        lambda: gvjax.advantages.gae(TOKENS, TOKENS[:, 1:], KEPT),
        "values",
    ),
    "logits of the last token": (
        lambda: gvjax.token_logps(TOKENS, FIRST.tokens),
        "logits",
    ),
    "tokens as floats": (
        lambda: gvjax.token_logps(jnp.ones((2, 4, V)), TOKENS),
        "tokens",
    ),
    "states of another length": (
        lambda: gvjax.chunked_token_logps(
            jnp.ones((2, 2, 3)), jnp.ones((3, V)), FIRST.tokens
        ),
        "hidden and tokens",
    ),
    "a reference of other rows": (lambda: gvjax.kl_k1(TOKENS, ROWS), "ref_logps"),
}


@pytest.mark.parametrize(("call", "name"), WRONG.values(), ids=WRONG)
def test_wrong_arrays_are_named(call, name):
    with pytest.raises(AssertionError, match=rf"arguments? .*{name}"):
        call()


def test_the_samplers_log_probabilities_are_the_old_ones():
    """Nothing scores the samples again."""
    assert gvjax.policy_batch(SAMPLED, ROWS).old_logps is SAMPLED.logps


def test_impossible_weights_of_the_kl_are_refused():
    for rewards_of in (steps.penalised_rewards, steps.token_rewards):
        with pytest.raises(ValueError, match="kl_coef is -1"):
            rewards_of(ROWS, TOKENS, TOKENS, KEPT, kl_coef=-1)


def test_an_objective_must_leave_its_mean_undivided():
    step = gvjax.make_train_step(lambda params, batch: (jnp.zeros(()), {}), SGD)
    with pytest.raises(ValueError, match=r"return \(Mean"):
        first_metrics(step, FIRST)


def test_arrays_that_differ_in_rows_are_not_cut():
    step = gvjax.make_dpo_step(logps_fn, SGD, num_microbatches=2)
    batch = dataclasses.replace(PAIRS, ref_chosen_logps=jnp.zeros(4))
    with pytest.raises(ValueError, match=r"ref_chosen_logps \(4,\)"):
        first_metrics(step, batch)


def test_a_loss_of_two_terms_weighs_the_second():
    step = gvjax.make_ppo_step(logps_fn, values_fn, SGD, value_coef=0.3)
    params = {"policy": TABLE, "value": {"scores": jnp.arange(V) * 1.0}}
    batch = ActorCriticBatch(ROLLOUTS, jnp.zeros((2, 4)), jnp.ones((2, 4)))
    metrics = first_metrics(step, batch, params)
    expected = metrics["loss/policy_avg"] + 0.3 * metrics["loss/value_avg"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    assert metrics["loss/value_avg"] > 0

    step = gvjax.make_policy_gradient_step(logps_fn, SGD, kl_coef=0.3)
    batch = gvjax.with_ref_logps(logps_fn, {"table": jnp.zeros((V, V))}, ROLLOUTS)
    metrics = first_metrics(step, batch)
    expected = metrics["policy_loss"] + 0.3 * metrics["kl"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    assert metrics["kl"] > 0


@pytest.mark.parametrize("place", ["nowhere", "a device", "a mesh"])
def test_a_step_is_compiled_once_wherever_its_parameters_lie(place):
    """A checkpoint's are committed to a device; the head that a reward model gets, and counters, were not."""
    table = TABLE["table"]
    if place == "a device":
        table = jax.device_put(table, jax.devices()[0])
    if place == "a mesh":
        mesh = jax.make_mesh((len(jax.devices()),), ("data",))
        table = jax.device_put(table, NamedSharding(mesh, PartitionSpec()))
    params = {"table": table, "head": jnp.ones(())}
    step = jax.jit(
        gvjax.make_supervised_step(logps_fn, optax.adam(0.1)), donate_argnums=0
    )
    state = gvjax.init_train_state(params, optax.adam(0.1))
    for _ in range(3):
        state, _ = step(state, jax.tree.map(np.asarray, FIRST))
    assert step._cache_size() == 1
