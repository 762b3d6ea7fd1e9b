"""Losses on pairs that need no reference policy, and the likelihood term that often goes with them."""

import jax
import jax.numpy as jnp

from gvjax.losses.contract import (
    float_rows,
    lengths_like,
    require_non_negative,
    require_positive,
    require_smoothing,
)
from gvjax.losses.preference import cross_entropy

# exp of more than this nears the end of float32; beyond it the value is held and the gradient is 0.
MAX_EXPONENT = 80.0


def nll_loss(chosen_logps: jax.Array, chosen_lengths: jax.Array) -> jax.Array:
    """Negative log-likelihood of the chosen completion per token, per pair.

        loss = −(1/|y_w|) log π(y_w|x)

    TRL's "sft" averages over all tokens of the batch, so that long completions count more; the mean of this loss
    weighted by `chosen_lengths` is that number. Equal lengths make both the same.

    Args:
      chosen_logps: f32[B], nats, summed over the completion, under the policy.
      chosen_lengths: int32[B], completion tokens, the EOS included; an empty completion gives 0.

    Returns:
      f32[B], nats per token, unreduced.
    """
    (chosen,) = float_rows(chosen_logps=chosen_logps)
    (count,) = lengths_like(chosen, chosen_lengths=chosen_lengths)
    return -chosen / count


def simpo_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    chosen_lengths: jax.Array,
    rejected_lengths: jax.Array,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Simple preference optimisation loss, per pair.

        loss = −log σ(Δ),   Δ = (β/|y_w|) log π(y_w) − (β/|y_l|) log π(y_l) − γ

    With label smoothing ε: −(1 − ε) log σ(Δ) − ε log σ(−Δ), as TRL has it; the paper has none.

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      chosen_lengths, rejected_lengths: int32[B], completion tokens, the EOS included.
      beta: > 0, per token. The paper used 2 to 2.5; TRL's default is 0.1.
      gamma: >= 0, target margin; the paper tuned it between 0.3 and 1.6. TRL's default is 0.5.
      label_smoothing: ε in [0, 0.5).

    Returns:
      f32[B], unreduced.

    References:
      Meng et al., 2024, https://arxiv.org/abs/2405.14734, Eq. 6. TRL's "simpo" adds `cpo_alpha` times its NLL.
    """
    require_positive(beta=beta)
    require_non_negative(gamma=gamma)
    require_smoothing(label_smoothing)
    chosen, rejected = _averages(
        chosen_logps, rejected_logps, chosen_lengths, rejected_lengths
    )
    return cross_entropy(1.0 - label_smoothing, beta * (chosen - rejected) - gamma)


def alphapo_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    chosen_lengths: jax.Array,
    rejected_lengths: jax.Array,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    alpha: float = 0.25,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """AlphaPO: SimPO with another shape of the reward, per pair.

        loss = −log σ(β r(y_w) − β r(y_l) − γ),   r(y) = (1 − π(y)^(−α/|y|)) / α

    α → 0 gives SimPO, α = 0 exactly. π^(−α/|y|) is held at e^80, where float32 ends.

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      chosen_lengths, rejected_lengths: int32[B], completion tokens, the EOS included.
      beta: > 0, per token. TRL's default is 0.1.
      gamma: >= 0, target margin. TRL's default is 0.5.
      alpha: any finite number; the paper's best were small. TRL's default is 0.
      label_smoothing: ε in [0, 0.5), as in `simpo_loss`.

    Returns:
      f32[B], unreduced.

    References:
      Gupta et al., 2025, https://arxiv.org/abs/2501.03884. TRL's "alphapo".
    """
    require_positive(beta=beta)
    require_non_negative(gamma=gamma)
    require_smoothing(label_smoothing)
    chosen, rejected = _averages(
        chosen_logps, rejected_logps, chosen_lengths, rejected_lengths
    )
    if alpha == 0:
        gap = chosen - rejected
    else:
        gap = (
            jnp.expm1(jnp.minimum(-alpha * rejected, MAX_EXPONENT))
            - jnp.expm1(jnp.minimum(-alpha * chosen, MAX_EXPONENT))
        ) / alpha
    return cross_entropy(1.0 - label_smoothing, beta * gap - gamma)


def cpo_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    chosen_lengths: jax.Array,
    *,
    beta: float = 0.1,
    nll_coef: float = 1.0,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Contrastive preference optimisation loss, per pair: DPO with a uniform reference, plus likelihood.

        loss = −(1 − ε) log σ(βΔ) − ε log σ(−βΔ) − (λ/|y_w|) log π(y_w),   Δ = log π(y_w) − log π(y_l)

    The paper writes the likelihood term with a sum; its code, like TRL, averages it over tokens (TRL over those of the
    whole batch, see `nll_loss`).

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      chosen_lengths: int32[B], completion tokens, the EOS included.
      beta: > 0.
      nll_coef: λ >= 0, weight of the likelihood term. TRL calls it cpo_alpha.
      label_smoothing: ε in [0, 0.5).

    Returns:
      f32[B], unreduced.

    References:
      Xu et al., 2024, https://arxiv.org/abs/2401.08417, Eq. 3 and 4. TRL's CPO trainer with "sigmoid".
    """
    require_positive(beta=beta)
    require_non_negative(nll_coef=nll_coef)
    require_smoothing(label_smoothing)
    chosen, rejected = float_rows(
        chosen_logps=chosen_logps, rejected_logps=rejected_logps
    )
    preference = cross_entropy(1.0 - label_smoothing, beta * (chosen - rejected))
    return preference + nll_coef * nll_loss(chosen, chosen_lengths)


def orpo_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    chosen_lengths: jax.Array,
    rejected_lengths: jax.Array,
    *,
    odds_coef: float = 0.1,
) -> jax.Array:
    """Odds ratio preference optimisation loss, per pair.

        loss = −(1/|y_w|) log π(y_w) − λ log σ( log odds(y_w) − log odds(y_l) )
        log odds(y) = log p − log(1 − p),   log p = (1/|y|) log π(y)

    TRL's likelihood term runs over prompt and completion, and averages over the tokens of the batch; here it is the
    completion's, per row, as in the paper. log p is held below −1e-6, where the odds are a million.

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      chosen_lengths, rejected_lengths: int32[B], completion tokens, the EOS included.
      odds_coef: λ >= 0. TRL calls it beta.

    Returns:
      f32[B], unreduced.

    References:
      Hong et al., 2024, https://arxiv.org/abs/2403.07691, Eq. 4, 6 and 7. TRL's ORPO trainer.
    """
    require_non_negative(odds_coef=odds_coef)
    chosen, rejected = _averages(
        chosen_logps, rejected_logps, chosen_lengths, rejected_lengths
    )
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    return -chosen - odds_coef * jax.nn.log_sigmoid(log_odds_ratio)


def _log_odds(log_probability: jax.Array) -> jax.Array:
    held = jnp.minimum(log_probability, -1e-6)
    # log(1 − p): each form loses digits where the other is exact; the unused one must stay finite for its gradient.
    near_one = held > -0.6931472
    small = jnp.where(near_one, -1.0, held)
    large = jnp.where(near_one, held, -0.5)
    log_complement = jnp.where(
        near_one, jnp.log(-jnp.expm1(large)), jnp.log1p(-jnp.exp(small))
    )
    return held - log_complement


def _averages(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    chosen_lengths: jax.Array,
    rejected_lengths: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    chosen, rejected = float_rows(
        chosen_logps=chosen_logps, rejected_logps=rejected_logps
    )
    chosen_count, rejected_count = lengths_like(
        chosen, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths
    )
    return chosen / chosen_count, rejected / rejected_count
