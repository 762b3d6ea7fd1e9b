"""Procedural puzzles of the package reasoning-gym as rows on disk, and verifiers of our own for the answers.

The package only makes the items. Its scorers are never called: some of them run what a completion says (`eval`, sympy's
parser), some never end, and some give points for any text. Ours read a completion with regular expressions, JSON or a
syntax tree of whitelisted nodes, and a reward is 0 or 1.

Items are written once, as `{"prompt", "completion", "answer"}` lines: in a few tasks they depend on PYTHONHASHSEED, and a run
that resumes in another process must see the same. A row's `answer` is JSON with all that its verifier needs.

    gvjax puzzles countdown data/countdown --train 1000 --test 200 min_numbers=3 max_numbers=3
"""

import ast
import fractions
import importlib
import itertools
import json
import math
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gvjax.data.answers import final_number

Item = Mapping[str, Any]
"""What the package makes: question, answer, metadata."""

_LONGEST = 4000
"""Characters of a completion that are looked at; a longer one is wrong."""


# Verifiers: (completion, what the row knows) -> right or not.


def countdown(text: str, known: Item) -> bool:
    """An expression of + - * / and brackets that uses every number once and makes the target."""
    # Short: parsing must not be made slow, nor its numbers long.
    if len(text) > 100:
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    used: list[int] = []
    value = _value(tree.body, used)
    return value == known["target"] and Counter(used) == Counter(known["numbers"])


_OPERATIONS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b if b else None,
}


def _value(node: ast.AST, used: list[int]) -> fractions.Fraction | None:
    """What a tree of sums and products comes to; None where it is anything else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return fractions.Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand, used)
        return None if value is None else -value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        left, right = _value(node.left, used), _value(node.right, used)
        if left is None or right is None:
            return None
        return _OPERATIONS[type(node.op)](left, right)
    return None


def word_ladder(text: str, known: Item) -> bool:
    """Words from start to end, each of the vocabulary and one letter from the one before."""
    words = [word.strip().upper() for word in text.strip().split(",")]
    vocabulary = set(known["words"])
    return (
        len(words) > 1
        and (words[0], words[-1]) == (known["start_word"], known["end_word"])
        and all(word in vocabulary for word in words)
        and all(
            len(a) == len(b) and sum(x != y for x, y in zip(a, b)) == 1
            for a, b in itertools.pairwise(words)
        )
    )


def graph_color(text: str, known: Item) -> bool:
    """A JSON map from every vertex to an allowed colour, with no edge between equals."""
    try:
        colours = json.loads(text)
    except (ValueError, RecursionError):
        return False
    puzzle = known["puzzle"]
    names = [str(vertex) for vertex in puzzle["vertices"]]
    if not isinstance(colours, dict) or set(colours) != set(names):
        return False
    if not all(
        type(each) is int and each in puzzle["color_options"]
        for each in colours.values()
    ):
        return False
    return all(colours[str(a)] != colours[str(b)] for a, b in puzzle["edges"])


def palindrome_generation(text: str, known: Item) -> bool:
    """A palindrome of exactly the letters given."""
    word = text.strip().lower()
    return word == word[::-1] and Counter(word) == Counter(known["letters"])


def prime_factorization(text: str, known: Item) -> bool:
    """Primes, in any order, whose product is the number."""
    if not re.fullmatch(r"\s*\d{1,12}(\s*[×x*]\s*\d{1,12})*\s*", text):
        return False
    factors = [int(digits) for digits in re.findall(r"\d+", text)]
    # Factors of the number are small enough to be tried.
    return math.prod(factors) == known["number"] and all(map(_is_prime, factors))


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))


def kakurasu(text: str, known: Item) -> bool:
    """A grid of 0 and 1 whose weighted sums are those of the rows and columns."""
    grid = _grid(text)
    rows, columns = known["row_sums"], known["col_sums"]
    if len(grid) != len(rows) or any(len(row) != len(columns) for row in grid):
        return False
    if any(cell not in (0, 1) for row in grid for cell in row):
        return False
    return rows == [
        sum(place * cell for place, cell in enumerate(row, 1)) for row in grid
    ] and columns == [
        sum(place * cell for place, cell in enumerate(column, 1))
        for column in zip(*grid)
    ]


def mini_sudoku(text: str, known: Item) -> bool:
    """A 4 by 4 sudoku that keeps what the puzzle gives."""
    grid, numbers = _grid(text), [1, 2, 3, 4]
    if len(grid) != 4 or any(sorted(row) != numbers for row in grid):
        return False
    boxes = [
        [grid[r + i][c + j] for i in (0, 1) for j in (0, 1)]
        for r in (0, 2)
        for c in (0, 2)
    ]
    if any(sorted(each) != numbers for each in (*zip(*grid), *boxes)):
        return False
    return all(
        given in (0, cell)
        for row, kept in zip(grid, known["puzzle"])
        for cell, given in zip(row, kept)
    )


def _grid(text: str) -> list[list[int]]:
    """Single digits by line; empty where a line holds anything else."""
    lines = [line.split() for line in text.strip().splitlines()]
    if any(not re.fullmatch(r"[0-9]", cell) for line in lines for cell in line):
        return []
    return [[int(cell) for cell in line] for line in lines]


def number(text: str, known: Item) -> bool:
    """The number that the text ends with."""
    return final_number(text) == final_number(known["answer"])


def exact(text: str, known: Item) -> bool:
    """The answer, letter for letter."""
    return text.strip() == known["answer"]


VERIFIERS: Mapping[str, tuple[Callable[[str, Item], bool], tuple[str, ...]]] = {
    # An answer is harder to find than to check.
    "countdown": (countdown, ("numbers", "target")),
    "word_ladder": (word_ladder, ("start_word", "end_word", "words")),
    "graph_color": (graph_color, ("puzzle",)),
    "palindrome_generation": (palindrome_generation, ("letters",)),
    "prime_factorization": (prime_factorization, ("number",)),
    "kakurasu": (kakurasu, ("row_sums", "col_sums")),
    "mini_sudoku": (mini_sudoku, ("puzzle",)),
    # Controls: to check an answer is to find it.
    "chain_sum": (number, ("answer",)),
    "gcd": (number, ("answer",)),
    "letter_counting": (number, ("answer",)),
    "spell_backward": (exact, ("answer",)),
}
"""Task -> (verifier, what of an item it needs)."""


def is_answer(answer: str) -> bool:
    """Whether it is the record of a puzzle that there is a verifier for."""
    try:
        known = json.loads(answer)
    except ValueError:
        return False
    task = known.get("task") if isinstance(known, dict) else None
    if not isinstance(task, str) or task not in VERIFIERS:
        return False
    _, needed = VERIFIERS[task]
    return all(name in known for name in needed)


def is_right(completion: str, answer: str) -> bool:
    """Whether a completion solves the item whose row has this `answer`."""
    known = json.loads(answer)
    if len(completion) > _LONGEST:
        return False
    _, _, said = completion.rpartition("####")
    return VERIFIERS[known["task"]][0](said, known)


# Making rows.


def write(
    task: str,
    directory: pathlib.Path,
    sizes: Mapping[str, int],
    *,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Writes `<split>.jsonl` files of a task's items, no question twice.

    Args:
      task: a key of `VERIFIERS`.
      directory: made if absent.
      sizes: split -> rows.
      seed: of the items.
      options: of the package's config for the task.

    Raises:
      ValueError: the task is unknown, the package is missing, or it does not make so many different questions.
    """
    if task not in VERIFIERS:
        raise ValueError(
            f"there is no verifier for task {task!r}; there are: {', '.join(VERIFIERS)}"
        )
    try:
        gym = importlib.import_module("reasoning_gym")
    except ModuleNotFoundError:
        raise ValueError(
            f"puzzles of {task} are made by the package reasoning-gym: pip install 'gvjax[puzzles]' (two of its"
            " dependencies are compiled, so a C compiler is needed)"
        ) from None
    items = _items(gym, task, seed, dict(options or {}))
    directory.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for split, count in sizes.items():
        lines = []
        for item, known in items:
            if item["question"] in seen:
                continue
            seen.add(item["question"])
            lines.append(json.dumps(_record(task, item, known), ensure_ascii=False))
            if len(lines) == count:
                break
        if len(lines) < count:
            raise ValueError(
                f"{task} made only {len(seen)} different questions; ask for fewer rows, or give options that allow more"
            )
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def _items(
    gym: Any, task: str, seed: int, options: dict[str, Any]
) -> Iterator[tuple[Item, Item]]:
    """(item, what a verifier may need), at most as many as the package makes of any task."""
    size = 20_000
    try:
        made = gym.create_dataset(task, size=size, seed=seed, **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"reasoning-gym refuses these options: {error}") from None
    for index in range(size):
        item = made[index]
        known = {**item["metadata"], "answer": item["answer"]}
        if task == "word_ladder":
            known["words"] = sorted(made.word_sets[len(known["end_word"])])
        yield item, known


def _record(task: str, item: Item, known: Item) -> dict[str, str]:
    kept = {name: known[name] for name in VERIFIERS[task][1]}
    solution = item["answer"]
    if solution is None:
        solution = json.dumps(item["metadata"]["possible_answer"])
    return {
        "prompt": item["question"],
        "completion": solution,
        "answer": json.dumps({"task": task, **kept}),
    }
