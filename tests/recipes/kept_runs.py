"""Runs of tests: where they are kept, what they logged, whether two ended alike."""

import json
import pathlib

import jax
import numpy as np

from gvjax import config
from gvjax.recipes import loop


def make_run(
    directory: pathlib.Path,
    *,
    checkpoint_every: int = 10_000,
    progress: loop.Progress = loop.nobody,
) -> loop.Run:
    return loop.Run(
        directory=directory,
        identity={"test": directory.name},
        logging=config.LoggingSection(tensorboard=False, every=1, sample_every=0),
        checkpoints=config.CheckpointSection(every=checkpoint_every),
        progress=progress,
    )


def metrics_of(run: loop.Run) -> list[dict[str, float]]:
    lines = (run.directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def same_bits(first, second) -> bool:
    """Whether two pytrees of arrays agree to the last bit."""
    equal = jax.tree.map(
        lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), first, second
    )
    return all(jax.tree.leaves(equal))
