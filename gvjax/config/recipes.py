"""One section a recipe: its sizes, its options and what they mean."""

import math
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field

from gvjax.config.base import (
    Count,
    Imported,
    NonNegative,
    Positive,
    Section,
    Unused,
    refuse_unused,
)
from gvjax.config.sections import OptimizerSection


class Recipe(Section):
    """What all recipes have in common: their own optimizer defaults, and sizes that must fit each other."""

    recipe: str

    @property
    def updates(self) -> int:
        """Optimizer updates in the whole run."""
        return getattr(self, "steps", 1) * getattr(self, "epochs", 1)

    @property
    def batch_rows(self) -> int | None:
        """rows of one update's batch, or None where nothing is trained."""
        return getattr(self, "batch_size", None)

    def unused(self) -> Unused:
        """Options that other fields switch off; giving one of them is refused."""
        return []

    @pydantic.model_validator(mode="before")
    @classmethod
    def _own_optimizer_defaults(cls, data: Any) -> Any:
        """An optimizer given in part keeps the recipe's own values elsewhere, not those of another recipe."""
        if not isinstance(data, dict) or "optimizer" not in cls.model_fields:
            return data
        if not isinstance(given := data.get("optimizer"), dict):
            return data
        own = cls.model_fields["optimizer"].default.model_dump(exclude_unset=True)
        return {**data, "optimizer": {**own, **given}}

    @pydantic.model_validator(mode="after")
    def _sizes_fit(self, info: pydantic.ValidationInfo) -> Self:
        refuse_unused(self, self.unused(), info)
        warmup = getattr(self, "optimizer", OptimizerSection()).warmup_steps
        if warmup >= self.updates:
            raise ValueError(
                f"optimizer.warmup_steps is {warmup} but the run makes {self.updates} updates; use fewer, or more steps"
            )
        count, rows = getattr(self, "num_microbatches", 1), self.batch_rows
        if rows is not None and rows % count:
            lower = rows - rows % count
            raise ValueError(
                f"a batch of {rows} rows is not divisible by num_microbatches {count}; use {lower or count} or"
                f" {lower + count} rows"
            )
        return self


# Not strict, as a list is what JSON has; the numbers in it are.
Buckets = Annotated[tuple[Count, ...], Field(min_length=1, strict=False)]


def _padded_once(section: Any) -> Unused:
    """Rows are packed or sorted into buckets, not both."""
    if section.packed_length is None:
        return []
    return [("length_buckets", "packed rows all have packed_length tokens")]


class SftSection(Recipe):
    """Supervised fine-tuning on the task's demonstrations, drawn afresh for every step.

    Attributes:
      steps, batch_size: updates, and demonstrations in each.
      packed_length: most tokens of a row that several sequences share, so that little of it is padding: rows are made
        shorter as far as the same number of them suffices. batch_size is then rows, and how many sequences a step
        has varies. null gives each its own row. Four times the longest sequence is a good length on CPUs and TPUs; on GPUs
        packed rows run without the fused attention kernel, so measure (`gvjax bench --only sft,sft_packed`).
      length_buckets: ascending lengths, such as [128, 256]: rows of like length make a batch, padded to the shortest of
        these that holds its longest row, or to max_prompt + max_completion. Each is a program of its own to compile. A
        step's rows are then alike in length, and where the loss is a mean over tokens those of short rows weigh more.
        null pads every row to max_prompt + max_completion.
      num_microbatches: slices of a batch; changes memory, not results.
    """

    recipe: Literal["sft"] = "sft"
    steps: Count = 800
    batch_size: Count = 128
    packed_length: Count | None = None
    length_buckets: Buckets | None = None
    num_microbatches: Count = 1
    optimizer: OptimizerSection = OptimizerSection(
        learning_rate=2e-3, schedule="cosine"
    )

    def unused(self) -> Unused:
        return _padded_once(self)


class RewardSection(Recipe):
    """A reward model: the SFT trunk with a scalar head, trained on the pairs.

    Attributes:
      steps, batch_size: updates, and pairs in each.
      pooling: what the head reads: the last completion token, or the mean or sum over completion tokens. `sum` learns
        additive rewards fast; `last` is what most published reward models use.
      label_smoothing: share of labels taken to be flipped.
      centering: weight of the squared sum of both rewards.
      early_stop: keep the checkpoint with the best held-out likelihood instead of the last.
      evaluate_every: steps between held-out evaluations.
      zero_head: start every reward at 0, else a random head of standard deviation 1/√(D + 1).
      packed_length: as for SFT; batch_size is then rows of each side of the pairs.
      length_buckets: as for SFT, by the longer sequence of each pair.
      num_microbatches: slices of a batch; changes memory, not results.
    """

    recipe: Literal["reward"] = "reward"
    steps: Count = 100
    batch_size: Count = 64
    pooling: Literal["last", "mean", "sum"] = "sum"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    centering: NonNegative = 0.0
    early_stop: bool = False
    evaluate_every: Count = 25
    zero_head: bool = True
    packed_length: Count | None = None
    length_buckets: Buckets | None = None
    num_microbatches: Count = 1
    optimizer: OptimizerSection = OptimizerSection(learning_rate=5e-4)

    def unused(self) -> Unused:
        return _padded_once(self)


class DpoSection(Recipe):
    """Offline preference optimisation on the pairs.

    Attributes:
      steps, batch_size: updates, and pairs in each.
      loss: a loss of `gvjax.losses` by TRL's name (`sigmoid`, `ipo`, ...), or an import path.
      loss_options: further arguments of the loss (label_smoothing, tau, ...).
      beta: how closely the policy is held to the reference; small lets it move. null takes the loss's own.
      nll_weight: weight of the chosen completion's negative log-likelihood per token, added to the loss.
      evaluate_every: steps between evaluations on validation prompts, from which the best checkpoint is kept.
      packed_length: as for SFT; batch_size is then rows of each side of the pairs.
      length_buckets: as for SFT, by the longer sequence of each pair.
      num_microbatches: slices of a batch; changes memory, not results.
    """

    recipe: Literal["dpo"] = "dpo"
    steps: Count = 400
    batch_size: Count = 64
    loss: Imported = "sigmoid"
    loss_options: dict[str, float | int] = Field(default_factory=dict)
    beta: Positive | None = None
    nll_weight: NonNegative = 0.0
    evaluate_every: Count = 100
    packed_length: Count | None = None
    length_buckets: Buckets | None = None
    num_microbatches: Count = 1
    optimizer: OptimizerSection = OptimizerSection(learning_rate=3e-4)

    def unused(self) -> Unused:
        return _padded_once(self)

    @pydantic.model_validator(mode="after")
    def _beta_once(self) -> Self:
        if "beta" in self.loss_options:
            raise ValueError("loss_options.beta has a field of its own; give beta")
        return self


class HypoSection(Recipe):
    """HyPO: offline DPO on the pairs plus the KL to the reference on fresh samples; no reward model.

    Attributes:
      steps, batch_size, beta: as for DPO.
      kl_coef: weight of the on-policy KL.
      on_policy_prompts: prompts sampled for it at each step, one completion each.
      evaluate_every, num_microbatches: as for DPO.
    """

    recipe: Literal["hypo"] = "hypo"
    steps: Count = 400
    batch_size: Count = 64
    beta: Positive = 1.0
    kl_coef: Positive = 0.1
    on_policy_prompts: Count = 64
    evaluate_every: Count = 100
    num_microbatches: Count = 1
    optimizer: OptimizerSection = OptimizerSection(learning_rate=3e-4)

    @pydantic.model_validator(mode="after")
    def _dealt_out_together(self) -> Self:
        if self.num_microbatches > 1 and self.batch_size != self.on_policy_prompts:
            raise ValueError(
                f"batch_size is {self.batch_size} and on_policy_prompts {self.on_policy_prompts}, but with"
                f" num_microbatches {self.num_microbatches} they are dealt out together and must be equal; make them"
                " so, or set num_microbatches to 1"
            )
        return self


class VerifierSection(Section):
    """A Python function as a source of reward.

    Attributes:
      path: `package.module:function`, called as `function(prompt: str, completion: str) -> float`; `gold` is the
        task's own reward.
      weight: multiplies its value in the sum of rewards; not 0, and negative punishes what it rewards.
      time_limit: seconds one call may take.
      error_reward: reward of a completion on which it raised, returned a non-number, or ran out of time.
      max_error_share: the run stops when more of one batch than this went wrong.
    """

    path: Imported = "gold"
    weight: float = 1.0
    time_limit: Positive = 5.0
    error_reward: float = 0.0
    max_error_share: Annotated[float, Field(ge=0, le=1)] = 0.1

    @pydantic.model_validator(mode="after")
    def _limits_are_for_functions(self, info: pydantic.ValidationInfo) -> Self:
        if not self.weight or not math.isfinite(self.weight):
            raise ValueError(
                f"weight is {self.weight}, so the verifier's value would not count; give another weight, or leave the"
                " verifier out"
            )
        if self.path == "gold":
            why = "the task's own reward is computed by the library and cannot fail"
            limits = ("time_limit", "error_reward", "max_error_share")
            refuse_unused(self, [(name, why) for name in limits], info)
        return self


class RewardSources(Section):
    """Where the online road's rewards come from, summed with their weights.

    Attributes:
      reward_model: weight of the learned reward model; 0 leaves it out.
      verifier: a Python function, or null.
    """

    reward_model: NonNegative = 1.0
    verifier: VerifierSection | None = None

    @pydantic.model_validator(mode="after")
    def _some_source(self) -> Self:
        if self.reward_model == 0 and self.verifier is None:
            raise ValueError(
                "no reward is left: give rewards.reward_model a weight above 0 or name a rewards.verifier"
            )
        return self


class OnlineDpoSection(Recipe):
    """DPO on samples of the policy itself, labelled by the reward model.

    Attributes:
      steps: rounds of sample, label, update.
      prompts_per_step, samples_per_prompt: completions sampled in each round.
      labels: `hard` takes the best and worst of each prompt as chosen and rejected (the paper's recipe); `soft`
        pairs samples at random and weighs both orders by the reward model's probability (the recipe whose optimum is
        exactly the soft-optimal policy).
      generation: `continual` samples from the current policy each step; `once` samples all rounds from the starting
        policy beforehand (the paper's recipe). Its samples do not say how far the policy has gone, so `objective/kl` and
        what contains it are not logged; `eval_kl` is.
      beta: as for DPO.
      rewards: where rewards come from.
      epochs: updates made on each round's pairs.
      num_microbatches: slices of a batch; changes memory, not results.
    """

    recipe: Literal["online_dpo"] = "online_dpo"
    steps: Count = 300
    prompts_per_step: Count = 32
    samples_per_prompt: Annotated[int, Field(ge=2)] = 8
    labels: Literal["hard", "soft"] = "hard"
    generation: Literal["continual", "once"] = "continual"
    beta: Positive = 1.0
    rewards: RewardSources = RewardSources()
    epochs: Count = 1
    evaluate_every: Count = 100
    num_microbatches: Count = 1
    optimizer: OptimizerSection = OptimizerSection(learning_rate=1e-3)

    @property
    def batch_rows(self) -> int:
        per_prompt = 1 if self.labels == "hard" else self.samples_per_prompt // 2
        return self.prompts_per_step * per_prompt

    @pydantic.model_validator(mode="after")
    def _even_for_soft(self) -> Self:
        if self.labels == "soft" and self.samples_per_prompt % 2:
            raise ValueError(
                f"samples_per_prompt is {self.samples_per_prompt}; soft labels pair the samples of a prompt two by"
                f" two, so use {self.samples_per_prompt - 1} or {self.samples_per_prompt + 1}"
            )
        return self


class PolicyGradientSection(Recipe):
    """Policy-gradient RL against the rewards.

    Attributes:
      algorithm: `reinforce` (advantage = reward less the batch mean), `rloo` (less the mean of the prompt's other
        samples), `grpo` (centred and scaled within the prompt), `dr_grpo` (centred, constant normaliser), `dapo`
        (GRPO per token with an asymmetric clip; without dynamic sampling and the shaping of overlong rewards, and with
        a KL, which the paper drops, unless kl_coef is 0), `gspo`, `cispo`.
      steps: rounds of sample, score, update.
      prompts_per_step, samples_per_prompt: completions sampled in each round.
      kl_coef: weight of the KL to the SFT policy.
      kl_in: `reward` subtracts it from the completion's reward (RLOO's way; estimator k1, the only unbiased choice
        there); `loss` adds an estimate to the loss (GRPO's way).
      kl_estimator: of the KL in the loss: k2 or k3.
      epsilon: how far below 1 the importance ratio may fall, and above it too where epsilon_high is null (rloo over
        several epochs, grpo, dr_grpo, dapo, gspo). On the first update of a round all ratios are 1, so it acts from the
        second epoch on. Left out, it is 0.2, or 3e-4 for gspo (its paper), whose ratio is a mean over the completion.
      epsilon_high: how far above 1 it may rise; null takes the algorithm's own: 0.28 for dapo and 4e-4 for gspo (their
        papers), 4 for cispo (ScaleRL), epsilon for the others.
      epochs: updates made on each round's samples; 1 for reinforce, which has no importance ratio. rloo clips that of
        the whole completion from 2 on, as TRL does.
      rewards: where rewards come from.
      missing_eos_penalty: subtracted from the reward of a completion that was cut off.
      num_microbatches: slices of a batch; changes memory, not results.
    """

    recipe: Literal["policy_gradient"] = "policy_gradient"
    algorithm: Literal[
        "reinforce", "rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo"
    ] = "rloo"
    steps: Count = 300
    prompts_per_step: Count = 32
    samples_per_prompt: Count = 8
    kl_coef: NonNegative = 0.3
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    epsilon: Positive = 0.2
    epsilon_high: Positive | None = None
    epochs: Count = 1
    rewards: RewardSources = RewardSources()
    missing_eos_penalty: NonNegative = 0.0
    evaluate_every: Count = 100
    num_microbatches: Count = 1
    optimizer: OptimizerSection = OptimizerSection(learning_rate=1e-3)

    @property
    def batch_rows(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    def unused(self) -> Unused:
        found: Unused = []
        if self.algorithm in ("reinforce", "rloo") and self.epochs == 1:
            why = f"{self.algorithm} does not clip where epochs is 1"
            found += [("epsilon", why), ("epsilon_high", why)]
        if self.algorithm == "cispo":
            found.append(("epsilon", "cispo bounds the ratio from above only"))
        if self.kl_coef == 0:
            why = "kl_coef is 0 and no KL is taken"
            found += [("kl_in", why), ("kl_estimator", why)]
        return found

    @pydantic.model_validator(mode="after")
    def _own_clip(self) -> Self:
        if self.algorithm == "gspo" and "epsilon" not in self.model_fields_set:
            # Not counted as given: an entry of a sweep may name another algorithm.
            object.__setattr__(self, "epsilon", 3e-4)
        return self

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.algorithm != "reinforce" and self.samples_per_prompt < 2:
            raise ValueError(
                f"samples_per_prompt is {self.samples_per_prompt}; {self.algorithm} compares the samples of a prompt"
                " and needs at least 2 (reinforce needs 1)"
            )
        if self.algorithm == "reinforce" and self.epochs > 1:
            raise ValueError(
                f"epochs is {self.epochs}, but from the second on the samples are another policy's, and reinforce does not"
                " correct for that; use epochs: 1, or rloo, which does"
            )
        several = self.algorithm == "rloo" and self.epochs > 1
        if several and self.kl_coef and self.kl_in == "loss":
            raise ValueError(
                f"epochs is {self.epochs}: rloo then averages its loss over a completion's tokens, and would divide the"
                " KL in the loss by their number too; use kl_in: reward with kl_estimator: k1, or epochs: 1"
            )
        if self.kl_coef and self.kl_in == "reward" and self.kl_estimator != "k1":
            raise ValueError(
                f"kl_estimator {self.kl_estimator} in the reward is biased; use k1 there, or kl_in: loss"
            )
        if self.kl_coef and self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator k1 in the loss has a gradient of mean 0 and would do nothing; use k2 or k3 there, or"
                " kl_in: reward"
            )
        return self


class PpoSection(Recipe):
    """PPO with a learned critic that starts as the SFT trunk.

    Attributes:
      steps, prompts_per_step, samples_per_prompt, epochs, rewards, missing_eos_penalty, num_microbatches: as for
        policy gradients.
      kl_coef: weight of the per-token KL in the reward (estimator k1).
      gamma, lam: discount, and λ of the advantage estimate.
      epsilon, value_epsilon: clips of the ratio and of the critic's move.
      value_coef: weight of the critic's loss.
      whiten_advantages: scale advantages to unit variance over the batch.
    """

    recipe: Literal["ppo"] = "ppo"
    steps: Count = 300
    prompts_per_step: Count = 32
    samples_per_prompt: Count = 8
    kl_coef: NonNegative = 0.3
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    epsilon: Positive = 0.2
    value_epsilon: Positive = 0.2
    value_coef: NonNegative = 0.1
    whiten_advantages: bool = True
    epochs: Count = 2
    rewards: RewardSources = RewardSources()
    missing_eos_penalty: NonNegative = 0.0
    evaluate_every: Count = 100
    num_microbatches: Count = 1
    optimizer: OptimizerSection = OptimizerSection(learning_rate=1e-3)

    @property
    def batch_rows(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    def unused(self) -> Unused:
        if self.value_coef:
            return []
        return [("value_epsilon", "value_coef is 0 and the critic is not trained")]


class RebelSection(Recipe):
    """REBEL: regress differences of rewards on differences of log-ratios to the policy that sampled.

    Attributes:
      steps, prompts_per_step, epochs, rewards, num_microbatches: as for policy gradients; two samples a prompt.
      eta: learning rate of the implied mirror descent; large follows the reward further in each round.
      kl_coef: weight of the KL to the SFT policy, subtracted from the rewards.
    """

    recipe: Literal["rebel"] = "rebel"
    steps: Count = 300
    prompts_per_step: Count = 128
    eta: Positive = 1.0
    kl_coef: NonNegative = 0.3
    epochs: Count = 2
    rewards: RewardSources = RewardSources()
    evaluate_every: Count = 100
    num_microbatches: Count = 1
    optimizer: OptimizerSection = OptimizerSection(learning_rate=1e-3)

    @property
    def batch_rows(self) -> int:
        return self.prompts_per_step


class BestOfNSection(Recipe):
    """Best of n samples of the starting policy under the rewards; trains nothing.

    Attributes:
      n: samples per prompt.
      rewards: what chooses among them.
    """

    recipe: Literal["best_of_n"] = "best_of_n"
    n: Annotated[int, Field(ge=2)] = 32
    rewards: RewardSources = RewardSources()


class RejectionSection(Recipe):
    """Rejection-sampling fine-tuning: SFT on the best of n samples of each prompt under the rewards.

    Attributes:
      n: samples per prompt.
      steps, batch_size: updates, and winners in each.
      rewards: what chooses among the samples.
    """

    recipe: Literal["rejection"] = "rejection"
    n: Annotated[int, Field(ge=2)] = 8
    steps: Count = 400
    batch_size: Count = 64
    rewards: RewardSources = RewardSources()
    evaluate_every: Count = 100
    num_microbatches: Count = 1
    optimizer: OptimizerSection = OptimizerSection(learning_rate=3e-4)


Trained = (
    DpoSection
    | HypoSection
    | OnlineDpoSection
    | PolicyGradientSection
    | PpoSection
    | RebelSection
    | BestOfNSection
    | RejectionSection
)
AnyRecipe = Annotated[
    SftSection | RewardSection | Trained, Field(discriminator="recipe")
]


RECIPES_OF_ROAD = {
    "offline": ("dpo", "hypo"),
    "online": ("online_dpo", "policy_gradient", "ppo", "rebel", "rejection"),
    "selection": ("best_of_n", "rejection"),
}
"""Which recipes go down which road."""
