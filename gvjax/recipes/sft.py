"""Supervised fine-tuning: the policy both roads start from."""

from gvjax import config, steps
from gvjax.recipes import checks, loop
from gvjax.recipes.ground import (
    Ground,
    cached,
    make_optimizer,
    role_key,
    role_rng,
    sequences,
)
from gvjax.tasks.task import Task
from gvjax.types import SequenceBatch


def train(
    settings: config.SftSection, ground: Ground, task: Task, seed: int, run: loop.Run
) -> loop.Trained:
    """Trains a policy from scratch on the task's demonstrations, new ones at every step.

    Args:
      settings: how.
      ground: the network and its mesh.
      task: gives prompts of the train split and demonstrations.
      seed: of the initialisation and the demonstrations.
      run: where it is kept.
    """
    compiled, schedule = program(ground, settings)
    state = compiled.start(ground.init_policy(role_key(seed, "init")))

    def batch_at(round_: int) -> SequenceBatch:
        rng = role_rng(seed, "demonstrations", round_)
        prompts = task.prompts(rng, settings.batch_size, "train")
        return sequences(prompts, task.demonstrations(rng, prompts), ground.pad_id)

    def advance(state, round_):
        return compiled.step(state, ground.put(batch_at(round_)))

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
    )


@cached
def program(ground: Ground, settings: config.SftSection):
    """The compiled step and its learning rate."""
    tx, schedule = make_optimizer(settings.optimizer, settings.steps)
    step = steps.make_supervised_step(
        ground.logps_fn, tx, num_microbatches=settings.num_microbatches
    )
    return ground.compiler(step, tx), schedule
