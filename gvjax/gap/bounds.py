"""Estimates with intervals that hold together."""

import dataclasses
import math
from collections.abc import Mapping

from gvjax.gap import statistics


@dataclasses.dataclass(frozen=True)
class Bounds:
    """An estimate and its simultaneous interval.

    Attributes:
      point: the estimate.
      low, high: ends of its interval, both None where there is none; −inf and inf are ends too.
    """

    point: float
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.point):
            raise ValueError("an estimate is NaN; leave it out (None) and say why")
        if (self.low is None) != (self.high is None):
            raise ValueError(
                f"an interval has the ends {self.low} and {self.high}; give both, or None for both"
            )
        if self.low is None or self.high is None:
            return
        if not self.low <= self.point <= self.high:
            raise ValueError(
                f"the estimate {self.point} lies outside its interval [{self.low}, {self.high}]; advice rests on both, so"
                " they must come from one method"
            )


def simultaneous(
    estimates: Mapping[str, statistics.Estimate], *, level: float = 0.95
) -> dict[str, Bounds]:
    """Bounds that hold together with at least the given probability (Bonferroni).

        each of the K intervals at level 1 − (1 − level)/K

    Args:
      estimates: by name; all that one piece of advice looks at.
      level: of all intervals together.

    References:
      Dunn, 1961, https://doi.org/10.1080/01621459.1961.10482090.
    """
    each = 1 - (1 - level) / max(1, len(estimates))
    found = {}
    for name, estimate in estimates.items():
        low, high = estimate.interval(each) or (None, None)
        found[name] = Bounds(estimate.mean, low, high)
    return found
