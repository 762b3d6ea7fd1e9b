"""The vocabulary: frozen pytrees that flow through the steps, and the callables that make and use them.

One sequence layout everywhere: prompt, then completion, then padding on the right; every `[B, T]` array is aligned to
`tokens`, so position `[b, t]` always speaks of `tokens[b, t]`. Which positions count is said by masks made from
lengths, never by comparing ids with a padding id.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, dataclass_transform

import jax
import optax

from gvjax.masked import Max, Mean, Min

Params = Any
"""A pytree of arrays."""

EosId = int | tuple[int, ...]
"""The token that ends a completion, or several of which each does."""


@dataclass_transform(frozen_default=True)
def _pytree(cls):
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_pytree
class TrainState:
    """What a step needs to go on: arrays only, no functions, config or keys.

    Attributes:
      step: int32[], optimizer updates made so far.
      params: the trained parameters.
      opt_state: the optax state for them.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState


@_pytree
class SequenceBatch:
    """Prompts with completions.

    Attributes:
      tokens: int32[B, T], prompt then completion then padding.
      completion_mask: bool[B, T], True on completion tokens, the EOS included.
      segments: int32[B, T] or None; with packing, the number (from 1) of the sequence a position belongs to, 0 on
        padding.
    """

    tokens: jax.Array
    completion_mask: jax.Array
    segments: jax.Array | None = None


@_pytree
class PreferenceBatch:
    """Pairs of completions of the same prompt.

    With packing (`chosen` and `rejected` have `segments`) a row holds up to S pairs: segment s of row b of both shares a
    prompt, what is f32[B] below is f32[B, S], and `weight` must be there, 0 where there is no pair.

    Attributes:
      chosen, rejected: SequenceBatch, row b of both shares a prompt; their T may differ.
      ref_chosen_logps, ref_rejected_logps: f32[B], nats, summed over the completion under the reference policy; None
        where the loss needs no reference.
      chosen_probability: f32[B] in [0, 1], probability that `chosen` is the better one; None means 1 (a hard label).
      margin: f32[B], by how much `chosen` is better, in reward units; None where unknown.
      weight: f32[B] >= 0, row weights; None means 1.
      chosen_from_reference: bool[B], True where the reference policy wrote `chosen` and the policy `rejected`, False
        the other way round (XPO); None where neither is meant.
      swapped: bool[B, S] or None; True where, in a packed row, a pair stands the other way round: its chosen completion
        in `rejected`, its rejected one in `chosen`. So both rows fill up evenly though chosen completions are longer.
    """

    chosen: SequenceBatch
    rejected: SequenceBatch
    ref_chosen_logps: jax.Array | None = None
    ref_rejected_logps: jax.Array | None = None
    chosen_probability: jax.Array | None = None
    margin: jax.Array | None = None
    weight: jax.Array | None = None
    chosen_from_reference: jax.Array | None = None
    swapped: jax.Array | None = None


@_pytree
class UnpairedBatch:
    """Single completions marked good or bad (KTO and its relatives).

    Attributes:
      sequences: SequenceBatch.
      desirable: bool[B].
      ref_logps: f32[B], nats, summed over the completion under the reference policy; None where not needed.
      kl_sequences: SequenceBatch or None: prompts with *other rows'* completions, from which the loss estimates how
        far the policy has moved.
      ref_kl_logps: f32[B] or None, the reference's summed log-probabilities of those.
      weight: f32[B] >= 0, row weights; None means 1.
    """

    sequences: SequenceBatch
    desirable: jax.Array
    ref_logps: jax.Array | None = None
    kl_sequences: SequenceBatch | None = None
    ref_kl_logps: jax.Array | None = None
    weight: jax.Array | None = None


@_pytree
class Rollouts:
    """Sampled completions; the `group_size` completions of one prompt stand in consecutive rows.

    Attributes:
      tokens: int32[B, T].
      completion_mask: bool[B, T], True on sampled tokens, the EOS included.
      logps: f32[B, T], nats, under the policy that sampled, at temperature 1 and full support.
      rewards: f32[B] or None until scored.
      sampler_logps: f32[B, T], nats, under the distribution that the tokens were drawn from, where temperature, top-k
        or top-p made that another one than the policy's; None where it is the policy's. What learns from rollouts and
        takes `logps` for the sampling distribution must refuse those where this is not None.
    """

    tokens: jax.Array
    completion_mask: jax.Array
    logps: jax.Array
    rewards: jax.Array | None = None
    sampler_logps: jax.Array | None = None

    def scored(self) -> jax.Array:
        """f32[B]: the rewards.

        Raises:
          ValueError: the rollouts have not been scored.
        """
        if self.rewards is None:
            raise ValueError("these rollouts have no rewards yet; score them first")
        return self.rewards


@_pytree
class PolicyBatch:
    """Rollouts made ready for a policy-gradient step.

    Attributes:
      tokens: int32[B, T].
      completion_mask: bool[B, T].
      old_logps: f32[B, T], nats, under the policy that sampled.
      advantages: f32[B, T], constant for the step.
      ref_logps: f32[B, T] or None, nats, under the reference policy.
    """

    tokens: jax.Array
    completion_mask: jax.Array
    old_logps: jax.Array
    advantages: jax.Array
    ref_logps: jax.Array | None = None


@_pytree
class ActorCriticBatch:
    """A PolicyBatch with what a value function is trained on (PPO).

    Attributes:
      policy: PolicyBatch.
      old_values: f32[B, T], the critic's values when the completion was sampled.
      returns: f32[B, T], targets for the critic.
    """

    policy: PolicyBatch
    old_values: jax.Array
    returns: jax.Array


class LogpsFn(Protocol):
    """Token log-probabilities: `[b, t]` is log p(tokens[b, t] | tokens[b, :t]) in nats; column 0 is 0.

    A model may take two more by name: `segments` int32[B, T] of packed rows, without which it cannot be given any, and
    `scored` bool[B, T], the tokens that will be looked at: the others need not be worked out.
    """

    def __call__(self, params: Params, tokens: jax.Array, /) -> jax.Array: ...


class GroupLogpsFn(Protocol):
    """Log-probabilities of completions that share their prompt.

    `(params, prompts int32[N, P], prompt_lengths int32[N], completions int32[N, k, C]) -> f32[N, k, C]`, nats: `[n, i, t]`
    is log p(completions[n, i, t] | the first prompt_lengths[n] tokens of prompts[n], completions[n, i, :t]). Prompts are
    padded on the right and have at least one token; what stands behind a completion changes nothing before it.
    """

    def __call__(
        self,
        params: Params,
        prompts: jax.Array,
        prompt_lengths: jax.Array,
        completions: jax.Array,
        /,
    ) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class SharedPrompts:
    """A model that runs each prompt once for its group of completions; steps take it in a LogpsFn's place.

    The rows of a batch stay as they are, whole sequences, a group's in consecutive rows: completions of one prompt, or
    the two of a pair.

    Attributes:
      logps_fn: GroupLogpsFn.
      plain: a LogpsFn of the same model, for batches that are packed or so narrow that sharing would not pay.
      prompt_length, completion_length: at least the longest of each in any batch. Longer ones would be cut.
      group_size: k, rows to a prompt; 2 for pairs.
    """

    logps_fn: GroupLogpsFn
    plain: LogpsFn
    prompt_length: int
    completion_length: int
    group_size: int

    def pays(self, width: int) -> bool:
        """Whether rows of so many tokens are run faster this way: from a quarter fewer tokens on, measured on a CPU."""
        own = min(self.completion_length, width) - 1
        shared = min(self.prompt_length, width) + self.group_size * own
        return shared <= 0.75 * self.group_size * (width - 1)


class ApplyFn(Protocol):
    """A plain forward pass: `(params, tokens int32[B, T]) -> logits f32[B, T, V]`."""

    def __call__(self, params: Params, tokens: jax.Array, /) -> jax.Array: ...


class RewardFn(Protocol):
    """A scorer: `(params, tokens int32[B, T], completion_mask bool[B, T]) -> rewards f32[B]`.

    What stands after the last True of a row must not change its reward; an empty completion has reward 0.
    """

    def __call__(
        self, params: Params, tokens: jax.Array, completion_mask: jax.Array, /
    ) -> jax.Array: ...


class ValuesFn(Protocol):
    """A critic: `(params, tokens int32[B, T]) -> values f32[B, T]`, the value *before* tokens[b, t] is chosen."""

    def __call__(self, params: Params, tokens: jax.Array, /) -> jax.Array: ...


class DecodeFn(Protocol):
    """One cached forward: `(params, tokens[B, S], positions[B, S], cache) -> (logits f32[B, V], cache)`.

    `positions` count from 0 in each row and −1 marks padding, on the right; the logits are those after each row's last
    real token. Every array of the cache that is not a scalar has the batch as axis 0, or that of the prompts which the
    rows continue.
    """

    def __call__(
        self, params: Params, tokens: jax.Array, positions: jax.Array, cache: Any, /
    ) -> tuple[jax.Array, Any]: ...


Metrics = dict[str, jax.Array]
Objective = Callable[[Params, Any], tuple[Mean, Mapping[str, Mean | Max | Min]]]
"""`(params, batch) -> (loss, metrics)`, the means undivided."""
Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
