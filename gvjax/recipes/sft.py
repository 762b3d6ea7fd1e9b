"""Supervised fine-tuning: the policy both roads start from."""

import functools

from gvjax import config, steps
from gvjax.data.ahead import Ahead
from gvjax.models import lora
from gvjax.recipes import checks, loop, packed
from gvjax.recipes.ground import Ground, cached, make_optimizer
from gvjax.recipes.rows import demonstrations_at, role_key, sequences
from gvjax.tasks.task import Task
from gvjax.types import SequenceBatch


def train(
    settings: config.SftSection, ground: Ground, task: Task, seed: int, run: loop.Run
) -> loop.Trained:
    """Trains a policy on the task's demonstrations: new ones at every step, or a dataset's, epoch by epoch.

    It starts from random parameters, or from the checkpoint that the ground names.

    Args:
      settings: how.
      ground: the network and its mesh.
      task: gives prompts of the train split and demonstrations.
      seed: of the initialisation and the demonstrations.
      run: where it is kept.
    """
    together = None
    if settings.packed_length is not None or settings.length_buckets is not None:
        together = packed.demonstrations(task, ground, settings, seed)
    compiled, schedule = program(ground, settings)
    policy = ground.init_policy(role_key(seed, "init"))
    adapted = ground.lora is not None
    base = policy if adapted else None
    state = compiled.start(ground.init_trained(role_key(seed, "adapters"), policy))
    # Without adapters the state has its own copy, and nobody else needs this one.
    del policy

    def batch_at(round_: int) -> SequenceBatch:
        rows = demonstrations_at(task, seed, settings.batch_size, round_)
        return sequences(*rows, ground.pad_id)

    feed = Ahead(
        batch_at if together is None else together.batch_at, stop=settings.steps
    )

    def advance(state, round_):
        with run.clock.part("data"):
            batch = ground.put(feed(round_))
        return compiled.step(state, batch, base)

    first = batch_at(0)
    checks.check_same_everywhere(first)
    checks.check_masks(first)
    checks.check_endings(ground, first, some_end=True)
    return loop.train(
        run,
        state,
        advance,
        rounds=settings.steps,
        learning_rate=schedule,
        trained_on=compiled.trained_on,
        policy_of=lambda trained: lora.adapted(base, trained) if adapted else trained,
    )


@cached
def program(ground: Ground, settings: config.SftSection):
    """The compiled step and its learning rate."""
    tx, schedule = make_optimizer(settings.optimizer, settings.steps)
    make_step = functools.partial(
        steps.make_supervised_step, tx=tx, num_microbatches=settings.num_microbatches
    )
    return ground.compiler(make_step, tx), schedule
