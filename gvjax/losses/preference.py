"""Losses on the difference between a chosen and a rejected completion, measured against a reference policy.

All see a pair through one number, the gap in log-ratios

    h = log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x)

(some per token), so the prompt's unknown constant cancels. Log-probabilities are sums over the completion.
"""

import jax
import jax.numpy as jnp

from gvjax.losses.contract import (
    float_rows,
    lengths_like,
    require_positive,
    require_smoothing,
)


def dpo_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Direct preference optimisation loss, per pair; with label smoothing, conservative DPO.

        loss = −(1 − ε) log σ(β h) − ε log σ(−β h)

    At the reference policy it is ln 2 whatever ε.

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      ref_chosen_logps, ref_rejected_logps: f32[B], the same under the reference policy.
      beta: > 0; larger keeps the policy closer to the reference.
      label_smoothing: ε in [0, 0.5), the probability that a label is flipped.

    Returns:
      f32[B], unreduced.

    References:
      Rafailov et al., 2023, https://arxiv.org/abs/2305.18290, Eq. 7. Mitchell, 2023, "A note on DPO with noisy
      preferences & relationship to IPO", for ε > 0. TRL's "sigmoid"; since TRL 1.0 it has no ε there.
    """
    require_positive(beta=beta)
    require_smoothing(label_smoothing)
    logits = beta * _gap(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    return cross_entropy(1.0 - label_smoothing, logits)


def soft_dpo_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    chosen_probability: jax.Array,
    *,
    beta: float = 0.1,
) -> jax.Array:
    """DPO with soft labels: cross-entropy between a judge's probability and the policy's own.

        loss = −p log σ(β h) − (1 − p) log σ(−β h)

    With p from the true reward model, and pairs that cover the completions, the minimum is π ∝ π_ref exp(r/β); hard
    labels (p ∈ {0, 1}) that never disagree have no finite minimum.

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      ref_chosen_logps, ref_rejected_logps: f32[B], the same under the reference policy.
      chosen_probability: f32[B] in [0, 1], probability that `chosen` is the better one.
      beta: > 0.

    Returns:
      f32[B], unreduced.

    References:
      Rafailov et al., 2023, https://arxiv.org/abs/2305.18290, Eq. 7 in expectation over the label. TRL has none.
    """
    require_positive(beta=beta)
    probability, *logps = float_rows(
        chosen_probability=chosen_probability,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    return cross_entropy(probability, beta * _gap(*logps))


def robust_dpo_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> jax.Array:
    """Robust DPO loss, per pair: an unbiased estimate of the clean DPO loss under flipped labels.

        loss = (−(1 − ε) log σ(β h) + ε log σ(−β h)) / (1 − 2ε)

    It is not bounded below: for ε > 0 it falls linearly as h grows.

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      ref_chosen_logps, ref_rejected_logps: f32[B], the same under the reference policy.
      beta: > 0.
      label_smoothing: ε in [0, 0.5), the probability that a label is flipped. 0 gives DPO, TRL's default.

    Returns:
      f32[B], unreduced.

    References:
      Chowdhury et al., 2024, https://arxiv.org/abs/2403.00409. TRL's "robust".
    """
    require_positive(beta=beta)
    require_smoothing(label_smoothing)
    logits = beta * _gap(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    kept = (1.0 - label_smoothing) * -jax.nn.log_sigmoid(logits)
    flipped = label_smoothing * -jax.nn.log_sigmoid(-logits)
    return (kept - flipped) / (1.0 - 2.0 * label_smoothing)


def ipo_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    chosen_lengths: jax.Array,
    rejected_lengths: jax.Array,
    *,
    tau: float = 0.1,
) -> jax.Array:
    """Identity preference optimisation loss on per-token averages, per pair.

        loss = (h − 1/(2τ))²,   h = (1/|y_w|) log π(y_w)/π_ref(y_w) − (1/|y_l|) log π(y_l)/π_ref(y_l)

    The paper writes h with sums; its results used averages, as TRL reports after asking the authors. It takes sums and
    lengths and divides itself; `summed_ipo_loss` is the paper's letter.

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      ref_chosen_logps, ref_rejected_logps: f32[B], the same under the reference policy.
      chosen_lengths, rejected_lengths: int32[B], completion tokens, the EOS included.
      tau: > 0; larger keeps the policy closer to the reference. TRL calls it beta.

    Returns:
      f32[B], unreduced.

    References:
      Azar et al., 2023, https://arxiv.org/abs/2310.12036, Eq. 17. TRL's "ipo" in its DPO trainer.
    """
    require_positive(tau=tau)
    gap = _gap_per_token(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        chosen_lengths,
        rejected_lengths,
    )
    return jnp.square(gap - 1.0 / (2.0 * tau))


def summed_ipo_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    tau: float = 0.1,
) -> jax.Array:
    """Identity preference optimisation loss as the paper writes it, on sums, per pair.

        loss = (h − 1/(2τ))²

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      ref_chosen_logps, ref_rejected_logps: f32[B], the same under the reference policy.
      tau: > 0; larger keeps the policy closer to the reference.

    Returns:
      f32[B], unreduced.

    References:
      Azar et al., 2023, https://arxiv.org/abs/2310.12036, Eq. 17. TRL's "ipo" in its online DPO trainer.
    """
    require_positive(tau=tau)
    gap = _gap(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return jnp.square(gap - 1.0 / (2.0 * tau))


def hinge_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float = 0.1,
) -> jax.Array:
    """Hinge preference loss, per pair.

        loss = max(0, 1 − β h)

    RSO's hinge-norm; `reference_free(hinge_loss)` is SLiC-HF's ranking term with margin 1/β, scaled by β.

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      ref_chosen_logps, ref_rejected_logps: f32[B], the same under the reference policy.
      beta: > 0; 1/β is the margin in nats.

    Returns:
      f32[B], unreduced.

    References:
      Liu et al., 2023, https://arxiv.org/abs/2309.06657. Zhao et al., 2023, https://arxiv.org/abs/2305.10425. TRL's
      "hinge".
    """
    require_positive(beta=beta)
    gap = _gap(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return jax.nn.relu(1.0 - beta * gap)


def length_normalised_dpo_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    chosen_lengths: jax.Array,
    rejected_lengths: jax.Array,
    *,
    beta: float = 5.0,
) -> jax.Array:
    """DPO loss on per-token averages, per pair.

        loss = −log σ( (β/|y_w|) log π(y_w)/π_ref(y_w) − (β/|y_l|) log π(y_l)/π_ref(y_l) )

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      ref_chosen_logps, ref_rejected_logps: f32[B], the same under the reference policy.
      chosen_lengths, rejected_lengths: int32[B], completion tokens, the EOS included.
      beta: > 0, per token: about a completion's length times what suits DPO. The paper used 5; TRL's default is 0.1.

    Returns:
      f32[B], unreduced.

    References:
      Lambert et al., 2024 (Tülu 3), https://arxiv.org/abs/2411.15124. TRL's "sigmoid_norm".
    """
    require_positive(beta=beta)
    gap = _gap_per_token(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        chosen_lengths,
        rejected_lengths,
    )
    return -jax.nn.log_sigmoid(beta * gap)


def exo_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> jax.Array:
    """Efficient exact optimisation loss for two completions, per pair: reverse instead of forward KL.

        loss = KL(q ‖ p),   q = (σ(β h), σ(−β h)),   p = (1 − ε, ε)

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      ref_chosen_logps, ref_rejected_logps: f32[B], the same under the reference policy.
      beta: > 0.
      label_smoothing: ε in (0, 0.5); it cannot be 0, where the divergence is infinite.

    Returns:
      f32[B], unreduced.

    References:
      Ji et al., 2024, https://arxiv.org/abs/2402.00856, Eq. 16. TRL's "exo_pair".
    """
    require_positive(beta=beta, label_smoothing=label_smoothing)
    require_smoothing(label_smoothing)
    logits = beta * _gap(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    keep = jax.nn.sigmoid(logits) * (
        jax.nn.log_sigmoid(logits) - jnp.log1p(-label_smoothing)
    )
    flip = jax.nn.sigmoid(-logits) * (
        jax.nn.log_sigmoid(-logits) - jnp.log(label_smoothing)
    )
    return keep + flip


def discopop_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float = 0.05,
    tau: float = 0.05,
) -> jax.Array:
    """DiscoPOP: the log-ratio-modulated blend of logistic and exponential loss, per pair.

        loss = (1 − σ(βh/τ)) · (−log σ(βh)) + σ(βh/τ) · exp(−βh)

    Not convex, and not monotone in h. The second term is taken as exp(log σ(βh/τ) − βh), which cannot overflow for
    τ <= 1; TRL multiplies the factors and gets NaN below βh ≈ −88.

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      ref_chosen_logps, ref_rejected_logps: f32[B], the same under the reference policy.
      beta: > 0. TRL's default is 0.1.
      tau: > 0, temperature of the blend.

    Returns:
      f32[B], unreduced.

    References:
      Lu et al., 2024, https://arxiv.org/abs/2406.08414, Eq. 5. TRL's "discopop".
    """
    require_positive(beta=beta, tau=tau)
    logits = beta * _gap(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    logistic = jax.nn.sigmoid(-logits / tau) * -jax.nn.log_sigmoid(logits)
    exponential = jnp.exp(jax.nn.log_sigmoid(logits / tau) - logits)
    return logistic + exponential


def aot_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Alignment by optimal transport, paired: dominate the reference's margins in distribution.

        loss_(i) = −(1 − ε) log σ(β d_i) − ε log σ(−β d_i),   d_i = m_(i) − m_ref,(i)

    with m = log π(y_w) − log π(y_l), each sorted over the batch. **Rows are coupled**: entry i belongs to rank i and not
    to row i, so row weights cannot be applied, and micro-batches or shards each sorted alone give another loss.

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      ref_chosen_logps, ref_rejected_logps: f32[B], the same under the reference policy.
      beta: > 0.
      label_smoothing: ε in [0, 0.5).

    Returns:
      f32[B] in ascending rank, unreduced.

    References:
      Melnyk et al., 2024, https://arxiv.org/abs/2406.05882. TRL's "aot" ("aot_pair" in TRL 0.x).
    """
    require_positive(beta=beta)
    require_smoothing(label_smoothing)
    chosen, rejected, ref_chosen, ref_rejected = float_rows(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    gap = jnp.sort(chosen - rejected) - jnp.sort(ref_chosen - ref_rejected)
    return cross_entropy(1.0 - label_smoothing, beta * gap)


def aot_unpaired_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Alignment by optimal transport, unpaired: chosen log-ratios dominate rejected ones in distribution.

        loss_(i) = −(1 − ε) log σ(β d_i) − ε log σ(−β d_i),   d_i = w_(i) − l_(i)

    with w = log π(y_w)/π_ref(y_w) and l likewise, each sorted over the batch; which chosen stood beside which rejected
    does not matter. **Rows are coupled**, as in `aot_loss`.

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      ref_chosen_logps, ref_rejected_logps: f32[B], the same under the reference policy.
      beta: > 0.
      label_smoothing: ε in [0, 0.5).

    Returns:
      f32[B] in ascending rank, unreduced.

    References:
      Melnyk et al., 2024, https://arxiv.org/abs/2406.05882. TRL's "aot_unpaired" ("aot" in TRL 0.x).
    """
    require_positive(beta=beta)
    require_smoothing(label_smoothing)
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    return cross_entropy(
        1.0 - label_smoothing, beta * (jnp.sort(chosen) - jnp.sort(rejected))
    )


def cross_entropy(probability: jax.Array | float, logits: jax.Array) -> jax.Array:
    """f32[B]: −p log σ(logits) − (1 − p) log σ(−logits)."""
    return -probability * jax.nn.log_sigmoid(logits) - (
        1.0 - probability
    ) * jax.nn.log_sigmoid(-logits)


def log_ratios(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(f32[B], f32[B]): log π/π_ref of the chosen and of the rejected completions, after checking all four."""
    chosen, rejected, ref_chosen, ref_rejected = float_rows(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    return chosen - ref_chosen, rejected - ref_rejected


def _gap(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
) -> jax.Array:
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    return chosen - rejected


def _gap_per_token(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    chosen_lengths: jax.Array,
    rejected_lengths: jax.Array,
) -> jax.Array:
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    chosen_count, rejected_count = lengths_like(
        chosen, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths
    )
    return chosen / chosen_count - rejected / rejected_count
