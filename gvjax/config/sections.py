"""Sections that many kinds of run share: task, optimizer, pairs, evaluation, mesh, logging, checkpoints."""

import importlib.util
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field

from gvjax.config.base import (
    RESOLVED,
    ConfigError,
    Count,
    FileName,
    Imported,
    NonNegative,
    Positive,
    PositiveOrInf,
    Scalar,
    Section,
)


class TaskSection(Section):
    """Where prompts, demonstrations and gold rewards come from.

    Attributes:
      name: a task of `gvjax.tasks`, or an import path `package.module:Class`.
      options: passed to the task's constructor. A task that takes a `seed` gets the run's unless one is given here.
    """

    name: Imported
    options: dict[str, Scalar] = Field(default_factory=dict)


class RowsSection(Section):
    """Rows of a dataset and the splits they are taken from.

    Attributes:
      source: a name of `gvjax.data.upstream.SOURCES` (hh_rlhf, ultrafeedback_binarized, tldr_preference, gsm8k, jsonl, ...),
        or tfds:NAME for a prepared dataset.
      path: the upstream file, or a folder with a file for each split.
      train, validation, test: splits, each a name with an optional slice, as test[:50%].
      drop: faults (`gvjax.data.schema.FAULTS`) whose rows are left out; other faulty rows are kept and counted.
      max_bad_share: more faulty rows than this share is an error.
    """

    source: str
    path: FileName | None = None
    train: str = "train"
    validation: str = "test[:50%]"
    test: str = "test[50%:]"
    drop: tuple[str, ...] = ()
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.05


class DatasetSection(Section):
    """A task made of files: prompts, demonstrations and, where the rows are preferences, real pairs.

    Attributes:
      name: for reports.
      rows: prompts of all splits, with the pairs or the answers to check.
      demonstrations: what SFT imitates, its train split only; null imitates the rows' own completions (of a pair the
        chosen one).
      tokenizer: a directory with tokenizer.json, a .gguf file or an id on the hub; null is the model's checkpoint.
      chat: turn plain text into a user's turn and an assistant's. Conversations always go through the template.
      template: `chatml`, `hh`, or a jinja2 file; null is the tokenizer's own.
      system: the system turn of conversations that have none; the empty string keeps templates from adding their own.
      max_prompt, max_completion: tokens; longer prompts are cut, longer completions lose their end and their EOS.
      prompt_truncation: what a long prompt loses: `left`, `right`, or whole lines before its last one (`newline`).
      gold: what completions are judged by: `number` compares the last number with the row's answer, `puzzle` asks the verifier of a
        row that `gvjax puzzles` made, `rouge_l` is how near they are to the row's own completion (extra `rouge`), a directory holds
        a reward model of transformers (`gvjax export` writes one) with the same tokenizer, null is nothing. Without it
        there is no gold reward: runs report KL, length and what the reward model says.
      prepared: where the rows are kept in normal form once read.
      reference_logps: where the log-probabilities of the pairs under the policy they are learned from are kept, by a hash
        of weights, rows and tokenizer, so that the next run on them need not compute them; null computes them in every
        run.
    """

    name: str
    rows: RowsSection
    demonstrations: RowsSection | None = None
    tokenizer: FileName | None = None
    chat: bool = False
    template: FileName | None = None
    system: str | None = None
    max_prompt: Count
    max_completion: Count
    prompt_truncation: Literal["left", "right", "newline"] = "left"
    gold: FileName | None = None
    prepared: str = "runs/prepared"
    reference_logps: str | None = "runs/reference_logps"


def _kind_of_task(value: Any) -> str:
    if isinstance(value, dict):
        return "dataset" if "rows" in value else "simulated"
    return "dataset" if isinstance(value, DatasetSection) else "simulated"


AnyTask = Annotated[
    Annotated[TaskSection, pydantic.Tag("simulated")]
    | Annotated[DatasetSection, pydantic.Tag("dataset")],
    pydantic.Discriminator(_kind_of_task),
]
"""A task by name, or one made of files: what has `rows` is the latter."""

KINDS_OF_TASK: dict[str, type[Section]] = {
    "simulated": TaskSection,
    "dataset": DatasetSection,
}


def with_tokenizer(data: dict[str, Any]) -> dict[str, Any]:
    """Config data whose datasets, where they name no tokenizer, have the one beside the model's weights.

    These are the task's, and those of a study's twins and a measurement's controls.

    Raises:
      ConfigError: there are none.
    """
    model = data.get("model")
    checkpoint = model.get("checkpoint") if isinstance(model, dict) else None

    def filled(part: Any, place: str = "") -> Any:
        task = part.get("task") if isinstance(part, dict) else None
        if not isinstance(task, dict) or "rows" not in task or task.get("tokenizer"):
            return part
        if checkpoint is None:
            raise ConfigError(
                f"{place}task.tokenizer is not given and model names no checkpoint to take it from; give one of the two"
            )
        return {**part, "task": {**task, "tokenizer": checkpoint}}

    data = filled(data)
    for name in ("twins", "controls"):
        if isinstance(parts := data.get(name), list):
            parts = [filled(part, f"{name}.{i}.") for i, part in enumerate(parts)]
            data = {**data, name: parts}
    return data


class LoraSection(Section):
    """Low-rank adapters in place of training all of the policy; without them it is the reference, kept once.

    Attributes:
      rank: 8 to 64 are usual.
      alpha: adapters count alpha / rank times.
      targets: regex of the layers that get one: attention/(query|key|value|output), mlp/(gate|up|down).
    """

    rank: Count = 16
    alpha: Positive = 32.0
    targets: str = "(attention|mlp)/.*"


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
    max_grad_norm: PositiveOrInf = 1.0


class PairsSection(Section):
    """The preference data: the dataset's own pairs, else two samples of the SFT policy per prompt, labelled by gold.

    Attributes:
      count: pairs, and so labels.
      tau: noise of the labeller of sampled pairs in reward units; the better sample wins with probability σ(Δr / τ).
      temperature: at which sampled pairs are drawn; above 1 they are broader than what the policy does by itself.
      heldout: further labelled pairs on which scorers are judged, never trained on.
    """

    count: Count = 1000
    tau: Positive = 0.2
    temperature: Positive = 1.0
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
      rows_per_call: completions that are sampled or scored at one time where nothing is learned from them (pairs,
        evaluation, best-of-n); fewer take less memory.
      gather_for_sampling: every device gathers the policy's matrices once before it samples, in the model's dtype, and
        holds them meanwhile, in place of gathering each of them from the fsdp axis at every token.
      compact_sampling: when half of the completions of a batch have ended the others are drawn on without them, and once
        more at a quarter. It pays where they differ much in length; it has not been measured on several devices.
      share_prompts: a pair and the completions of a group are trained on with their prompt run once, in unfused attention;
        null is where that is known to pay, on a CPU. Models with a sliding window cannot.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    rows_per_call: Count = 512
    gather_for_sampling: bool = False
    compact_sampling: bool = False
    share_prompts: bool | None = None


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


class TimeoutsSection(Section):
    """Seconds after which a run counts as stuck and ends, so that a supervisor can start it again.

    Attributes:
      step: without a step (exit code 71); ten times the median step holds where that is more. Evaluations do not count.
      first_step: the same until the first step is done, which contains the compilation, and while a checkpoint is
        written.
      heartbeat: without a sign of life from another process; a frozen host is noticed by this.
      arrival: for all processes to arrive at the start.
    """

    step: Positive = 600.0
    first_step: Positive = 3600.0
    heartbeat: Count = 30
    arrival: Count = 120
