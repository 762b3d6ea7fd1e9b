"""Plan: one decision, then content that follows from it; what the content is worth depends on the prompt's class.

A prompt is [class, symbol, symbol]: 4 classes and 16 symbols make 1024 prompts, of which only the class matters. A
completion is one of 128 plan tokens and the 6 content tokens that belong to that plan. The three forms differ in the
gold reward and in what is written:

- main: gold = Σ_i w[class, content_i], a unigram verifier with w ~ N(0, 1/6), shifted so that plans are worth 0 on
  average to each class; they spread by about 1. It reads the content only: better content than any plan's is paid for
  too, and so the optimum lies above the best plan.
- `write_content=False` (H = 1): the plan token alone, worth what its content is worth. Policy and verifier then have
  the same table of classes and plans to learn.
- `lookup=True`: gold = table[class, plan], drawn from N(0, 1) for each of the 512 cells; the content is not looked at.
  Enough pairs cover the table, so this look-up can be learnt.

A token that is not content counts as the class's worst content token, a first token that is not a plan (where the plan
is looked at) as its worst plan, and missing tokens likewise. Demonstrations draw plans uniformly and write their content
exactly: they are imperfect only in the choice of plan.
"""

import dataclasses
import functools

import numpy as np

from gvjax.tasks import task as task_lib
from gvjax.tasks.task import Completions, Prompts, Split


@dataclasses.dataclass(frozen=True)
class Plan:
    """The task; see the module.

    Token ids, in order: classes, symbols, plans, content tokens, padding.

    Attributes:
      seed: >= 0; draws the plans' content and the values.
      num_plans, num_classes, num_symbols, num_content: how many there are of each kind of token, >= 1.
      content_length: content tokens of a plan, >= 1.
      write_content: whether completions hold the content or only the plan token.
      lookup: whether the gold reward is a random table instead of the content's worth.
    """

    seed: int = 0
    num_plans: int = 128
    num_classes: int = 4
    num_symbols: int = 16
    num_content: int = 32
    content_length: int = 6
    write_content: bool = True
    lookup: bool = False

    name = "plan"
    eos_id = None
    max_prompt_length = 3

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; use 0 or more")
        for field in (
            "num_plans",
            "num_classes",
            "num_symbols",
            "num_content",
            "content_length",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; use 1 or more")

    @property
    def first_plan(self) -> int:
        """The id of plan 0."""
        return self.num_classes + self.num_symbols

    @property
    def first_content(self) -> int:
        """The id of content token 0."""
        return self.first_plan + self.num_plans

    @property
    def pad_id(self) -> int:
        return self.first_content + self.num_content

    @property
    def vocab_size(self) -> int:
        return self.pad_id + 1

    @property
    def max_completion_length(self) -> int:
        return 1 + (self.content_length if self.write_content else 0)

    @property
    def reward_range(self) -> tuple[float, float]:
        if self._judges_plan:
            return float(self.plan_values.min()), float(self.plan_values.max())
        low, high = self.weights.min(), self.weights.max()
        return float(low) * self.content_length, float(high) * self.content_length

    @property
    def _judges_plan(self) -> bool:
        return self.lookup or not self.write_content

    def _rng(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, purpose])

    @functools.cached_property
    def content(self) -> np.ndarray:
        """int64[plans, content_length]: what each plan writes, from 0 .. num_content - 1."""
        shape = (self.num_plans, self.content_length)
        return self._rng(0).integers(self.num_content, size=shape)

    @functools.cached_property
    def weights(self) -> np.ndarray:
        """float64[classes, num_content]: what a content token is worth to a class."""
        weights = self._rng(1).normal(size=(self.num_classes, self.num_content))
        weights /= np.sqrt(self.content_length)
        return weights - weights[:, self.content].mean(axis=(1, 2))[:, None]

    @functools.cached_property
    def plan_values(self) -> np.ndarray:
        """float64[classes, plans]: the gold reward of each plan, written as demonstrated."""
        if self.lookup:
            return self._rng(2).normal(size=(self.num_classes, self.num_plans))
        return self.weights[:, self.content].sum(axis=2)

    def prompts(
        self,
        rng: np.random.Generator,
        count: int,
        split: Split,
        *,
        distinct: bool = False,
    ) -> Prompts:
        """Prompts [class, symbol, symbol], uniform over the split; see `task.Task`."""
        return task_lib.draw_prompts(self._draw, rng, count, split, distinct=distinct)

    def _draw(self, rng: np.random.Generator, count: int) -> Prompts:
        classes = rng.integers(self.num_classes, size=(count, 1))
        symbols = self.num_classes + rng.integers(self.num_symbols, size=(count, 2))
        tokens = np.concatenate([classes, symbols], axis=1)
        return Prompts(tokens, np.full(count, 3))

    def demonstrations(self, rng: np.random.Generator, prompts: Prompts) -> Completions:
        """A uniformly random plan with its content."""
        plan = rng.integers(self.num_plans, size=len(prompts))
        tokens = self.first_plan + plan[:, None]
        if self.write_content:
            content = self.first_content + self.content[plan]
            tokens = np.concatenate([tokens, content], axis=1)
        return Completions(tokens, np.full(len(prompts), tokens.shape[1]))

    def reward(self, prompts: Prompts, completions: Completions) -> np.ndarray:
        """float32[N] in `reward_range`: see the module."""
        task_lib.check_rows_match(prompts, completions)
        width = self.max_completion_length
        tokens, _ = task_lib.read_completions(completions, width, None)
        class_ = prompts.tokens[:, 0]
        if self._judges_plan:
            values, first, chosen = self.plan_values, self.first_plan, tokens[:, :1]
        else:
            values, first, chosen = self.weights, self.first_content, tokens[:, 1:]
        values = np.concatenate([values, values.min(axis=1, keepdims=True)], axis=1)
        # Compared before subtracting: the lowest int32 would wrap around.
        known = (chosen >= first) & (chosen < first + values.shape[1] - 1)
        index = np.where(known, chosen - np.where(known, first, 0), values.shape[1] - 1)
        return values[class_[:, None], index].sum(axis=1).astype(np.float32)

    def optimum(self, prompts: Prompts) -> np.ndarray:
        """float32[N]: the best plan where plans are judged, else the best content token written throughout."""
        if self._judges_plan:
            best = self.plan_values.max(axis=1)
        else:
            best = self.weights.max(axis=1) * self.content_length
        return best[prompts.tokens[:, 0]].astype(np.float32)

    def decode(self, tokens: np.ndarray) -> str:
        """Words such as `class2 symbol7` and `plan31 c5 c0`; unknown ids in angle brackets."""
        kinds = (
            [f"class{i}" for i in range(self.num_classes)]
            + [f"symbol{i}" for i in range(self.num_symbols)]
            + [f"plan{i}" for i in range(self.num_plans)]
            + [f"c{i}" for i in range(self.num_content)]
        )
        return " ".join(
            kinds[token] if 0 <= token < len(kinds) else f"<{token}>"
            for token in np.asarray(tokens).tolist()
            if token != self.pad_id
        )
