"""Which sequences share a row: fewer positions that hold no token, and a step costs what its tokens cost."""

from collections.abc import Callable, Sequence

import numpy as np

STEPS = 64
"""Steps from nothing to the longest row, in which `shortest` makes rows shorter."""

OPEN_BINS = 256
"""Bins that `pack_pairs` still looks at; the fullest is closed when there are more."""


def pack(lengths: np.ndarray, capacity: int) -> list[tuple[int, ...]]:
    """Bins of indices whose lengths sum to at most `capacity`: longest first, each into the fullest bin that takes it.

    Best-fit decreasing needs at most 11/9 of the fewest bins, plus a few (Johnson, 1973).
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"length {lengths.max()} exceeds the capacity {capacity}")
    bins: list[list[int]] = []
    # For each free space the bins that have it; bit s of `free` is set where there are any.
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    free = 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        fitting = free >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            which = by_space[space].pop()
            if not by_space[space]:
                free &= ~(1 << space)
            bins[which].append(i)
        else:
            space, which = capacity, len(bins)
            bins.append([i])
        by_space[space - length].append(which)
        free |= 1 << (space - length)
    return [tuple(each) for each in bins]


def pack_pairs(
    first: np.ndarray, second: np.ndarray, capacity: int
) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Bins of two rows each: of every pair, one sequence stands in one row and the other in the other.

    Longest pairs first, each into the bin that it fills best, the longer sequence into the emptier row. Which of the two
    rows a pair's first sequence stands in is free, so both rows fill up though first sequences are longer on average.

    Args:
      first, second: int[n], lengths of both sequences of each pair, prompts included.
      capacity: of each row.

    Returns:
      (bins of indices; bool[n], where the pair's first sequence stands in the second row).

    Raises:
      ValueError: a sequence is longer than a row.
    """
    longest = max(first.max(initial=0), second.max(initial=0))
    if longest > capacity:
        raise ValueError(f"length {longest} exceeds the capacity {capacity}")
    bins: list[list[int]] = []
    swapped = np.zeros(len(first), bool)
    # Of the open bins: their number, and the free space in each of their rows.
    numbers, spaces = np.zeros(0, np.int64), np.zeros((0, 2), np.int64)
    for i in np.argsort(-(first + second), kind="stable").tolist():
        longer, shorter = max(first[i], second[i]), min(first[i], second[i])
        wide, narrow = spaces.max(axis=1), spaces.min(axis=1)
        fits = (wide >= longer) & (narrow >= shorter)
        if fits.any():
            left = np.where(fits, wide + narrow, 2 * capacity + 1)
            # Of equally full bins the one whose rows this pair makes more alike.
            uneven = np.abs((wide - longer) - (narrow - shorter))
            which = int(np.lexsort((uneven, left))[0])
        else:
            if len(numbers) == OPEN_BINS:
                fullest = int(spaces.sum(axis=1).argmin())
                numbers = np.delete(numbers, fullest)
                spaces = np.delete(spaces, fullest, axis=0)
            which = len(numbers)
            numbers = np.append(numbers, len(bins))
            spaces = np.append(spaces, [[capacity, capacity]], axis=0)
            bins.append([])
        bins[numbers[which]].append(i)
        # The longer one into the emptier row; of equals the first one into the first.
        emptier = int(spaces[which, 1] > spaces[which, 0])
        row_of_first = emptier if first[i] >= second[i] else 1 - emptier
        swapped[i] = row_of_first == 1
        spaces[which, row_of_first] -= first[i]
        spaces[which, 1 - row_of_first] -= second[i]
    return [tuple(each) for each in bins], swapped


def shortest(
    rows_of: Callable[[int], int], capacity: int, *, longest: int, total: int
) -> int:
    """The shortest length, in steps of a 64th of `capacity`, of which no more rows are needed than of that.

    Sequences seldom fill the last of their rows. Of a few rows that is much, and the same number of somewhat shorter ones
    holds as many.

    Args:
      rows_of: how many rows of a length are needed.
      capacity: the longest that rows may be.
      longest: of the sequences.
      total: tokens that the rows have to hold.
    """
    most = rows_of(capacity)
    step = max(capacity // STEPS, 1)
    fewer, bound = 0, (capacity - max(longest, -(-total // max(most, 1)))) // step
    while fewer < bound:
        middle = (fewer + bound + 1) // 2
        if rows_of(capacity - middle * step) <= most:
            fewer = middle
        else:
            bound = middle - 1
    return capacity - fewer * step


def filled(
    bins: Sequence[tuple[int, ...]],
    first: np.ndarray,
    second: np.ndarray,
    swapped: np.ndarray,
) -> np.ndarray:
    """int[len(bins)]: positions used in the fuller row of each bin of `pack_pairs`."""
    upper = np.where(swapped, second, first)
    lower = np.where(swapped, first, second)
    return np.array(
        [max(upper[list(each)].sum(), lower[list(each)].sum()) for each in bins],
        np.int64,
    )
