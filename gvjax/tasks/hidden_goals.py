"""Hidden goals: Tour's look-up twin, where nothing about the reward can be learnt from other prompts.

Prompts, graph and demonstrations are Tour's; but the K goals that the reward counts are a hash of the prompt (K different
nodes other than the start, unrelated to the goals that are shown). A verifier is then as hard to learn as a policy, so
an advantage of the online road that comes from an easy verifier should be gone on new prompts.
"""

import dataclasses

import numpy as np

from gvjax.tasks import task as task_lib
from gvjax.tasks.task import Prompts
from gvjax.tasks.tour import Tour

_SALT = 0x60A1


@dataclasses.dataclass(frozen=True)
class HiddenGoals(Tour):
    """Tour with the counted goals hashed from seed and prompt; moves are judged, and goals stayed on, as in Tour."""

    name = "hidden_goals"

    def counted_goals(self, prompts: Prompts) -> np.ndarray:
        """int32[N, K]: the K nodes with the lowest hash of (seed, prompt, node), the start left out."""
        row_hash = task_lib.content_hash(prompts, salt=(_SALT << 32) + self.seed)
        nodes = task_lib.mix(np.arange(1, self.num_nodes + 1))
        rank = task_lib.mix(row_hash[:, None] ^ nodes)
        rank[np.arange(len(prompts)), prompts.tokens[:, 0]] = np.uint64(2**64 - 1)
        lowest = np.argpartition(rank, self.num_goals - 1, axis=1)
        return lowest[:, : self.num_goals].astype(np.int32)
