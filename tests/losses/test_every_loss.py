"""One battery over every loss: a new loss gets all of it for one row of the table."""

import dataclasses
import functools
import inspect
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from gvjax import losses as gl
from gvjax.losses.contract import require_positive

ROWS, TOKENS = 4, 5
MASK = np.arange(TOKENS) < np.array([5, 2, 0, 3])[:, None]


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss, and what the battery must know about it.

    Attributes:
      loss: every required parameter that is left is an array.
      trained: the arrays its gradient flows to.
      smooth: whether finite differences may be compared everywhere near the inputs.
      rowwise: whether permuting rows permutes losses.
      positive: hyper-parameters that must be > 0.
    """

    loss: Callable[..., jax.Array]
    trained: tuple[str, ...] = ("chosen_logps", "rejected_logps")
    smooth: bool = True
    rowwise: bool = True
    positive: tuple[str, ...] = ("beta",)


SINGLE = ("logps",)
CASES = {
    "dpo": Case(gl.dpo_loss),
    "conservative_dpo": Case(functools.partial(gl.dpo_loss, label_smoothing=0.2)),
    "soft_dpo": Case(gl.soft_dpo_loss),
    "robust_dpo": Case(gl.robust_dpo_loss),
    "ipo": Case(gl.ipo_loss, positive=("tau",)),
    "summed_ipo": Case(gl.summed_ipo_loss, positive=("tau",)),
    "hinge": Case(gl.hinge_loss),
    "length_normalised_dpo": Case(gl.length_normalised_dpo_loss),
    "exo": Case(gl.exo_loss, positive=("beta", "label_smoothing")),
    "discopop": Case(gl.discopop_loss, positive=("beta", "tau")),
    "aot": Case(gl.aot_loss, rowwise=False),
    "aot_unpaired": Case(gl.aot_unpaired_loss, rowwise=False),
    "nca": Case(gl.nca_loss),
    "bco": Case(functools.partial(gl.bco_loss, delta=0.3)),
    "sppo": Case(gl.sppo_loss),
    "sppo_hard": Case(gl.sppo_hard_loss),
    "apo_zero": Case(gl.apo_zero_loss),
    "apo_down": Case(gl.apo_down_loss),
    "nll": Case(gl.nll_loss, trained=("chosen_logps",), positive=()),
    "simpo": Case(gl.simpo_loss),
    "alphapo": Case(gl.alphapo_loss),
    "cpo": Case(gl.cpo_loss),
    "orpo": Case(gl.orpo_loss, positive=()),
    "mpo": Case(gl.mpo_loss, positive=()),
    "slic": Case(gl.reference_free(gl.hinge_loss), positive=()),
    "forward_kl_dpo": Case(gl.with_divergence(gl.dpo_loss, gl.forward_kl), positive=()),
    "js_dpo": Case(gl.with_divergence(gl.dpo_loss, gl.js_divergence), positive=()),
    "alpha_dpo": Case(
        gl.with_divergence(
            gl.dpo_loss, functools.partial(gl.alpha_divergence, alpha=0.5)
        ),
        positive=(),
    ),
    "rebel": Case(functools.partial(gl.rebel_loss, eta=2.0), positive=("eta",)),
    "xpo": Case(functools.partial(gl.xpo_loss, alpha=0.1)),
    "hypo_kl": Case(
        functools.partial(gl.hypo_kl_loss, kl_coef=0.3),
        trained=SINGLE,
        smooth=False,  # by design not the gradient of its value
        positive=("kl_coef",),
    ),
    "a_star_po": Case(gl.a_star_po_loss, trained=SINGLE),
    "kto": Case(gl.kto_loss, trained=SINGLE),
    "apo_zero_unpaired": Case(gl.apo_zero_unpaired_loss, trained=SINGLE),
    "bco_unpaired": Case(gl.bco_unpaired_loss, trained=SINGLE),
    "bradley_terry": Case(
        gl.bradley_terry_loss,
        trained=("chosen_rewards", "rejected_rewards"),
        positive=(),
    ),
    "centering": Case(
        gl.centering_penalty,
        trained=("chosen_rewards", "rejected_rewards"),
        positive=(),
    ),
}

POLICY = ("logps", "old_logps", "advantages", "mask")
TOKEN_CASES = {
    "reinforce": Case(gl.reinforce_loss, trained=SINGLE, positive=()),
    "clipped_policy": Case(
        functools.partial(gl.clipped_policy_loss, epsilon=0.3, max_ratio=4.0),
        trained=SINGLE,
        positive=(),
    ),
    "gspo": Case(
        functools.partial(gl.gspo_loss, epsilon=0.3, epsilon_high=0.4),
        trained=SINGLE,
        positive=(),
    ),
    "sequence_clipped": Case(gl.sequence_clipped_loss, trained=SINGLE, positive=()),
    "cispo": Case(gl.cispo_loss, trained=SINGLE, smooth=False, positive=()),
    "sapo": Case(
        gl.sapo_loss,
        trained=SINGLE,
        positive=("temperature_positive", "temperature_negative"),
    ),
    "gmpo": Case(gl.gmpo_loss, trained=SINGLE, positive=()),
    "vespo": Case(
        gl.vespo_loss,
        trained=SINGLE,
        smooth=False,
        positive=("k_positive", "lambda_positive", "k_negative", "lambda_negative"),
    ),
    "clipped_value": Case(
        gl.clipped_value_loss, trained=("values",), positive=("epsilon",)
    ),
    "token_nll": Case(gl.token_nll_loss, trained=SINGLE, positive=()),
    "dft": Case(gl.dft_loss, trained=SINGLE, smooth=False, positive=()),
}
EVERY = {**CASES, **TOKEN_CASES}


def needs(loss):
    return [
        name
        for name, parameter in inspect.signature(loss).parameters.items()
        if parameter.default is parameter.empty
    ]


def inputs(name, seed=0):
    """The arrays a case asks for."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, TOKENS) if name in TOKEN_CASES else (ROWS,)

    def make(argument):
        if argument == "mask":
            return jnp.asarray(MASK)
        if argument in ("desirable", "chosen_from_reference"):
            return jnp.array([True, False, False, True])
        if argument == "kl":
            return jnp.float32(0.4)
        if argument.endswith("lengths"):
            return jnp.asarray(rng.integers(1, 9, shape))
        if argument == "chosen_probability":
            return jnp.asarray(rng.uniform(size=shape), jnp.float32)
        if argument.endswith("logps"):
            return jnp.asarray(-rng.gamma(3.0, 0.5, shape), jnp.float32)
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {argument: make(argument) for argument in needs(EVERY[name].loss)}


def floats(arrays):
    return [k for k, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)]


class EveryLossTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*EVERY)
    def test_shape_and_dtype(self, name):
        arrays = inputs(name)
        losses = self.variant(EVERY[name].loss)(**arrays)
        shape = (ROWS, TOKENS) if name in TOKEN_CASES else (ROWS,)
        chex.assert_shape(losses, shape)
        chex.assert_type(losses, jnp.float32)
        chex.assert_tree_all_finite(losses)
        np.testing.assert_allclose(
            losses, EVERY[name].loss(**arrays), rtol=1e-5, atol=1e-6
        )

    @parameterized.parameters(*EVERY)
    def test_bfloat16_is_only_a_rounding_of_the_inputs(self, name):
        arrays = inputs(name)
        rounded = {
            k: a.astype(jnp.bfloat16) if k in floats(arrays) else a
            for k, a in arrays.items()
        }
        exact = {
            k: a.astype(jnp.float32) if k in floats(arrays) else a
            for k, a in rounded.items()
        }
        losses = EVERY[name].loss(**rounded)
        chex.assert_type(losses, jnp.float32)
        np.testing.assert_array_equal(losses, EVERY[name].loss(**exact))

    @parameterized.parameters(*EVERY)
    def test_row_order(self, name):
        arrays = inputs(name)
        order = jnp.array([2, 0, 3, 1])
        permuted = {k: a[order] if a.ndim else a for k, a in arrays.items()}
        losses = EVERY[name].loss(**arrays)
        expected = losses[order] if EVERY[name].rowwise else losses
        np.testing.assert_allclose(
            EVERY[name].loss(**permuted), expected, rtol=1e-5, atol=1e-6
        )

    @parameterized.parameters(*EVERY)
    def test_gradient(self, name):
        case, arrays = EVERY[name], inputs(name)
        rng = np.random.default_rng(7)

        def total(trained):
            return jnp.sum(case.loss(**{**arrays, **trained}))

        trained = {k: arrays[k] for k in case.trained}
        gradient = jax.grad(total)(trained)
        chex.assert_tree_all_finite(gradient)
        assert any(np.any(g != 0) for g in gradient.values())
        if not case.smooth:
            return
        direction = {
            k: jnp.asarray(rng.normal(size=a.shape), jnp.float32)
            for k, a in trained.items()
        }
        step = 3e-3
        ahead, behind = (
            total({k: trained[k] + sign * step * direction[k] for k in trained})
            for sign in (1, -1)
        )
        slope = sum(jnp.vdot(gradient[k], direction[k]) for k in trained)
        # Differences of float32 losses keep about eps · |loss| / step.
        rounding = 2e-7 * max(1.0, abs(float(ahead))) / step
        np.testing.assert_allclose(
            (ahead - behind) / (2 * step), slope, rtol=1e-2, atol=1e-3 + rounding
        )

    @parameterized.parameters(*EVERY)
    def test_only_the_policy_is_trained(self, name):
        case, arrays = EVERY[name], inputs(name)
        frozen = {
            k: arrays[k]
            for k in ("old_logps", "advantages", "old_values", "returns", "kl")
            if k in arrays
        }
        gradient = jax.grad(lambda frozen: jnp.sum(case.loss(**{**arrays, **frozen})))(
            frozen
        )
        for value in gradient.values():
            np.testing.assert_array_equal(value, jnp.zeros_like(value))

    @parameterized.product(name=list(EVERY), sign=(-1.0, 1.0))
    def test_extreme_inputs(self, name, sign):
        case, arrays = EVERY[name], inputs(name)
        extreme = 1e4 * sign * np.array([1.0, -1.0, 1.0, -1.0], np.float32)
        if name in TOKEN_CASES:
            extreme = extreme[:, None]
        trained = {k: arrays[k] * 0 + extreme for k in case.trained}
        if len(trained) == 2:
            trained[case.trained[1]] = -trained[case.trained[1]]
        if all("logps" in k for k in trained):
            trained = {k: jnp.minimum(a, 0.0) for k, a in trained.items()}
        if "old_logps" in arrays:
            arrays["old_logps"] = jnp.minimum(-trained["logps"] - 1e4, 0.0)
        losses, gradient = jax.value_and_grad(
            lambda trained: jnp.sum(case.loss(**{**arrays, **trained}))
        )(trained)
        chex.assert_tree_all_finite((losses, gradient))

    @parameterized.parameters(*EVERY)
    def test_wrong_shapes_name_the_argument(self, name):
        case, arrays = EVERY[name], inputs(name)
        for argument, array in arrays.items():
            for wrong in (array[..., None], array[:-1] if array.ndim else array[None]):
                if len(arrays) == 1 and wrong.ndim == array.ndim:
                    continue
                with pytest.raises(AssertionError) as error:
                    case.loss(**{**arrays, argument: wrong})
                # A length that differs may be told as the other one's.
                assert argument in str(error.value) or wrong.ndim == array.ndim

    @parameterized.parameters(*EVERY)
    def test_wrong_dtypes_name_the_argument(self, name):
        case, arrays = EVERY[name], inputs(name)
        for argument, array in arrays.items():
            if argument.endswith("lengths") or argument == "kl":
                continue
            with pytest.raises(AssertionError, match=f"argument {argument}"):
                case.loss(**{**arrays, argument: array.astype(jnp.int32)})

    @parameterized.parameters(*EVERY)
    def test_impossible_hyper_parameters(self, name):
        case, arrays = EVERY[name], inputs(name)
        for parameter in case.positive:
            for value in (0, -1.0, float("nan"), float("inf")):
                with pytest.raises(ValueError, match=f"{parameter} is {value}"):
                    functools.partial(case.loss, **{parameter: value})(**arrays)
        if "label_smoothing" in inspect.signature(case.loss).parameters:
            with pytest.raises(ValueError, match=r"label_smoothing is 0\.5"):
                functools.partial(case.loss, label_smoothing=0.5)(**arrays)
        for parameter in ("epsilon", "epsilon_high"):
            if parameter in inspect.signature(case.loss).parameters:
                with pytest.raises(ValueError, match=f"{parameter} is -0.1"):
                    functools.partial(case.loss, **{parameter: -0.1})(**arrays)

    @parameterized.product(
        name=list(TOKEN_CASES), hidden=(float("nan"), float("inf"), -float("inf"))
    )
    def test_nothing_comes_through_the_mask(self, name, hidden):
        case, arrays = EVERY[name], inputs(name)
        dirty = {
            k: a if k == "mask" else jnp.where(MASK, a, hidden)
            for k, a in arrays.items()
        }

        def run(arrays):
            trained = {k: arrays[k] for k in case.trained}
            return jax.value_and_grad(
                lambda trained: (lambda losses: (jnp.sum(losses), losses))(
                    case.loss(**{**arrays, **trained})
                ),
                has_aux=True,
            )(trained)

        (_, losses), gradient = run(dirty)
        (_, clean_losses), clean_gradient = run(arrays)
        np.testing.assert_array_equal(losses, clean_losses)
        np.testing.assert_array_equal(losses[~MASK], 0.0)
        for key in gradient:
            np.testing.assert_array_equal(gradient[key], clean_gradient[key])
            np.testing.assert_array_equal(gradient[key][~MASK], 0.0)


def test_every_public_loss_is_in_the_battery():
    tested = {
        part for case in EVERY.values() for part in gl.contract.underlying(case.loss)
    }
    public = {getattr(gl, name) for name in gl.__all__ if name.endswith("_loss")}
    assert public - tested == {gl.mpo_loss}


def test_empty_completions_give_zero():
    zeros, lengths = jnp.zeros(2), jnp.zeros(2, jnp.int32)
    np.testing.assert_array_equal(gl.nll_loss(zeros, lengths), zeros)
    for loss in (gl.ipo_loss, gl.length_normalised_dpo_loss):
        chex.assert_tree_all_finite(loss(zeros, zeros, zeros, zeros, lengths, lengths))
    for loss in (gl.orpo_loss, gl.simpo_loss, gl.alphapo_loss):
        value, gradient = jax.value_and_grad(
            lambda x, loss=loss: jnp.sum(loss(x, zeros, lengths, lengths))
        )(zeros)
        chex.assert_tree_all_finite((value, gradient))


def test_column_of_rewards_raises():
    with pytest.raises(AssertionError, match="chosen_rewards"):
        gl.bradley_terry_loss(jnp.zeros((3, 1)), jnp.zeros((3, 1)))
    with pytest.raises(AssertionError, match="margin"):
        gl.bradley_terry_loss(jnp.zeros(3), jnp.zeros(3), margin=jnp.zeros((3, 1)))


def test_other_impossible_values():
    with pytest.raises(ValueError, match=r"max_ratio is 1\.1"):
        gl.clipped_policy_loss(
            *(inputs("clipped_policy")[name] for name in POLICY), max_ratio=1.1
        )
    with pytest.raises(ValueError, match="length is 0"):
        gl.constant(0)
    with pytest.raises(ValueError, match="gamma is -1"):
        gl.simpo_loss(*inputs("simpo").values(), gamma=-1)


def test_traced_hyper_parameters_pass():
    arrays = inputs("dpo")
    losses = jax.jit(lambda beta: gl.dpo_loss(**arrays, beta=beta))(0.3)
    np.testing.assert_allclose(losses, gl.dpo_loss(**arrays, beta=0.3), rtol=1e-6)
    jax.jit(lambda value: require_positive(value=value))(-1.0)
