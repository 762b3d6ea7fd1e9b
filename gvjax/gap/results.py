"""What one comparison study produced: every seed's value, kept as plain JSON.

These classes hold measurements and what was declared before they were made. What the measurements say (intervals,
verdicts) is computed from them by `contrasts.analyse`, which fills `StudyResults.outcomes` and changes nothing else.
"""

import dataclasses
import difflib
import functools
import json
import math
import pathlib
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

VERSION = 1
"""Version of the JSON layout; a file of another version is refused."""

Road = Literal["start", "offline", "relabelled", "online", "selection"]
Scalar = str | float | int | bool | None
R = typing.TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Ledger:
    """What an arm spent. Ledgers add field by field.

    Attributes:
      labels: preference labels bought from the gold judge; an arm buys a pair's once, however often it is read.
      prompts: prompts that were sampled on, one as often as it was.
      sampled_tokens: completion tokens generated for training (evaluation is free, since every arm has the same).
      trained_tokens: tokens, prompts included, that went through a training step.
      flops: floating-point operations of sampling, scoring and training.
      seconds: wall-clock seconds, compilation included.
      reward_model_calls: completions scored by a learned reward model.
      gold_calls: completions scored by the gold reward to be learned from or chosen among: labels beyond those of the pairs.
    """

    labels: int = 0
    prompts: int = 0
    sampled_tokens: int = 0
    trained_tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    reward_model_calls: int = 0
    gold_calls: int = 0

    def __add__(self, other: "Ledger") -> "Ledger":
        return Ledger(
            **{
                field.name: getattr(self, field.name) + getattr(other, field.name)
                for field in dataclasses.fields(self)
            }
        )


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """One evaluation during training.

    Attributes:
      step: optimizer updates made.
      gold: mean gold reward on the validation prompts; what is reported of a checkpoint, `SeedResult.gold`, is on the test
        prompts.
      kl: nats per sequence, KL(policy ‖ SFT policy).
      length: mean completion tokens.
      winrate: in [0, 1], over the SFT policy's completions in gold reward; None where not taken.
      proxy: mean reward under the reward model; None where there is none.
    """

    step: int
    gold: float
    kl: float
    length: float
    winrate: float | None = None
    proxy: float | None = None


@dataclasses.dataclass(frozen=True)
class SeedResult:
    """One arm trained once.

    Attributes:
      seed: the training seed; arms of one study share seeds.
      gold: [prompts], gold reward of one temperature-1 completion of each test prompt; entry i is the same prompt in
        every arm of this seed.
      kl: nats per sequence, KL(policy ‖ SFT policy) on those completions.
      length: mean completion tokens, the EOS included.
      step: optimizer updates of the checkpoint reported.
      setting: the hyper-parameters chosen from the arm's sweep.
      curve: evaluations along the way, of the chosen setting, by step.
      ledger: what the arm spent beyond the SFT policy: the whole sweep, its reward model, the samples that this ranked, and
        all that the arm it starts from spent.
      extra: further numbers worth keeping, by name; `validation_gold` is the mean gold reward of the reported checkpoint on
        validation prompts, by which it was chosen.
    """

    seed: int
    gold: tuple[float, ...]
    kl: float
    length: float
    step: int = 0
    setting: dict[str, Scalar] = dataclasses.field(default_factory=dict)
    curve: tuple[CurvePoint, ...] = ()
    ledger: Ledger = Ledger()
    extra: dict[str, float] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def mean_gold(self) -> float:
        """Mean of `gold`."""
        return math.fsum(self.gold) / len(self.gold)


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """One way of using the data, over all seeds.

    Attributes:
      name: as shown, e.g. "DPO + NLL".
      road: "start" for the SFT policy; "offline" for what was trained from it on the preference pairs alone;
        "relabelled" for an offline loss on SFT samples that a reward model labelled, which borrows the verifier
        without going online; "online" for what learns from its own samples; "selection" for what chooses among SFT
        samples without training (best-of-n).
      seeds: SeedResult per seed.
      description: one sentence: loss, data and how its checkpoint was chosen.
    """

    name: str
    road: Road
    seeds: tuple[SeedResult, ...]
    description: str = ""

    def seed(self, seed: int) -> SeedResult:
        """The result of one seed.

        Raises:
          ValueError: the arm has no such seed.
        """
        for result in self.seeds:
            if result.seed == seed:
                return result
        present = [result.seed for result in self.seeds]
        raise ValueError(f"arm {self.name!r} has no seed {seed}; it has {present}")


@dataclasses.dataclass(frozen=True)
class ScorerSeed:
    """How well a scorer tells chosen from rejected on held-out pairs, for one seed.

    Attributes:
      seed: the training seed.
      log_likelihood: nats per pair, mean log-probability of the label; ln ½ = −.693 is chance.
      accuracy: share of pairs ordered as labelled; ties count ½.
      gold_accuracy: share ordered as their gold rewards are, which labels follow but for noise; pairs of equal gold left
        out. None where there is no gold, and in results of before it had this name: those have it under `accuracy`.
      calibration_error: expected calibration error, None where not measured.
      pair_log_likelihoods: [pairs], log-probability of each label; () where only the mean was kept.
    """

    seed: int
    log_likelihood: float
    accuracy: float
    calibration_error: float | None = None
    pair_log_likelihoods: tuple[float, ...] = ()
    gold_accuracy: float | None = None


@dataclasses.dataclass(frozen=True)
class ScorerResult:
    """One scorer of completions, over all seeds.

    Attributes:
      name: e.g. "reward model", "DPO implicit reward", "gold".
      seeds: ScorerSeed per seed.
      description: one sentence: what it is and how it was chosen.
    """

    name: str
    seeds: tuple[ScorerSeed, ...]
    description: str = ""


@dataclasses.dataclass(frozen=True)
class BestOfN:
    """Gold reward of the best of n samples of the SFT policy, as chosen by one scorer.

    Attributes:
      scorer: its name.
      n: the sizes, ascending.
      gold: [seeds][len(n)], mean gold of the chosen sample.
    """

    scorer: str
    n: tuple[int, ...]
    gold: tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One test prompt with what the arms made of it.

    Attributes:
      prompt: decoded.
      completions: decoded, by arm name.
      gold: gold rewards, by arm name.
    """

    prompt: str
    completions: dict[str, str]
    gold: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Both roads on one task.

    Attributes:
      task: its name.
      role: "main", or "twin" for a control on which the theory says that the advantage of going online is gone.
      arms: ArmResult per arm, exactly one of them with road "start".
      prompts: "crossed" when all seeds are tested on the same prompts, "nested" when each seed draws its own.
      scorers: ScorerResult per scorer.
      best_of_n: BestOfN per scorer.
      samples: a few prompts.
      optimum: the highest gold reward possible, None where unknown.
      description: one or two sentences: what the task is, and for a twin, what was changed.
    """

    task: str
    role: Literal["main", "twin"]
    arms: tuple[ArmResult, ...]
    prompts: Literal["crossed", "nested"] = "crossed"
    scorers: tuple[ScorerResult, ...] = ()
    best_of_n: tuple[BestOfN, ...] = ()
    samples: tuple[Sample, ...] = ()
    optimum: float | None = None
    description: str = ""

    def arm(self, name: str) -> ArmResult:
        """The arm of that name, or a composite one: BEST_OFFLINE is each seed's best offline arm.

        Raises:
          ValueError: there is no such arm.
        """
        if name == BEST_OFFLINE:
            return best_arm(self.offline, name)
        for arm in self.arms:
            if arm.name == name:
                return arm
        names = [arm.name for arm in self.arms] + [BEST_OFFLINE]
        raise ValueError(
            f"task {self.task!r} has no arm {name!r}{_near_miss(name, names)}; it has {names}"
        )

    @property
    def offline(self) -> tuple[ArmResult, ...]:
        """The arms among which BEST_OFFLINE is."""
        return tuple(arm for arm in self.arms if arm.road == "offline")

    @property
    def start(self) -> ArmResult:
        """The arm both roads begin at."""
        starts = [arm for arm in self.arms if arm.road == "start"]
        if len(starts) != 1:
            raise ValueError(
                f"task {self.task!r} has {len(starts)} arms with road 'start'; give exactly one"
            )
        return starts[0]


BEST_OFFLINE = "best offline"
"""Names, in a contrast, the best offline arm, chosen anew for each seed; see `best_arm`."""


def chosen_on_test(arms: Sequence[ArmResult]) -> bool:
    """Whether the best of some arms is chosen on the test prompts: a seed of one of them has no gold on validation ones."""
    return len(arms) > 1 and not all(
        "validation_gold" in seed.extra for arm in arms for seed in arm.seeds
    )


def best_arm(arms: Sequence[ArmResult], name: str) -> ArmResult:
    """The composite arm that takes, for each seed, the arm with the highest mean gold on validation prompts.

    Chosen on the prompts that are reported it would be flattered. That is harmless where another arm is claimed to be
    better, and not where the composite is claimed to be enough: of equal arms the luckiest would stand for all. So the
    test prompts choose only in results that lack validation gold, and the description says so.
    """
    if not arms:
        raise ValueError(f"no arms to make {name!r} of; give at least one")
    on_test = chosen_on_test(arms)

    def gold(result: SeedResult) -> float:
        return result.mean_gold if on_test else result.extra.get("validation_gold", 0.0)

    chosen = []
    for seed in [result.seed for result in arms[0].seeds]:
        candidates = [(arm.seed(seed), arm) for arm in arms]
        result, arm = max(candidates, key=lambda pair: gold(pair[0]))
        setting = {"arm": arm.name, **result.setting}
        chosen.append(dataclasses.replace(result, setting=setting))
    names = ", ".join(arm.name for arm in arms)
    where = "the test prompts themselves, which flatters it" if on_test else "validation prompts"  # fmt: skip
    description = f"the best of {names}, seed by seed by gold on {where}"
    return ArmResult(name, arms[0].road, tuple(chosen), description)


@dataclasses.dataclass(frozen=True)
class Contrast:
    """A comparison declared before the run: a − b in mean gold reward.

    Attributes:
      task: the task's name.
      a, b: arm names; `BEST_OFFLINE` stands for each seed's best offline arm.
      margin: gold reward; differences inside ±margin count as equal when testing equivalence. None: not tested.
      primary: True puts it in the verdict and in the family that Holm's correction covers.
    """

    task: str
    a: str
    b: str
    margin: float | None = None
    primary: bool = True


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the data say about a contrast.

    Attributes:
      contrast: the contrast.
      measure: "gold", or "gold at matched KL" where both arms are compared at the same KL to the SFT policy.
      estimate: mean over seeds of a − b; None where it cannot be computed (see `reason`).
      low, high: ends of the 95% interval; None where there is none (one seed).
      method: how the interval was made.
      p_value: two-sided, uncorrected; p_holm: corrected over the primary contrasts of the study; None where there
        is no interval.
      degrees_of_freedom: of the t distribution behind the interval.
      equivalent: whether equivalence within the margin was shown at level .05; None where not tested.
      detectable: the smallest true difference that this design would have found in 80% of studies.
      seeds: a − b for every seed, by seed; None where that seed has none.
      checks: further intervals by method name, as cross-checks.
      same_checkpoint: whether both arms kept one and the same checkpoint in every seed, so that there is nothing to test.
      reason: why something above is None, or ''.
    """

    contrast: Contrast
    measure: Literal["gold", "gold at matched KL"]
    estimate: float | None
    low: float | None = None
    high: float | None = None
    method: str = ""
    p_value: float | None = None
    p_holm: float | None = None
    degrees_of_freedom: float | None = None
    equivalent: bool | None = None
    detectable: float | None = None
    seeds: dict[str, float | None] = dataclasses.field(default_factory=dict)
    checks: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    same_checkpoint: bool = False
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class StudyResults:
    """Everything one study produced.

    Attributes:
      name: of the study.
      config: the resolved configuration.
      config_hash: its hash, taken before the run.
      versions: of gvjax and the libraries under it, and the device: of all that computed the numbers.
      started: ISO 8601 time, with its zone.
      tasks: TaskResult per task.
      contrasts: what was declared before the run.
      outcomes: what the data say about it; filled by `contrasts.analyse`.
    """

    name: str
    config: dict[str, Any]
    config_hash: str
    versions: dict[str, str]
    started: str
    tasks: tuple[TaskResult, ...]
    contrasts: tuple[Contrast, ...] = ()
    outcomes: tuple[Outcome, ...] = ()

    def task(self, name: str) -> TaskResult:
        """The task of that name.

        Raises:
          ValueError: there is no such task.
        """
        for task in self.tasks:
            if task.task == name:
                return task
        names = [task.task for task in self.tasks]
        raise ValueError(
            f"no task {name!r}{_near_miss(name, names)}; the study has {names}"
        )

    def to_json(self) -> str:
        """The results as JSON text. Numbers that are not finite become the strings "nan", "inf" and "-inf"."""
        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> "StudyResults":
        """Results from JSON text, strictly: unknown, missing or mistyped fields are refused.

        Raises:
          ValueError: the text is not what `to_json` writes; the message names the place.
        """
        return from_json(cls, text)

    def save(self, path: str | pathlib.Path) -> None:
        """Writes `to_json` to a file, in one piece: a reader never sees half of it."""
        write_whole(path, self.to_json())

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "StudyResults":
        """Reads what `save` wrote."""
        return cls.from_json(pathlib.Path(path).read_text(encoding="utf-8"))


def to_json(results: Any) -> str:
    """Results of any kind as JSON text, the version of the layout first."""
    return json.dumps({"version": VERSION, **_encode(results)}, indent=1) + "\n"


def from_json(kind: type[R], text: str) -> R:
    """Results of a kind from what `to_json` wrote.

    Raises:
      ValueError: the text is something else; the message names the place.
    """
    value = json.loads(text)
    if not isinstance(value, dict) or "version" not in value:
        raise ValueError("not a results file: it has no 'version' field")
    version = value.pop("version")
    if version != VERSION:
        raise ValueError(
            f"results file has version {version!r}, this gvjax reads {VERSION}; "
            "read it with the gvjax named in its 'versions' field"
        )
    return _decode(kind, value, "results")


def write_whole(path: str | pathlib.Path, text: str) -> None:
    """Writes a file in one piece: a reader never sees half of it."""
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _near_miss(name: str, names: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _encode(getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_encode(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "item"):  # numpy and jax scalars
        return _encode(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    raise ValueError(
        f"cannot write {type(value).__name__} {value!r} to JSON; convert it to numbers, text, lists or dicts"
    )


def _decode(kind: Any, value: Any, place: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, place)
    if origin is tuple and isinstance(value, list):
        kinds = (args[0],) * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(
                _decode(item_kind, item, f"{place}[{i}]")
                for i, (item_kind, item) in enumerate(zip(kinds, value))
            )
    if origin is dict and isinstance(value, dict):
        return {
            key: _decode(args[1], item, f"{place}.{key}") for key, item in value.items()
        }
    if origin is Literal and value in args:
        return value
    if origin in (types.UnionType, typing.Union):
        for option in args:
            if option is type(value) or (option is types.NoneType and value is None):
                return value
        for option in args:
            try:
                return _decode(option, value, place)
            except ValueError:
                continue
    if kind is float:
        if value in ("nan", "inf", "-inf"):
            return float(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    if (
        kind in (int, str, bool)
        and isinstance(value, kind)
        and not (kind is int and isinstance(value, bool))
    ):
        return value
    shown = json.dumps(value)
    shown = shown if len(shown) <= 60 else shown[:60] + "…"
    raise ValueError(f"{place}: expected {kind}, found {shown}")


def _decode_dataclass(kind: Any, value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected an object, found {type(value).__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            raise ValueError(
                f"{place}: unknown field {key!r}{_near_miss(key, fields)}; "
                f"{kind.__name__} has {list(fields)}"
            )
    hints = typing.get_type_hints(kind)
    decoded = {}
    for name, field in fields.items():
        if name in value:
            decoded[name] = _decode(hints[name], value[name], f"{place}.{name}")
        elif (
            field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ):
            raise ValueError(f"{place}: field {name!r} is missing")
    return kind(**decoded)
