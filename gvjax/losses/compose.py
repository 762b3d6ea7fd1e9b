"""Losses made of losses, and the table of TRL's names."""

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from gvjax.losses import anchored, preference, unpaired
from gvjax.losses.contract import VOCABULARY, Loss, arguments, underlying
from gvjax.losses.reference_free import (
    MAX_EXPONENT,
    alphapo_loss,
    cpo_loss,
    nll_loss,
    orpo_loss,
    simpo_loss,
)

_COUPLED = (preference.aot_loss, preference.aot_unpaired_loss)

# β log Z(x) cancels only in the difference of the two rewards; these use a reward by itself, or another pairing.
_NOT_DIFFERENCES = (
    *_COUPLED,
    anchored.nca_loss,
    anchored.bco_loss,
    anchored.sppo_loss,
    anchored.sppo_hard_loss,
    anchored.apo_zero_loss,
    anchored.apo_down_loss,
)


def weighted_sum(*terms: tuple[float, Loss]) -> Loss:
    """Makes one loss of several: each term gets the arrays it asks for, by name.

        weighted_sum((1.0, dpo_loss), (0.2, nll_loss))        # DPO with a likelihood term

    Args:
      *terms: (weight, loss); weights are finite, losses ask by the vocabulary. Hyper-parameters are bound beforehand.

    Returns:
      A loss whose signature lists what the terms need together, in the vocabulary's order.

    Raises:
      ValueError: no terms, a weight that is not finite, or a loss that asks for an unknown array.
    """
    if not terms:
        raise ValueError(
            "weighted_sum got no terms; pass pairs such as weighted_sum((1.0, dpo_loss), (0.2, nll_loss))"
        )
    for weight, loss in terms:
        if isinstance(weight, numbers.Real) and not math.isfinite(weight):
            raise ValueError(
                f"the weight {weight} of {loss} is not finite; leave the term out instead"
            )
    needs = [arguments(loss) for _, loss in terms]
    names = [name for name in VOCABULARY if any(name in need for need in needs)]

    def total(*args: jax.Array, **kwargs: jax.Array) -> jax.Array:
        given = signature.bind(*args, **kwargs).arguments
        parts = [
            weight * loss(**{name: given[name] for name in need})
            for (weight, loss), need in zip(terms, needs)
        ]
        return functools.reduce(jnp.add, parts)

    signature = _signature(names)
    return _describe(total, "weighted_sum", signature, tuple(loss for _, loss in terms))


def reference_free(loss: Loss) -> Loss:
    """Makes a loss that drops the reference policy: log π/π_ref becomes log π.

        reference_free(hinge_loss)      # SLiC-HF's ranking term

    Args:
      loss: asks for `ref_chosen_logps` and `ref_rejected_logps`.

    Returns:
      The loss with both taken as 0, and no longer asking for them.

    Raises:
      ValueError: the loss does not ask for them.
    """
    need = arguments(loss)
    references = ("ref_chosen_logps", "ref_rejected_logps")
    if not set(references) <= set(need):
        raise ValueError(
            f"the loss asks for {', '.join(need)} only; it has no reference policy to drop"
        )
    names = [name for name in need if name not in references]

    def free(*args: jax.Array, **kwargs: jax.Array) -> jax.Array:
        given = signature.bind(*args, **kwargs).arguments
        zeros = jnp.zeros(jnp.shape(given["chosen_logps"]), jnp.float32)
        return loss(**given, **dict.fromkeys(references, zeros))

    signature = _signature(names)
    return _describe(free, "reference_free", signature, (loss,))


def with_divergence(loss: Loss, divergence: Callable[[jax.Array], jax.Array]) -> Loss:
    """Makes a loss that regularises with another f-divergence than the reverse KL.

    Log-ratios ρ are replaced by f'(e^ρ):

        with_divergence(functools.partial(dpo_loss, beta=0.1), forward_kl)

    Args:
      loss: on the gap between chosen and rejected. Others are refused: their rewards keep a term log Z(x) that cancels
        only in the gap.
      divergence: f32[B] -> f32[B], ρ -> f'(e^ρ): `reverse_kl` (changes nothing), `forward_kl`, `js_divergence`,
        `functools.partial(alpha_divergence, alpha=0.5)`.

    Returns:
      A loss that asks for the same arrays.

    Raises:
      ValueError: the loss is known not to be on the gap, or has no reference.

    References:
      Wang et al., 2023, https://arxiv.org/abs/2309.16240.
    """
    for part in underlying(loss):
        if part in _NOT_DIFFERENCES:
            raise ValueError(
                f"{part.__name__} is not a function of the gap chosen − rejected, so no f-divergence but the reverse KL "
                "is defined for it; use dpo_loss, robust_dpo_loss, ipo_loss, hinge_loss, "
                "length_normalised_dpo_loss, exo_loss or discopop_loss"
            )
    names = arguments(loss)
    references = {"ref_chosen_logps", "ref_rejected_logps"}
    if not references <= set(names):
        raise ValueError(
            f"the loss asks for {', '.join(names)} only; without a reference policy there is no divergence from it"
        )

    def diverged(*args: jax.Array, **kwargs: jax.Array) -> jax.Array:
        given = dict(signature.bind(*args, **kwargs).arguments)
        chosen, rejected = preference.log_ratios(
            *(given[name] for name in VOCABULARY[:4])
        )
        given["chosen_logps"] = divergence(chosen)
        given["rejected_logps"] = divergence(rejected)
        for name in references:
            given[name] = jnp.zeros_like(chosen)
        return loss(**given)

    signature = _signature(names)
    return _describe(diverged, "with_divergence", signature, (loss,))


def reverse_kl(log_ratios: jax.Array) -> jax.Array:
    """f32[B]: f'(e^ρ) = ρ, up to a constant: DPO's own divergence."""
    return log_ratios


def forward_kl(log_ratios: jax.Array) -> jax.Array:
    """f32[B]: f'(e^ρ) = 1 − e^(−ρ); e^(−ρ) is held at e^80, where float32 ends."""
    return -jnp.expm1(jnp.minimum(-log_ratios, MAX_EXPONENT))


def js_divergence(log_ratios: jax.Array) -> jax.Array:
    """f32[B]: f'(e^ρ) = ln 2 + log σ(ρ)."""
    return math.log(2.0) + jax.nn.log_sigmoid(log_ratios)


def alpha_divergence(log_ratios: jax.Array, *, alpha: float) -> jax.Array:
    """f32[B]: f'(e^ρ) = (e^((α − 1)ρ) − 1)/(α − 1), the limit ρ at α = 1; the power is held at e^80."""
    if abs(alpha - 1.0) < 1e-6:
        return log_ratios
    exponent = jnp.minimum((alpha - 1.0) * log_ratios, MAX_EXPONENT)
    return jnp.expm1(exponent) / (alpha - 1.0)


def couples_rows(loss: Loss) -> bool:
    """Whether a row's loss depends on other rows, so that row weights and micro-batches would change its meaning."""
    return any(part in _COUPLED for part in underlying(loss))


def _signature(names: list[str] | tuple[str, ...]) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [inspect.Parameter(name, kind, annotation=jax.Array) for name in names],
        return_annotation=jax.Array,
    )


def _describe(
    function: Callable[..., jax.Array],
    name: str,
    signature: inspect.Signature,
    parts: tuple[Loss, ...],
) -> Loss:
    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"f32[B], unreduced; made by `{name}`."
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.parts = parts  # type: ignore[attr-defined]
    return function


mpo_loss = weighted_sum(
    (0.8, preference.dpo_loss), (0.2, anchored.bco_loss), (1.0, nll_loss)
)
"""Mixed preference optimisation: 0.8 DPO + 0.2 BCO + 1.0 likelihood, β = 0.1, as TRL sets the paper's method.

Wang et al., 2024, https://arxiv.org/abs/2411.10442.
"""


def _with_nll(loss: Loss) -> Loss:
    return weighted_sum((1.0, loss), (1.0, nll_loss))


_bind = functools.partial

TRL_NAMES: Mapping[str, Loss] = MappingProxyType(
    {
        # DPOTrainer(loss_type=...), beta 0.1.
        "sigmoid": _bind(preference.dpo_loss, beta=0.1),
        "hinge": _bind(preference.hinge_loss, beta=0.1),
        "ipo": _bind(preference.ipo_loss, tau=0.1),
        "exo_pair": _bind(preference.exo_loss, beta=0.1, label_smoothing=1e-3),
        "nca_pair": _bind(anchored.nca_loss, beta=0.1),
        "robust": _bind(preference.robust_dpo_loss, beta=0.1, label_smoothing=0.0),
        "bco_pair": _bind(anchored.bco_loss, beta=0.1),
        "sppo_hard": _bind(anchored.sppo_hard_loss, beta=0.1),
        "aot": _bind(preference.aot_loss, beta=0.1),
        "aot_unpaired": _bind(preference.aot_unpaired_loss, beta=0.1),
        "apo_zero": _bind(anchored.apo_zero_loss, beta=0.1),
        "apo_down": _bind(anchored.apo_down_loss, beta=0.1),
        "discopop": _bind(preference.discopop_loss, beta=0.1, tau=0.05),
        "sft": nll_loss,
        "sigmoid_norm": _bind(preference.length_normalised_dpo_loss, beta=0.1),
        # Several loss types at once, with the weights of TRL's paper index.
        "mpo": mpo_loss,
        # OnlineDPOTrainer; "sigmoid" is as above.
        "online_ipo": _bind(preference.summed_ipo_loss, tau=0.1),
        # CPOTrainer(loss_type=...): cpo_alpha 1 times the likelihood, beta 0.1.
        "cpo": _bind(cpo_loss, beta=0.1),
        "cpo_hinge": _with_nll(reference_free(_bind(preference.hinge_loss, beta=0.1))),
        "cpo_ipo": _with_nll(reference_free(_bind(preference.ipo_loss, tau=0.1))),
        "simpo": _with_nll(_bind(simpo_loss, beta=0.1, gamma=0.5)),
        "alphapo": _bind(alphapo_loss, beta=0.1, gamma=0.5, alpha=0.0),
        # ORPOTrainer.
        "orpo": _bind(orpo_loss, odds_coef=0.1),
        # TPOTrainer without its likelihood of a third, gold completion.
        "tpo": reference_free(_bind(preference.dpo_loss, beta=0.01)),
        "tpo-l": _bind(simpo_loss, beta=0.01, gamma=0.5),
        # KTOTrainer(loss_type=...) and BCOTrainer: single completions, UNPAIRED_VOCABULARY.
        "kto": _bind(unpaired.kto_loss, beta=0.1),
        "apo_zero_unpaired": _bind(unpaired.apo_zero_unpaired_loss, beta=0.1),
        "bco": _bind(unpaired.bco_unpaired_loss, beta=0.1),
    }
)
"""TRL's loss names (TRL 1.0 to 1.16) -> the loss here, with TRL's default hyper-parameters.

Names that two trainers share carry the trainer's as a prefix. Bind others over them:
`functools.partial(TRL_NAMES["sigmoid"], beta=0.5)`. Policy-gradient names are in
`gvjax.losses.policy_gradient.TRL_POLICY_LOSSES`; XPO, whose loss must know which completion the reference policy wrote,
is `xpo_loss`.
"""
