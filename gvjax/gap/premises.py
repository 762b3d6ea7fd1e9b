"""Premises of advice: each about one end of one interval, or about one estimate, and what to say where it does not hold."""

import dataclasses
import math

from gvjax.gap.bounds import Bounds


@dataclasses.dataclass(frozen=True)
class Premise:
    """One condition on one number.

    Attributes:
      text: the condition with the number behind it, as it reads where it holds.
      holds: whether it does.
      shortfall: the number, and the condition that it does not meet; '' where the number is not known.
      missing: what would make it hold, or '' where nothing but another value would.
      name: of the number, where the condition is on one.
    """

    text: str
    holds: bool
    missing: str = ""
    shortfall: str = ""
    name: str = ""


def low_end(name: str, bounds: Bounds | None, least: float, strictly: bool) -> Premise:
    """The lower end of an interval is at least something, or above it."""
    rule = f"{'above' if strictly else 'at least'} {number(least)}"
    if bounds is None or bounds.low is None or bounds.high is None:
        return Premise(f"{name} is {rule}", False, unknown(name, bounds))
    holds = bounds.low > least if strictly else bounds.low >= least
    return bounded(name, bounds, rule, least, bounds.low, holds)


def high_end(name: str, bounds: Bounds | None, most: float) -> Premise:
    """The upper end of an interval is below something."""
    rule = f"below {number(most)}"
    if bounds is None or bounds.low is None or bounds.high is None:
        return Premise(f"{name} is {rule}", False, unknown(name, bounds))
    return bounded(name, bounds, rule, most, bounds.high, bounds.high < most)


def bounded(
    name: str, bounds: Bounds, rule: str, wall: float, end: float, holds: bool
) -> Premise:
    """A number whose interval ends on one side of a wall; says how far it would have to shrink."""
    known = f"{name} is {shown(bounds)}"
    return Premise(
        f"{known}, {rule}",
        holds,
        "" if holds else _shrink(name, bounds, wall, end, rule),
        f"{known}, not all {rule}",
        name,
    )


def estimate(name: str, bounds: Bounds | None, least: float, strictly: bool) -> Premise:
    """An estimate is at least something, or above it; one without an interval does not count."""
    rule = f"{'above' if strictly else 'at least'} {number(least)}"
    if bounds is None or bounds.low is None:
        return Premise(f"{name} is estimated {rule}", False, unknown(name, bounds))
    holds = bounds.point > least if strictly else bounds.point >= least
    known = f"{name} is estimated at {number(bounds.point)}"
    return Premise(f"{known}, {rule}", holds, "", f"{known}, not {rule}", name)


def estimate_at_most(name: str, bounds: Bounds | None, most: float) -> Premise:
    """An estimate is at most something; one without an interval does not count."""
    if bounds is None or bounds.low is None:
        return Premise(
            f"{name} is estimated at most {number(most)}",
            False,
            unknown(name, bounds),
        )
    return Premise(
        f"{name} is estimated at {number(bounds.point)}, at most {number(most)}",
        bounds.point <= most,
    )


def either(a: Premise, b: Premise) -> Premise:
    """One of two holds."""
    if a.holds or b.holds:
        return a if a.holds else b
    missing = " or ".join(text for text in (a.missing, b.missing) if text)
    return Premise(f"{a.text}, or {b.text}", False, missing)


def both(a: Premise, b: Premise) -> Premise:
    """Two hold."""
    missing = " and ".join(text for text in (a.missing, b.missing) if text)
    return Premise(f"{a.text}, and {b.text}", a.holds and b.holds, missing)


def _shrink(name: str, bounds: Bounds, wall: float, end: float, rule: str) -> str:
    """By how much the interval must shrink; '' where its middle is on the wrong side and shrinking would not help."""
    room, half = wall - bounds.point, end - bounds.point
    if room == 0 or half == 0 or (room > 0) != (half > 0):
        return ""
    if math.isinf(half):
        return f"an interval of {name}, which has no end now"
    # Intervals shrink with the root of what they are made from.
    factor = (half / room) ** 2
    return (
        f"the interval {shown(bounds)} of {name}: to lie {rule} around the same estimate, it must shrink to"
        f" {percent(abs(room / half))} of its width, which takes about {times(factor)} as many prompts and seeds"
    )


def unknown(name: str, bounds: Bounds | None) -> str:
    """Why a number says nothing."""
    if bounds is None:
        return f"{name}: not measured"
    return f"an interval of {name}: seed variance is unknown, train at least two seeds, better five"


def shown(bounds: Bounds) -> str:
    """An estimate with its interval."""
    if bounds.low is None or bounds.high is None:
        return f"{number(bounds.point)} (no interval)"
    if bounds.low == bounds.high:
        return number(bounds.point)
    return f"{number(bounds.point)} [{number(bounds.low)}, {number(bounds.high)}]"


def number(value: float) -> str:
    """Three digits."""
    # What rounding alone left is nothing.
    value = 0.0 if abs(value) < 1e-9 else value
    return f"{value:.3g}".replace("-", "−")


def percent(share: float) -> str:
    """A share."""
    return f"{100 * share:.0f}%"


def times(factor: float) -> str:
    """A factor."""
    return f"{factor:.1f} times" if factor < 100 else f"{factor:.0f} times"


def capital(text: str) -> str:
    """With a capital letter in front."""
    return text[:1].upper() + text[1:]
