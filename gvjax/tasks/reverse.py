"""Reverse: write a word backwards.

    reverse gabh:  ->  hbag

The reward is the share of letters that stand where they should, out of the longer of answer and completion (spaces
around it are ignored); 1 only when all is right. Half of the demonstrations are right, the others shuffle the letters.
"""

from collections.abc import Iterator

import numpy as np

from gvjax.tasks.task import Split
from gvjax.tasks.text import Record, in_split

REWARD_RANGE = (0.0, 1.0)
_LETTERS = "abcdefgh"


def examples(split: Split, *, seed: int = 0, count: int = 5000) -> Iterator[Record]:
    """Records of words of 3 to 6 letters; `count` over all splits."""
    return in_split(_records(seed, count), split)


def _records(seed: int, count: int) -> Iterator[Record]:
    rng = np.random.default_rng(seed)
    seen: set[str] = set()
    while len(seen) < count:
        letters = rng.integers(len(_LETTERS), size=rng.integers(3, 7))
        word = "".join(_LETTERS[i] for i in letters)
        if word not in seen:
            seen.add(word)
            yield {"prompt": f"reverse {word}: ", "completion": word[::-1]}


def demonstration(rng: np.random.Generator, record: Record) -> str:
    """The answer, or as often its letters in random order."""
    letters = list(record["completion"])
    return "".join(letters if rng.random() < 0.5 else rng.permutation(letters).tolist())


def reward(record: Record, completion: str) -> float:
    """In [0, 1]: share of letters in their place."""
    answer, word = record["completion"], completion.strip()
    right = sum(a == b for a, b in zip(answer, word))
    return right / max(len(answer), len(word))


def optimum(record: Record) -> float:
    """1: the answer itself."""
    return 1.0
