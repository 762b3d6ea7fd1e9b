"""The stages of a study, and what each depends on.

For every seed: the SFT policy, then for the main task and each twin the labelled pairs, the reward model, and one trial
for each setting of each arm. All arms of a seed share the SFT policy, the pairs, the network, the optimizer family, the
prompts and the random numbers of evaluation.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gvjax import config
from gvjax.gap import spending
from gvjax.gap.stages import Stage
from gvjax.recipes import identity, single
from gvjax.recipes.dataset import Dataset
from gvjax.recipes.ground import Ground, ground_of, task_of
from gvjax.tasks.task import Split, Task

Candidates = Callable[[Stage, Stage], Sequence[Stage]]
"""`(SFT stage, pairs stage) -> stages among which the reward model is chosen`."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The stages of a study.

    Attributes:
      stages: all of them, parents before children.
      by_place: (kind, seed, task, arm, trial) -> Stage.
    """

    stages: tuple[Stage, ...]
    by_place: Mapping[tuple[Any, ...], Stage]

    def of(self, kind: str, seed: int, task: int = 0, arm: str = "", trial: int = 0):
        """The stage at a place."""
        return self.by_place[kind, seed, task, arm, trial]


def task_sections(study: config.StudyConfig) -> list[config.AnyTask]:
    """The main task, then the twins'."""
    return [study.task, *(twin.task for twin in study.twins)]


def arms_of(study: config.StudyConfig, task: int) -> dict[str, config.ArmSection]:
    """The arms run on the main task (0) or on a twin (1, 2, ...)."""
    names = study.twins[task - 1].arms if task else None
    return {
        name: arm for name, arm in study.arms.items() if names is None or name in names
    }


def check(study: config.StudyConfig) -> None:
    """Refuses what a stage would fail on later, before anything is compiled.

    Raises:
      ConfigError: there is no arm, or a task, the network, a twin, a loss, a verifier or a size does not fit.
    """
    if not study.arms:
        raise config.ConfigError(
            "arms: no arm takes the offline road; a comparison needs one"
        )
    check_parts(study)


def check_parts(study: config.StudyConfig) -> None:
    """The same, of a study that need not have arms."""
    ground = ground_for(study)
    single.check(study.sft, ground)
    single.check(study.reward, ground)
    for section in task_sections(study):
        task = task_of(section, study.seeds[0])
        single.check_pairs(study.pairs, task)
        _check_sizes(study, task)
    for name, arm in study.arms.items():
        for settings in config.arm_settings(arm):
            try:
                single.check(settings, ground)
            except config.ConfigError as error:
                raise config.ConfigError(f"arms.{name}: {error}") from None


def _check_sizes(study: config.StudyConfig, task: Task) -> None:
    """Refuses a study that asks for more prompts than a dataset has."""
    if not isinstance(task, Dataset):
        return
    asked: tuple[tuple[str, Split, int], ...] = (
        ("pairs.count", "train", study.pairs.count),
        ("pairs.heldout", "validation", study.pairs.heldout),
        ("pairs.heldout", "test", study.pairs.heldout),
        (
            "evaluation.validation_prompts",
            "validation",
            study.evaluation.validation_prompts,
        ),
        ("evaluation.test_prompts", "test", study.evaluation.test_prompts),
    )
    for field, split, count in asked:
        if count > task.size(split):
            raise config.ConfigError(
                f"{field} is {count}, but the {split} split of dataset {task.name} has {task.size(split)} rows; use no"
                " more, or widen the split"
            )


def ground_for(study: config.StudyConfig) -> Ground:
    """The network and layout all seeds and twins share.

    Raises:
      ConfigError: a twin has another vocabulary or other lengths than the main task.
    """
    made = [task_of(section, study.seeds[0]) for section in task_sections(study)]
    grounds = [ground_of(task, study.model, study.mesh, study.lora) for task in made]
    for section, ground in zip(task_sections(study), grounds):
        if ground != grounds[0]:
            raise config.ConfigError(
                f"twin {section.name} does not have the main task's vocabulary and lengths, so it cannot share its SFT"
                " policy; make it a study of its own"
            )
    return grounds[0]


def content_of_task(
    section: config.AnyTask, seed: int, content: identity.Content
) -> dict[str, str | None]:
    """Hashes of what a task is made of beyond its config: files, code given by import path, and the rows of a dataset."""
    rows = getattr(task_of(section, seed), "fingerprint", None)
    return {**identity.named(section, content), identity.ROWS: rows}


def plan_of(
    study: config.StudyConfig,
    code: str,
    candidates: Candidates | None = None,
    content: identity.Content | None = None,
) -> Plan:
    """Every stage of a study, in an order in which they can be done.

    It is made once, by the process that leads: files and code that the config names are hashed into the keys, as they
    stand then.

    Args:
      study: the study.
      code: fingerprint of gvjax's own code.
      candidates: makes the stages that the reward stage chooses among, instead of training; they are not in the plan.
      content: hashes a file or folder, each once where several plans share them; null remembers for this plan alone.
    """
    content = content or functools.cache(identity.content_of)
    ground = ground_for(study)
    stages: list[Stage] = []
    by_place: dict[tuple[Any, ...], Stage] = {}
    shared: dict[str, Any] = {
        "model": study.model,
        "weights": identity.weights(study.model, content),
        "evaluation": study.evaluation.model_dump(),
        # A program over lanes rounds otherwise than that of one seed.
        "seeds_together": study.seeds_together,
    }
    if study.lora is not None:
        shared["lora"] = study.lora.model_dump()
    behind_tasks = [
        content_of_task(section, study.seeds[0], content)
        for section in task_sections(study)
    ]

    def add(kind, seed, task, arm, trial, label, inputs: dict[str, Any], parents, cost):
        section = task_sections(study)[task]
        place = {
            "task": section.model_dump(),
            "behind_task": behind_tasks[task],
            "seed": seed,
        }
        stage = Stage(
            kind=kind,
            place=(seed, task, arm, trial),
            label=f"{section.name} seed {seed}: {label}",
            inputs={**shared, **place, **inputs},
            parents=tuple(parents),
            cost=cost,
            code=code,
        )
        stages.append(stage)
        by_place[kind, seed, task, arm, trial] = stage
        return stage

    def cost(settings) -> float:
        return spending.spent(settings, ground, study.pairs.count).flops

    for seed in study.seeds:
        settings = {"settings": study.sft.model_dump()}
        start = add("sft", seed, 0, "", 0, "SFT", settings, (), cost(study.sft))
        for task in range(len(task_sections(study))):
            few = 4 * spending.forward_flops(
                ground, study.pairs.count * ground.completion_length
            )
            inputs: dict[str, Any] = {"pairs": study.pairs.model_dump()}
            pairs = add("pairs", seed, task, "", 0, "pairs", inputs, (start,), few)
            inputs = {"settings": study.reward.model_dump()}
            needed = (start, pairs)
            chosen_among = tuple(candidates(start, pairs)) if candidates else ()
            verifier = add(
                "reward",
                seed,
                task,
                "",
                0,
                "reward model",
                inputs,
                (*needed, *chosen_among),
                0.0 if chosen_among else cost(study.reward),
            )
            arms = arms_of(study, task)
            extra: tuple[Stage, ...] = ()
            if any(config.needs_ranked_samples(arm) for arm in arms.values()):
                inputs = {"augmentation": study.augmentation.model_dump()}
                drawn = (
                    study.augmentation.prompts * study.augmentation.samples_per_prompt
                )
                flops = 2 * spending.forward_flops(
                    ground, drawn * ground.completion_length
                )
                extra = (
                    add(
                        "augmented",
                        seed,
                        task,
                        "",
                        0,
                        "more pairs",
                        inputs,
                        (*needed, verifier),
                        flops,
                    ),
                )
            if study.best_of_n:
                inputs = {"n": list(study.best_of_n)}
                flops = spending.forward_flops(
                    ground,
                    study.evaluation.test_prompts
                    * max(study.best_of_n)
                    * ground.completion_length
                    * 4,
                )
                add(
                    "curves",
                    seed,
                    task,
                    "",
                    0,
                    "best-of-n",
                    inputs,
                    (*needed, verifier),
                    flops,
                )
            # Arms that start from another arm come after it.
            for name, arm in sorted(
                arms.items(), key=lambda item: item[1].start != "sft"
            ):
                parents = [*needed, verifier]
                if config.needs_ranked_samples(arm):
                    parents += extra
                if arm.start != "sft":
                    trials = len(config.arm_settings(arms[arm.start]))
                    parents += [
                        by_place["trial", seed, task, arm.start, trial]
                        for trial in range(trials)
                    ]
                for trial, tried in enumerate(config.arm_settings(arm)):
                    inputs = {
                        "settings": tried.model_dump(),
                        "behind_settings": identity.named(tried, content),
                        "select": arm.select,
                        "data": arm.data,
                        "start": arm.start,
                    }
                    if arm.data == "augmented" and not config.needs_ranked_samples(arm):
                        inputs["more_prompts"] = study.augmentation.prompts
                    label = f"{name} {trial + 1}" if arm.sweep else name
                    add(
                        "trial",
                        seed,
                        task,
                        name,
                        trial,
                        label,
                        inputs,
                        parents,
                        cost(tried),
                    )
    # All SFT policies first: then there is always something to do for every process.
    order = {"sft": 0, "pairs": 1, "reward": 1, "augmented": 2, "trial": 2, "curves": 3}
    ordered = sorted(stages, key=lambda stage: order[stage.kind])
    return Plan(tuple(ordered), by_place)
