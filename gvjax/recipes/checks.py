"""A few seconds of self-checks before a run spends hours: known first values, or it does not start."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gvjax import config, distributed, sharding
from gvjax.recipes.ground import Ground
from gvjax.recipes.programs import reward_scorer, scorer
from gvjax.sampling import is_eos
from gvjax.types import Params, PreferenceBatch, Rollouts, SequenceBatch

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
"""Nats per token by which two computations of the same log-probability may differ, by compute dtype."""


class SelfCheckError(RuntimeError):
    """A quantity with a known first value does not have it; nothing has been trained."""


def check_same_everywhere(batch: Any) -> None:
    """The first batch, of host arrays, must be the same on every process: each gives the mesh its part of the rows.

    Raises:
      ConfigError: it is not.
    """
    with config.refusing():
        distributed.assert_same_on_all_hosts(
            "first batch", distributed.batch_digest(batch)
        )


def check_rows(section: config.Recipe, ground: Ground) -> None:
    """Every batch must divide over the mesh.

    Raises:
      ValueError: naming the sizes that do.
    """
    for name in ("batch_size", "prompts_per_step", "on_policy_prompts"):
        if (rows := getattr(section, name, None)) is not None:
            sharding.check_batch_size(ground.mesh, rows, name)
    if section.batch_rows is not None:
        sharding.check_batch_size(ground.mesh, section.batch_rows, "a batch of size")


def check_seeds_together(
    settings: config.StudyConfig | config.GapConfig, devices: int
) -> None:
    """Seeds that are done at once share one device, of whose time a single one leaves much.

    Raises:
      ConfigError: there are fewer seeds, or the mesh has several devices.
    """
    together = settings.seeds_together
    if together > len(settings.seeds):
        raise config.ConfigError(
            f"seeds_together is {together}, but there are {len(settings.seeds)} seeds; use no more"
        )
    if together > 1 and devices > 1:
        raise config.ConfigError(
            f"seeds_together is {together}, but the mesh has {devices} devices, over which one seed is split already;"
            " leave it out, or run on one device"
        )


def check_masks(batch: SequenceBatch) -> None:
    """Every row must have a prompt before its completion, and some row a completion."""
    mask = sharding.fetch(batch.completion_mask)
    if not mask.any():
        raise SelfCheckError(
            "the first batch has no completion token: every loss would be 0. Look at the data"
        )
    if mask[:, 0].any():
        rows = np.flatnonzero(mask[:, 0])[:3].tolist()
        raise SelfCheckError(
            f"rows {rows} of the first batch have a completion that begins at the first token; give them a prompt"
        )


def check_endings(
    ground: Ground, batch: SequenceBatch, *, some_end: bool = False
) -> None:
    """Completions must end with the EOS token, once, or fill all the room there is; a task without an EOS need not.

    And none may begin where the task says that there is prompt in every row.

    Args:
      ground: knows the EOS token and the room.
      batch: rows of the first batch.
      some_end: at least one must end, as in demonstrations, or a policy could not learn to stop.
    """
    tokens, mask = sharding.fetch((batch.tokens, batch.completion_mask))
    if mask[:, : ground.shortest_prompt].any():
        raise SelfCheckError(
            f"a completion of the first batch begins within the first {ground.shortest_prompt} tokens, which the task's"
            " min_prompt_length says are prompt in every row; lower it"
        )
    if ground.eos_id is None:
        return
    lengths, ends = mask.sum(axis=1), mask & is_eos(tokens, ground.eos_id)
    last = mask & (np.cumsum(mask, axis=1) == lengths[:, None])
    ended = (ends & last).any(axis=1)
    cut_off = ~ends.any(axis=1) & (lengths >= ground.completion_length)
    wrong = (ends & ~last).any(axis=1) | ~(ended | cut_off | (lengths == 0))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise SelfCheckError(
            f"row {row} of the first batch has a completion of {lengths[row]} tokens with {ends[row].sum()} EOS tokens"
            f" ({ground.eos_id}): give it one, at its end (only one of {ground.completion_length} tokens may lack it)"
        )
    if some_end and not ended.any():
        raise SelfCheckError(
            f"no completion of the first batch ends with the EOS token ({ground.eos_id}), so that the policy could not"
            " learn to stop; add it to the demonstrations, or make them shorter"
        )


def check_reference(ground: Ground, params: Params, batch: PreferenceBatch) -> None:
    """A policy that starts at the reference must give the stored reference log-probabilities.

    Then sigmoid DPO's first loss is ln 2, hinge's 1 and IPO's 1/(4τ²); a reference that is secretly another model, or
    was scored on other tokens, shows here.
    """
    tolerance = TOLERANCE[ground.model.dtype]
    for name, sequences, ref_logps in (
        ("chosen", batch.chosen, batch.ref_chosen_logps),
        ("rejected", batch.rejected, batch.ref_rejected_logps),
    ):
        placed = ground.put(sequences)
        logps = sharding.fetch(scorer(ground)(params, placed)).sum(axis=1)
        tokens = np.asarray(sequences.completion_mask).sum(axis=1)
        error = np.abs(logps - np.asarray(ref_logps)) / np.maximum(tokens, 1)
        if not error.max() <= tolerance:
            raise SelfCheckError(
                f"the policy starts at the reference, yet their log-probabilities of a {name} completion differ by"
                f" {error.max():.2e} nats a token (allowed: {tolerance:g}): the reference is another model, or saw"
                " other tokens"
            )


def check_first_loss(
    loss: float, expected: float, name: str, *, tolerance: float = 1e-4
) -> None:
    """A loss with a known value before the first update must have it."""
    if not math.isclose(loss, expected, rel_tol=1e-3, abs_tol=tolerance):
        raise SelfCheckError(
            f"the first {name} loss is {loss:.6f} and must be {expected:.6f}"
        )


def check_rollouts(ground: Ground, params: Params, rollouts: Rollouts) -> None:
    """The sampler's log-probabilities must be the scorer's, so that the first importance ratio is 1."""
    sequences = SequenceBatch(rollouts.tokens, rollouts.completion_mask)
    check_masks(sequences)
    check_endings(ground, sequences)
    logps = sharding.fetch(scorer(ground)(params, sequences))
    mask, sampled = sharding.fetch((rollouts.completion_mask, rollouts.logps))
    error = np.abs(np.where(mask, sampled - logps, 0.0)).max()
    tolerance = TOLERANCE[ground.model.dtype]
    if not error <= tolerance:
        raise SelfCheckError(
            f"sampler and scorer differ by {error:.2e} nats on a token (allowed: {tolerance:g}): the first importance"
            " ratio would not be 1"
        )


def check_reward_padding(
    ground: Ground, pooling, params: Params, sequences: SequenceBatch
) -> None:
    """A reward must not change when padding is appended."""
    score = reward_scorer(ground, pooling)
    more = 8
    if ground.model.learned_positions is not None:
        more = min(more, ground.model.learned_positions - sequences.tokens.shape[1])
    wide = jax.tree.map(
        lambda leaf: np.pad(np.asarray(leaf), ((0, 0), (0, more))), sequences
    )
    narrow_scores = score(params, *_placed(ground, sequences))
    wide_scores = score(params, *_placed(ground, wide))
    error = float(jnp.max(jnp.abs(narrow_scores - wide_scores)))
    scale = 1.0 + float(jnp.max(jnp.abs(narrow_scores)))
    if not error <= TOLERANCE[ground.model.dtype] * scale:
        raise SelfCheckError(
            f"appending {more} padding tokens changes a reward by {error:.2e}: the head reads padding"
        )


def _placed(ground: Ground, sequences: SequenceBatch):
    return ground.put((sequences.tokens, sequences.completion_mask))
