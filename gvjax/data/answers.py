"""Answers that can be checked: numbers found in text by a regular expression, never by running it."""

import decimal
import re

_NUMBER = re.compile(r"[-+\u2212]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_MARK = "####"
"""What GSM8K's solutions write before the answer."""
_LONGEST = 40
"""Characters of a number that is still one; converting digits takes a time quadratic in their count."""


def canonical_number(text: str | float) -> str | None:
    """str: the first number in a text without separators, units and needless zeros; None where there is none.

    "86,400" and "$86400.00 in all" give "86400", 266.0 gives "266", "-0.50%" gives "-0.5".
    """
    found = _NUMBER.search(str(text))
    return None if found is None else _canonical(found.group())


def final_number(text: str) -> str | None:
    """str: the number that a solution ends with: the first after its last `####`, else the last in the text."""
    _, mark, after = text.rpartition(_MARK)
    if mark:
        return canonical_number(after)
    found = _NUMBER.findall(text)
    return _canonical(found[-1]) if found else None


def is_answer(answer: str) -> bool:
    """Whether there is a number in it, so that a completion can be right."""
    return canonical_number(answer) is not None


def is_right(completion: str, answer: str) -> bool:
    """Whether the number that a completion ends with is the answer."""
    found = final_number(completion)
    return found is not None and found == canonical_number(answer)


def _canonical(digits: str) -> str | None:
    digits = digits.replace(",", "").replace("\u2212", "-")
    if len(digits) > _LONGEST:
        return None
    number = decimal.Decimal(digits)
    if number == number.to_integral_value():
        return str(int(number))
    return format(number.normalize(), "f")
