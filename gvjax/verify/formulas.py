"""Every loss a second time, in NumPy: its formula comes from the paper, and not from the code that is judged by it.

`signs` holds each exported loss to its formula here.
"""
# The papers write l for the rejected completion.
# ruff: noqa: E741

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy.special import expit, log_expit


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
