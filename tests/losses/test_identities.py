"""What must be true of the losses whatever the numbers, and three-row values written as their formulas."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from gvjax import losses as gl
from gvjax.masked import Mean

LN2 = math.log(2.0)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def rows(seed, count=5):
    rng = np.random.default_rng(seed)
    return {
        "chosen_logps": jnp.asarray(-rng.gamma(3.0, 2.0, count), jnp.float32),
        "rejected_logps": jnp.asarray(-rng.gamma(3.0, 2.0, count), jnp.float32),
        "ref_chosen_logps": jnp.asarray(-rng.gamma(3.0, 2.0, count), jnp.float32),
        "ref_rejected_logps": jnp.asarray(-rng.gamma(3.0, 2.0, count), jnp.float32),
        "chosen_lengths": jnp.asarray(rng.integers(1, 9, count)),
        "rejected_lengths": jnp.asarray(rng.integers(1, 9, count)),
        "chosen_probability": jnp.asarray(rng.uniform(size=count), jnp.float32),
        "margin": jnp.asarray(rng.normal(size=count), jnp.float32),
    }


def call(loss, arrays):
    return loss(**{name: arrays[name] for name in gl.arguments(loss)})


def swap(arrays):
    other = {"chosen": "rejected", "rejected": "chosen"}
    swapped = dict(arrays)
    for name in arrays:
        for side in other:
            if side in name and "probability" not in name:
                swapped[name] = arrays[name.replace(side, other[side])]
    swapped["chosen_probability"] = 1.0 - arrays["chosen_probability"]
    swapped["margin"] = -arrays["margin"]
    return swapped


AT_REFERENCE = {
    "dpo": (gl.dpo_loss, LN2),
    "conservative": (functools.partial(gl.dpo_loss, label_smoothing=0.3), LN2),
    "soft": (gl.soft_dpo_loss, LN2),
    "robust": (gl.robust_dpo_loss, LN2),
    "ipo": (functools.partial(gl.ipo_loss, tau=0.2), 1 / (4 * 0.2**2)),
    "summed_ipo": (functools.partial(gl.summed_ipo_loss, tau=0.2), 1 / (4 * 0.2**2)),
    "hinge": (gl.hinge_loss, 1.0),
    "length_normalised": (gl.length_normalised_dpo_loss, LN2),
    "exo": (
        functools.partial(gl.exo_loss, label_smoothing=0.1),
        -LN2 - 0.5 * math.log(0.9) - 0.5 * math.log(0.1),
    ),
    "discopop": (gl.discopop_loss, 0.5 * LN2 + 0.5),
    "aot": (gl.aot_loss, LN2),
    "aot_unpaired": (gl.aot_unpaired_loss, LN2),
    "nca": (gl.nca_loss, 2 * LN2),
    "bco": (gl.bco_loss, 2 * LN2),
    "sppo_hard": (functools.partial(gl.sppo_hard_loss, beta=0.1), 2 * 5.0**2),
    "apo_zero": (gl.apo_zero_loss, 1.0),
    "apo_down": (gl.apo_down_loss, 1.0),
    "forward_kl": (gl.with_divergence(gl.dpo_loss, gl.forward_kl), LN2),
    "js": (gl.with_divergence(gl.dpo_loss, gl.js_divergence), LN2),
}


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_value_at_the_reference_policy(name):
    loss, expected = AT_REFERENCE[name]
    arrays = rows(0)
    arrays["ref_chosen_logps"] = arrays["chosen_logps"]
    arrays["ref_rejected_logps"] = arrays["rejected_logps"]
    np.testing.assert_allclose(call(loss, arrays), np.full(5, expected), rtol=1e-5)


def test_rebel_at_the_sampling_policy_is_the_squared_margin():
    arrays = rows(0)
    arrays["ref_chosen_logps"] = arrays["chosen_logps"]
    arrays["ref_rejected_logps"] = arrays["rejected_logps"]
    loss = functools.partial(gl.rebel_loss, eta=3.0)
    np.testing.assert_allclose(
        call(loss, arrays), np.square(arrays["margin"]), rtol=1e-6
    )


class SwapTest(parameterized.TestCase):
    @parameterized.parameters(0, 1, 2)
    def test_symmetric_losses_do_not_see_a_swap(self, seed):
        arrays = rows(seed)
        for loss in (gl.soft_dpo_loss, functools.partial(gl.rebel_loss, eta=2.0)):
            np.testing.assert_allclose(
                call(loss, arrays), call(loss, swap(arrays)), rtol=1e-5
            )

    @parameterized.parameters(0, 1, 2)
    def test_swapping_negates_the_margin(self, seed):
        # −log σ(m) and −log σ(−m) differ by exactly −m.
        arrays = rows(seed)
        difference = call(gl.dpo_loss, arrays) - call(gl.dpo_loss, swap(arrays))
        gap = (arrays["chosen_logps"] - arrays["ref_chosen_logps"]) - (
            arrays["rejected_logps"] - arrays["ref_rejected_logps"]
        )
        np.testing.assert_allclose(difference, -0.1 * gap, atol=1e-5)

    @parameterized.parameters(0, 1, 2)
    def test_robust_loss_is_unbiased(self, seed):
        arrays, flip = rows(seed), 0.2
        robust = functools.partial(gl.robust_dpo_loss, label_smoothing=flip)
        noisy = (1 - flip) * call(robust, arrays) + flip * call(robust, swap(arrays))
        np.testing.assert_allclose(noisy, call(gl.dpo_loss, arrays), rtol=1e-5)

    @parameterized.parameters(0, 1, 2)
    def test_smoothing_is_a_soft_label(self, seed):
        arrays = rows(seed)
        arrays["chosen_probability"] = jnp.full(5, 0.8)
        np.testing.assert_allclose(
            call(functools.partial(gl.dpo_loss, label_smoothing=0.2), arrays),
            call(gl.soft_dpo_loss, arrays),
            rtol=1e-6,
        )


def test_soft_labels_stop_at_the_judge():
    # Zero gradient exactly where σ(βh) is the judge's probability.
    probability, beta = 0.7, 0.5
    gap = math.log(probability / (1 - probability)) / beta
    zeros = jnp.zeros(1)
    gradient = jax.grad(
        lambda logps: gl.soft_dpo_loss(
            logps, zeros, zeros, zeros, jnp.array([probability]), beta=beta
        )[0]
    )
    np.testing.assert_allclose(gradient(jnp.array([gap])), [0.0], atol=1e-6)
    assert gradient(jnp.array([gap + 1]))[0] > 0 > gradient(jnp.array([gap - 1]))[0]


class HandValuesTest(chex.TestCase):
    """Three rows: policy log-ratios w = (2, 0, -1) and l = (-1, 0, 3), lengths (2, 1, 4) and (1, 5, 3)."""

    w = (2.0, 0.0, -1.0)
    loss_l = (-1.0, 0.0, 3.0)

    def arrays(self):
        reference = jnp.array([-4.0, -3.0, -6.0])
        return {
            "chosen_logps": reference + jnp.array(self.w),
            "rejected_logps": reference + jnp.array(self.loss_l),
            "ref_chosen_logps": reference,
            "ref_rejected_logps": reference,
            "chosen_lengths": jnp.array([2, 1, 4]),
            "rejected_lengths": jnp.array([1, 5, 3]),
        }

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(
        ("dpo", functools.partial(gl.dpo_loss, beta=0.5), [
            -math.log(sigmoid(0.5 * 3)), LN2, -math.log(sigmoid(0.5 * -4)),
        ]),
        ("ipo", functools.partial(gl.ipo_loss, tau=0.25), [
            (2 / 2 + 1 - 2) ** 2, 4.0, (-1 / 4 - 3 / 3 - 2) ** 2,
        ]),
        ("summed_ipo", functools.partial(gl.summed_ipo_loss, tau=0.25), [
            (3 - 2) ** 2, 4.0, (-4 - 2) ** 2,
        ]),
        ("hinge", functools.partial(gl.hinge_loss, beta=0.5), [0.0, 1.0, 1 + 0.5 * 4]),
        ("sppo_hard", functools.partial(gl.sppo_hard_loss, beta=0.5), [
            (2 - 1) ** 2 + (-1 + 1) ** 2, 2.0, (-1 - 1) ** 2 + (3 + 1) ** 2,
        ]),
        ("apo_zero", functools.partial(gl.apo_zero_loss, beta=1.0), [
            1 - sigmoid(2) + sigmoid(-1), 1.0, 1 - sigmoid(-1) + sigmoid(3),
        ]),
        ("apo_down", functools.partial(gl.apo_down_loss, beta=1.0), [
            sigmoid(2) + 1 - sigmoid(3), 1.0, sigmoid(-1) + 1 - sigmoid(-4),
        ]),
        ("bco", functools.partial(gl.bco_loss, beta=1.0, delta=0.5), [
            -math.log(sigmoid(1.5)) - math.log(sigmoid(1.5)),
            -math.log(sigmoid(-0.5)) - math.log(sigmoid(0.5)),
            -math.log(sigmoid(-1.5)) - math.log(sigmoid(-2.5)),
        ]),
        # Sorted: w = (-1, 0, 2), l = (-1, 0, 3).
        ("aot_unpaired", functools.partial(gl.aot_unpaired_loss, beta=1.0), [
            LN2, LN2, -math.log(sigmoid(-1)),
        ]),
        # Margins 3, 0, -4 sorted: -4, 0, 3; the reference's are 0.
        ("aot", functools.partial(gl.aot_loss, beta=1.0), [
            -math.log(sigmoid(-4)), LN2, -math.log(sigmoid(3)),
        ]),
        ("nll", gl.nll_loss, [2 / 2, 3 / 1, 7 / 4]),
        ("simpo", functools.partial(gl.simpo_loss, beta=2.0, gamma=0.5), [
            -math.log(sigmoid(2 * (-2 / 2 + 5 / 1) - 0.5)),
            -math.log(sigmoid(2 * (-3 / 1 + 3 / 5) - 0.5)),
            -math.log(sigmoid(2 * (-7 / 4 + 3 / 3) - 0.5)),
        ]),
        ("cpo", functools.partial(gl.cpo_loss, beta=0.5, nll_coef=2.0), [
            -math.log(sigmoid(0.5 * 3)) + 2 * 2 / 2,
            LN2 + 2 * 3 / 1,
            -math.log(sigmoid(0.5 * -4)) + 2 * 7 / 4,
        ]),
    )  # fmt: skip
    def test_value(self, loss, expected):
        np.testing.assert_allclose(
            self.variant(loss)(
                **{name: self.arrays()[name] for name in gl.arguments(loss)}
            ),
            expected,
            rtol=1e-5,
            atol=1e-6,
        )

    def test_orpo(self):
        # Average probabilities 1/2 and 1/4: odds 1 and 1/3.
        loss = gl.orpo_loss(
            jnp.array([3 * math.log(0.5)]),
            jnp.array([2 * math.log(0.25)]),
            jnp.array([3]),
            jnp.array([2]),
            odds_coef=0.5,
        )
        np.testing.assert_allclose(loss, [LN2 - 0.5 * math.log(3 / 4)], rtol=1e-5)

    def test_kto(self):
        loss = gl.kto_loss(
            jnp.array([-1.0, -1.0]),
            jnp.array([-3.0, -3.0]),
            jnp.array([True, False]),
            jnp.array(0.5),
            beta=1.0,
            undesirable_weight=2.0,
        )
        np.testing.assert_allclose(
            loss, [1 - sigmoid(1.5), 2 * (1 - sigmoid(-1.5))], rtol=1e-5
        )

    def test_bradley_terry(self):
        loss = gl.bradley_terry_loss(
            jnp.array([2.0, 0.0]),
            jnp.array([0.5, 1.0]),
            margin=jnp.array([0.5, 0.0]),
            chosen_probability=jnp.array([1.0, 0.25]),
            label_smoothing=0.1,
        )
        second = 0.25 * 0.9 + 0.75 * 0.1
        expected = [
            -0.9 * math.log(sigmoid(1)) - 0.1 * math.log(sigmoid(-1)),
            -second * math.log(sigmoid(-1)) - (1 - second) * math.log(sigmoid(1)),
        ]
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_allclose(
            gl.centering_penalty(jnp.array([2.0]), jnp.array([-0.5])), [1.5**2]
        )

    def test_rebel(self):
        arrays = {**self.arrays(), "margin": jnp.array([1.0, 2.0, -1.0])}
        loss = functools.partial(gl.rebel_loss, eta=2.0)
        np.testing.assert_allclose(
            call(loss, arrays), [(1.5 - 1) ** 2, 2.0**2, (-2 + 1) ** 2], rtol=1e-6
        )


def test_alphapo_limit():
    arrays = rows(3)
    np.testing.assert_allclose(
        call(functools.partial(gl.alphapo_loss, alpha=1e-3), arrays),
        call(gl.simpo_loss, arrays),
        rtol=2e-2,  # r differs from log π by α (log π)²/2
        atol=1e-6,
    )
    np.testing.assert_array_equal(
        call(functools.partial(gl.alphapo_loss, alpha=0.0), arrays),
        call(gl.simpo_loss, arrays),
    )


def test_on_policy_kl_has_the_exact_value_and_gradient():
    logits = jnp.array([0.3, -1.0, 0.8])
    reference = jax.nn.log_softmax(jnp.array([0.0, 0.5, -0.2]))

    def exact(logits):
        logps = jax.nn.log_softmax(logits)
        return 0.7 * jnp.sum(jnp.exp(logps) * (logps - reference))

    def surrogate(logits):
        logps = jax.nn.log_softmax(logits)
        sampled = jax.lax.stop_gradient(jnp.exp(logps))
        return jnp.sum(sampled * gl.hypo_kl_loss(logps, reference, kl_coef=0.7))

    np.testing.assert_allclose(surrogate(logits), exact(logits), rtol=1e-6)
    np.testing.assert_allclose(
        jax.grad(surrogate)(logits), jax.grad(exact)(logits), rtol=1e-5, atol=1e-7
    )


def test_divergences():
    ratios = jnp.array([-2.0, 0.0, 1.5])
    alpha = functools.partial(gl.alpha_divergence, alpha=2.0)
    np.testing.assert_allclose(gl.forward_kl(ratios), 1 - np.exp(-ratios), rtol=1e-6)
    np.testing.assert_allclose(alpha(ratios), np.exp(ratios) - 1, rtol=1e-6)
    np.testing.assert_array_equal(gl.alpha_divergence(ratios, alpha=1.0), ratios)
    arrays = rows(1)
    np.testing.assert_allclose(
        call(gl.with_divergence(gl.dpo_loss, gl.reverse_kl), arrays),
        call(gl.dpo_loss, arrays),
        rtol=1e-6,
    )
    with pytest.raises(ValueError, match="nca_loss is not a function of the gap"):
        gl.with_divergence(functools.partial(gl.nca_loss, beta=1.0), gl.forward_kl)
    with pytest.raises(ValueError, match="without a reference policy"):
        gl.with_divergence(gl.simpo_loss, gl.forward_kl)


class ByNameTest(chex.TestCase):
    def test_arguments(self):
        assert gl.arguments(gl.dpo_loss) == gl.VOCABULARY[:4]
        assert gl.arguments(functools.partial(gl.rebel_loss, eta=1.0)) == (
            *gl.VOCABULARY[:4],
            "margin",
        )
        assert gl.arguments(gl.nll_loss) == ("chosen_logps", "chosen_lengths")
        bound = functools.partial(gl.nll_loss, chosen_logps=jnp.zeros(2))
        assert gl.arguments(bound) == ("chosen_lengths",)
        assert gl.arguments(gl.kto_loss, gl.UNPAIRED_VOCABULARY) == (
            gl.UNPAIRED_VOCABULARY
        )

    def test_unknown_arguments(self):
        with pytest.raises(
            ValueError, match=r"'chosen_logp'.*did you mean chosen_logps"
        ):
            gl.arguments(lambda chosen_logp: chosen_logp)
        with pytest.raises(ValueError, match=r"partial\(rebel_loss, eta=\.\.\.\)"):
            gl.arguments(gl.rebel_loss)
        with pytest.raises(ValueError, match="hides the arrays"):
            gl.arguments(lambda *args: args)
        with pytest.raises(ValueError, match="by position only"):
            gl.arguments(lambda chosen_logps, /: chosen_logps)

    def test_weighted_sum(self):
        arrays = rows(4)
        inner = gl.weighted_sum((0.5, gl.nll_loss), (2.0, gl.hinge_loss))
        total = gl.weighted_sum((1.0, gl.simpo_loss), (3.0, inner))
        assert gl.arguments(total) == gl.VOCABULARY[:6]
        np.testing.assert_allclose(
            call(total, arrays),
            call(gl.simpo_loss, arrays)
            + 1.5 * call(gl.nll_loss, arrays)
            + 6.0 * call(gl.hinge_loss, arrays),
            rtol=1e-6,
        )
        by_position = total(*(arrays[name] for name in gl.arguments(total)))
        np.testing.assert_array_equal(by_position, call(total, arrays))
        with pytest.raises(TypeError):
            total(arrays["chosen_logps"])

    def test_weighted_sum_refuses(self):
        with pytest.raises(ValueError, match="no terms"):
            gl.weighted_sum()
        with pytest.raises(ValueError, match="weight nan"):
            gl.weighted_sum((math.nan, gl.dpo_loss))
        with pytest.raises(ValueError, match="eta"):
            gl.weighted_sum((1.0, gl.rebel_loss))

    def test_reference_free(self):
        arrays = rows(5)
        free = gl.reference_free(functools.partial(gl.dpo_loss, beta=0.3))
        assert gl.arguments(free) == ("chosen_logps", "rejected_logps")
        zeros = dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), jnp.zeros(5))
        np.testing.assert_array_equal(
            call(free, arrays),
            call(functools.partial(gl.dpo_loss, beta=0.3), {**arrays, **zeros}),
        )
        with pytest.raises(ValueError, match="no reference policy to drop"):
            gl.reference_free(gl.simpo_loss)

    def test_couples_rows(self):
        assert gl.couples_rows(gl.weighted_sum((1.0, gl.dpo_loss), (1.0, gl.aot_loss)))
        assert gl.couples_rows(functools.partial(gl.aot_unpaired_loss, beta=1.0))
        assert not gl.couples_rows(gl.mpo_loss)


def tokens(seed=0, shape=(4, 5)):
    rng = np.random.default_rng(seed)
    logps = jnp.asarray(-rng.gamma(2.0, 0.5, shape), jnp.float32)
    advantages = jnp.broadcast_to(
        jnp.asarray(rng.normal(size=(shape[0], 1)), jnp.float32), shape
    )
    mask = jnp.arange(shape[1]) < jnp.array([5, 2, 0, 3])[:, None]
    return logps, advantages, mask


@pytest.mark.parametrize(
    "loss",
    [gl.clipped_policy_loss, gl.cispo_loss, gl.sapo_loss, gl.vespo_loss],
    ids=lambda loss: loss.__name__,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_ratio_one_gives_reinforce(loss, seed):
    logps, advantages, mask = tokens(seed)

    def gradient(loss):
        return jax.grad(lambda x: jnp.sum(loss(x, logps, advantages, mask)))(logps)

    np.testing.assert_allclose(
        gradient(loss), gradient(gl.reinforce_loss), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("loss", "normaliser"),
    [
        (gl.gspo_loss, gl.per_sequence_mean),
        (gl.gmpo_loss, gl.per_sequence_mean),
        (gl.sequence_clipped_loss, gl.per_sequence_sum),
    ],
    ids=["gspo", "gmpo", "rloo"],
)
def test_sequence_ratio_one_gives_reinforce(loss, normaliser):
    # The ratio is one number per completion, so its loss, repeated on tokens, is averaged over them.
    logps, advantages, mask = tokens()

    def gradient(loss, normaliser):
        return jax.grad(
            lambda x: normaliser(loss(x, logps, advantages, mask), mask).value
        )(logps)

    np.testing.assert_allclose(
        gradient(loss, gl.per_sequence_mean),
        gradient(gl.reinforce_loss, normaliser),
        rtol=1e-5,
        atol=1e-6,
    )


def test_clipping_by_hand():
    ratio = jnp.array([[0.5, 0.5, 1.0, 1.5, 1.5, 5.0]])
    advantages = jnp.array([[2.0, -2.0, 2.0, 2.0, -2.0, -2.0]])
    mask = jnp.ones(ratio.shape, bool)
    zeros = jnp.zeros(ratio.shape)
    losses = functools.partial(
        gl.clipped_policy_loss, epsilon=0.2, epsilon_high=0.3, max_ratio=4.0
    )
    expected = [[-2 * 0.5, 2 * 0.8, -2.0, -2 * 1.3, 2 * 1.5, 2 * 4.0]]
    np.testing.assert_allclose(
        losses(jnp.log(ratio), zeros, advantages, mask), expected, rtol=1e-6
    )
    gradient = jax.grad(lambda x: jnp.sum(losses(x, zeros, advantages, mask)))
    np.testing.assert_allclose(
        gradient(jnp.log(ratio)), [[-1.0, 0.0, -2.0, 0.0, 3.0, 0.0]], rtol=1e-6
    )
    fractions = gl.clip_fractions(
        jnp.log(ratio), zeros, advantages, mask, epsilon=0.2, epsilon_high=0.3
    )
    np.testing.assert_allclose(
        [fraction.value for fraction in fractions.values()], [1 / 6, 1 / 6, 2 / 6]
    )


def test_clipped_value_loss_by_hand():
    losses = gl.clipped_value_loss(
        jnp.array([[1.0, 1.0, 1.0]]),
        jnp.array([[0.5, 0.5, 1.0]]),
        jnp.array([[1.0, 2.0, 0.0]]),
        jnp.ones((1, 3), bool),
        epsilon=0.2,
    )
    np.testing.assert_allclose(losses, [[0.5 * 0.3**2, 0.5 * 1.3**2, 0.5]], rtol=1e-6)


NORMALISERS = {
    "per_token": (gl.per_token, 36 / 6),
    "per_sequence_mean": (gl.per_sequence_mean, (6 / 3 + 10 / 1 + 20 / 2) / 3),
    "per_sequence_sum": (gl.per_sequence_sum, 36 / 3),
    "constant": (gl.constant(4), 36 / (4 * 3)),
}


@pytest.mark.parametrize("name", NORMALISERS)
def test_normalisers(name):
    normaliser, expected = NORMALISERS[name]
    losses = jnp.array(
        [[1.0, 2.0, 3.0], [10.0, jnp.nan, jnp.inf], [jnp.nan] * 3, [8.0, 12.0, 5.0]]
    )
    mask = jnp.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], bool)
    np.testing.assert_allclose(normaliser(losses, mask).value, expected, rtol=1e-6)
    for size in (1, 2, 4):
        parts = [
            normaliser(losses[i : i + size], mask[i : i + size])
            for i in range(0, 4, size)
        ]
        total = functools.reduce(Mean.__add__, parts)
        np.testing.assert_allclose(total.value, expected, rtol=1e-6)
    empty = normaliser(losses[2:3], mask[2:3])
    assert empty.value == 0.0
    assert empty.weight == 0.0


def test_kto_reference_point():
    policy, reference = jnp.array([-1.0, -2.0]), jnp.array([-2.0, -5.0])
    np.testing.assert_allclose(gl.kto_kl(policy, reference), 2.0)
    assert gl.kto_kl(reference, policy) == 0.0
    gradient = jax.grad(lambda logps: gl.kto_kl(logps, reference))(policy)
    np.testing.assert_array_equal(gradient, jnp.zeros(2))


def test_length_desensitised_limits():
    logps, _, mask = tokens()
    shared = jnp.array([2, 2, 0, 3])
    plain = jnp.sum(jnp.where(mask, logps, 0.0), axis=1)
    np.testing.assert_allclose(
        gl.length_desensitised_logps(logps, mask, shared, alpha=1.0), plain, rtol=1e-6
    )
    np.testing.assert_allclose(
        gl.length_desensitised_logps(logps, mask, shared, alpha=0.0)[0],
        logps[0, :2].sum(),
        rtol=1e-6,
    )
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        gl.length_desensitised_logps(logps, mask, shared, alpha=1.5)


def test_weights_of_a_sampled_policy():
    # Under a uniform policy over V tokens log Σ π² is log π, so every aligned weight is 1.
    logps = jnp.full((2, 3), -math.log(7))
    mask = jnp.array([[True, True, False], [False] * 3])
    np.testing.assert_allclose(gl.wpo_weights(logps, mask, logps), [1.0, 1.0])
    np.testing.assert_allclose(gl.wpo_weights(logps, mask), [1 / 7, 1.0], rtol=1e-6)
