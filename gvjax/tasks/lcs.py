"""LCS: Tour's other look-up twin, rewarded for overlap with a hidden reference walk.

Prompts, graph and demonstrations are Tour's. Each prompt has a hidden reference: a walk of H nodes from its start along
edges that a hash of the prompt picks. With L the length of the longest common subsequence of completion and reference,
precision P = L / (nodes written) and recall R = L / H,

    gold = F1 = 2 P R / (P + R) = 2 L / (nodes written + H)

which is ROUGE-L with equal weights; with completions of H nodes it is L / H. Invalid moves cost nothing by themselves.
What can be learnt on other prompts is only that references follow edges from the start.

References:
  Lin, 2004, https://aclanthology.org/W04-1013, section 3.1.
"""

import dataclasses

import numpy as np

from gvjax.tasks import task as task_lib
from gvjax.tasks.task import Completions, Prompts
from gvjax.tasks.tour import Tour

_SALT = 0x1C5


@dataclasses.dataclass(frozen=True)
class Lcs(Tour):
    """Tour's prompts and demonstrations with an overlap reward; `token_cost` is still charged with `eos`."""

    name = "lcs"

    paraphrase = None  # type: ignore[assignment]
    """Tour's keeps the goals but not what this reward looks at: which nodes come in which order."""

    @property
    def reward_range(self) -> tuple[float, float]:
        return -self.token_cost * self.horizon if self.eos else 0.0, 1.0

    def reference(self, prompts: Prompts) -> np.ndarray:
        """int32[N, H]: the hidden walk of each prompt."""
        row_hash = task_lib.content_hash(prompts, salt=(_SALT << 32) + self.seed)
        current = prompts.tokens[:, 0]
        walk = np.zeros((len(prompts), self.horizon), np.int32)
        for step in range(self.horizon):
            row_hash = task_lib.mix(row_hash + np.uint64(1))
            edge = (row_hash % np.uint64(self.degree)).astype(np.int64)
            walk[:, step] = current = self.successors[current, edge]
        return walk

    def reward(self, prompts: Prompts, completions: Completions) -> np.ndarray:
        """float32[N] in [0, 1] (`eos` lowers the bound by token_cost * H): see the module."""
        task_lib.check_rows_match(prompts, completions)
        nodes, lengths = task_lib.read_completions(
            completions, self.horizon, self.eos_id
        )
        common = _longest_common_subsequence(nodes, self.reference(prompts))
        gold = 2 * common / (lengths + self.horizon)
        if self.eos:
            gold = gold - self.token_cost * lengths
        return gold.astype(np.float32)

    def optimum(self, prompts: Prompts) -> np.ndarray:
        """float32[N]: the reward of the best beginning of the reference."""
        lengths = np.arange(self.horizon + 1) if self.eos else np.array([self.horizon])
        gold = 2 * lengths / (lengths + self.horizon)
        if self.eos:
            gold = gold - self.token_cost * lengths
        return np.full(len(prompts), gold.max(), np.float32)


def _longest_common_subsequence(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """int64[N]: for each row of a, int32[N, S], and b, int32[N, T]."""
    best = np.zeros((b.shape[1] + 1, len(a)), np.int64)
    for i in range(a.shape[1]):
        above = best.copy()
        for j in range(b.shape[1]):
            extended = above[j] + (a[:, i] == b[:, j])
            best[j + 1] = np.maximum(np.maximum(above[j + 1], best[j]), extended)
    return best[-1]
