"""Sections that many kinds of run share: task, optimizer, pairs, evaluation, mesh, logging, checkpoints."""

import importlib.util
from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from gvjax.config.base import (
    RESOLVED,
    Count,
    Imported,
    NonNegative,
    Positive,
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


class TimeoutsSection(Section):
    """Seconds after which a run counts as stuck and ends, so that a supervisor can start it again.

    Attributes:
      step: without a step (exit code 71); ten times the median step holds where that is more. Evaluations and saves do
        not count.
      first_step: the same until the first step is done, which contains the compilation.
      heartbeat: without a sign of life from another process; a frozen host is noticed by this.
      arrival: for all processes to arrive at the start.
    """

    step: Positive = 600.0
    first_step: Positive = 3600.0
    heartbeat: Count = 30
    arrival: Count = 120
