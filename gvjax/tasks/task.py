"""What a task is: prompts in disjoint splits, imperfect demonstrations and a gold reward, all as NumPy arrays.

A task is a frozen value with the attributes and methods of `Task`; nothing needs to be inherited or registered. Which
split a prompt belongs to is a hash of the prompt itself (`split_of`), so held-out prompts are disjoint from training
prompts whatever was drawn, in whichever process, and in tasks with few prompts too.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol, Self, get_args

import numpy as np

from gvjax.types import EosId

Split = Literal["train", "validation", "test"]
_NUM_BUCKETS = 10
_FIRST_BUCKET = {"train": 0, "validation": 8, "test": 9}
_STALLED_DRAWS = 64


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows of tokens, right-padded.

    Attributes:
      tokens: int32[N, T].
      lengths: int32[N], tokens that count in each row, 0 <= length <= T; what stands behind them is padding.
    """

    tokens: np.ndarray
    lengths: np.ndarray

    def __post_init__(self):
        tokens, lengths = np.asarray(self.tokens), np.asarray(self.lengths)
        if tokens.ndim != 2 or lengths.shape != tokens.shape[:1]:
            raise ValueError(
                f"tokens {tokens.shape} and lengths {lengths.shape} do not fit; "
                "pass tokens [N, T] with lengths [N]"
            )
        if not (
            np.issubdtype(tokens.dtype, np.integer)
            and np.issubdtype(lengths.dtype, np.integer)
        ):
            raise ValueError(
                f"tokens are {tokens.dtype} and lengths {lengths.dtype}; pass integers"
            )
        if lengths.size and not 0 <= lengths.min() <= lengths.max() <= tokens.shape[1]:
            raise ValueError(
                f"lengths lie in [{lengths.min()}, {lengths.max()}] but must lie in "
                f"[0, {tokens.shape[1]}], the width of tokens"
            )
        object.__setattr__(self, "tokens", tokens.astype(np.int32, copy=False))
        object.__setattr__(self, "lengths", lengths.astype(np.int32, copy=False))

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows) -> Self:
        """The rows that an index array, boolean mask or slice picks."""
        return type(self)(self.tokens[rows], self.lengths[rows])

    def followed_by(self, other: Self) -> Self:
        """These rows, then the other's, which are as wide."""
        return type(self)(
            np.concatenate([self.tokens, other.tokens]),
            np.concatenate([self.lengths, other.lengths]),
        )

    def repeat(self, times: int) -> Self:
        """Every row `times` times, the copies of one row consecutive (the order of a rollout group)."""
        return type(self)(
            np.repeat(self.tokens, times, axis=0), np.repeat(self.lengths, times)
        )


@dataclasses.dataclass(frozen=True)
class Prompts(_Rows):
    """Prompts: tokens int32[N, P] right-padded, lengths int32[N]."""


@dataclasses.dataclass(frozen=True)
class Completions(_Rows):
    """Completions: tokens int32[N, C] right-padded, lengths int32[N], the EOS counted where there is one."""


class Task(Protocol):
    """Prompts, demonstrations and a gold reward.

    Attributes:
      name: short, for reports.
      vocab_size: ids are 0 .. vocab_size - 1.
      pad_id: what stands behind the end of a row; no sampled token should be this.
      eos_id: the token that ends a completion, or several of which each does; None where all completions have `max_completion_length` tokens.
      max_prompt_length, max_completion_length: in tokens, the EOS counted.
      reward_range: (low, high), bounds of the gold reward; None where there is no gold reward to ask for.

    A task may also have `paraphrase(rng, prompts, completions) -> Completions`, which changes the tokens of completions and
    not their gold reward: `gvjax gap` then probes which scorers lean on the tokens themselves. And it may have
    `min_prompt_length`, tokens that every prompt has at least: work for prompt tokens that no result needs is then left out.
    """

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def eos_id(self) -> EosId | None: ...
    @property
    def max_prompt_length(self) -> int: ...
    @property
    def max_completion_length(self) -> int: ...
    @property
    def reward_range(self) -> tuple[float, float] | None: ...

    def prompts(
        self,
        rng: np.random.Generator,
        count: int,
        split: Split,
        *,
        distinct: bool = False,
    ) -> Prompts:
        """`count` prompts drawn uniformly from one split, without repeats if `distinct`.

        Raises:
          ValueError: the split is unknown, or has fewer than `count` distinct prompts when they are asked for.
        """
        ...

    def demonstrations(self, rng: np.random.Generator, prompts: Prompts) -> Completions:
        """One imperfect completion for each prompt, to start a policy from."""
        ...

    def reward(self, prompts: Prompts, completions: Completions) -> np.ndarray:
        """float32[N]: gold reward of each row, finite for any completion (empty, truncated, unknown ids)."""
        ...

    def optimum(self, prompts: Prompts) -> np.ndarray | None:
        """float32[N]: the highest reward any completion can have, or None where it cannot be computed."""
        ...

    def decode(self, tokens: np.ndarray) -> str:
        """One row of tokens as people read it; padding is left out."""
        ...


def mix(values: np.ndarray) -> np.ndarray:
    """uint64[...]: a bijective scramble of 64 bits, the same in every process.

    References:
      The finaliser of SplitMix64: Steele, Lea and Flood, 2014, https://doi.org/10.1145/2660193.2660195.
    """
    values = np.asarray(values).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def content_hash(rows: _Rows, salt: int = 0) -> np.ndarray:
    """uint64[N]: a hash of each row's tokens, blind to padding and to the other rows.

    Args:
      rows: Prompts or Completions.
      salt: >= 0; different salts give unrelated hashes of the same row.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    state = np.full(len(rows), salt, np.uint64)
    state = mix(state * golden + rows.lengths.astype(np.uint64) + np.uint64(1))
    for column in range(rows.tokens.shape[1]):
        # The cast wraps negative ids around instead of refusing them.
        token = rows.tokens[:, column].astype(np.int64).astype(np.uint64)
        step = mix((state ^ token) * golden + np.uint64(1))
        state = np.where(column < rows.lengths, step, state)
    return state


def split_of(prompts: Prompts) -> np.ndarray:
    """str[N]: the split of each prompt; about 80% train, 10% validation, 10% test."""
    bucket = content_hash(prompts) % np.uint64(_NUM_BUCKETS)
    names = list(_FIRST_BUCKET)
    firsts = np.array([_FIRST_BUCKET[name] for name in names])
    return np.array(names)[np.searchsorted(firsts, bucket, side="right") - 1]


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is one of the three."""
    if split not in get_args(Split):
        raise ValueError(
            f"split {split!r} is unknown; use one of {', '.join(get_args(Split))}"
        )


def draw_prompts(
    draw: Callable[[np.random.Generator, int], Prompts],
    rng: np.random.Generator,
    count: int,
    split: Split,
    *,
    distinct: bool = False,
) -> Prompts:
    """Uniform draws from one split of whatever `draw` draws from, by rejection.

    Args:
      draw: `(rng, n) -> Prompts` of n rows (fewer are allowed), uniform over all prompts of all splits.
      rng: consumed.
      count: >= 0.
      split: train, validation or test.
      distinct: whether no prompt may come twice.

    Raises:
      ValueError: the split is unknown, or cannot supply `count` (distinct) prompts.
    """
    check_split(split)
    if count < 0:
        raise ValueError(f"count is {count}; ask for 0 or more prompts")
    share = (8 if split == "train" else 1) / _NUM_BUCKETS
    size = max(256, int(1.2 * count / share))
    kept: list[Prompts] = []
    seen = np.zeros(0, np.uint64)
    have = stalled = 0
    while have < count or not kept:
        rows = draw(rng, size)
        rows = rows.take(split_of(rows) == split)
        if distinct:
            hashes = content_hash(rows, salt=1)
            _, first = np.unique(hashes, return_index=True)
            first = np.sort(first[~np.isin(hashes[first], seen)])
            rows, seen = rows.take(first), np.concatenate([seen, hashes[first]])
        kept.append(rows)
        have += len(rows)
        stalled = 0 if len(rows) else stalled + 1
        if have < count and stalled >= _STALLED_DRAWS:
            raise ValueError(
                f"the {split} split has only {have} distinct prompts and count asks for "
                f"{count}; ask for fewer, pass distinct=False or make the task larger"
            )
    tokens = np.concatenate([rows.tokens for rows in kept])[:count]
    return Prompts(tokens, np.concatenate([rows.lengths for rows in kept])[:count])


def read_completions(
    completions: Completions, width: int, eos_id: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """What a reward may look at: the first `width` tokens before the end of each row.

    Args:
      completions: any.
      width: tokens to keep; longer rows are cut, shorter ones filled.
      eos_id: a row ends before the first of these; None where the task has none.

    Returns:
      int32[N, width], -1 behind the end of a row; int32[N], how many tokens each row kept.
    """
    tokens = completions.tokens[:, :width]
    missing = width - tokens.shape[1]
    tokens = np.pad(tokens, ((0, 0), (0, missing)), constant_values=-1)
    inside = np.arange(width) < completions.lengths[:, None]
    if eos_id is not None:
        inside &= np.cumsum(tokens == eos_id, axis=1) == 0
    return np.where(inside, tokens, -1), inside.sum(axis=1, dtype=np.int32)


def check_rows_match(prompts: Prompts, completions: Completions) -> None:
    """Raises ValueError unless there is one completion for each prompt."""
    if len(prompts) != len(completions):
        raise ValueError(
            f"{len(prompts)} prompts but {len(completions)} completions; for several "
            "completions of a prompt pass prompts.repeat(k)"
        )


def preference_labels(
    rng: np.random.Generator,
    rewards_a: np.ndarray,
    rewards_b: np.ndarray,
    tau: float,
) -> np.ndarray:
    """bool[N]: whether a labeller prefers a to b, drawn from the Bradley-Terry model.

        P(a ≻ b) = σ((r_a − r_b) / τ)

    Args:
      rng: consumed: one draw per row.
      rewards_a, rewards_b: f32[N], gold rewards.
      tau: > 0, noise of the labeller in reward units; small is nearly certain.

    References:
      Bradley and Terry, 1952, https://doi.org/10.2307/2334029.
    """
    if not tau > 0:
        raise ValueError(
            f"tau is {tau} but must be > 0; use a small one for hard labels"
        )
    margin = (np.asarray(rewards_a, np.float64) - np.asarray(rewards_b)) / tau
    # The logistic function written with tanh cannot overflow.
    return rng.random(margin.shape) < 0.5 * (1 + np.tanh(0.5 * margin))
