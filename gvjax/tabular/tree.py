"""Token trees small enough to enumerate: every completion, every state, nothing sampled."""

import dataclasses
import itertools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tree:
    """All completions of at most `horizon` tokens, as leaves of a tree of prefixes.

    One tree serves any number of prompts: what depends on the prompt (policies, rewards) carries leading axes `[...]`.
    Dimension letters: S states (prefixes that still want a token), V tokens, N leaves (completions), H = horizon.

    Attributes:
      vocabulary: V.
      horizon: H, the longest completion.
      eos: the token that ends a completion at any depth, or None when all have length H.
      states: the S prefixes, shorter ones first; states[0] is the empty one.
      leaves: the N completions. One of length H without an EOS is truncated; it is a leaf too, or the probabilities of
        the leaves would not sum to 1.
      paths: int[N, H], the state in which each token of a completion is chosen; 0 behind its end.
      tokens: int[N, H], the tokens; 0 behind the end.
      mask: bool[N, H], True on the tokens of the completion, EOS included.
      children: int[S, V], where a token leads: to state c if c >= 0, to leaf -1 - c otherwise.
    """

    vocabulary: int
    horizon: int
    eos: int | None
    states: tuple[tuple[int, ...], ...]
    leaves: tuple[tuple[int, ...], ...]
    paths: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray
    children: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """int[N]: tokens in each completion, EOS included."""
        return self.mask.sum(axis=1)


def token_tree(vocabulary: int, horizon: int, eos: int | None = None) -> Tree:
    """Tree: every completion of at most `horizon` tokens out of `vocabulary`.

    Args:
      vocabulary: V >= 2.
      horizon: H >= 1, in tokens.
      eos: the token that ends a completion, in [0, V); None for completions of exactly H tokens.

    Raises:
      ValueError: for sizes out of range, or more than a million completions.
    """
    if vocabulary < 2 or horizon < 1:
        raise ValueError(
            f"a tree of vocabulary {vocabulary} and horizon {horizon} has no choice in it; "
            "use a vocabulary of at least 2 and a horizon of at least 1"
        )
    if eos is not None and not 0 <= eos < vocabulary:
        raise ValueError(
            f"eos {eos} is not a token; use one of 0..{vocabulary - 1}, or None"
        )
    if vocabulary**horizon > 1_000_000:
        raise ValueError(
            f"{vocabulary}**{horizon} completions are too many to enumerate; use at most a million"
        )
    going = [token for token in range(vocabulary) if token != eos]
    states = [
        prefix
        for depth in range(horizon)
        for prefix in itertools.product(going, repeat=depth)
    ]
    number = {prefix: index for index, prefix in enumerate(states)}
    leaves: list[tuple[int, ...]] = []
    children = np.zeros((len(states), vocabulary), int)
    for prefix in states:
        for token in range(vocabulary):
            extended = (*prefix, token)
            if extended in number:
                children[number[prefix], token] = number[extended]
            else:
                leaves.append(extended)
                children[number[prefix], token] = -len(leaves)
    paths, tokens = np.zeros((2, len(leaves), horizon), int)
    mask = np.zeros((len(leaves), horizon), bool)
    for row, leaf in enumerate(leaves):
        for depth, token in enumerate(leaf):
            paths[row, depth] = number[leaf[:depth]]
            tokens[row, depth] = token
            mask[row, depth] = True
    return Tree(
        vocabulary=vocabulary,
        horizon=horizon,
        eos=eos,
        states=tuple(states),
        leaves=tuple(leaves),
        paths=paths,
        tokens=tokens,
        mask=mask,
        children=children,
    )
