"""The config of one recipe, run by `gvjax run`."""

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from gvjax.config.base import RunDir, Scalar, Section, Unused, refuse_unused
from gvjax.config.recipes import AnyRecipe
from gvjax.config.sections import (
    AnyTask,
    CheckpointSection,
    DatasetSection,
    LoggingSection,
    LoraSection,
    MeshSection,
    PairsSection,
    TimeoutsSection,
    ValidationSection,
)


class RunConfig(Section):
    """One recipe, run by `gvjax run`.

    Attributes:
      run_dir: where checkpoints, metrics and results go; the same command resumes an interrupted run.
      seed: of initialisation, data order and sampling.
      task: see TaskSection, or DatasetSection for rows from files.
      model: fields of `gvjax.models.config.ModelConfig`, without vocab_size, which the task gives, those of a network
        of `gvjax.models.shapes` by its `shape` (weights are random: for benchmarks and plans); or `checkpoint`
        (a directory of transformers, a .gguf file, an id on the hub) with dtype, remat and scan_layers.
      lora: train adapters instead of the whole policy; see LoraSection.
      settings: the recipe and its fields.
      start: run directory of the policy to start from (every recipe but sft; null starts from the checkpoint).
      reward_model: run directory of a reward model (recipes whose rewards use one).
      select: `best` keeps the checkpoint with the best gold reward on validation prompts, `last` the last one.
      pairs: the preference data (reward, dpo, hypo).
      evaluation: see ValidationSection (every recipe but sft and reward).
      mesh, logging, checkpoints, timeouts: see their sections.
    """

    run_dir: RunDir
    seed: Annotated[int, Field(ge=0)] = 0
    task: AnyTask
    model: dict[str, Scalar]
    lora: LoraSection | None = None
    settings: AnyRecipe
    start: str | None = None
    reward_model: str | None = None
    select: Literal["best", "last"] = "last"
    pairs: PairsSection | None = None
    evaluation: ValidationSection = ValidationSection()
    mesh: MeshSection = MeshSection()
    logging: LoggingSection = LoggingSection()
    checkpoints: CheckpointSection = CheckpointSection()
    timeouts: TimeoutsSection = TimeoutsSection()

    @pydantic.model_validator(mode="after")
    def _has_what_the_recipe_uses(self, info: pydantic.ValidationInfo) -> Self:
        recipe = self.settings.recipe
        unused: Unused = []
        if recipe in ("reward", "best_of_n"):
            unused.append(("lora", f"recipe {recipe} trains no policy"))
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
            steps = [(name, why) for name in ("step", "first_step")]
            refuse_unused(self.timeouts, steps, info)
        refuse_unused(self, unused, info)
        if recipe == "reward":
            why = "a reward model has no samples to show"
            refuse_unused(self.logging, [("sample_every", why)], info)
        if isinstance(self.task, DatasetSection) and self.task.gold is None:
            self._needs_no_gold()
        needs_start = recipe != "sft" and "checkpoint" not in self.model
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
            if given and not needed and not (field == "start" and recipe != "sft"):
                raise ValueError(
                    f"recipe {recipe} does not use {field}; take it out of the config"
                )
        return self

    def _needs_no_gold(self) -> None:
        ways_out = "give task.gold (`number`, or the directory of a reward model)"
        if self.select == "best":
            raise ValueError(
                f"select is best, but the dataset {self.task.name} has no gold reward to choose by; {ways_out}, or select"
                " last"
            )
        rewards = getattr(self.settings, "rewards", None)
        verifier = rewards.verifier if rewards is not None else None
        if verifier is not None and verifier.path == "gold":
            raise ValueError(
                f"rewards.verifier.path is gold, but the dataset {self.task.name} has no gold reward; {ways_out}, or"
                " name a function package.module:function"
            )
