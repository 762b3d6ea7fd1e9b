"""What a measurement of the gap found: every seed's value, the intervals over them, and the advice; kept as plain JSON."""

import dataclasses
import pathlib
from typing import Any, Literal

from gvjax.gap import results
from gvjax.gap.advice import Advice
from gvjax.gap.results import StudyResults
from gvjax.gap.statistics import Prompts

SeedValues = dict[str, float | None]
"""A value for every seed, by seed; None where that seed has none."""


@dataclasses.dataclass(frozen=True)
class Quantity:
    """One number of the measurement.

    Attributes:
      key: Q1 to Q10, the part of the measurement it belongs to.
      name: in words.
      unit: nats per pair, winrate, gold, ...
      estimate: mean over seeds; None where it cannot be computed (see `reason`).
      low, high: its 95% interval; None where there is none.
      bound_low, bound_high: the wider interval that holds together with those of all numbers the advice looks at; None for
        numbers that it does not look at.
      method: how the interval was made.
      check: the same interval by bootstrap over seeds and prompts, as a cross-check; None where not made.
      p_value, p_holm: two-sided, of 0; plain, and corrected over the decision tests; None for other numbers.
      margin: declared before the run; None where there is none.
      equivalent: whether equality with 0 within the margin was shown at level .05; None where not tested.
      detectable: the smallest true value that this design finds in 80% of studies.
      seeds: every seed's value.
      reason: why something above is None, or on what less than everything it rests, or ''.
    """

    key: str
    name: str
    unit: str
    estimate: float | None
    low: float | None = None
    high: float | None = None
    bound_low: float | None = None
    bound_high: float | None = None
    method: str = ""
    check: tuple[float, float] | None = None
    p_value: float | None = None
    p_holm: float | None = None
    margin: float | None = None
    equivalent: bool | None = None
    detectable: float | None = None
    seeds: SeedValues = dataclasses.field(default_factory=dict)
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class ScorerFinding:
    """A scorer of completions on held-out pairs, one value a seed.

    Attributes:
      name, description: of `scorers.DESCRIPTIONS`.
      pairs: it was trained on; 0 where it learns nothing.
      log_likelihood: nats per pair, at the scale fitted on validation pairs; ln ½ is chance.
      mean_likelihood: mean probability of the label.
      accuracy: share of labels in order.
      calibration_error: expected calibration error.
      learning_rate, updates: of the try that was chosen on validation pairs.
    """

    name: str
    description: str
    pairs: int
    log_likelihood: SeedValues
    mean_likelihood: SeedValues
    accuracy: SeedValues
    calibration_error: SeedValues
    learning_rate: SeedValues = dataclasses.field(default_factory=dict)
    updates: SeedValues = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ChoiceCurve:
    """Choosing among n samples of the SFT policy.

    Attributes:
      scorer: who chooses.
      n: the sizes, ascending.
      winrate: [seeds][len(n)], of the chosen sample over a fresh one.
      gold: [seeds][len(n)], its gold reward.
    """

    scorer: str
    n: tuple[int, ...]
    winrate: tuple[tuple[float, ...], ...]
    gold: tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class Multiplier:
    """How many times the verifier's data the policy needs; see `quantities.DataMultiplier`."""

    identified: bool
    value: float | None
    low: float | None
    high: float | None
    policy_asymptote: float
    verifier_asymptote: float
    asymptote_gap: tuple[float, float]
    reason: str


@dataclasses.dataclass(frozen=True)
class JudgeFinding:
    """Who judged the policies, and how far that can be trusted.

    Attributes:
      kind: gold, reward_model, llm or human.
      comparisons: how many were judged.
      measures: name -> (value, low, high), the ends None where there is no interval.
      warnings: sentences for the advice.
      notes: what else a reader should know, e.g. failures.
    """

    kind: str
    comparisons: int
    measures: dict[str, tuple[float, float | None, float | None]]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TaskFinding:
    """All that was measured on one task.

    Attributes:
      task: its name.
      role: "main", or "control" for a task on which the gap should be closed.
      description: the first line of what it is.
      quantities: Quantity per number.
      scorers: trained on all pairs, and untrained.
      curves: the verifier and the DPO policy at every size of the data.
      multiplier: None with fewer than three sizes.
      choices: best-of-n by every scorer; none where there is no gold reward.
      chosen_n: the n that validation prompts prefer for the verifier; None where there are no choices.
      pilot: both roads, where they were taken.
      onsets: arm -> per seed, the KL at which over-optimisation sets in: gold falls while the proxy rises; None where it
        does not.
      judge: who compared policies; None without a pilot.
      prompts: "crossed" where all seeds share test prompts and held-out pairs, "nested" where each seed draws its own.
    """

    task: str
    role: Literal["main", "control"]
    description: str
    quantities: tuple[Quantity, ...]
    scorers: tuple[ScorerFinding, ...]
    curves: tuple[ScorerFinding, ...]
    multiplier: Multiplier | None
    choices: tuple[ChoiceCurve, ...]
    chosen_n: int | None
    pilot: StudyResults | None = None
    onsets: dict[str, SeedValues] = dataclasses.field(default_factory=dict)
    judge: JudgeFinding | None = None
    prompts: Prompts = "nested"

    def quantity(self, name: str) -> Quantity:
        """The number of that name.

        Raises:
          ValueError: it was not measured.
        """
        for quantity in self.quantities:
            if quantity.name == name:
                return quantity
        names = [quantity.name for quantity in self.quantities]
        raise ValueError(f"{name!r} was not measured on {self.task}; there are {names}")


@dataclasses.dataclass(frozen=True)
class GapFindings:
    """A measurement of the gap and what it comes to.

    Attributes:
      name: of the measurement.
      config: the resolved configuration, margins included.
      config_hash: its hash, taken before the run.
      versions: of gvjax and the libraries under it, and the device.
      started: ISO 8601 time, with its zone.
      seeds: training seeds.
      tasks: the task itself, then its controls.
      advice: on the task itself.
    """

    name: str
    config: dict[str, Any]
    config_hash: str
    versions: dict[str, str]
    started: str
    seeds: tuple[int, ...]
    tasks: tuple[TaskFinding, ...]
    advice: Advice

    def to_json(self) -> str:
        """As JSON text; see `StudyResults.to_json`."""
        return results.to_json(self)

    @classmethod
    def from_json(cls, text: str) -> "GapFindings":
        """From JSON text, strictly.

        Raises:
          ValueError: the text is not what `to_json` writes; the message names the place.
        """
        return results.from_json(cls, text)

    def save(self, path: str | pathlib.Path) -> None:
        """Writes `to_json` to a file, in one piece."""
        results.write_whole(path, self.to_json())
