"""Every loss the package exports, against its formula written a second time in NumPy: a flipped sign shows.

Values and gradients are compared on random rows, in float64. The formulas come from the papers and not from the code
they judge; a new loss without one here is a failing row.
"""
# The papers write l for the rejected completion.
# ruff: noqa: E741

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit, log_expit

from gvjax import losses, tabular
from gvjax.verify.check import Check, distance


@dataclasses.dataclass(frozen=True)
class Formula:
    """A loss as its paper writes it.

    Attributes:
      text: the equation. h = w − l; w, l = log π/π_ref of chosen and rejected; ρ that of a single completion, or the
        ratio π/π_old of a token; |y| lengths.
      value: NumPy, by the loss's own argument names, arrays and hyper-parameters alike.
      settings: hyper-parameters to call both with; no two alike, so that mixing them up shows.
      wrt: the arrays to differentiate by; everything else must be constant for the gradient.
      gradient: for losses whose gradient is not the derivative of their value: NumPy, by the same names, giving the
        derivative of the loss by wrt[0] entry by entry.
    """

    text: str
    value: Callable[..., np.ndarray]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wrt: tuple[str, ...] = ("chosen_logps", "rejected_logps")
    gradient: Callable[..., np.ndarray] | None = None


Array = np.ndarray


def _w_and_l(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
) -> tuple[Array, Array]:
    return chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps


def _of_gap(loss_of_gap: Callable[..., Array]) -> Callable[..., Array]:
    """A loss that sees h alone."""

    def value(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, **settings
    ):
        w, l = _w_and_l(
            chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
        )
        return loss_of_gap(w - l, **settings)

    return value


def _of_both(loss_of_both: Callable[..., Array]) -> Callable[..., Array]:
    """A loss that sees w and l."""

    def value(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, **settings
    ):
        return loss_of_both(
            *_w_and_l(
                chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
            ),
            **settings,
        )

    return value


def _of_average_gap(loss_of_gap: Callable[..., Array]) -> Callable[..., Array]:
    """A loss that sees w/|y_w| − l/|y_l|."""

    def value(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        chosen_lengths,
        rejected_lengths,
        **settings,
    ):
        w, l = _w_and_l(
            chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
        )
        return loss_of_gap(w / chosen_lengths - l / rejected_lengths, **settings)

    return value


def _of_averages(loss_of_averages: Callable[..., Array]) -> Callable[..., Array]:
    """A loss that sees log π(y)/|y| of both, and no reference."""

    def value(
        chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, **settings
    ):
        return loss_of_averages(
            chosen_logps / chosen_lengths, rejected_logps / rejected_lengths, **settings
        )

    return value


def _smoothed(margin: Array, flipped: Array | float) -> Array:
    return -(1 - flipped) * log_expit(margin) - flipped * log_expit(-margin)


def _log_odds(average: Array) -> Array:
    return np.log(np.exp(average) / (1 - np.exp(average)))


def _aot(
    chosen_logps,
    rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    beta,
    label_smoothing,
):
    policy = np.sort(chosen_logps - rejected_logps)
    reference = np.sort(ref_chosen_logps - ref_rejected_logps)
    return _smoothed(beta * (policy - reference), label_smoothing)


def _exo(h, beta, label_smoothing):
    q = np.stack([expit(beta * h), 1 - expit(beta * h)])
    p = np.array([1 - label_smoothing, label_smoothing])[:, None]
    return (q * np.log(q / p)).sum(axis=0)


def _discopop(h, beta, tau):
    blend = 1 / (1 + np.exp(-beta * h / tau))
    return (1 - blend) * np.log(1 + np.exp(-beta * h)) + blend * np.exp(-beta * h)


def _alphapo(chosen, rejected, beta, gamma, alpha, label_smoothing):
    r_w, r_l = (
        (1 - np.exp(average) ** -alpha) / alpha for average in (chosen, rejected)
    )
    return _smoothed(beta * r_w - beta * r_l - gamma, label_smoothing)


def _kto(logps, ref_logps, desirable, kl, beta, desirable_weight, undesirable_weight):
    rho = logps - ref_logps
    good = desirable_weight * (1 - expit(beta * (rho - kl)))
    bad = undesirable_weight * (1 - expit(beta * (kl - rho)))
    return np.where(desirable, good, bad)


def _clip(ratio, advantages, epsilon, epsilon_high):
    held = np.clip(ratio, 1 - epsilon, 1 + epsilon_high)
    return -np.minimum(ratio * advantages, held * advantages)


def _per_completion(logps, old_logps, mask, combine):
    """[B, 1]: one number per completion out of its tokens' log-ratios."""
    rows = [combine((logps - old_logps)[row][mask[row]]) for row in range(len(mask))]
    return np.array(rows)[:, None]


def _ppo(logps, old_logps, advantages, mask, epsilon, epsilon_high, max_ratio):
    ratio = np.exp(logps - old_logps)
    held = np.clip(ratio, 1 - epsilon, 1 + epsilon_high)
    bounded = np.minimum(ratio, max_ratio)
    return mask * -np.minimum(bounded * advantages, held * advantages)


def _gspo(logps, old_logps, advantages, mask, epsilon, epsilon_high):
    ratio = np.exp(_per_completion(logps, old_logps, mask, np.mean))
    return mask * _clip(ratio, advantages, epsilon, epsilon_high)


def _sequence_clipped(logps, old_logps, advantages, mask, epsilon, epsilon_high):
    ratio = np.exp(_per_completion(logps, old_logps, mask, np.sum))
    return mask * _clip(ratio, advantages, epsilon, epsilon_high)


def _cispo_weight(logps, old_logps, epsilon, epsilon_high):
    return np.clip(np.exp(logps - old_logps), 1 - epsilon, 1 + epsilon_high)


def _sapo(
    logps, old_logps, advantages, mask, temperature_positive, temperature_negative
):
    tau = np.where(advantages > 0, temperature_positive, temperature_negative)
    ratio = np.exp(logps - old_logps)
    return mask * -4 / tau / (1 + np.exp(-tau * (ratio - 1))) * advantages


def _gmpo(logps, old_logps, advantages, mask, epsilon, epsilon_high):
    log_ratio = logps - old_logps
    held = np.where(
        advantages > 0,
        np.minimum(log_ratio, epsilon_high),
        np.maximum(log_ratio, -epsilon),
    )
    ratio = np.exp(_per_completion(held, np.zeros_like(held), mask, np.mean))
    return mask * -advantages * ratio


def _vespo_weight(
    logps,
    old_logps,
    advantages,
    mask,
    k_positive,
    lambda_positive,
    k_negative,
    lambda_negative,
):
    w = np.exp(_per_completion(logps, old_logps, mask, np.sum))
    positive = advantages >= 0
    k = np.where(positive, k_positive, k_negative)
    decay = np.where(positive, lambda_positive, lambda_negative)
    return w**k * np.exp(decay * (1 - w))


def _clipped_value(values, old_values, returns, mask, epsilon):
    held = np.clip(values, old_values - epsilon, old_values + epsilon)
    return mask * 0.5 * np.maximum((values - returns) ** 2, (held - returns) ** 2)


TOKENS: Mapping[str, Any] = {"wrt": ("logps",)}

FORMULAS: Mapping[str, Formula] = {
    "dpo_loss": Formula(
        "−(1−ε) log σ(βh) − ε log σ(−βh)",
        _of_gap(lambda h, beta, label_smoothing: _smoothed(beta * h, label_smoothing)),
        {"beta": 0.7, "label_smoothing": 0.15},
    ),
    "soft_dpo_loss": Formula(
        "−p log σ(βh) − (1−p) log σ(−βh)",
        _of_gap(
            lambda h, chosen_probability, beta: _smoothed(
                beta * h, 1 - chosen_probability
            )
        ),
        {"beta": 0.7},
    ),
    "robust_dpo_loss": Formula(
        "(−(1−ε) log σ(βh) + ε log σ(−βh))/(1−2ε)",
        _of_gap(
            lambda h, beta, label_smoothing: (
                (
                    -(1 - label_smoothing) * log_expit(beta * h)
                    + label_smoothing * log_expit(-beta * h)
                )
                / (1 - 2 * label_smoothing)
            )
        ),
        {"beta": 0.7, "label_smoothing": 0.15},
    ),
    "ipo_loss": Formula(
        "(w/|y_w| − l/|y_l| − 1/2τ)²",
        _of_average_gap(lambda h, tau: (h - 1 / (2 * tau)) ** 2),
        {"tau": 0.3},
    ),
    "summed_ipo_loss": Formula(
        "(h − 1/2τ)²", _of_gap(lambda h, tau: (h - 1 / (2 * tau)) ** 2), {"tau": 0.3}
    ),
    "hinge_loss": Formula(
        "max(0, 1 − βh)",
        _of_gap(lambda h, beta: np.maximum(0, 1 - beta * h)),
        {"beta": 0.3},
    ),
    "length_normalised_dpo_loss": Formula(
        "−log σ(βw/|y_w| − βl/|y_l|)",
        _of_average_gap(lambda h, beta: -log_expit(beta * h)),
        {"beta": 0.7},
    ),
    "exo_loss": Formula(
        "KL((σ(βh), σ(−βh)) ‖ (1−ε, ε))",
        _of_gap(_exo),
        {"beta": 0.7, "label_smoothing": 0.15},
    ),
    "discopop_loss": Formula(
        "(1−σ(βh/τ)) log(1+e^(−βh)) + σ(βh/τ) e^(−βh)",
        _of_gap(_discopop),
        {"beta": 0.3, "tau": 0.6},
    ),
    "aot_loss": Formula(
        "DPO on sorted log π(y_w)/π(y_l) less the sorted reference's",
        _aot,
        {"beta": 0.7, "label_smoothing": 0.15},
    ),
    "aot_unpaired_loss": Formula(
        "DPO on sorted w less sorted l",
        _of_both(
            lambda w, l, beta, label_smoothing: _smoothed(
                beta * (np.sort(w) - np.sort(l)), label_smoothing
            )
        ),
        {"beta": 0.7, "label_smoothing": 0.15},
    ),
    "nca_loss": Formula(
        "−log σ(βw) − ½ log σ(−βw) − ½ log σ(−βl)",
        _of_both(
            lambda w, l, beta: (
                -log_expit(beta * w) - (log_expit(-beta * w) + log_expit(-beta * l)) / 2
            )
        ),
        {"beta": 0.7},
    ),
    "bco_loss": Formula(
        "−log σ(βw − δ) − log σ(−(βl − δ))",
        _of_both(
            lambda w, l, beta, delta: (
                -log_expit(beta * w - delta) - log_expit(-(beta * l - delta))
            )
        ),
        {"beta": 0.7, "delta": 0.25},
    ),
    "sppo_loss": Formula(
        "(w − (p−½)/β)² + (l + (p−½)/β)²",
        _of_both(
            lambda w, l, chosen_probability, beta: (
                (w - (chosen_probability - 0.5) / beta) ** 2
                + (l + (chosen_probability - 0.5) / beta) ** 2
            )
        ),
        {"beta": 0.7},
    ),
    "sppo_hard_loss": Formula(
        "(w − 1/2β)² + (l + 1/2β)²",
        _of_both(lambda w, l, beta: (w - 0.5 / beta) ** 2 + (l + 0.5 / beta) ** 2),
        {"beta": 0.5},
    ),
    "apo_zero_loss": Formula(
        "1 − σ(βw) + σ(βl)",
        _of_both(lambda w, l, beta: 1 - expit(beta * w) + expit(beta * l)),
        {"beta": 0.7},
    ),
    "apo_down_loss": Formula(
        "σ(βw) + 1 − σ(βh)",
        _of_both(lambda w, l, beta: expit(beta * w) + 1 - expit(beta * (w - l))),
        {"beta": 0.7},
    ),
    "nll_loss": Formula(
        "−log π(y_w)/|y_w|",
        lambda chosen_logps, chosen_lengths: -chosen_logps / chosen_lengths,
        wrt=("chosen_logps",),
    ),
    "simpo_loss": Formula(
        "DPO on β(log π(y_w)/|y_w| − log π(y_l)/|y_l|) − γ",
        _of_averages(
            lambda c, r, beta, gamma, label_smoothing: _smoothed(
                beta * (c - r) - gamma, label_smoothing
            )
        ),
        {"beta": 0.7, "gamma": 0.4, "label_smoothing": 0.15},
    ),
    "alphapo_loss": Formula(
        "DPO on β r(y_w) − β r(y_l) − γ, r = (1 − π^(−α/|y|))/α",
        _of_averages(_alphapo),
        {"beta": 0.7, "gamma": 0.4, "alpha": 0.3, "label_smoothing": 0.15},
    ),
    "cpo_loss": Formula(
        "DPO without reference − λ log π(y_w)/|y_w|",
        lambda chosen_logps, rejected_logps, chosen_lengths, beta, nll_coef, label_smoothing: (
            _smoothed(beta * (chosen_logps - rejected_logps), label_smoothing)
            - nll_coef * chosen_logps / chosen_lengths
        ),
        {"beta": 0.7, "nll_coef": 0.4, "label_smoothing": 0.15},
    ),
    "orpo_loss": Formula(
        "−log p_w − λ log σ(log odds p_w − log odds p_l), p = π^(1/|y|)",
        _of_averages(
            lambda c, r, odds_coef: (
                -c - odds_coef * log_expit(_log_odds(c) - _log_odds(r))
            )
        ),
        {"odds_coef": 0.4},
    ),
    "xpo_loss": Formula(
        "−log σ(βh) + α log π(ỹ)",
        lambda chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_from_reference, beta, alpha: (
            -log_expit(
                beta
                * (
                    chosen_logps
                    - ref_chosen_logps
                    - rejected_logps
                    + ref_rejected_logps
                )
            )
            + alpha * np.where(chosen_from_reference, chosen_logps, rejected_logps)
        ),
        {"beta": 0.7, "alpha": 0.3},
    ),
    "hypo_kl_loss": Formula(
        "λρ, gradient λρ ∇log π",
        lambda logps, ref_logps, kl_coef: kl_coef * (logps - ref_logps),
        {"kl_coef": 0.4},
        wrt=("logps",),
        gradient=lambda logps, ref_logps, kl_coef: kl_coef * (logps - ref_logps),
    ),
    "kto_loss": Formula(
        "λ_D (1 − σ(β(ρ − z))), λ_U (1 − σ(β(z − ρ)))",
        _kto,
        {"beta": 0.7, "desirable_weight": 1.5, "undesirable_weight": 0.5},
        wrt=("logps",),
    ),
    "apo_zero_unpaired_loss": Formula(
        "λ_D (1 − σ(βρ)), λ_U σ(βρ)",
        lambda logps, ref_logps, desirable, **settings: _kto(
            logps, ref_logps, desirable, 0.0, **settings
        ),
        {"beta": 0.7, "desirable_weight": 1.5, "undesirable_weight": 0.5},
        wrt=("logps",),
    ),
    "bco_unpaired_loss": Formula(
        "−log σ(βρ − δ), −log σ(−(βρ − δ))",
        lambda logps, ref_logps, desirable, beta, delta: (
            -log_expit(
                np.where(desirable, 1, -1) * (beta * (logps - ref_logps) - delta)
            )
        ),
        {"beta": 0.7, "delta": 0.25},
        wrt=("logps",),
    ),
    "mpo_loss": Formula(
        "0.8 DPO + 0.2 BCO + NLL, β = 0.1",
        lambda chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths: (
            -0.8
            * log_expit(
                0.1
                * (
                    chosen_logps
                    - ref_chosen_logps
                    - rejected_logps
                    + ref_rejected_logps
                )
            )
            - 0.2 * log_expit(0.1 * (chosen_logps - ref_chosen_logps))
            - 0.2 * log_expit(-0.1 * (rejected_logps - ref_rejected_logps))
            - chosen_logps / chosen_lengths
        ),
    ),
    "bradley_terry_loss": Formula(
        "−q log σ(Δ) − (1−q) log σ(−Δ), Δ = r_w − r_l − m, q = p(1−ε) + (1−p)ε",
        lambda chosen_rewards, rejected_rewards, margin, chosen_probability, label_smoothing: (
            _smoothed(
                chosen_rewards - rejected_rewards - margin,
                1
                - chosen_probability * (1 - label_smoothing)
                - (1 - chosen_probability) * label_smoothing,
            )
        ),
        {"label_smoothing": 0.15},
        wrt=("chosen_rewards", "rejected_rewards"),
    ),
    "centering_penalty": Formula(
        "(r_w + r_l)²",
        lambda chosen_rewards, rejected_rewards: (
            (chosen_rewards + rejected_rewards) ** 2
        ),
        wrt=("chosen_rewards", "rejected_rewards"),
    ),
    "rebel_loss": Formula(
        "(h/η − (r − r'))²",
        _of_gap(lambda h, margin, eta: (h / eta - margin) ** 2),
        {"eta": 0.7},
    ),
    "a_star_po_loss": Formula(
        "(βρ − (r − V*))²",
        lambda logps, ref_logps, rewards, optimal_values, beta: (
            (beta * (logps - ref_logps) - (rewards - optimal_values)) ** 2
        ),
        {"beta": 0.7},
        wrt=("logps",),
    ),
    "reinforce_loss": Formula(
        "−A log π",
        lambda logps, old_logps, advantages, mask: mask * -advantages * logps,
        **TOKENS,
    ),
    "clipped_policy_loss": Formula(
        "−min(min(ρ, δ)A, clip(ρ, 1−ε, 1+ε⁺)A)",
        _ppo,
        {"epsilon": 0.2, "epsilon_high": 0.35, "max_ratio": 1.8},
        **TOKENS,
    ),
    "gspo_loss": Formula(
        "−min(sA, clip(s)A), s = e^(mean log ρ)",
        _gspo,
        {"epsilon": 0.2, "epsilon_high": 0.35},
        **TOKENS,
    ),
    "sequence_clipped_loss": Formula(
        "−min(ρA, clip(ρ)A), ρ of the whole completion",
        _sequence_clipped,
        {"epsilon": 0.2, "epsilon_high": 0.35},
        **TOKENS,
    ),
    "cispo_loss": Formula(
        "−sg(clip(ρ, 1−ε, 1+ε⁺)) A log π",
        lambda logps, old_logps, advantages, mask, epsilon, epsilon_high: (
            mask
            * -_cispo_weight(logps, old_logps, epsilon, epsilon_high)
            * advantages
            * logps
        ),
        {"epsilon": 0.2, "epsilon_high": 0.35},
        wrt=("logps",),
        gradient=lambda logps, old_logps, advantages, mask, epsilon, epsilon_high: (
            mask * -_cispo_weight(logps, old_logps, epsilon, epsilon_high) * advantages
        ),
    ),
    "sapo_loss": Formula(
        "−(4/τ) σ(τ(ρ − 1)) A, τ by the sign of A",
        _sapo,
        {"temperature_positive": 0.8, "temperature_negative": 1.3},
        **TOKENS,
    ),
    "gmpo_loss": Formula(
        "−A e^(mean clipped log ρ)",
        _gmpo,
        {"epsilon": 0.3, "epsilon_high": 0.2},
        **TOKENS,
    ),
    "vespo_loss": Formula(
        "−sg(w^k e^(λ(1−w))) A log π, w of the whole completion",
        lambda logps, old_logps, advantages, mask, **settings: (
            mask
            * -_vespo_weight(logps, old_logps, advantages, mask, **settings)
            * advantages
            * logps
        ),
        {
            "k_positive": 1.5,
            "lambda_positive": 0.7,
            "k_negative": 1.2,
            "lambda_negative": 0.9,
        },
        wrt=("logps",),
        gradient=lambda logps, old_logps, advantages, mask, **settings: (
            mask
            * -_vespo_weight(logps, old_logps, advantages, mask, **settings)
            * advantages
        ),
    ),
    "clipped_value_loss": Formula(
        "½ max((V − R)², (clip(V, V_old ± ε) − R)²)",
        _clipped_value,
        {"epsilon": 0.2},
        wrt=("values",),
    ),
    "reverse_kl": Formula("ρ", lambda log_ratios: log_ratios, wrt=("log_ratios",)),
    "forward_kl": Formula(
        "f'(e^ρ) = 1 − e^(−ρ)",
        lambda log_ratios: 1 - np.exp(-log_ratios),
        wrt=("log_ratios",),
    ),
    "js_divergence": Formula(
        "f'(e^ρ) = log(2 e^ρ/(1 + e^ρ))",
        lambda log_ratios: np.log(2 * np.exp(log_ratios) / (1 + np.exp(log_ratios))),
        wrt=("log_ratios",),
    ),
    "alpha_divergence": Formula(
        "f'(e^ρ) = (e^((α−1)ρ) − 1)/(α−1)",
        lambda log_ratios, alpha: (np.exp(log_ratios) ** (alpha - 1) - 1) / (alpha - 1),
        {"alpha": 0.4},
        wrt=("log_ratios",),
    ),
    "kto_kl": Formula(
        "max(0, mean log π/π_ref), without gradient",
        lambda kl_logps, ref_kl_logps: np.maximum(0, np.mean(kl_logps - ref_kl_logps)),
        wrt=("kl_logps",),
        gradient=lambda kl_logps, ref_kl_logps: np.zeros_like(kl_logps),
    ),
    "length_desensitised_logps": Formula(
        "Σ_{t<=l} log π + α Σ_{t>l} log π",
        lambda logps, mask, shared_lengths, alpha: (
            np.where(np.arange(logps.shape[1]) < shared_lengths[:, None], 1, alpha)
            * mask
            * logps
        ).sum(axis=1),
        {"alpha": 0.4},
        **TOKENS,
    ),
    "wpo_weights": Formula(
        "e^(mean(log π − log Σπ²)), without gradient",
        lambda logps, mask, log_collisions: np.exp(
            _per_completion(logps, log_collisions, mask, np.mean)[:, 0]
        ),
        wrt=("logps",),
        gradient=lambda logps, mask, log_collisions: np.zeros_like(logps),
    ),
    "token_nll_loss": Formula("−log π", lambda logps, mask: mask * -logps, **TOKENS),
    "dft_loss": Formula(
        "−sg(π) log π",
        lambda logps, mask: mask * -np.exp(logps) * logps,
        wrt=("logps",),
        gradient=lambda logps, mask: mask * -np.exp(logps),
    ),
}


def exported() -> list[str]:
    """Names in `gvjax.losses` that are losses by their ending, or have a formula here."""
    return [
        name
        for name in losses.__all__
        if name.endswith(("_loss", "_penalty")) or name in FORMULAS
    ]


def arrays(seed: int, per_token: bool) -> dict[str, Array]:
    """Random arguments by name: eight rows; token losses get [8, 5] with ragged masks.

    No two are alike and none is 0, and log-ratios reach to both sides of every clip.
    """
    rng = np.random.default_rng(seed)
    rows, tokens = 8, 5
    shape = (rows, tokens) if per_token else (rows,)
    lengths = np.array([1, 2, 3, 4, 5, 3, 2, 5])
    logps = -rng.uniform(1.0, 3.0, shape)
    drawn: dict[str, Array] = {
        "logps": logps,
        "old_logps": logps + rng.uniform(-0.6, 0.6, shape),
        "ref_logps": -rng.uniform(1.0, 3.0, shape),
        "advantages": rng.uniform(0.3, 1.5, shape)
        * rng.choice([-1.0, 1.0], (rows, 1)[: len(shape)]),
        "mask": np.arange(tokens) < lengths[:, None],
        "desirable": np.arange(rows) % 2 == 0,
        "chosen_from_reference": np.arange(rows) % 3 == 0,
        "kl": np.array(0.375),
        "log_ratios": rng.uniform(-1.5, 1.5, rows),
        "log_collisions": -rng.uniform(1.0, 3.0, shape),
        "shared_lengths": np.minimum(lengths, lengths[::-1]),
        "chosen_lengths": lengths,
        "rejected_lengths": lengths[::-1].copy(),
        "chosen_probability": rng.uniform(0.1, 0.9, rows),
        "margin": rng.uniform(-1.0, 1.0, rows),
        "rewards": rng.standard_normal(rows),
        "optimal_values": rng.standard_normal(rows),
        "chosen_rewards": rng.standard_normal(rows),
        "rejected_rewards": rng.standard_normal(rows),
        "values": rng.standard_normal(shape),
    }
    drawn["ref_kl_logps"] = -rng.uniform(1.0, 3.0, rows)
    drawn["kl_logps"] = drawn["ref_kl_logps"] + rng.uniform(-0.3, 0.7, rows)
    drawn["old_values"] = drawn["values"] + rng.uniform(-0.5, 0.5, shape)
    drawn["returns"] = drawn["values"] + rng.uniform(-0.7, 0.7, shape)
    for name in (
        "chosen_logps",
        "rejected_logps",
        "ref_chosen_logps",
        "ref_rejected_logps",
    ):
        drawn[name] = -rng.uniform(1.0, 5.0, rows)
    return drawn


def error(loss: Callable[..., jax.Array], formula: Formula, seed: int) -> float:
    """Largest difference between a loss and its formula, in value and in gradient."""
    known = arrays(seed, per_token="mask" in inspect.signature(loss).parameters)
    asked = [name for name in inspect.signature(loss).parameters if name in known]
    given = {name: known[name] for name in asked}
    on_device = {name: jnp.asarray(array) for name, array in given.items()}
    value = loss(**on_device, **formula.settings)
    expected = formula.value(**given, **formula.settings)
    if value.shape != expected.shape:
        return np.inf
    errors = [distance(value, expected)]
    for name in asked:
        if not jnp.issubdtype(on_device[name].dtype, jnp.floating):
            continue
        # Constants by contract: the reference is data, advantages and targets are fixed for the step.
        if name not in formula.wrt and name not in CONSTANTS:
            continue

        def total(array, name=name):
            return jnp.sum(loss(**{**on_device, name: array}, **formula.settings))

        found = np.asarray(jax.grad(total)(on_device[name]))
        if name in CONSTANTS:
            errors.append(distance(found, 0.0))
        elif formula.gradient is not None:
            errors.append(
                distance(found, formula.gradient(**given, **formula.settings))
            )
        else:
            errors.append(distance(found, _slopes(formula, given, name)))
    return max(errors)


CONSTANTS = ("advantages", "old_logps", "old_values", "returns", "kl")


def _slopes(formula: Formula, given: Mapping[str, Array], name: str) -> Array:
    """Derivative of the formula's sum by each entry of one array, by central differences (error about 1e-9)."""
    step = 1e-6
    result = np.zeros(given[name].shape)
    for index in np.ndindex(*result.shape):
        totals = []
        for sign in (1, -1):
            moved = given[name].copy()
            moved[index] += sign * step
            totals.append(
                formula.value(**{**given, name: moved}, **formula.settings).sum()
            )
        result[index] = (totals[0] - totals[1]) / (2 * step)
    return result


def rebel_reaches_gibbs(seed: int) -> float:
    """REBEL with exact rewards is 0 at π ∝ π_t exp(η r), for every pair."""
    rng = np.random.default_rng(seed)
    tree = tabular.token_tree(vocabulary=3, horizon=2, eos=0)
    old = tabular.completion_logps(tree, tabular.random_policy(rng, tree))
    rewards, eta = rng.standard_normal(len(old)), 0.7
    policy = tabular.gibbs(old, rewards, 1 / eta)
    first, second = tabular.bradley_terry.all_pairs(len(old))
    found = losses.rebel_loss(
        chosen_logps=jnp.asarray(policy[first]),
        rejected_logps=jnp.asarray(policy[second]),
        ref_chosen_logps=jnp.asarray(old[first]),
        ref_rejected_logps=jnp.asarray(old[second]),
        margin=jnp.asarray(rewards[first] - rewards[second]),
        eta=eta,
    )
    return distance(found, 0.0)


def alphapo_limit(seed: int) -> float:
    known = arrays(seed, per_token=False)
    pair: dict[str, Any] = {
        name: jnp.asarray(known[name])
        for name in (
            "chosen_logps",
            "rejected_logps",
            "chosen_lengths",
            "rejected_lengths",
        )
    }
    return distance(
        losses.alphapo_loss(**pair, beta=0.7, gamma=0.4, alpha=0.0),
        losses.simpo_loss(**pair, beta=0.7, gamma=0.4),
    )


def alpha_divergence_limit(seed: int) -> float:
    log_ratios = jnp.asarray(arrays(seed, per_token=False)["log_ratios"])
    return distance(losses.alpha_divergence(log_ratios, alpha=1.0), log_ratios)


def checks() -> tuple[Check, ...]:
    """One row per exported loss, and the special cases that papers name."""
    rows = []
    for name in exported():
        formula = FORMULAS.get(name)
        if formula is None:
            text = "no formula in gvjax/verify/signs.py: write it there, from the paper"
            rows.append(Check(name, text, 0.0, lambda seed: np.inf))
            continue

        def error_of(seed, name=name, formula=formula):
            return error(getattr(losses, name), formula, seed)

        rows.append(Check(name, formula.text, 1e-7, error_of))
    rows += [
        Check(
            "rebel_loss at its optimum",
            "0 at π_t exp(ηr)/Z, for every pair",
            1e-12,
            rebel_reaches_gibbs,
        ),
        Check("alphapo_loss at α = 0", "SimPO", 1e-12, alphapo_limit),
        Check("alpha_divergence at α = 1", "ρ", 1e-12, alpha_divergence_limit),
    ]
    return tuple(rows)
