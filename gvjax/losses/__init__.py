"""Losses: arrays in, unreduced float32 losses out; no models, no reduction, no state.

Preference losses (`preference`, `anchored`, `reference_free`, `unpaired`, `online`, `compose`), losses for reward models
(`reward`), policy gradients (`policy_gradient`) and their `normalisers`, regressions on rewards (`regression`), and
demonstrations (`supervised`). `contract` says how a loss asks for its arrays.
"""

from gvjax.losses.anchored import (
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    nca_loss,
    sppo_hard_loss,
    sppo_loss,
)
from gvjax.losses.compose import (
    TRL_NAMES,
    alpha_divergence,
    couples_rows,
    forward_kl,
    js_divergence,
    mpo_loss,
    reference_free,
    reverse_kl,
    weighted_sum,
    with_divergence,
)
from gvjax.losses.contract import (
    UNPAIRED_VOCABULARY,
    VOCABULARY,
    Loss,
    arguments,
)
from gvjax.losses.normalisers import (
    Normaliser,
    constant,
    per_sequence_mean,
    per_sequence_sum,
    per_token,
)
from gvjax.losses.online import hypo_kl_loss, xpo_loss
from gvjax.losses.policy_gradient import (
    TRL_POLICY_LOSSES,
    PolicyLoss,
    cispo_loss,
    clip_fractions,
    clipped_policy_loss,
    clipped_value_loss,
    gmpo_loss,
    gspo_loss,
    reinforce_loss,
    sapo_loss,
    sequence_clipped_loss,
    vespo_loss,
)
from gvjax.losses.preference import (
    aot_loss,
    aot_unpaired_loss,
    discopop_loss,
    dpo_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    length_normalised_dpo_loss,
    robust_dpo_loss,
    soft_dpo_loss,
    summed_ipo_loss,
)
from gvjax.losses.reference_free import (
    alphapo_loss,
    cpo_loss,
    nll_loss,
    orpo_loss,
    simpo_loss,
)
from gvjax.losses.regression import a_star_po_loss, rebel_loss
from gvjax.losses.reward import bradley_terry_loss, centering_penalty
from gvjax.losses.reweighting import length_desensitised_logps, wpo_weights
from gvjax.losses.supervised import dft_loss, token_nll_loss
from gvjax.losses.unpaired import (
    apo_zero_unpaired_loss,
    bco_unpaired_loss,
    kto_kl,
    kto_loss,
)

__all__ = [
    "TRL_NAMES",
    "TRL_POLICY_LOSSES",
    "UNPAIRED_VOCABULARY",
    "VOCABULARY",
    "Loss",
    "Normaliser",
    "PolicyLoss",
    "a_star_po_loss",
    "alpha_divergence",
    "alphapo_loss",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "apo_zero_unpaired_loss",
    "arguments",
    "bco_loss",
    "bco_unpaired_loss",
    "bradley_terry_loss",
    "centering_penalty",
    "cispo_loss",
    "clip_fractions",
    "clipped_policy_loss",
    "clipped_value_loss",
    "constant",
    "couples_rows",
    "cpo_loss",
    "dft_loss",
    "discopop_loss",
    "dpo_loss",
    "exo_loss",
    "forward_kl",
    "gmpo_loss",
    "gspo_loss",
    "hinge_loss",
    "hypo_kl_loss",
    "ipo_loss",
    "js_divergence",
    "kto_kl",
    "kto_loss",
    "length_desensitised_logps",
    "length_normalised_dpo_loss",
    "mpo_loss",
    "nca_loss",
    "nll_loss",
    "orpo_loss",
    "per_sequence_mean",
    "per_sequence_sum",
    "per_token",
    "rebel_loss",
    "reference_free",
    "reinforce_loss",
    "reverse_kl",
    "robust_dpo_loss",
    "sapo_loss",
    "sequence_clipped_loss",
    "simpo_loss",
    "soft_dpo_loss",
    "sppo_hard_loss",
    "sppo_loss",
    "summed_ipo_loss",
    "token_nll_loss",
    "vespo_loss",
    "weighted_sum",
    "with_divergence",
    "wpo_weights",
    "xpo_loss",
]
