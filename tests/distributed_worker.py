"""One process of a small run, started by test_distributed.py: python distributed_worker.py ACT DIRECTORY.

Who takes part comes from GVJAX_*. Each process writes `<process id>.json` before it ends on purpose.
"""

import json
import logging
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gvjax import checkpoint, distributed, sharding
from gvjax.usage import ExitCode

RULES = [("w", P("fsdp"))]
ROWS = 8


def init() -> dict:
    return {"step": jnp.zeros((), jnp.int32), "w": jnp.linspace(-1.0, 1.0, 8)}


def step(state: dict, batch: dict) -> tuple[dict, dict]:
    def loss_fn(w):
        return jnp.mean(jnp.square(batch["x"] @ w - batch["y"]))

    loss, grad = jax.value_and_grad(loss_fn)(state["w"])
    return {"step": state["step"] + 1, "w": state["w"] - 0.1 * grad}, {"loss": loss}


def batch_at(number: int) -> dict:
    rng = np.random.default_rng(number)
    x = rng.normal(size=(ROWS, 8)).astype(np.float32)
    return {"x": x, "y": x.sum(1)}


def restored_with_an_old_listing(directory: pathlib.Path, me: int) -> list[int | None]:
    """Steps restored by a process that does not see the newest, the second time none."""
    mesh = sharding.make_mesh(fsdp=2)
    state = sharding.init_sharded(init, mesh, RULES)
    with checkpoint.Checkpoints(directory / "checkpoints", every_steps=1) as kept:
        kept.save(1, state, {})
        kept.save(2, state, {})
        kept.wait()
        plain = checkpoint._listed
        if me == 1:
            checkpoint._listed = lambda directory: plain(directory)[:1]
        found = [kept.latest_step(), kept.restore(state).step]
        if me == 1:
            checkpoint._listed = lambda directory: []
        return [*found, kept.restore(state).step]


def main(act: str, directory: pathlib.Path) -> None:
    logging.basicConfig(level=logging.INFO)
    distributed.initialize()
    me = jax.process_index()
    first = batch_at(100 * me if act == "differ" else 0)
    distributed.assert_same_on_all_hosts("first batch", distributed.batch_digest(first))
    distributed.assert_shared(directory / str(me) if act == "apart" else directory)

    if act == "stale":
        result = {"restored": restored_with_an_old_listing(directory, me)}
        (directory / f"{me}.json").write_text(json.dumps(result))
        distributed.exit_with(ExitCode.DONE)

    tensor = 4 if act == "tensor" else 1
    mesh = sharding.make_mesh(fsdp=2 if tensor == 1 else 1, tensor=tensor)
    state = sharding.init_sharded(init, mesh, RULES)
    targets = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = sharding.jit_step(step, mesh, targets)
    rows = sharding.process_rows(mesh, ROWS)
    losses = []
    for number in range(10_000 if act == "raise" else 3):
        batch = batch_at(number)
        if act == "tensor":
            placed = sharding.put_batch(mesh, batch)
        else:
            mine = {name: array[rows] for name, array in batch.items()}
            placed = sharding.put_batch(mesh, mine, global_batch=ROWS)
        state, metrics = jitted(state, placed)
        losses.append(float(metrics["loss"]))
        if act == "raise" and number >= 5 and me == 1:
            raise KeyError("a bug in one process")
        print(number + 1, flush=True)
    result = {
        "losses": losses,
        "rows": rows.tolist(),
        "processes": jax.process_count(),
    }
    (directory / f"{me}.json").write_text(json.dumps(result))
    distributed.exit_with(ExitCode.DONE)


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
