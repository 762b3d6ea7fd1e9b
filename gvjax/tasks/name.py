"""Name: name one of the goals in the prompt. No graph and no planning: a short-horizon control for Tour.

A prompt is K different goals out of V names; a completion is H names.

    gold = different goals named / min(H, K)

Everything else, unknown ids, repeats and missing tokens included, earns nothing. In demonstrations each token is one of
the goals (uniform) with probability `skill`, and else any of the V names (uniform).
"""

import dataclasses

import numpy as np

from gvjax.tasks import task as task_lib
from gvjax.tasks.task import Completions, Prompts, Split


@dataclasses.dataclass(frozen=True)
class Name:
    """The task; see the module. It has one instance only, and so no seed.

    Attributes:
      num_names: V.
      num_goals: K, 1 <= K < V.
      horizon: H >= 1, names in a completion; 1 and 2 are the forms of interest.
      skill: in [0, 1], share of demonstrated tokens that are goals on purpose. At .23 demonstrations earn about .345
        with H = 1.
    """

    num_names: int = 20
    num_goals: int = 3
    horizon: int = 1
    skill: float = 0.23

    name = "name"
    eos_id = None
    reward_range = (0.0, 1.0)

    def __post_init__(self):
        if not 1 <= self.num_goals < self.num_names:
            raise ValueError(
                f"num_goals {self.num_goals} is impossible with num_names "
                f"{self.num_names}; use 1 to {self.num_names - 1}"
            )
        if self.horizon < 1:
            raise ValueError(f"horizon is {self.horizon}; use 1 or more")
        if not 0 <= self.skill <= 1:
            raise ValueError(f"skill is {self.skill}; use a share in [0, 1]")

    @property
    def pad_id(self) -> int:
        return self.num_names

    @property
    def vocab_size(self) -> int:
        return self.num_names + 1

    @property
    def max_prompt_length(self) -> int:
        return self.num_goals

    @property
    def max_completion_length(self) -> int:
        return self.horizon

    def prompts(
        self,
        rng: np.random.Generator,
        count: int,
        split: Split,
        *,
        distinct: bool = False,
    ) -> Prompts:
        """Prompts [goal, ..., goal], uniform over the split; see `task.Task`."""
        return task_lib.draw_prompts(self._draw, rng, count, split, distinct=distinct)

    def _draw(self, rng: np.random.Generator, count: int) -> Prompts:
        order = np.argsort(rng.random((count, self.num_names)), axis=1)
        return Prompts(order[:, : self.num_goals], np.full(count, self.num_goals))

    def demonstrations(self, rng: np.random.Generator, prompts: Prompts) -> Completions:
        """Names that are goals a little more often than by chance; see the module."""
        shape = (len(prompts), self.horizon)
        which = rng.integers(self.num_goals, size=shape)
        goal = np.take_along_axis(prompts.tokens, which, axis=1)
        anything = rng.integers(self.num_names, size=shape)
        tokens = np.where(rng.random(shape) < self.skill, goal, anything)
        return Completions(tokens, np.full(len(prompts), self.horizon))

    def reward(self, prompts: Prompts, completions: Completions) -> np.ndarray:
        """float32[N] in [0, 1]: see the module."""
        task_lib.check_rows_match(prompts, completions)
        tokens, _ = task_lib.read_completions(completions, self.horizon, None)
        goals = prompts.tokens[:, : self.num_goals]
        named = (tokens[:, :, None] == goals[:, None, :]).any(axis=1).sum(axis=1)
        return (named / min(self.horizon, self.num_goals)).astype(np.float32)

    def optimum(self, prompts: Prompts) -> np.ndarray:
        """float32[N]: 1, by naming goals without repeats."""
        return np.ones(len(prompts), np.float32)

    def decode(self, tokens: np.ndarray) -> str:
        """Numbers separated by spaces; unknown ids in angle brackets."""
        return " ".join(
            str(token) if 0 <= token < self.num_names else f"<{token}>"
            for token in np.asarray(tokens).tolist()
            if token != self.pad_id
        )
