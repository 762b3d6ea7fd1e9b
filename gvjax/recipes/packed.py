"""Batches with little padding: several sequences share a row, or rows of like length share a batch.

Packed, a step has a fixed number of rows and not of sequences; how many those are differs a little from step to step.
Which sequences share a row is fixed, the order of the rows is new in every epoch. In length buckets, each sequence has a
row of its own, and a step has the length of its bucket: one compiled program each. Either way a batch is a function of
seed and step, so a resumed run goes on exactly where it was.
"""

import numpy as np

from gvjax import config
from gvjax.data.batches import Batches, shortened
from gvjax.data.examples import Examples, LengthPolicy, examples_of
from gvjax.data.schema import DemonstrationRow, PreferenceRow, Row
from gvjax.recipes.dataset import Dataset
from gvjax.recipes.ground import Ground
from gvjax.recipes.pairs import Pairs
from gvjax.recipes.rows import role_rng
from gvjax.tasks.task import Completions, Prompts, Task


def demonstrations(
    task: Task, ground: Ground, settings: config.SftSection, seed: int
) -> Batches:
    """A dataset's demonstrations, `batch_size` rows a step: of at most `packed_length` tokens, or of a bucket's.

    Raises:
      ConfigError: the task makes its demonstrations at every step, and has none to pack or to sort.
    """
    if not isinstance(task, Dataset):
        raise config.ConfigError(
            f"{_asked(settings)}, but task {task.name} makes new demonstrations at every step; only a dataset's can be"
            " packed or sorted by length. Take it out of the config"
        )
    rows = task.demonstrations_of(np.arange(len(task.demonstrated)))
    prompts, completions = rows
    examples = _examples(DemonstrationRow, prompts, (completions,), ground, settings)
    return _batches(examples, settings, seed, "packed demonstrations")


def pairs(
    pairs: Pairs,
    ground: Ground,
    settings: config.DpoSection | config.RewardSection,
    seed: int,
    role: str,
) -> Batches:
    """Pairs with their reference log-probabilities, `batch_size` rows of each side a step."""
    examples = _examples(
        PreferenceRow,
        pairs.prompts,
        (pairs.chosen, pairs.rejected),
        ground,
        settings,
        ref_logps=(pairs.ref_chosen_logps, pairs.ref_rejected_logps),
    )
    return _batches(examples, settings, seed, role)


def _examples(
    kind: type[Row],
    prompts: Prompts,
    completions: tuple[Completions, ...],
    ground: Ground,
    settings: config.SftSection | config.DpoSection | config.RewardSection,
    ref_logps: tuple[np.ndarray, np.ndarray] | None = None,
) -> Examples:
    longest = ground.prompt_length + ground.completion_length
    return examples_of(
        kind,
        (prompts.tokens, prompts.lengths),
        [(each.tokens, each.lengths) for each in completions],
        lengths=_lengths(settings, longest),
        pad_id=ground.pad_id,
        ref_logps=ref_logps,
    )


def _lengths(settings, longest: int) -> LengthPolicy:
    """What rows are padded to; of buckets, the last holds every row there may be."""
    if settings.packed_length is not None:
        return LengthPolicy((settings.packed_length,))
    shorter = [each for each in settings.length_buckets if each != longest]
    return LengthPolicy((*shorter, longest))


def _asked(settings) -> str:
    if settings.packed_length is not None:
        return f"packed_length is {settings.packed_length}"
    return f"length_buckets is {list(settings.length_buckets)}"


def _batches(examples: Examples, settings, seed: int, role: str) -> Batches:
    if settings.packed_length is not None:
        examples = shortened(examples)
    with config.refusing(_asked(settings)):
        return Batches(
            examples,
            batch_size=settings.batch_size,
            seed=int(role_rng(seed, role).integers(2**62)),
            packing=settings.packed_length is not None,
        )


def check(
    section: config.SftSection | config.DpoSection | config.RewardSection,
    ground: Ground,
) -> None:
    """Refuses rows that cannot be packed, and buckets that no row needs.

    Raises:
      ValueError: a packed row is shorter than a sequence may be, or the network cannot tell sequences of a row apart; a
        bucket is longer than any sequence, or they are not ascending.
    """
    longest = ground.prompt_length + ground.completion_length
    if section.length_buckets is not None:
        if section.length_buckets[-1] > longest:
            raise ValueError(
                f"length_buckets is {list(section.length_buckets)}, but one prompt with its completion has at most"
                f" {longest} tokens; use none beyond that"
            )
        _lengths(section, longest)
    if section.packed_length is None:
        return
    if section.packed_length < longest:
        raise ValueError(
            f"packed_length is {section.packed_length}, but one prompt with its completion has up to {longest} tokens;"
            f" use at least that, better {4 * longest}"
        )
    if ground.model.learned_positions is not None:
        raise ValueError(
            "packed_length is given, but the model's positions are learned and count from the start of a row; use"
            " rotary ones, or take packed_length out of the config"
        )
