"""The config of a comparison of both roads, run by `gvjax compare`."""

from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field

from gvjax.config.base import (
    Count,
    Positive,
    RunDir,
    Scalar,
    Section,
    known,
    refuse_unused,
)
from gvjax.config.reading import merge, validate
from gvjax.config.recipes import RECIPES_OF_ROAD, RewardSection, SftSection, Trained
from gvjax.config.sections import (
    AnyTask,
    DatasetSection,
    EvaluationSection,
    LoggingSection,
    LoraSection,
    MeshSection,
    PairsSection,
    TimeoutsSection,
)

BEST_OFFLINE = "best offline"


class ArmSection(Section):
    """One way down one of the roads.

    Attributes:
      road: offline (learns from the pairs), online (learns from its own samples) or selection (best-of-n).
      settings: the recipe and its fields.
      sweep: overrides of `settings`, each tried; null tries `settings` alone. The best on validation prompts is kept.
      select: `best` keeps the checkpoint with the best gold reward on validation prompts, `last` the last one.
      data: what an arm learns from: the `pairs`, and their prompts if it is online; these `augmented`, offline by
        further samples of the SFT policy that the reward model labels, online by further prompts to sample on; or the
        pairs `relabelled` by the reward model.
      start: the arm whose policy it starts from; `sft` is the SFT policy.
    """

    road: Literal["offline", "online", "selection"]
    settings: Annotated[Trained, Field(discriminator="recipe")]
    sweep: tuple[dict[str, Any], ...] | None = None
    select: Literal["best", "last"] = "last"
    data: Literal["pairs", "augmented", "relabelled"] = "pairs"
    start: str = "sft"


class AugmentationSection(Section):
    """More data without new labels: new prompts, with samples of the SFT policy that the reward model ranks.

    Attributes:
      prompts: new prompts; online arms sample on them too.
      samples_per_prompt: completions of each, for offline arms; best and worst make the pair.
    """

    prompts: Count = 9600
    samples_per_prompt: Annotated[int, Field(ge=2)] = 8


class TwinSection(Section):
    """A task that differs from the main one only in what is rewarded; it shares the SFT policy and prompts.

    Attributes:
      task: as the study's; demonstrations and prompts must be the main task's.
      arms: arms run on it; null means all.
    """

    task: AnyTask
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
      task, model, lora, sft, pairs, reward, evaluation: shared by both roads; task, model and lora as in RunConfig.
      arms: name -> ArmSection.
      twins: control tasks.
      augmentation: see AugmentationSection; used by arms with `data: augmented`.
      contrasts: declared comparisons.
      best_of_n: sizes n at which best-of-n under each scorer is measured; () leaves it out.
      workers: processes that share the stages out among themselves on a CPU; 0 means one a core, or, where several
        processes were started together, none: those do each stage together.
      seeds_together: seeds that are done at once, every program running once for all of them (`jax.vmap`), on one device.
        Their numbers differ from those of single seeds by rounding. Worth trying where a small network leaves an
        accelerator waiting; on a CPU `workers` are faster.
      mesh, logging, timeouts: see their sections; of each stage.
    """

    study: str
    run_dir: RunDir
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    task: AnyTask
    model: dict[str, Scalar]
    lora: LoraSection | None = None
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
    seeds_together: Annotated[int, Field(ge=1)] = 1
    mesh: MeshSection = MeshSection()
    logging: LoggingSection = LoggingSection(sample_every=0)
    timeouts: TimeoutsSection = TimeoutsSection()

    @pydantic.model_validator(mode="after")
    def _has_gold(self) -> Self:
        for section in (self.task, *(twin.task for twin in self.twins)):
            without = isinstance(section, DatasetSection) and section.gold is None
            if self.arms and without:
                raise ValueError(
                    f"a study compares its arms by gold reward, and the dataset {section.name} has none; give task.gold:"
                    " `number`, or the directory of a reward model that was trained on other rows"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _arms_exist(self, info: pydantic.ValidationInfo) -> Self:
        why = "studies show their samples in the report"
        if "logging" in self.model_fields_set:
            refuse_unused(self.logging, [("sample_every", why)], info)
        if not any(arm.data == "augmented" for arm in self.arms.values()):
            why = "no arm has data: augmented"
            refuse_unused(self, [("augmentation", why)], info)
        elif not any(needs_ranked_samples(arm) for arm in self.arms.values()):
            why = "the arms with data: augmented are online and draw their own samples"
            refuse_unused(self.augmentation, [("samples_per_prompt", why)], info)
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {self.seeds} repeat; use different ones")
        # Without any arm it is the ground of a measurement that takes no road.
        if self.arms and not any(arm.road == "offline" for arm in self.arms.values()):
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
                refuse_unused(arm, [("select", why)], info)
            if arm.start != "sft":
                known(arm.start, self.arms, f"arms.{name}.start")
                if self.arms[arm.start].start != "sft":
                    raise ValueError(
                        f"arms.{name}.start is {arm.start}, which itself starts from an arm; start from sft or from"
                        " an arm that does"
                    )
            reads = ("dpo",) if arm.data == "relabelled" else ("dpo", *RECIPES_OF_ROAD["online"])  # fmt: skip
            if arm.data != "pairs" and arm.settings.recipe not in reads:
                raise ValueError(
                    f"arms.{name}.data is {arm.data}, which only {', '.join(reads)} read; use data: pairs"
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


def needs_ranked_samples(arm: ArmSection) -> bool:
    """Whether an arm learns offline from samples that the reward model ranked, which borrows the verifier."""
    return arm.data == "augmented" and arm.road == "offline"


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
        merged = merge(base, overrides)
        tried.append(validate(type(arm.settings), merged, "sweep"))
    return tried
