"""The config of a measurement of a task's generation–verification gap, run by `gvjax gap`."""

from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field

from gvjax.config.base import (
    ConfigError,
    Count,
    Positive,
    RunDir,
    Scalar,
    Section,
    known,
    refuse_unused,
)
from gvjax.config.reading import validate
from gvjax.config.recipes import SftSection
from gvjax.config.sections import (
    AnyTask,
    DatasetSection,
    EvaluationSection,
    LoggingSection,
    MeshSection,
    PairsSection,
    TimeoutsSection,
)
from gvjax.config.study import ArmSection, AugmentationSection, StudyConfig

Share = Annotated[float, Field(gt=0, le=1)]
Trainable = Literal[
    "global reward model",
    "local reward model",
    "DPO implicit reward",
    "shuffled reward model",
    "frozen features",
]
"""Scorers that learn from the pairs."""


class ScorersSection(Section):
    """Scorers of completions, all trained on the same pairs from the same SFT policy with the same tuning budget.

    Attributes:
      pooling: of the verifier, the reward model that the online road uses: `sum` makes it the local reward model (a sum
        of token terms), `last` and `mean` the global one. The other of the two is trained beside it as a probe.
      learning_rates: each is tried for every scorer; the checkpoint with the best validation likelihood is kept.
      steps, batch_size: updates of one try, and pairs in each, at every size of the data.
      evaluate_every: updates between validation likelihoods: the grid of training lengths that is chosen from.
      fractions: shares of the pairs, ascending to 1, at which the verifier and the DPO policy are trained to draw
        their learning curves; each share is contained in the next.
      beta: of the DPO policy that is the implicit reward. Scores are rescaled on validation pairs, so it is no
        handicap in likelihood, but it decides how far the policy moves.
      also: further scorers trained on all pairs, to say where a gap comes from.
    """

    pooling: Literal["last", "mean", "sum"] = "sum"
    learning_rates: Annotated[tuple[Positive, ...], Field(min_length=1)] = (3e-4, 1e-3)
    steps: Count = 200
    batch_size: Count = 64
    evaluate_every: Count = 20
    fractions: Annotated[tuple[Share, ...], Field(min_length=1)] = (
        0.125,
        0.25,
        0.5,
        1.0,
    )
    beta: Positive = 1.0
    also: tuple[Trainable, ...] = (
        "global reward model",
        "local reward model",
        "shuffled reward model",
        "frozen features",
    )

    @property
    def verifier(self) -> Trainable:
        """The scorer that the online road learns from."""
        return "local reward model" if self.pooling == "sum" else "global reward model"

    @property
    def trained(self) -> tuple[Trainable, ...]:
        """All that learn from the pairs, the verifier and the DPO policy first."""
        first: tuple[Trainable, ...] = (self.verifier, "DPO implicit reward")
        return (*first, *(name for name in self.also if name not in first))

    @pydantic.model_validator(mode="after")
    def _sizes_are_in_order(self) -> Self:
        if list(self.fractions) != sorted(set(self.fractions)) or (
            self.fractions[-1] != 1
        ):
            raise ValueError(
                f"fractions are {list(self.fractions)}; give ascending shares that end with 1.0, e.g. [0.25, 0.5, 1.0]"
            )
        for name in ("learning_rates", "also"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} {list(values)} repeat; name each once")
        return self


class SamplesSection(Section):
    """Samples of the SFT policy, from which best-of-n and the gap of generation and verification are computed.

    Attributes:
      prompts: test prompts.
      validation_prompts: prompts on which n is chosen.
      per_prompt: samples of each, that scorers choose among; at least twice the largest n makes good estimates.
      opponents: further samples of each prompt, against which the chosen one must win.
      best_of_n: sizes n, ascending.
      quantile: the share of samples with the highest scores that a filter keeps, for the gap in gold reward.
    """

    prompts: Count = 200
    validation_prompts: Count = 100
    per_prompt: Annotated[int, Field(ge=2)] = 32
    opponents: Count = 8
    best_of_n: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 4, 8, 16)
    quantile: Share = 0.1

    @pydantic.model_validator(mode="after")
    def _there_are_n_samples(self) -> Self:
        sizes = list(self.best_of_n)
        if sizes != sorted(set(sizes)) or sizes[-1] < 2:
            raise ValueError(
                f"best_of_n is {sizes}; give ascending sizes, the largest at least 2"
            )
        if sizes[-1] > self.per_prompt:
            raise ValueError(
                f"best_of_n goes up to {sizes[-1]} but per_prompt is {self.per_prompt}; draw at least as many, better twice"
            )
        return self


class MarginsSection(Section):
    """What counts as much; fixed before the run, and part of the config's hash. See `gap.advice.Margins`.

    Attributes:
      winrate: share of comparisons won.
      nats: per pair, of likelihoods.
      low_efficiency: share of a perfect judge's gain below which a reward model is a poor one.
      nats_per_doubling: loss of the verifier's advantage with twice the data that counts as steep.
      relative_gap: of the gap in gold reward, relative to what is left to gain.
    """

    winrate: Annotated[float, Field(gt=0, lt=0.5)] = 0.03
    nats: Positive = 0.01
    low_efficiency: Annotated[float, Field(gt=0, lt=1)] = 0.25
    nats_per_doubling: Positive = 0.01
    relative_gap: Positive = 0.02


class SquareSection(Section):
    """Four arms that differ in whose completions they learn from and who labels them.

    Attributes:
      offline_gold, offline_model, online_gold, online_model: arm names: completions of the SFT policy or of the policy
        itself, labelled by the gold judge or by the reward model. `online_gold` buys labels that no other arm has.
    """

    offline_gold: str
    offline_model: str
    online_gold: str
    online_model: str


class PilotSection(Section):
    """The second tier: both roads taken, at the size of the study.

    Attributes:
      online: the online arm whose lead over the best offline arm decides; declared before the run.
      arms: name -> ArmSection, as in `gvjax compare`; offline ones that read the pairs are its opponents.
      augmentation: see AugmentationSection; used by arms with `data: augmented`.
      square: the decomposition into samples and labels; null leaves it out.
    """

    online: str
    arms: dict[str, ArmSection]
    augmentation: AugmentationSection = AugmentationSection()
    square: SquareSection | None = None

    @pydantic.model_validator(mode="after")
    def _names_are_arms(self, info: pydantic.ValidationInfo) -> Self:
        known(self.online, self.arms, "pilot.online")
        if self.arms[self.online].road != "online":
            raise ValueError(
                f"online is {self.online}, an arm of the {self.arms[self.online].road} road; name an online one"
            )
        if not any(
            arm.road == "offline" and arm.data == "pairs" for arm in self.arms.values()
        ):
            raise ValueError(
                "no arm of the offline road learns from the pairs; the online arm needs an opponent"
            )
        if self.square is not None:
            for name in self.square.model_dump().values():
                known(name, self.arms, "pilot.square")
        if not any(arm.data == "augmented" for arm in self.arms.values()):
            why = "no arm has data: augmented"
            refuse_unused(self, [("augmentation", why)], info)
        return self


class ControlSection(Section):
    """A task on which the gap should be closed: a short horizon, or a reward that needs a hidden reference.

    Attributes:
      task: see TaskSection and DatasetSection.
      pilot: whether the pilot is run on it too, or the first tier alone.
    """

    task: AnyTask
    pilot: bool = True


class GoldJudgeSection(Section):
    """The task's own gold reward, the higher one wins."""

    kind: Literal["gold"] = "gold"


class RewardModelJudgeSection(Section):
    """A reward model that `gvjax run` trained, with the same network; never one that an arm learns from.

    Attributes:
      run_dir: of its finished run.
    """

    kind: Literal["reward_model"]
    run_dir: str


class LlmJudgeSection(Section):
    """A model behind any OpenAI-compatible endpoint, asked about each pair in both orders.

    Attributes:
      base_url: up to and without `/chat/completions`.
      model: as the endpoint names it.
      key_variable: name of the environment variable that holds the key; null sends none.
      options: further fields of each request, over {temperature: 0, max_tokens: 256}, of which null takes one away; models
        that reason may want other names and values.
      calls: requests that may be sent in all, retries and earlier starts included.
      timeout: seconds without a word before a request is given up.
      max_failure_share: more requests than this without a usable answer stop the judging.
    """

    kind: Literal["llm"]
    base_url: str
    model: str
    key_variable: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    calls: Count = 20_000
    timeout: Positive = 60.0
    max_failure_share: Annotated[float, Field(ge=0, le=1)] = 0.05


class HumanJudgeSection(Section):
    """People, through CSV sheets: the first run writes them and stops, the next one reads the labels.

    Attributes:
      directory: where sheets to fill in are written; their keys lie in the run directory.
    """

    kind: Literal["human"]
    directory: str


JudgeSection = (
    GoldJudgeSection | RewardModelJudgeSection | LlmJudgeSection | HumanJudgeSection
)


class GapConfig(Section):
    """The generation–verification gap of a task, run by `gvjax gap`.

    Attributes:
      gap: its name.
      run_dir: where stages and the report go; the same command resumes, an edited config re-uses what is unchanged.
      seeds: training seeds; each draws its own task instance, SFT policy and pairs. One seed gives no intervals, and so
        no advice above "inconclusive".
      task, model, sft, pairs, evaluation: shared by all scorers and both roads. A dataset without a gold reward can be
        measured without a pilot: scorers predict its labels, and nothing is said of samples.
      scorers, samples: the first tier, which trains no policy by RL.
      pilot: the second tier; null stops after the first, whose advice is then a prediction.
      controls: tasks on which the gap should be closed.
      sizes: changes of `model`, each a network of another size that is measured twice: as the verifier of the policy's
        samples, and as the policy whose samples the verifier chooses among.
      judge: who compares completions of the pilot's policies with those of the SFT policy. Only with the gold judge is the
        lead at equal KL known, without which no pilot says that RL pays.
      judged_prompts: test prompts on which that is done; null takes all.
      margins: see MarginsSection.
      workers, seeds_together, mesh, logging, timeouts: as for `gvjax compare`.
    """

    gap: str
    run_dir: RunDir
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    task: AnyTask
    model: dict[str, Scalar]
    sft: SftSection = SftSection()
    pairs: PairsSection = PairsSection()
    evaluation: EvaluationSection = EvaluationSection()
    scorers: ScorersSection = ScorersSection()
    samples: SamplesSection = SamplesSection()
    pilot: PilotSection | None = None
    controls: tuple[ControlSection, ...] = ()
    sizes: tuple[dict[str, Scalar], ...] = ()
    judge: Annotated[JudgeSection, Field(discriminator="kind")] = GoldJudgeSection()
    judged_prompts: Count | None = None
    margins: MarginsSection = MarginsSection()
    workers: Annotated[int, Field(ge=0)] = 0
    seeds_together: Annotated[int, Field(ge=1)] = 1
    mesh: MeshSection = MeshSection()
    logging: LoggingSection = LoggingSection(sample_every=0)
    timeouts: TimeoutsSection = TimeoutsSection()

    @pydantic.model_validator(mode="after")
    def _can_be_measured(self, info: pydantic.ValidationInfo) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {self.seeds} repeat; use different ones")
        smallest = int(self.scorers.fractions[0] * self.pairs.count)
        if smallest < 1:
            raise ValueError(
                f"scorers.fractions start with {self.scorers.fractions[0]}, less than one of {self.pairs.count} pairs;"
                " use larger shares or more pairs"
            )
        if self.judge.kind != "gold" and self.pilot is None:
            raise ValueError(
                f"judge.kind is {self.judge.kind}, but without a pilot there are no policies to compare; add a pilot, or"
                " leave the judge out: scorers are held against the task's gold reward"
            )
        if self.judge.kind == "gold":
            why = "gold rewards judge every prompt"
            refuse_unused(self, [("judged_prompts", why)], info)
        if (
            self.judged_prompts is not None
            and self.judged_prompts > self.evaluation.test_prompts
        ):
            raise ValueError(
                f"judged_prompts is {self.judged_prompts}, more than the {self.evaluation.test_prompts} test prompts"
            )
        for number, section in enumerate(gap_tasks(self)):
            without = isinstance(section, DatasetSection) and section.gold is None
            if without and (has_pilot(self, number) or self.sizes):
                raise ValueError(
                    f"the dataset {section.name} has no gold reward, so neither a pilot nor networks of other sizes can be"
                    " judged; give task.gold, or leave them out"
                )
            study_of(self, number)
        return self


def gap_tasks(settings: GapConfig) -> list[AnyTask]:
    """The task that is measured, then its controls."""
    return [settings.task, *(control.task for control in settings.controls)]


def has_pilot(settings: GapConfig, number: int) -> bool:
    """Whether both roads are taken on the task (0) or on a control (1, 2, ...)."""
    if settings.pilot is None:
        return False
    return number == 0 or settings.controls[number - 1].pilot


def study_of(
    settings: GapConfig, number: int = 0, model: dict[str, Scalar] | None = None
) -> StudyConfig:
    """The comparison of both roads that is inside a measurement, on its task (0) or on a control (1, 2, ...).

    Its reward section says what all tries of the verifier together spend; the verifier itself is chosen among them.

    Args:
      settings: the measurement.
      number: of the task.
      model: another network than the config's.

    Raises:
      ConfigError: the pilot's arms do not make a study.
    """
    scorers = settings.scorers
    data: dict[str, Any] = {
        "study": settings.gap,
        "run_dir": settings.run_dir,
        "seeds": settings.seeds,
        "task": gap_tasks(settings)[number].model_dump(exclude_unset=True),
        "model": settings.model if model is None else model,
        "sft": settings.sft.model_dump(exclude_unset=True),
        "pairs": settings.pairs.model_dump(exclude_unset=True),
        "evaluation": settings.evaluation.model_dump(),
        "reward": {
            "steps": scorers.steps * len(scorers.learning_rates),
            "batch_size": scorers.batch_size,
            "pooling": scorers.pooling,
        },
        "arms": {},
        "workers": settings.workers,
        "seeds_together": settings.seeds_together,
        "mesh": settings.mesh.model_dump(),
    }
    if "logging" in settings.model_fields_set:
        data["logging"] = settings.logging.model_dump(exclude_unset=True)
    pilot = settings.pilot
    if pilot is not None and has_pilot(settings, number) and model is None:
        data["arms"] = {
            name: arm.model_dump(exclude_unset=True) for name, arm in pilot.arms.items()
        }
        data["contrasts"] = [{"a": pilot.online, "b": "best offline"}]
        if any(arm.data == "augmented" for arm in pilot.arms.values()):
            data["augmentation"] = pilot.augmentation.model_dump(exclude_unset=True)
    try:
        return validate(StudyConfig, data, "pilot")
    except ConfigError as error:
        raise ConfigError(str(error)) from None
