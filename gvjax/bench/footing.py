"""What the rows share: one network with random weights, and batches of random tokens that are never zero."""

import dataclasses
import functools
from collections.abc import Hashable

import jax
import numpy as np

from gvjax.bench.request import Request
from gvjax.recipes.ground import Ground
from gvjax.recipes.rows import role_key, role_rng
from gvjax.types import Params, PreferenceBatch, SequenceBatch

SEED = 0
BATCHES = 4
"""Different batches that a step is given in turn."""


@dataclasses.dataclass(frozen=True)
class Footing:
    """The network of a request and what feeds it; parameters are made when first asked for.

    Attributes:
      request: what is asked.
      peaks: bytes that programs need by the compiler's account, of those that have been looked at; see `plan`'s keys.
    """

    request: Request
    peaks: dict[Hashable, int | None] = dataclasses.field(
        default_factory=dict, compare=False
    )

    @functools.cached_property
    def ground(self) -> Ground:
        """Every completion has its full length: without an EOS, none ends early."""
        sizes = self.request.sizes
        return Ground(
            model=self.request.model,
            mesh=self.request.mesh,
            eos_id=None,
            pad_id=0,
            prompt_length=sizes.prompt,
            completion_length=sizes.completion,
            share_prompts=self.request.share_prompts,
        )

    @functools.cached_property
    def policy(self) -> Params:
        return self.ground.init_policy(role_key(SEED, "bench policy"))

    @functools.cached_property
    def reward_model(self) -> Params:
        # A random head, or all rewards would be equal and online DPO would have nothing to learn.
        return self.ground.init_reward_model(
            role_key(SEED, "bench reward"), self.policy, zero_head=False
        )

    def tokens(self, role: str, number: int, shape: tuple[int, ...]) -> np.ndarray:
        """Random tokens, none of them 0: a batch of zeros may be faster, and is nobody's."""
        high = self.request.model.vocab_size
        rng = role_rng(SEED, role, number)
        return rng.integers(1, high, shape, dtype=np.int32)

    def sequences(self, role: str, number: int, rows: int) -> SequenceBatch:
        """Full-length sequences as host arrays."""
        sizes = self.request.sizes
        tokens = self.tokens(role, number, (rows, sizes.length))
        mask = np.broadcast_to(np.arange(sizes.length) >= sizes.prompt, tokens.shape)
        host: tuple = (tokens, np.array(mask))
        return SequenceBatch(*host)

    def pairs(self, role: str, number: int, rows: int) -> PreferenceBatch:
        """Full-length pairs that share their prompts, with some reference log-probabilities."""
        prompt = self.request.sizes.prompt
        chosen = self.sequences(f"{role} chosen", number, rows)
        rejected = self.sequences(f"{role} rejected", number, rows)
        np.asarray(rejected.tokens)[:, :prompt] = chosen.tokens[:, :prompt]
        logps: list = [
            role_rng(SEED, f"{role} {side}", number).uniform(-9, -1, rows)
            for side in ("chosen", "rejected")
        ]
        first, second = (each.astype(np.float32) for each in logps)
        return PreferenceBatch(chosen, rejected, first, second)  # type: ignore[arg-type]

    def prompts(self, role: str, number: int, rows: int) -> tuple[jax.Array, ...]:
        """(tokens int32[rows, P], lengths int32[rows], ids int32[rows]) on the mesh."""
        prompt = self.request.sizes.prompt
        lengths = np.full(rows, prompt, np.int32)
        ids = np.arange(rows, dtype=np.int32)
        return self.ground.put(
            (self.tokens(role, number, (rows, prompt)), lengths, ids)
        )
