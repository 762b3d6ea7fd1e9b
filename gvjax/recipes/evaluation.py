"""How policies and scorers are judged, the same way for every arm."""

import dataclasses

import numpy as np
from scipy import optimize, special

from gvjax.recipes.ground import Ground
from gvjax.recipes.programs import sample_all, score_all
from gvjax.recipes.rows import completions_of, host_sequences, role_key
from gvjax.tasks.task import Completions, Prompts, Task
from gvjax.types import Params


@dataclasses.dataclass(frozen=True)
class PolicyEvaluation:
    """One temperature-1 completion of each prompt, judged.

    Attributes:
      gold: f32[N], gold rewards; None where the task has none.
      kl: f32[N], log π(y|x) − log π_ref(y|x) of the completion drawn, whose mean estimates KL(π ‖ π_ref), nats.
      completions: as drawn.
    """

    gold: np.ndarray | None
    kl: np.ndarray
    completions: Completions

    def summary(self) -> dict[str, float]:
        """Means, for curves and progress bars."""
        gold = {} if self.gold is None else {"gold": float(self.gold.mean())}
        return {
            **gold,
            "kl": float(self.kl.mean()),
            "length": float(self.completions.lengths.mean()),
        }


def gold_of(
    task: Task, prompts: Prompts, completions: Completions
) -> np.ndarray | None:
    """f32[N]: gold rewards, or None where the task has none."""
    if task.reward_range is None:
        return None
    return task.reward(prompts, completions)


def evaluate_policy(
    ground: Ground,
    task: Task,
    params: Params,
    ref_params: Params,
    prompts: Prompts,
    *,
    seed: int,
    role: str = "evaluation",
) -> PolicyEvaluation:
    """Samples each prompt once and judges the samples.

    The random numbers come from (seed, role) and the prompt's row, so every arm is judged with the same ones.
    """
    rollouts = sample_all(ground, params, prompts, role_key(seed, role))
    completions = completions_of(rollouts, ground.completion_length)
    mask = np.asarray(rollouts.completion_mask)
    logps = np.where(mask, rollouts.logps, 0.0).sum(axis=1)
    ref_logps = score_all(ground, ref_params, host_sequences(rollouts.tokens, mask))
    return PolicyEvaluation(
        gold=gold_of(task, prompts, completions),
        kl=logps - ref_logps,
        completions=completions,
    )


@dataclasses.dataclass(frozen=True)
class ScorerEvaluation:
    """How well reward margins predict the labels of held-out pairs.

    Attributes:
      log_likelihood: mean log σ(scale · margin), nats per pair; ln ½ is chance.
      accuracy: share of pairs with a positive margin; ties count ½.
      gold_accuracy: the same against the order of the gold rewards, pairs of equal or unknown gold left out; None where
        no gold is known.
      scale: what margins were multiplied by.
    """

    log_likelihood: float
    accuracy: float
    gold_accuracy: float | None
    scale: float = 1.0


def evaluate_margins(
    margins: np.ndarray, gold_margins: np.ndarray, *, fit_scale: bool = False
) -> ScorerEvaluation:
    """Judges the margins of a scorer, chosen less rejected.

    Args:
      margins: [N], the scorer's.
      gold_margins: [N], of the gold reward: labels are noisy, so these may be negative.
      fit_scale: multiply margins by the scale >= 0 that these very pairs like best. It grants a DPO policy its best β,
        so that it does not lose by miscalibration; it is generous to the scorer it is used for.
    """
    gold_margins = np.asarray(gold_margins, np.float64)
    known = ~np.isnan(gold_margins)
    margins = np.asarray(margins, np.float64)
    scale = best_scale(margins) if fit_scale else 1.0
    right = np.where(margins == 0, 0.5, margins > 0)
    decided = known & (gold_margins != 0)
    agrees = np.where(margins == 0, 0.5, np.sign(margins) == np.sign(gold_margins))
    return ScorerEvaluation(
        log_likelihood=float(special.log_expit(scale * margins).mean()),
        accuracy=float(right.mean()),
        gold_accuracy=None
        if not known.any()
        else float(agrees[decided].mean())
        if decided.any()
        else 0.5,
        scale=scale,
    )


def best_scale(margins: np.ndarray) -> float:
    """The s >= 0 that maximises mean log σ(s · margin), a concave function of s.

    Args:
      margins: f64[N], of a scorer, chosen less rejected.
    """
    spread = np.abs(margins).mean()
    if spread == 0 or margins.mean() <= 0:
        # The slope at 0 is the mean margin: where it is not positive, 0 is the best scale.
        return 0.0
    found = optimize.minimize_scalar(
        lambda log_scale: -special.log_expit(np.exp(log_scale) * margins).mean(),
        bounds=(np.log(1e-6 / spread), np.log(1e3 / spread)),
        method="bounded",
    )
    return float(np.exp(found.x))
