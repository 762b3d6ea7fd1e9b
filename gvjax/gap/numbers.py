"""Numbers on their way to the page: one value a seed, an interval, and bounds and tests of those that decide together."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gvjax.gap import quantities, statistics
from gvjax.gap.bounds import Bounds, simultaneous
from gvjax.gap.findings import Quantity, SeedValues
from gvjax.gap.statistics import Estimate, Prompts

LEVEL = 0.05

ADVANTAGE = "verifier's lead in likelihood"
HEADROOM = "gain by choosing with the verifier"
LEAD = "its lead over choosing with the DPO policy"
NULL_LEAD = "its lead over choosing with the policy's own log-probability"
ORACLE = "gain by choosing with a perfect judge"
EFFICIENCY = "verifier's share of the perfect judge's gain"
TURN = "verifier's gain at the largest n, less that at the chosen n"
SLOPE = "change of the lead with twice the data"
DIFFERENCE = "online policy's lead over the best offline one"
MATCHED = "the same at equal KL to the SFT policy"
FLATTERED = "the same over the offline policy that wins most on these very prompts"
CUES = "accuracy lost on paraphrases, DPO policy less verifier"
PEAK = "rarity of the best samples"
LENGTH = "share of gold explained by length"

_DECISIVE = (
    ADVANTAGE,
    HEADROOM,
    LEAD,
    ORACLE,
    EFFICIENCY,
    TURN,
    SLOPE,
    DIFFERENCE,
    MATCHED,
)
"""What the advice looks at: the bounds of those that were measured hold together."""
_TESTS = (ADVANTAGE, LEAD, DIFFERENCE, MATCHED)
"""Decision tests declared here and nowhere else: Holm's correction is over those that were measured."""


@dataclasses.dataclass
class Number:
    """A number on its way to becoming a Quantity."""

    key: str
    unit: str
    values: SeedValues
    estimate: Estimate | None
    margin: float | None = None
    rows: list[np.ndarray] | None = None
    prompts: Prompts = "nested"
    reason: str = ""


class Numbers:
    """What a task was found to be, by name.

    Attributes:
      by_name: name -> Number, in the order of the page.
    """

    def __init__(self, seeds: Sequence[int]):
        """Args: the seeds, in the order in which values are given."""
        self.by_name: dict[str, Number] = {}
        self._seeds = tuple(seeds)

    def __getitem__(self, name: str) -> Number:
        return self.by_name[name]

    def per_seed(self, values: Sequence[float | None]) -> SeedValues:
        """Seed -> value."""
        return {str(seed): value for seed, value in zip(self._seeds, values)}

    def add_rows(
        self,
        key: str,
        name: str,
        unit: str,
        rows: list[np.ndarray],
        prompts: Prompts,
        margin: float | None = None,
        reason: str = "",
    ) -> None:
        """Adds a number that is a mean over prompts or pairs.

        Args:
          key: of the question, such as "Q4".
          name, unit: as the page shows them.
          rows: every seed's values, f64[prompts] each.
          prompts: whether seeds share them.
          margin: what matters, for the test of equivalence.
          reason: a word on what is left out.
        """
        self.by_name[name] = Number(
            key,
            unit,
            self.per_seed([float(row.mean()) for row in rows]),
            statistics.paired_mean(rows, prompts=prompts),
            margin,
            rows,
            prompts,
            reason,
        )

    def add_seeds(
        self,
        key: str,
        name: str,
        unit: str,
        values: Sequence[float | None],
        margin: float | None = None,
        reason: str = "",
        *,
        needs_all: bool = False,
    ) -> None:
        """Adds a number that each seed has or lacks.

        Args:
          key, name, unit, margin: as for `add_rows`.
          values: a seed's each.
          reason: why one may be missing.
          needs_all: those that have one do not stand for the others.
        """
        missing = sum(value is None for value in values)
        if missing and not reason:
            reason = f"{missing} of {len(values)} seeds have no value"
        self.by_name[name] = Number(
            key,
            unit,
            self.per_seed(values),
            None if missing and needs_all else quantities.over_seeds(values),
            margin,
            reason=reason if missing else "",
        )

    def quantities(self) -> tuple[dict[str, Bounds], dict[str, Quantity]]:
        """Simultaneous bounds of the numbers that decide, and all numbers with their intervals and tests."""
        for name, number in self.by_name.items():
            estimate = number.estimate
            if estimate is not None and estimate.standard_error == 0 and name != TURN:
                # Seeds that agree to the last bit, as when nothing was learnt, say nothing of how seeds differ.
                number.estimate = dataclasses.replace(
                    estimate,
                    standard_error=None,
                    degrees_of_freedom=None,
                    reason="all seeds agree exactly: no spread to make an interval of",
                )
        estimates = {
            name: estimate
            for name in _DECISIVE
            if name in self.by_name
            and (estimate := self.by_name[name].estimate) is not None
        }
        bounds = simultaneous(estimates)
        tested = {
            name: p
            for name in _TESTS
            if (estimate := estimates.get(name)) is not None
            and (p := estimate.p_value()) is not None
        }
        corrected = dict(zip(tested, statistics.holm(list(tested.values()))))
        made = {}
        for name, number in self.by_name.items():
            estimate = number.estimate
            base = Quantity(
                number.key,
                name,
                number.unit,
                None,
                margin=number.margin,
                seeds=number.values,
                reason=number.reason,
            )
            if estimate is None:
                made[name] = base
                continue
            low, high = estimate.interval() or (None, None)
            equivalent = None
            if number.margin is not None:
                p = estimate.equivalence_p_value(number.margin)
                equivalent = None if p is None else p < LEVEL
            bound = bounds.get(name)
            check = None
            if number.rows is not None:
                check = statistics.pigeonhole_interval(
                    number.rows, prompts=number.prompts
                )
            made[name] = dataclasses.replace(
                base,
                estimate=estimate.mean,
                low=low,
                high=high,
                bound_low=None if bound is None else bound.low,
                bound_high=None if bound is None else bound.high,
                method=estimate.method,
                check=check,
                p_value=tested.get(name),
                p_holm=corrected.get(name),
                equivalent=equivalent,
                # Without any spread everything would be.
                detectable=estimate.detectable() or None,
                reason="; ".join(t for t in (number.reason, estimate.reason) if t),
            )
        return bounds, made
