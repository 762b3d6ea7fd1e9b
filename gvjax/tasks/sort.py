"""Sort: write whole numbers in ascending order.

    sort 31 4 15:  ->  4 15 31

The reward is the share of words that stand where they should, out of the longer of answer and completion; 1 only when
all is right. Half of the demonstrations are right, the others are in random order.
"""

from collections.abc import Iterator

import numpy as np

from gvjax.tasks.task import Split
from gvjax.tasks.text import Record, in_split

REWARD_RANGE = (0.0, 1.0)


def examples(split: Split, *, seed: int = 0, count: int = 5000) -> Iterator[Record]:
    """Records of 3 to 5 different numbers below 100; `count` over all splits."""
    return in_split(_records(seed, count), split)


def _records(seed: int, count: int) -> Iterator[Record]:
    rng = np.random.default_rng(seed)
    seen: set[tuple[int, ...]] = set()
    while len(seen) < count:
        numbers = tuple(rng.permutation(100)[: rng.integers(3, 6)].tolist())
        if numbers not in seen:
            seen.add(numbers)
            prompt = "sort " + " ".join(map(str, numbers)) + ": "
            answer = " ".join(map(str, sorted(numbers)))
            yield {"prompt": prompt, "completion": answer}


def demonstration(rng: np.random.Generator, record: Record) -> str:
    """The answer, or as often its numbers in random order."""
    words = record["completion"].split()
    return " ".join(words if rng.random() < 0.5 else rng.permutation(words).tolist())


def reward(record: Record, completion: str) -> float:
    """In [0, 1]: share of words in their place."""
    answer, words = record["completion"].split(), completion.split()
    right = sum(a == b for a, b in zip(answer, words))
    return right / max(len(answer), len(words))


def optimum(record: Record) -> float:
    """1: the answer itself."""
    return 1.0
