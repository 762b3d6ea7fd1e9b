"""Tour: visit goals on a fixed directed graph. Checking a walk is easy, planning one is not.

A prompt is a start node and K goals, all different (116,280 prompts at the defaults); a completion is H nodes. The
policy must find out the graph and plan on it; a reward model only has to recognise goals and missing edges.

    gold = visited goals / K − invalid moves / H

A move is valid along an edge. With `dwell`, staying for one extra step on a goal of the prompt after arriving there is
valid too, since the demonstrations do so. Everything else is an invalid move: other stays, unknown ids, the move after
an unknown id, and steps that are missing. Nodes behind the H-th are ignored.

Demonstrations are uniform random walks in which each token is replaced by a uniformly random node with probability
`noise` (the walk goes on from there), and which, with `dwell`, repeat a goal once on each arrival.

The graph is drawn anew for each seed, uniformly among those of the given out-degree without self-loops, until it is
strongly connected, so that every goal can be reached from everywhere.
"""

import dataclasses
import functools

import numpy as np

from gvjax.tasks import task as task_lib
from gvjax.tasks.task import Completions, Prompts, Split

_MAX_GRAPH_DRAWS = 10_000
_GOAL_SETS_PER_CHUNK = 128


@dataclasses.dataclass(frozen=True)
class Tour:
    """The task; see the module.

    Attributes:
      seed: >= 0; draws the graph.
      num_nodes: V.
      degree: edges that leave each node, 1 <= degree < V.
      num_goals: K, 1 <= K < V.
      horizon: H >= 1, nodes in a completion.
      noise: in [0, 1], share of random tokens in demonstrations.
      dwell: whether demonstrations stay one extra step on a goal, and may. It makes the position "on a goal" visible
        in the text, and so the reward easier to learn; without it the verifier's task is harder.
      goal_within: None for free goals; otherwise only prompts are used in which exactly one goal lies within this
        many steps of the start. `horizon=1, goal_within=1` and `horizon=2, goal_within=2` are the short forms.
      eos: whether a completion may end early. Demonstrations then stop after 2 .. H nodes (uniform) with an EOS,
        steps that are missing are not invalid, and each node costs `token_cost`.
      token_cost: >= 0, reward units for each node; used with `eos` only.
    """

    seed: int = 0
    num_nodes: int = 20
    degree: int = 3
    num_goals: int = 3
    horizon: int = 10
    noise: float = 0.03
    dwell: bool = True
    goal_within: int | None = None
    eos: bool = False
    token_cost: float = 0.04

    name = "tour"

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; use 0 or more")
        if not 1 <= self.degree < self.num_nodes:
            raise ValueError(
                f"degree {self.degree} is impossible with num_nodes {self.num_nodes}; "
                f"use 1 to {self.num_nodes - 1}"
            )
        if not 1 <= self.num_goals < min(self.num_nodes, 11):
            raise ValueError(
                f"num_goals {self.num_goals} is impossible with num_nodes "
                f"{self.num_nodes}; use 1 to {min(self.num_nodes - 1, 10)}"
            )
        if self.horizon < 1:
            raise ValueError(f"horizon is {self.horizon}; use 1 or more")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise is {self.noise}; use a share in [0, 1]")
        if self.goal_within is not None and self.goal_within < 1:
            raise ValueError(
                f"goal_within is {self.goal_within}; use 1 or more steps, or None"
            )
        if self.token_cost < 0:
            raise ValueError(f"token_cost is {self.token_cost}; use 0 or more")

    @property
    def pad_id(self) -> int:
        return self.num_nodes

    @property
    def eos_id(self) -> int | None:
        return self.num_nodes + 1 if self.eos else None

    @property
    def vocab_size(self) -> int:
        return self.num_nodes + (2 if self.eos else 1)

    @property
    def max_prompt_length(self) -> int:
        return 1 + self.num_goals

    @property
    def min_prompt_length(self) -> int:
        return self.max_prompt_length

    @property
    def max_completion_length(self) -> int:
        return self.horizon + (1 if self.eos else 0)

    @property
    def reward_range(self) -> tuple[float, float]:
        return -1.0 - (self.token_cost * self.horizon if self.eos else 0.0), 1.0

    @functools.cached_property
    def successors(self) -> np.ndarray:
        """int32[V, degree]: where the edges of each node lead."""
        rng = np.random.default_rng([self.seed, self.num_nodes, self.degree])
        for _ in range(_MAX_GRAPH_DRAWS):
            order = rng.random((self.num_nodes, self.num_nodes))
            np.fill_diagonal(order, np.inf)
            successors = np.argsort(order, axis=1)[:, : self.degree].astype(np.int32)
            if (_distances(successors) < self.num_nodes).all():
                return successors
        raise ValueError(
            f"no strongly connected graph found for num_nodes {self.num_nodes} and "
            f"degree {self.degree}; use a larger degree"
        )

    @functools.cached_property
    def distances(self) -> np.ndarray:
        """int32[V, V]: moves from row to column along edges; 0 on the diagonal."""
        return _distances(self.successors)

    @functools.cached_property
    def _edges(self) -> np.ndarray:
        """bool[V + 1, V + 1]: whether there is an edge; row and column V stand for all unknown ids."""
        edges = np.zeros((self.num_nodes + 1, self.num_nodes + 1), bool)
        edges[np.arange(self.num_nodes)[:, None], self.successors] = True
        return edges

    def prompts(
        self,
        rng: np.random.Generator,
        count: int,
        split: Split,
        *,
        distinct: bool = False,
    ) -> Prompts:
        """Prompts [start, goal, ..., goal], uniform over the split; see `task.Task`."""
        return task_lib.draw_prompts(self._draw, rng, count, split, distinct=distinct)

    def _draw(self, rng: np.random.Generator, count: int) -> Prompts:
        order = np.argsort(rng.random((count, self.num_nodes)), axis=1)
        tokens = order[:, : self.max_prompt_length]
        if self.goal_within is not None:
            steps = self.distances[tokens[:, :1], tokens[:, 1:]]
            tokens = tokens[(steps <= self.goal_within).sum(axis=1) == 1]
        return Prompts(tokens, np.full(len(tokens), self.max_prompt_length))

    def demonstrations(self, rng: np.random.Generator, prompts: Prompts) -> Completions:
        """Noisy random walks from the start; see the module."""
        count = len(prompts)
        goals = prompts.tokens[:, 1:]
        current = prompts.tokens[:, 0]
        arrived = np.zeros(count, bool)
        walk = np.zeros((count, self.horizon), np.int32)
        for step in range(self.horizon):
            edge = rng.integers(self.degree, size=count)
            following = np.where(arrived, current, self.successors[current, edge])
            noisy = rng.random(count) < self.noise
            anywhere = rng.integers(self.num_nodes, size=count)
            following = np.where(noisy, anywhere, following).astype(np.int32)
            on_goal = (following[:, None] == goals).any(axis=1)
            arrived = self.dwell & on_goal & (following != current)
            walk[:, step] = current = following
        lengths = np.full(count, self.horizon)
        if not self.eos:
            return Completions(walk, lengths)
        lengths = rng.integers(min(2, self.horizon), self.horizon + 1, size=count)
        walk = np.pad(walk, ((0, 0), (0, 1)))
        column = np.arange(self.horizon + 1)
        walk = np.where(column < lengths[:, None], walk, self.pad_id)
        walk = np.where(column == lengths[:, None], self.num_nodes + 1, walk)
        return Completions(walk, lengths + 1)

    def counted_goals(self, prompts: Prompts) -> np.ndarray:
        """int32[N, K]: the goals that the reward counts: those of the prompt."""
        return prompts.tokens[:, 1 : self.max_prompt_length]

    def reward(self, prompts: Prompts, completions: Completions) -> np.ndarray:
        """float32[N] in [-1, 1] (`eos` lowers the bound by token_cost * H): see the module."""
        task_lib.check_rows_match(prompts, completions)
        nodes, lengths = task_lib.read_completions(
            completions, self.horizon, self.eos_id
        )
        counted = self.counted_goals(prompts)
        visited = (nodes[:, :, None] == counted[:, None, :]).any(axis=1)
        valid = self.valid_moves(prompts, nodes)
        taken = np.arange(self.horizon) < lengths[:, None]
        invalid = ~valid & taken if self.eos else ~valid
        gold = visited.mean(axis=1) - invalid.mean(axis=1)
        if self.eos:
            gold = gold - self.token_cost * lengths
        return gold.astype(np.float32)

    def valid_moves(self, prompts: Prompts, nodes: np.ndarray) -> np.ndarray:
        """bool[N, H]: whether each move, from the node before it, is valid.

        Args:
          prompts: N rows.
          nodes: int32[N, H], -1 or any other unknown id where there is no node.
        """
        path = np.concatenate([prompts.tokens[:, :1], nodes], axis=1)
        path = np.where((path >= 0) & (path < self.num_nodes), path, self.num_nodes)
        before, after = path[:, :-1], path[:, 1:]
        valid = self._edges[before, after]
        if self.dwell:
            goals = prompts.tokens[:, 1 : self.max_prompt_length]
            stays = before == after
            on_goal = (before[:, :, None] == goals[:, None, :]).any(axis=2)
            just_arrived = np.ones_like(stays)
            just_arrived[:, 1:] = ~stays[:, :-1]
            valid |= stays & on_goal & just_arrived
        return valid

    def paraphrase(
        self, rng: np.random.Generator, prompts: Prompts, completions: Completions
    ) -> Completions:
        """The same walks by other nodes: the same gold reward, move by move.

        A node that is no goal and lies on two valid edges is replaced by another such node, uniformly among those that
        fit, itself included. Everything else stays.

        Args:
          rng: consumed.
          prompts, completions: N rows each.
        """
        task_lib.check_rows_match(prompts, completions)
        tokens = completions.tokens.copy()
        rows = np.arange(len(tokens))
        goals = np.concatenate(
            [
                prompts.tokens[:, 1 : self.max_prompt_length],
                self.counted_goals(prompts),
            ],
            axis=1,
        )
        free = np.ones((len(tokens), self.num_nodes), bool)
        free[rows[:, None], goals] = False

        def known(ids: np.ndarray) -> np.ndarray:
            inside = (ids >= 0) & (ids < self.num_nodes)
            return np.where(inside, ids, self.num_nodes)

        for step in range(min(self.horizon, tokens.shape[1])):
            before = known(tokens[:, step - 1] if step else prompts.tokens[:, 0])
            fits = free & self._edges[before, :-1]
            if step + 1 < min(self.horizon, tokens.shape[1]):
                after = known(tokens[:, step + 1])
                last = step + 1 >= completions.lengths
                fits &= self._edges[:-1, after].T | (last | (after == self.num_nodes))[:, None]  # fmt: skip
            here = known(tokens[:, step])
            inside = (step < completions.lengths) & (here < self.num_nodes)
            changes = inside & fits[rows, np.minimum(here, self.num_nodes - 1)]
            other = np.where(fits, rng.random(fits.shape), -1.0).argmax(axis=1)
            tokens[:, step] = np.where(changes, other, tokens[:, step])
        return Completions(tokens, completions.lengths)

    def optimum(self, prompts: Prompts) -> np.ndarray:
        """float32[N]: the exact optimum, by dynamic programming over (node, goals visited), invalid moves included.

        Staying on a goal is left out: some edge always leads on at no cost, so waiting never pays.
        """
        goal_sets, which = np.unique(
            np.sort(self.counted_goals(prompts), axis=1), axis=0, return_inverse=True
        )
        best = np.zeros((len(goal_sets), self.num_nodes))
        for first in range(0, len(goal_sets), _GOAL_SETS_PER_CHUNK):
            chunk = slice(first, first + _GOAL_SETS_PER_CHUNK)
            best[chunk] = self._plan(goal_sets[chunk])
        return best[which.reshape(-1), prompts.tokens[:, 0]].astype(np.float32)

    def _plan(self, goals: np.ndarray) -> np.ndarray:
        """float64[S, V]: the optimum from each start node, for goal sets int32[S, K]."""
        nodes = np.arange(self.num_nodes)
        masks = np.arange(1 << self.num_goals)
        bits = (goals[:, :, None] == nodes) * (1 << np.arange(self.num_goals))[:, None]
        reached = masks[:, None] | bits.sum(axis=1)[:, None, :]
        gain = np.bitwise_count(reached) - np.bitwise_count(masks)[:, None].astype(int)
        cost = np.where(self._edges[:-1, :-1], 0.0, 1 / self.horizon)
        charge = self.token_cost if self.eos else 0.0
        value = np.zeros((len(goals), len(masks), self.num_nodes))
        row = np.arange(len(goals))[:, None, None]
        for _ in range(self.horizon):
            onward = gain / self.num_goals + value[row, reached, nodes] - charge
            value = (onward[:, :, None, :] - cost).max(axis=3)
            if self.eos:
                value = np.maximum(value, 0.0)
        return value[:, 0]

    def decode(self, tokens: np.ndarray) -> str:
        """Node numbers separated by spaces; unknown ids in angle brackets."""
        words = []
        for token in np.asarray(tokens).tolist():
            if 0 <= token < self.num_nodes:
                words.append(str(token))
            elif token == self.eos_id:
                words.append("<eos>")
            elif token != self.pad_id:
                words.append(f"<{token}>")
        return " ".join(words)


def _distances(successors: np.ndarray) -> np.ndarray:
    """int32[V, V]: shortest path lengths; V where there is no path."""
    num_nodes = len(successors)
    distances = np.full((num_nodes, num_nodes), num_nodes, np.int32)
    reached = np.eye(num_nodes, dtype=bool)
    step = np.zeros((num_nodes, num_nodes), bool)
    step[np.arange(num_nodes)[:, None], successors] = True
    for distance in range(num_nodes):
        distances[reached & (distances == num_nodes)] = distance
        reached = reached | (reached.astype(np.int32) @ step > 0)
    return distances
