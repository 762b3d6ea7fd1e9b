"""The train step every other step is made of: an objective above, an optimizer below, nothing else."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from gvjax.masked import Max, Mean, Min, at_least_float32
from gvjax.types import Metrics, Objective, Params, Step, TrainState


def init_train_state(
    params: Params, tx: optax.GradientTransformation, *, copy: bool = True
) -> TrainState:
    """The state at step 0. What is made here, counters and a head's moments, lies where the parameters do.

    Args:
      params: pytree of arrays.
      tx: the optax transform the step will use.
      copy: whether the state gets copies of them: a step that donates its state deletes its buffers, and the caller often
        keeps the parameters as the reference policy. False gives them away, and memory holds them once.
    """

    def copied() -> Params:
        return jax.tree.map(jnp.copy, params)

    # The optimizer gets its own copy: some keep the parameters they are given, and a buffer can be donated once.
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=copied() if copy else params,
        opt_state=tx.init(copied()),
    )
    return _beside(params, state)


def _beside(params: Params, state: TrainState) -> TrainState:
    """The state with every array committed, if one of the parameters is, as a checkpoint's are.

    JAX returns all of a step's outputs committed then, and would compile the step once more for those.
    """
    places = [leaf.sharding for leaf in jax.tree.leaves(params) if _committed(leaf)]
    if not places:
        return state
    place = places[0]
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec())
    return jax.tree.map(
        lambda leaf: leaf if _committed(leaf) else jax.device_put(leaf, place), state
    )


def _committed(leaf: jax.Array) -> bool:
    """Whether it lies where somebody has put it; while traced, nothing does."""
    return not isinstance(leaf, jax.core.Tracer) and getattr(leaf, "committed", False)


def make_train_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    num_microbatches: int = 1,
) -> Step:
    """Builds one optimizer update of an objective, un-jitted.

    The objective's loss and metrics come undivided (`Mean`): totals and weights are summed over micro-batches and
    divided once, so that the update does not depend on `num_microbatches`. Weights must not depend on the params.

    A batch whose loss has weight 0 (every row masked) gives loss 0 and a zero gradient.

    A batch whose loss or gradient is not finite is skipped: the new state has the old parameters and optimizer state,
    and the metric `skipped` is 1. Only the step counter moves on.

    Args:
      objective: `(params, batch) -> (loss Mean, metrics dict of Mean)`.
      tx: optax transform; chain `optax.clip_by_global_norm` in front for clipping.
      num_microbatches: >= 1, slices the batch is walked through in; must divide the leading axis of every array.

    Returns:
      `(state, batch) -> (state, metrics)`; metrics are f32[] and add `loss`, `grad_norm` (before clipping) and
      `skipped`, 0 or 1.
      A metric with nothing to speak of is 0.

    Raises:
      ValueError: if num_microbatches is not positive, or (when the step is traced) does not divide the batch, or the
        arrays of the batch differ in their number of rows.
    """
    if num_microbatches < 1:
        raise ValueError(
            f"num_microbatches is {num_microbatches}; it must be at least 1"
        )

    def undivided(params: Params, batch):
        loss, metrics = objective(params, batch)
        if not isinstance(loss, Mean):
            raise ValueError(
                f"the objective returned {type(loss).__name__} for its loss; return (Mean(total, weight), metrics), so"
                " that micro-batches add exactly"
            )
        return loss.total, (loss, dict(metrics))

    def parts_of_gradient(params: Params, batch):
        grads, parts = jax.grad(undivided, has_aux=True)(params, batch)
        return jax.tree.map(at_least_float32, grads), parts

    def step(state: TrainState, batch) -> tuple[TrainState, Metrics]:
        if num_microbatches == 1:
            grads, (loss, metrics) = parts_of_gradient(state.params, batch)
        else:
            microbatches = split(batch, num_microbatches)

            def add(grads, microbatch):
                more, parts = parts_of_gradient(state.params, microbatch)
                return jax.tree.map(jnp.add, grads, more), parts

            zeros = jax.tree.map(
                lambda leaf: jnp.zeros_like(at_least_float32(leaf)), state.params
            )
            grads, (loss, metrics) = jax.lax.scan(add, zeros, microbatches)
            loss = loss.merged()
            metrics = {name: metric.merged() for name, metric in metrics.items()}

        weight = jnp.where(loss.weight == 0, 1.0, loss.weight)
        grads = jax.tree.map(lambda grad: grad / weight, grads)
        grad_norm = optax.tree.norm(grads)
        grads = jax.tree.map(
            lambda grad, param: grad.astype(param.dtype), grads, state.params
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # One not-a-number among the moments would stay there for the rest of the run.
        finite = jnp.isfinite(loss.value) & jnp.isfinite(grad_norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        values = {name: _value(metric) for name, metric in metrics.items()}
        values["loss"] = loss.value
        values["grad_norm"] = grad_norm
        values["skipped"] = 1.0 - finite.astype(jnp.float32)
        new_state = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
        return new_state, values

    return step


def _value(metric: Mean | Max | Min) -> jax.Array:
    """f32[]: the value, and 0 for an extreme of nothing."""
    value = at_least_float32(metric.value)
    if isinstance(metric, Mean):
        return value
    nothing = jnp.inf if isinstance(metric, Min) else -jnp.inf
    return jnp.where(value == nothing, 0.0, value)


def split(batch: Any, count: int) -> Any:
    """Every leaf [B, ...] as [count, B / count, ...], rows dealt out in turn.

    Contiguous blocks would cut across the device axis of a sharded batch and cost an all-gather.

    Raises:
      ValueError: count does not divide B, or the leaves differ in B.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    sizes = {
        jax.tree_util.keystr(path): leaf.shape[:1]
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    }
    if len(set(sizes.values())) > 1 or () in sizes.values():
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"a batch walked through in micro-batches needs the same number of rows in every array, not {shown}"
        )
    for (size,) in set(sizes.values()):
        if size % count:
            lower = size - size % count
            raise ValueError(
                f"batch size {size} is not divisible by num_microbatches {count}; use {lower or count} or"
                f" {lower + count} rows"
            )
    return jax.tree.map(
        lambda leaf: leaf.reshape(
            leaf.shape[0] // count, count, *leaf.shape[1:]
        ).swapaxes(0, 1),
        batch,
    )
