"""The losses against TRL's own numbers, loss by loss and gradient by gradient.

`tests/golden/make_losses.py` made them with TRL's code in float64; it says how. Where TRL means something else, the
test says what and compares what can be.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvjax import losses as gl
from gvjax.losses import TRL_NAMES, TRL_POLICY_LOSSES
from gvjax.masked import Mean

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
TRL = json.loads((GOLDEN / "losses.json").read_text())
OLD_TRL = json.loads((GOLDEN / "losses_trl_1_0.json").read_text())
INPUTS = TRL["inputs"]
UNPAIRED_NAMES = ("kto", "apo_zero_unpaired", "bco")


def f32(values):
    return jnp.asarray(values, jnp.float32)


def batch():
    sums = {
        f"{prefix}{side}_logps": f32(
            np.sum(INPUTS[f"{prefix}{side}_token_logps"], axis=1)
        )
        for prefix in ("", "ref_")
        for side in ("chosen", "rejected")
    }
    lengths = {
        f"{side}_lengths": jnp.asarray(INPUTS[f"{side}_lengths"])
        for side in ("chosen", "rejected")
    }
    return {**sums, **lengths}


def losses_and_gradients(loss, names=None):
    arrays = batch()
    names = names or gl.arguments(loss)

    def total(trained):
        values = loss(**{name: {**arrays, **trained}[name] for name in names})
        return jnp.sum(values), values

    trained = {name: arrays[name] for name in ("chosen_logps", "rejected_logps")}
    (_, values), gradients = jax.value_and_grad(total, has_aux=True)(trained)
    return values, gradients["chosen_logps"], gradients["rejected_logps"]


def assert_same(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


PAIRED = {
    **{f"dpo/{name}": TRL_NAMES[name] for name in TRL["dpo"] if name in TRL_NAMES},
    "dpo/sigmoid/beta=0.7": functools.partial(gl.dpo_loss, beta=0.7),
    "dpo/hinge/beta=0.7": functools.partial(gl.hinge_loss, beta=0.7),
    "dpo/ipo/beta=0.7": functools.partial(gl.ipo_loss, tau=0.7),
    "dpo/sigmoid_norm/beta=0.7": functools.partial(
        gl.length_normalised_dpo_loss, beta=0.7
    ),
    "dpo/robust/label_smoothing=0.2": functools.partial(
        gl.robust_dpo_loss, label_smoothing=0.2
    ),
    "dpo/exo_pair/label_smoothing=0.001": TRL_NAMES["exo_pair"],
    "dpo/sigmoid/forward_kl": gl.with_divergence(gl.dpo_loss, gl.forward_kl),
    "dpo/ipo/forward_kl": gl.with_divergence(gl.ipo_loss, gl.forward_kl),
    "dpo/sigmoid/js_divergence": gl.with_divergence(gl.dpo_loss, gl.js_divergence),
    "dpo/ipo/js_divergence": gl.with_divergence(gl.ipo_loss, gl.js_divergence),
    "dpo/sigmoid/alpha_divergence=0.5": gl.with_divergence(
        gl.dpo_loss, functools.partial(gl.alpha_divergence, alpha=0.5)
    ),
    # TRL's CPO method is the preference term alone.
    "cpo/cpo": functools.partial(gl.cpo_loss, nll_coef=0.0),
    "cpo/cpo/label_smoothing=0.2": functools.partial(
        gl.cpo_loss, nll_coef=0.0, label_smoothing=0.2
    ),
    "cpo/cpo_hinge": gl.reference_free(gl.hinge_loss),
    "cpo/cpo_ipo": gl.reference_free(gl.ipo_loss),
    "cpo/simpo": functools.partial(gl.simpo_loss, beta=0.1, gamma=0.5),
    "cpo/simpo/beta=2": functools.partial(gl.simpo_loss, beta=2.0, gamma=1.0),
    "cpo/simpo/label_smoothing=0.2": functools.partial(
        gl.simpo_loss, beta=0.1, gamma=0.5, label_smoothing=0.2
    ),
    "cpo/alphapo/alpha=0.25": functools.partial(TRL_NAMES["alphapo"], alpha=0.25),
    "cpo/alphapo/alpha=-0.5": functools.partial(TRL_NAMES["alphapo"], alpha=-0.5),
    "orpo/orpo": TRL_NAMES["orpo"],
    "tpo/tpo": functools.partial(
        gl.reference_free(functools.partial(gl.dpo_loss, beta=0.7))
    ),
    "tpo/tpo/label_smoothing=0.2": gl.reference_free(
        functools.partial(gl.dpo_loss, beta=0.7, label_smoothing=0.2)
    ),
    "tpo/tpo-l": functools.partial(TRL_NAMES["tpo-l"], beta=0.7),
}


@pytest.mark.parametrize("case", PAIRED)
def test_paired_losses(case):
    section, name = case.split("/", 1)
    expected = TRL[section][name]
    values, chosen, rejected = losses_and_gradients(PAIRED[case])
    assert_same(values, expected["loss"])
    assert_same(chosen, expected["grad_chosen"])
    assert_same(rejected, expected["grad_rejected"])


@pytest.mark.parametrize("case", [name for name in TRL["dpo"] if "aot" in name])
def test_losses_that_couple_rows(case):
    name, smoothing = case.split("/label_smoothing=")
    expected = TRL["dpo"][case]
    loss = functools.partial(TRL_NAMES[name], label_smoothing=float(smoothing))
    values, chosen, rejected = losses_and_gradients(loss)
    assert_same(jnp.mean(values), expected["loss"][0])
    assert_same(chosen / len(values), expected["grad_chosen"])
    assert_same(rejected / len(values), expected["grad_rejected"])


def test_likelihood_of_a_batch_is_weighted_by_lengths():
    # TRL averages over the batch's tokens, this library over rows: the lengths as weights give TRL's number.
    values, _, _ = losses_and_gradients(gl.nll_loss)
    weights = f32(INPUTS["chosen_lengths"])
    expected = TRL["dpo"]["sft/batch"]["loss"][0]
    assert_same(jnp.sum(values * weights) / jnp.sum(weights), expected)
    assert abs(float(jnp.mean(values)) - expected) > 1e-3


def test_length_desensitised():
    arrays = {
        name: f32(INPUTS[f"{name}_token_logps"])
        for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")
    }
    lengths = {
        side: jnp.asarray(INPUTS[f"{side}_lengths"]) for side in ("chosen", "rejected")
    }
    shared = jnp.minimum(lengths["chosen"], lengths["rejected"])

    def total(trained):
        sums = {}
        for name, token_logps in {**arrays, **trained}.items():
            mask = (
                jnp.arange(token_logps.shape[1])
                < lengths[name.removeprefix("ref_")][:, None]
            )
            sums[f"{name}_logps"] = gl.length_desensitised_logps(
                token_logps, mask, shared, alpha=0.3
            )
        values = gl.dpo_loss(**sums)
        return jnp.sum(values), values

    trained = {name: arrays[name] for name in ("chosen", "rejected")}
    (_, values), gradients = jax.value_and_grad(total, has_aux=True)(trained)
    expected = TRL["dpo"]["sigmoid/ld_alpha=0.3"]
    assert_same(values, expected["loss"])
    for side in ("chosen", "rejected"):
        mask = jnp.arange(6) < lengths[side][:, None]
        # TRL's masks are positions, ours tokens: beyond the end its zeros carry a gradient that reaches nothing.
        assert_same(gradients[side], np.where(mask, expected[f"grad_{side}"], 0.0))


def test_weighted_preference_optimisation():
    weights = []
    for side in ("chosen", "rejected"):
        lengths = jnp.asarray(INPUTS[f"{side}_lengths"])
        weights.append(
            gl.wpo_weights(
                f32(INPUTS[f"{side}_token_logps"]),
                jnp.arange(6) < lengths[:, None],
                f32(INPUTS["log_collisions"]),
            )
        )
    values, _, _ = losses_and_gradients(TRL_NAMES["sigmoid"])
    assert_same(
        values * weights[0] * weights[1], TRL["dpo"]["sigmoid/weighting"]["loss"]
    )


@pytest.mark.parametrize("case", TRL["kto"])
def test_unpaired_losses(case):
    expected = TRL["kto"][case]
    arrays = batch()
    shift = {"kto/kl>0": 3.0, "kto/kl=0": -3.0}.get(case)
    loss = functools.partial(
        TRL_NAMES[case.split("/")[0]], desirable_weight=1.3, undesirable_weight=0.8
    )
    extra = {}
    if shift is not None:
        extra["kl"] = gl.kto_kl(
            arrays["rejected_logps"] + shift, arrays["ref_rejected_logps"]
        )
        assert_same(extra["kl"], expected["kl"][0])

    def total(logps):
        values = loss(
            logps=logps,
            ref_logps=arrays["ref_chosen_logps"],
            desirable=jnp.asarray(INPUTS["desirable"]),
            **extra,
        )
        return jnp.sum(values), values

    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(
        arrays["chosen_logps"]
    )
    assert_same(values, expected["loss"])
    assert_same(gradient, expected["grad_chosen"])


def test_binary_classifier_with_running_mean():
    expected = OLD_TRL["bco"]["bco"]
    arrays = batch()
    rows = len(arrays["chosen_logps"])

    def total(logps):
        values = TRL_NAMES["bco"](
            logps,
            jnp.concatenate([arrays["ref_chosen_logps"], arrays["ref_rejected_logps"]]),
            jnp.arange(2 * rows) < rows,
            delta=expected["delta"],
        )
        return jnp.sum(values), values

    logps = jnp.concatenate([arrays["chosen_logps"], arrays["rejected_logps"]])
    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(logps)
    assert_same(values, expected["loss"])
    assert_same(gradient, expected["grad_chosen"] + expected["grad_rejected"])
    # The paired form is the sum of a pair's two.
    paired = functools.partial(gl.bco_loss, beta=0.1, delta=expected["delta"])
    assert_same(
        losses_and_gradients(paired)[0],
        np.reshape(expected["loss"], (2, rows)).sum(0),
    )


def test_exploratory_preference_optimisation():
    expected = OLD_TRL["online"]["xpo/alpha=0.05"]
    loss = functools.partial(
        gl.xpo_loss,
        chosen_from_reference=jnp.array([False, True, False, True]),
        alpha=0.05,
    )
    values, chosen, rejected = losses_and_gradients(loss, gl.VOCABULARY[:4])
    assert_same(values, expected["loss"])
    assert_same(chosen, expected["grad_chosen"])
    assert_same(rejected, expected["grad_rejected"])


def test_online_ipo_is_on_sums():
    expected = OLD_TRL["online"]["online_ipo"]
    values, chosen, rejected = losses_and_gradients(TRL_NAMES["online_ipo"])
    assert_same(values, expected["loss"])
    assert_same(chosen, expected["grad_chosen"])
    assert_same(rejected, expected["grad_rejected"])


@pytest.mark.parametrize("case", TRL["reward"])
def test_reward_losses(case):
    expected = TRL["reward"][case]
    margin = None if case == "reward" else f32(INPUTS["margin"])
    coefficient = 0.01 if "centering" in case else 0.0

    def total(chosen, rejected):
        values = gl.bradley_terry_loss(chosen, rejected, margin=margin)
        values += coefficient * gl.centering_penalty(chosen, rejected)
        return jnp.sum(values), values

    (_, values), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
        f32(INPUTS["chosen_rewards"]), f32(INPUTS["rejected_rewards"])
    )
    assert_same(values, expected["loss"])
    assert_same(gradients[0], expected["grad_chosen"])
    assert_same(gradients[1], expected["grad_rejected"])


def test_a_star_po():
    expected = TRL["regression"]["a2po"]
    arrays = batch()

    def total(logps):
        values = gl.a_star_po_loss(
            logps,
            arrays["ref_chosen_logps"],
            f32(INPUTS["chosen_rewards"]),
            f32(INPUTS["optimal_values"]),
            beta=0.3,
        )
        return jnp.sum(values), values

    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(
        arrays["chosen_logps"]
    )
    assert_same(values, expected["loss"])
    assert_same(gradient, expected["grad_chosen"])


def tokens():
    logps = f32(INPUTS["chosen_token_logps"])
    mask = jnp.arange(6) < jnp.asarray(INPUTS["chosen_lengths"])[:, None]
    advantages = jnp.broadcast_to(f32(INPUTS["advantages"])[:, None], logps.shape)
    return logps, f32(INPUTS["ref_chosen_token_logps"]), advantages, mask


DAPO_CLIP = {"epsilon": 0.2, "epsilon_high": 0.28}
POLICY = {
    **{
        name: (functools.partial(TRL_POLICY_LOSSES[name][0], **DAPO_CLIP), norm)
        for name, norm in (
            ("grpo", gl.per_sequence_mean),
            ("bnpo", gl.per_token),
            ("dapo", gl.per_token),
            ("dr_grpo", gl.constant(10)),
            ("gspo", gl.per_sequence_mean),
            ("luspo", gl.per_sequence_sum),
            ("rloo", gl.per_sequence_mean),
        )
    },
    "sapo": TRL_POLICY_LOSSES["sapo"],
    "vespo": TRL_POLICY_LOSSES["vespo"],
    # TRL's epsilon_high is the largest ratio itself, 1.5.
    "cispo": (functools.partial(gl.cispo_loss, epsilon_high=0.5), gl.per_token),
    "delta": (
        functools.partial(gl.clipped_policy_loss, max_ratio=1.4),
        gl.per_token,
    ),
    "gmpo": (
        functools.partial(gl.gmpo_loss, epsilon=0.3, epsilon_high=0.5),
        gl.per_sequence_mean,
    ),
}


@pytest.mark.parametrize("case", TRL["policy"])
def test_policy_losses(case):
    loss, normaliser = POLICY[case]
    logps, old_logps, advantages, mask = tokens()
    value, gradient = jax.value_and_grad(
        lambda x: normaliser(loss(x, old_logps, advantages, mask), mask).value
    )(logps)
    expected = TRL["policy"][case]
    assert_same(value, expected["loss"][0])
    assert_same(gradient, expected["grad_logps"])


def test_clip_fractions():
    fractions = gl.clip_fractions(*tokens(), **DAPO_CLIP)
    metrics = TRL["policy"]["dapo"]["metrics"]
    assert 0 < metrics["clip_ratio/low_mean"] < metrics["clip_ratio/region_mean"]
    for name, fraction in fractions.items():
        assert_same(fraction.value, metrics[name])


@pytest.mark.parametrize("case", TRL["supervised"])
def test_supervised_losses(case):
    loss = {"nll": gl.token_nll_loss, "dft": gl.dft_loss}[case]
    logps, _, _, mask = tokens()

    def mean(logps):
        total: Mean = gl.per_token(loss(logps, mask), mask)
        return total.value

    value, gradient = jax.value_and_grad(mean)(logps)
    expected = TRL["supervised"][case]
    assert_same(value, expected["loss"][0])
    assert_same(gradient, np.where(mask, expected["grad_logps"], 0.0))


def test_every_number_is_compared():
    paired = set(PAIRED)
    elsewhere = {"sft/batch", "sigmoid/ld_alpha=0.3", "sigmoid/weighting"}
    for section in ("dpo", "cpo", "orpo", "tpo"):
        for name in TRL[section]:
            assert f"{section}/{name}" in paired or name in elsewhere or "aot" in name
    assert set(POLICY) == set(TRL["policy"])


def test_table_covers_trl():
    # What TRL's trainers accept as loss types, read from their configurations.
    dpo = (
        "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired "
        "apo_zero apo_down discopop sft sigmoid_norm"
    )
    cpo = "cpo cpo_hinge cpo_ipo simpo alphapo"
    others = "mpo online_ipo orpo tpo tpo-l kto apo_zero_unpaired bco"
    assert set(TRL_NAMES) == set(f"{dpo} {cpo} {others}".split())
    policy = "grpo bnpo dr_grpo dapo cispo sapo luspo vespo gspo rloo gmpo ppo"
    assert set(TRL_POLICY_LOSSES) == set(policy.split())
    for name, loss in TRL_NAMES.items():
        vocabulary = gl.UNPAIRED_VOCABULARY if name in UNPAIRED_NAMES else gl.VOCABULARY
        assert gl.arguments(loss, vocabulary)
