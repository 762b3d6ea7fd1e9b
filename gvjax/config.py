"""What a run is told: YAML files with `a.b=c` overrides, read strictly into frozen sections.

Unknown keys, wrong types and impossible values are refused before any device is touched, with the value, the rule and
a way out (`ConfigError`, exit code 64). Each section below documents what to expect when a field is changed.
"""

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import json
import math
import pathlib
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic
import yaml
from pydantic import Field

Scalar = bool | int | float | str | None
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
S = TypeVar("S", bound="Section")
D = TypeVar("D")


class ConfigError(ValueError):
    """A config that cannot be run; the message says which field, what is wrong and what would do."""


class Section(pydantic.BaseModel):
    """A frozen part of a config that knows its own fields and no others."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


Unused = list[tuple[str, str]]
"""(field, why nothing reads it) of options that other fields switch off."""

RESOLVED = {"resolved": True}
"""Validation context of a config that the library itself wrote, with every field spelled out."""


def _refuse_unused(
    section: Section, unused: Unused, info: pydantic.ValidationInfo
) -> None:
    if info.context == RESOLVED:
        return
    for field, why in unused:
        if field in section.model_fields_set:
            raise ValueError(f"{field} is given, but {why}; take it out of the config")


# Shared by both roads.


class TaskSection(Section):
    """Where prompts, demonstrations and gold rewards come from.

    Attributes:
      name: a task of `gvjax.tasks`, or an import path `package.module:Class`.
      options: passed to the task's constructor. A task that takes a `seed` gets the run's unless one is given here.
    """

    name: str
    options: dict[str, Scalar] = {}


class OptimizerSection(Section):
    """AdamW, the one optimizer family of every arm.

    Attributes:
      learning_rate: the peak.
      schedule: what follows the warm-up: constant, or linear or cosine decay to 0.
      warmup_steps: updates of the linear rise from 0.
      b1, b2, eps, weight_decay: AdamW's.
      max_grad_norm: global norm that gradients are clipped to; .inf turns it off.
    """

    learning_rate: Positive = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    b1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    b2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0


class PairsSection(Section):
    """The preference data: two samples of the SFT policy per prompt, labelled once by the gold reward.

    Attributes:
      count: pairs, and so labels.
      tau: noise of the labeller in reward units; the better sample wins with probability σ(Δr / τ).
      heldout: further labelled pairs on which scorers are judged, never trained on.
    """

    count: Count = 1000
    tau: Positive = 0.2
    heldout: Count = 500


class ValidationSection(Section):
    """How the checkpoints of one run are judged: one temperature-1 completion of each prompt.

    Attributes:
      validation_prompts: prompts on which checkpoints are judged and chosen.
    """

    validation_prompts: Count = 300


class EvaluationSection(ValidationSection):
    """How the policies of a study are judged, with the same random numbers for every arm.

    Attributes:
      test_prompts: prompts the report is made of.
      validation_prompts: prompts on which checkpoints and settings are chosen.
    """

    test_prompts: Count = 600


class MeshSection(Section):
    """Devices along each axis; one may be -1, which takes the rest.

    Attributes:
      data: the batch is split.
      fsdp: the batch and the parameters are split.
      tensor: heads, hidden units and the vocabulary are split.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


class LoggingSection(Section):
    """Attributes:
    tensorboard: write event files beside the JSONL.
    wandb_project: also log there (extra `wandb`).
    every: steps between log lines.
    sample_every: steps between decoded samples on the terminal; 0 shows none.
    """

    tensorboard: bool = True
    wandb_project: str | None = None
    every: Count = 10
    sample_every: Annotated[int, Field(ge=0)] = 100

    @pydantic.model_validator(mode="after")
    def _wandb_is_there(self, info: pydantic.ValidationInfo) -> Self:
        missing = importlib.util.find_spec("wandb") is None
        if self.wandb_project is not None and missing and info.context != RESOLVED:
            raise ValueError(
                f"wandb_project is {self.wandb_project!r}, which needs the wandb extra: pip install 'gvjax[wandb]'"
            )
        return self


class CheckpointSection(Section):
    """Attributes:
    every: steps between checkpoints; a crash costs at most these.
    keep: newest checkpoints kept.
    on_full_disk: `stop` ends the run when a checkpoint finds no room; `continue` says so and goes on with the last good
      one (one process only: several always stop).
    """

    every: Count = 200
    keep: Count = 2
    on_full_disk: Literal["stop", "continue"] = "stop"


# Recipes.


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
        _refuse_unused(self, self.unused(), info)
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


class SftSection(Recipe):
    """Supervised fine-tuning on the task's demonstrations, drawn afresh for every step.

    Attributes:
      steps, batch_size: updates, and demonstrations in each.
      num_microbatches: slices of a batch; changes memory, not results.
    """

    recipe: Literal["sft"] = "sft"
    steps: Count = 800
    batch_size: Count = 128
    num_microbatches: Count = 1
    optimizer: OptimizerSection = OptimizerSection(
        learning_rate=2e-3, schedule="cosine"
    )


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
    num_microbatches: Count = 1
    optimizer: OptimizerSection = OptimizerSection(learning_rate=5e-4)


class DpoSection(Recipe):
    """Offline preference optimisation on the pairs.

    Attributes:
      steps, batch_size: updates, and pairs in each.
      loss: a loss of `gvjax.losses` by TRL's name (`sigmoid`, `ipo`, ...), or an import path.
      loss_options: further arguments of the loss (label_smoothing, tau, ...).
      beta: how closely the policy is held to the reference; small lets it move. null takes the loss's own.
      nll_weight: weight of the chosen completion's negative log-likelihood per token, added to the loss.
      evaluate_every: steps between evaluations on validation prompts, from which the best checkpoint is kept.
      num_microbatches: slices of a batch; changes memory, not results.
    """

    recipe: Literal["dpo"] = "dpo"
    steps: Count = 400
    batch_size: Count = 64
    loss: str = "sigmoid"
    loss_options: dict[str, float | int] = {}
    beta: Positive | None = None
    nll_weight: NonNegative = 0.0
    evaluate_every: Count = 100
    num_microbatches: Count = 1
    optimizer: OptimizerSection = OptimizerSection(learning_rate=3e-4)

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

    path: str = "gold"
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
            _refuse_unused(self, [(name, why) for name in limits], info)
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
        policy beforehand (the paper's recipe).
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
        (GRPO per token with an asymmetric clip, without dynamic sampling), `gspo`, `cispo`.
      steps: rounds of sample, score, update.
      prompts_per_step, samples_per_prompt: completions sampled in each round.
      kl_coef: weight of the KL to the SFT policy.
      kl_in: `reward` subtracts it from the completion's reward (RLOO's way; estimator k1, the only unbiased choice
        there); `loss` adds an estimate to the loss (GRPO's way).
      kl_estimator: of the KL in the loss: k2 or k3.
      epsilon: how far below 1 the importance ratio may fall, and above it too where epsilon_high is null (grpo,
        dr_grpo, dapo, gspo). On the first update of a round all ratios are 1, so it acts from the second epoch on.
      epsilon_high: how far above 1 it may rise; null takes the algorithm's own: 0.28 for dapo (its paper), 4 for cispo
        (ScaleRL), epsilon for the others.
      epochs: updates made on each round's samples.
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
        if self.algorithm in ("reinforce", "rloo"):
            why = f"{self.algorithm} does not clip"
            found += [("epsilon", why), ("epsilon_high", why)]
        if self.algorithm == "cispo":
            found.append(("epsilon", "cispo bounds the ratio from above only"))
        if self.kl_coef == 0:
            why = "kl_coef is 0 and no KL is taken"
            found += [("kl_in", why), ("kl_estimator", why)]
        return found

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.algorithm != "reinforce" and self.samples_per_prompt < 2:
            raise ValueError(
                f"samples_per_prompt is {self.samples_per_prompt}; {self.algorithm} compares the samples of a prompt"
                " and needs at least 2 (reinforce needs 1)"
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


# Whole runs.


class RunConfig(Section):
    """One recipe, run by `gvjax run`.

    Attributes:
      run_dir: where checkpoints, metrics and results go; the same command resumes an interrupted run.
      seed: of initialisation, data order and sampling.
      task: see TaskSection.
      model: fields of `gvjax.models.transformer.ModelConfig`, without vocab_size, which the task gives.
      settings: the recipe and its fields.
      start: run directory of the policy to start from (every recipe but sft).
      reward_model: run directory of a reward model (recipes whose rewards use one).
      select: `best` keeps the checkpoint with the best gold reward on validation prompts, `last` the last one.
      pairs: the preference data (reward, dpo, hypo).
      evaluation: see ValidationSection (every recipe but sft and reward).
      mesh, logging, checkpoints: see their sections.
    """

    run_dir: str
    seed: Annotated[int, Field(ge=0)] = 0
    task: TaskSection
    model: dict[str, Scalar]
    settings: AnyRecipe
    start: str | None = None
    reward_model: str | None = None
    select: Literal["best", "last"] = "last"
    pairs: PairsSection | None = None
    evaluation: ValidationSection = ValidationSection()
    mesh: MeshSection = MeshSection()
    logging: LoggingSection = LoggingSection()
    checkpoints: CheckpointSection = CheckpointSection()

    @pydantic.model_validator(mode="after")
    def _has_what_the_recipe_uses(self, info: pydantic.ValidationInfo) -> Self:
        recipe = self.settings.recipe
        unused: Unused = []
        if recipe in ("sft", "reward"):
            why = f"recipe {recipe} is not judged on prompts"
            unused += [("evaluation", why)]
            why = f"recipe {recipe} keeps its last checkpoint" + (
                " (early_stop keeps the best)" if recipe == "reward" else ""
            )
            unused += [("select", why)]
        if recipe == "best_of_n":
            why = "recipe best_of_n trains nothing"
            unused += [(name, why) for name in ("select", "logging", "checkpoints")]
        _refuse_unused(self, unused, info)
        if recipe == "reward":
            why = "a reward model has no samples to show"
            _refuse_unused(self.logging, [("sample_every", why)], info)
        needs_start = recipe != "sft"
        needs_pairs = recipe in ("reward", "dpo", "hypo")
        rewards = getattr(self.settings, "rewards", None)
        needs_reward_model = rewards is not None and rewards.reward_model > 0
        for field, needed in (
            ("start", needs_start),
            ("pairs", needs_pairs),
            ("reward_model", needs_reward_model),
        ):
            given = getattr(self, field) is not None
            if needed and not given:
                raise ValueError(f"recipe {recipe} needs {field}; add it to the config")
            if given and not needed:
                raise ValueError(
                    f"recipe {recipe} does not use {field}; take it out of the config"
                )
        return self


class ArmSection(Section):
    """One way down one of the roads.

    Attributes:
      road: offline (learns from the pairs), online (learns from its own samples) or selection (best-of-n).
      settings: the recipe and its fields.
      sweep: overrides of `settings`, each tried; null tries `settings` alone. The best on validation prompts is kept.
      select: `best` keeps the checkpoint with the best gold reward on validation prompts, `last` the last one.
      data: what an offline arm learns from: the `pairs`, or the pairs `augmented` by further samples of the SFT
        policy that the reward model labels.
      start: the arm whose policy it starts from; `sft` is the SFT policy.
    """

    road: Literal["offline", "online", "selection"]
    settings: Annotated[Trained, Field(discriminator="recipe")]
    sweep: tuple[dict[str, Any], ...] | None = None
    select: Literal["best", "last"] = "last"
    data: Literal["pairs", "augmented"] = "pairs"
    start: str = "sft"


class AugmentationSection(Section):
    """More offline data without new labels: samples of the SFT policy on new prompts, ranked by the reward model.

    Attributes:
      prompts: new prompts.
      samples_per_prompt: completions of each; best and worst make the pair.
    """

    prompts: Count = 9600
    samples_per_prompt: Annotated[int, Field(ge=2)] = 8


class TwinSection(Section):
    """A task that differs from the main one only in what is rewarded; it shares the SFT policy and prompts.

    Attributes:
      task: see TaskSection; demonstrations and prompts must be the main task's.
      arms: arms run on it; null means all.
    """

    task: TaskSection
    arms: tuple[str, ...] | None = None


class ContrastSection(Section):
    """A comparison declared before the run: a − b in mean gold reward.

    Attributes:
      a, b: arm names; `best offline` is each seed's best offline arm.
      task: null means the main task, else a twin's name.
      margin: differences inside ±margin count as equal.
      primary: enters the verdict.
    """

    a: str
    b: str
    task: str | None = None
    margin: Positive | None = None
    primary: bool = True


class StudyConfig(Section):
    """A comparison of both roads, run by `gvjax compare`: everything they share, then the arms.

    Attributes:
      study: its name.
      run_dir: where stages and the report go; the same command resumes, an edited config re-uses what is unchanged.
      seeds: training seeds; each draws its own task instance, SFT policy and pairs.
      task, model, sft, pairs, reward, evaluation: shared by both roads.
      arms: name -> ArmSection.
      twins: control tasks.
      augmentation: see AugmentationSection; used by arms with `data: augmented`.
      contrasts: declared comparisons.
      best_of_n: sizes n at which best-of-n under each scorer is measured; () leaves it out.
      workers: processes that share the stages out among themselves on a CPU; 0 means one a core.
      mesh, logging: see their sections.
    """

    study: str
    run_dir: str
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    task: TaskSection
    model: dict[str, Scalar]
    sft: SftSection = SftSection()
    pairs: PairsSection = PairsSection()
    reward: RewardSection = RewardSection()
    evaluation: EvaluationSection = EvaluationSection()
    arms: dict[str, ArmSection]
    twins: tuple[TwinSection, ...] = ()
    augmentation: AugmentationSection = AugmentationSection()
    contrasts: tuple[ContrastSection, ...] = ()
    best_of_n: tuple[Count, ...] = ()
    workers: Annotated[int, Field(ge=0)] = 0
    mesh: MeshSection = MeshSection()
    logging: LoggingSection = LoggingSection(sample_every=0)

    @pydantic.model_validator(mode="after")
    def _arms_exist(self, info: pydantic.ValidationInfo) -> Self:
        why = "studies show their samples in the report"
        if "logging" in self.model_fields_set:
            _refuse_unused(self.logging, [("sample_every", why)], info)
        if not any(arm.data == "augmented" for arm in self.arms.values()):
            why = "no arm has data: augmented"
            _refuse_unused(self, [("augmentation", why)], info)
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {self.seeds} repeat; use different ones")
        if not any(arm.road == "offline" for arm in self.arms.values()):
            raise ValueError("no arm takes the offline road; a comparison needs one")
        for name, arm in self.arms.items():
            if name in ("sft", BEST_OFFLINE):
                raise ValueError(f"an arm may not be called {name!r}; it has a meaning")
            if arm.settings.recipe not in RECIPES_OF_ROAD[arm.road]:
                raise ValueError(
                    f"arms.{name}.road is {arm.road}, but its recipe is {arm.settings.recipe}; {arm.road} recipes are"
                    f" {', '.join(RECIPES_OF_ROAD[arm.road])}"
                )
            if arm.settings.recipe == "best_of_n":
                why = "best_of_n trains nothing"
                _refuse_unused(arm, [("select", why)], info)
            if arm.start != "sft":
                known(arm.start, self.arms, f"arms.{name}.start")
                if self.arms[arm.start].start != "sft":
                    raise ValueError(
                        f"arms.{name}.start is {arm.start}, which itself starts from an arm; start from sft or from"
                        " an arm that does"
                    )
            if arm.data == "augmented" and arm.settings.recipe != "dpo":
                raise ValueError(
                    f"arms.{name}.data is augmented, which only the dpo recipe reads; use data: pairs"
                )
            arm_settings(arm)
        arms_on = {self.task.name: list(self.arms)}
        for twin in self.twins:
            if twin.task.name in arms_on:
                raise ValueError(
                    f"two tasks of the study are called {twin.task.name}; contrasts could not tell them apart"
                )
            names = list(self.arms if twin.arms is None else twin.arms)
            arms_on[twin.task.name] = names
            for name in names:
                start = self.arms[
                    known(name, self.arms, f"arms of twin {twin.task.name}")
                ].start
                if start not in ("sft", *names):
                    raise ValueError(
                        f"twin {twin.task.name} runs {name}, which starts from {start}; add that to its arms"
                    )
        for contrast in self.contrasts:
            for name in (contrast.a, contrast.b):
                known(name, [*self.arms, "sft", BEST_OFFLINE], "contrasts")
            task = contrast.task or self.task.name
            known(task, arms_on, "contrasts.task")
            for name in (contrast.a, contrast.b):
                offline = any(
                    self.arms[arm].road == "offline" and self.arms[arm].data == "pairs"
                    for arm in arms_on[task]
                )
                if name not in ("sft", *arms_on[task]) and not (
                    name == BEST_OFFLINE and offline
                ):
                    raise ValueError(
                        f"a contrast compares {name} on {task}, where it is not run; add it to that task's arms"
                    )
            if contrast.a == contrast.b:
                raise ValueError(f"a contrast compares {contrast.a} with itself")
        return self


BEST_OFFLINE = "best offline"

RECIPES_OF_ROAD = {
    "offline": ("dpo", "hypo"),
    "online": ("online_dpo", "policy_gradient", "ppo", "rebel", "rejection"),
    "selection": ("best_of_n", "rejection"),
}
"""Which recipes go down which road."""


def arm_settings(arm: ArmSection) -> list[Trained]:
    """The settings an arm tries: its own, or one for each entry of its sweep.

    Raises:
      ValueError: a sweep entry does not fit the recipe.
    """
    if arm.sweep is None:
        return [arm.settings]
    if not arm.sweep:
        raise ValueError("sweep is empty; leave it out to try the settings alone")
    # Only what was given: an entry may switch off an option that nobody asked for.
    base = arm.settings.model_dump(exclude_unset=True)
    tried = []
    for overrides in arm.sweep:
        merged = _merge(base, overrides)
        tried.append(_validate(type(arm.settings), merged, "sweep"))
    return tried


# Reading.


def load(
    path: pathlib.Path | str, overrides: Sequence[str] = ()
) -> RunConfig | StudyConfig:
    """Reads a config file and applies `a.b=c` overrides.

    Args:
      path: YAML; one with a `study` key is a StudyConfig, else a RunConfig.
      overrides: each `dotted.key=value`, the value read as YAML.

    Raises:
      ConfigError: the file cannot be read, or something in it is refused.
    """
    path = pathlib.Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no mapping; a config is `key: value` lines")
    for override in overrides:
        _apply(data, override)
    kind: type[Section] = StudyConfig if "study" in data else RunConfig
    try:
        return _validate(kind, data, str(path))  # type: ignore[return-value]
    except ValueError as error:
        raise ConfigError(str(error)) from None


def reread(text: str) -> RunConfig:
    """A RunConfig that was written out with every field: unused ones are not held against it.

    Raises:
      ConfigError: it is no config of this version.
    """
    return _validate(RunConfig, json.loads(text), "the kept config", RESOLVED)


def resolved(config: Section) -> dict[str, Any]:
    """Every field with its value, as plain JSON data."""
    return config.model_dump(mode="json")


def config_hash(config: Section | Mapping[str, Any]) -> str:
    """16 hex digits that change when any value does."""
    data = resolved(config) if isinstance(config, Section) else config
    text = json.dumps(data, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def dataclass_from(kind: type[D], fields: Mapping[str, Any], place: str) -> D:
    """A frozen dataclass of the library from config values, types checked.

    Args:
      kind: the dataclass; its own ValueErrors are passed on with `place` in front.
      fields: its arguments.
      place: the config key they stand under, for messages.

    Raises:
      ConfigError: an unknown field (with the near miss), a wrong type or a refused value.
    """
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            )
            raise ConfigError(f"{place}.{name} is not a key; {hint}")
    types = typing.get_type_hints(kind)
    for name, value in fields.items():
        try:
            pydantic.TypeAdapter(types[name]).validate_json(
                json.dumps(value), strict=True
            )
        except pydantic.ValidationError as error:
            message = error.errors()[0]["msg"]
            raise ConfigError(f"{place}.{name} is {value!r}: {message}") from None
    try:
        return kind(**fields)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{place}: {error}") from None


class _Loader(yaml.SafeLoader):
    """YAML with 1e-6 a number, and only true and false booleans (not yes, no, on, off); repeated keys are refused."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            (tag, regex)
            for tag, regex in pairs
            if not tag.endswith((":bool", ":float"))
        ]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


def _apply(data: dict, override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise ConfigError(
            f"override {override!r} is not of the form key=value, e.g. settings.steps=10"
        )
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"the value of override {override!r} is not YAML: {error}"
        ) from None
    *parents, last = name.split(".")
    place = data
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(
                f"override {override!r}: {parent} is a value, not a section with keys"
            )
    place[last] = value


def _merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _validate(
    kind: type[S], data: Any, source: str, context: dict[str, Any] | None = None
) -> S:
    try:
        return kind.model_validate_json(json.dumps(data), context=context)
    except pydantic.ValidationError as error:
        lines = [_explain(kind, problem) for problem in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


_TAGS = {
    "sft",
    "reward",
    *(name for names in RECIPES_OF_ROAD.values() for name in names),
}


def _explain(kind: type[Section], problem: Any) -> str:
    # The tag of a union stands in pydantic's place, but not in the file.
    parts = [
        part
        for before, part in zip((None, *problem["loc"]), problem["loc"])
        if not (before == "settings" and part in _TAGS)
    ]
    place = ".".join(str(part) for part in parts)
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        fields = _fields_at(kind, problem["loc"][:-1])
        close = difflib.get_close_matches(key, fields, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(fields)}"
        return f"{place} is not a key; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{place}: {message}" if place else message
    if problem["type"] == "missing":
        return f"{place} is missing"
    return f"{place} is {problem['input']!r}: {message}"


def _fields_at(kind: type[Section], loc: Sequence[Any]) -> list[str]:
    """The field names of the section at a place, following tags of unions."""
    kinds: list[Any] = [kind]
    for part in loc:
        following = []
        for each in kinds:
            for section in _sections(each):
                if part in section.model_fields:
                    following.append(section.model_fields[part].annotation)
                elif (
                    section.model_fields.get("recipe")
                    and part == section.model_fields["recipe"].default
                ):
                    following.append(section)
        # A dictionary key or a list index leads to no new field: stay with the value's type.
        kinds = following or kinds
    return sorted(
        {
            name
            for each in kinds
            for section in _sections(each)
            for name in section.model_fields
        }
    )


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [
        section
        for argument in getattr(annotation, "__args__", ())
        for section in _sections(argument)
    ]


def known(name: str, names: Iterable[str], place: str) -> str:
    """The name, if it is one of them.

    Raises:
      ConfigError: it is not; the message names the near miss.
    """
    names = list(names)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"{place}: there is no {name!r}{hint} (known: {', '.join(names)})"
        )
    return name


def import_object(path: str) -> Any:
    """What `package.module:name` names.

    Raises:
      ConfigError: no such module or name.
    """
    module, separator, name = path.partition(":")
    if not separator:
        raise ConfigError(f"{path!r} is not an import path; write package.module:name")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"cannot import {path!r}: {error}") from None
