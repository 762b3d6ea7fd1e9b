"""Countdown: reach a target from given numbers with + - * / and brackets.

    use 3 5 7 to make 22:  ->  3*5+7

The reward is 1 for an expression that equals the target exactly (fractions on the way are fine) and uses each number
at most once, 0.1 for one that keeps to the numbers but misses the target, and 0 for everything else. Completions are
read by the small parser below and never evaluated as code. Half of the demonstrations are right, the others combine the
numbers at random.
"""

import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from gvjax.tasks.task import Split
from gvjax.tasks.text import Record, in_split

REWARD_RANGE = (0.0, 1.0)
MAX_CHARACTERS = 64
_LARGEST_TARGET = 99


def examples(
    split: Split, *, seed: int = 0, count: int = 5000, num_numbers: int = 3
) -> Iterator[Record]:
    """Solvable records with `num_numbers` different numbers from 1 to 20; `count` over all splits."""
    return in_split(_records(seed, count, num_numbers), split)


def _records(seed: int, count: int, num_numbers: int) -> Iterator[Record]:
    if not 2 <= num_numbers <= 6:
        raise ValueError(f"num_numbers is {num_numbers}; use 2 to 6")
    rng = np.random.default_rng(seed)
    seen: set[tuple] = set()
    while len(seen) < count:
        # In order: otherwise one puzzle could stand in two splits, its numbers in another order.
        numbers = sorted((1 + rng.permutation(20)[:num_numbers]).tolist())
        solution = _random_expression(rng, numbers)
        target, _ = evaluate(solution)
        key = (tuple(numbers), target)
        if 0 < target <= _LARGEST_TARGET and target not in numbers and key not in seen:
            seen.add(key)
            words = " ".join(map(str, numbers))
            yield {
                "prompt": f"use {words} to make {target}: ",
                "completion": solution,
                "numbers": numbers,
                "target": int(target),
            }


def _random_expression(rng: np.random.Generator, numbers: list[int]) -> str:
    """All the numbers in random order with + - * between them."""
    words = [str(number) for number in rng.permutation(numbers)]
    for place in range(len(words) - 1):
        words[place] += "+-*"[rng.integers(3)]
    return "".join(words)


def demonstration(rng: np.random.Generator, record: Record) -> str:
    """The known solution, or as often a random expression of the same numbers."""
    if rng.random() < 0.5:
        return record["completion"]
    return _random_expression(rng, record["numbers"])


def reward(record: Record, completion: str) -> float:
    """0, 0.1 or 1: see the module."""
    try:
        value, used = evaluate(completion)
    except ValueError:
        return 0.0
    if Counter(used) - Counter(record["numbers"]):
        return 0.0
    return 1.0 if value == record["target"] else 0.1


def optimum(record: Record) -> float:
    """1: every record has a solution."""
    return 1.0


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression, and the numbers it uses, in order.

        sum = product (("+" | "-") product)*
        product = atom (("*" | "/") atom)*
        atom = number | "(" sum ")"

    Numbers are decimal without sign or leading zeros; spaces are allowed between tokens.

    Raises:
      ValueError: the text is longer than 64 characters, is no such expression, or divides by zero.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{len(text)} characters; use at most {MAX_CHARACTERS}")
    tokens = re.findall(r"[1-9][0-9]*|[^ ]", text)
    used: list[int] = []
    position = 0

    def accept(choices: str) -> str | None:
        nonlocal position
        if position < len(tokens) and tokens[position] in tuple(choices):
            position += 1
            return tokens[position - 1]
        return None

    def atom() -> Fraction:
        nonlocal position
        if accept("("):
            value = total()
            if not accept(")"):
                raise ValueError(f"{text!r} leaves a bracket open; close it")
            return value
        if position == len(tokens) or not re.fullmatch("[1-9][0-9]*", tokens[position]):
            raise ValueError(f"{text!r} lacks a number at token {position}; add one")
        used.append(int(tokens[position]))
        position += 1
        return Fraction(used[-1])

    def product() -> Fraction:
        value = atom()
        while operator := accept("*/"):
            right = atom()
            if operator == "/" and right == 0:
                raise ValueError(f"{text!r} divides by zero; it has no value")
            value = value * right if operator == "*" else value / right
        return value

    def total() -> Fraction:
        value = product()
        while operator := accept("+-"):
            right = product()
            value = value + right if operator == "+" else value - right
        return value

    value = total()
    if position < len(tokens):
        raise ValueError(f"{text!r} goes on after its end at token {position}; cut it")
    return value, used
