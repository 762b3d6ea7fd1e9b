"""Where arrays live: one mesh of three axes, a table of rules, and a step compiled for both.

Axes: `data` copies the parameters, `fsdp` splits parameters and batch alike, `tensor` splits the matrices inside a
layer. A table of rules, `(path-ending regex, PartitionSpec)`, stands beside the model it describes:

    RULES = [
        ("embed/table", P("tensor", "fsdp")),
        ("attention/(query|key|value)/kernel", P("fsdp", "tensor")),
        (".*scale|.*bias", P()),
    ]

A leaf's path is its keys joined by "/"; a rule speaks of every path that ends with it, at a "/" boundary, and the
first rule that fits wins. So the same table serves `params/embed/table` and `opt_state/0/mu/embed/table`. What no rule
names is an error: an array replicated by oversight is found when the memory runs out, on the big machine.
"""

import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

logger = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
"""How axis 0 of every batch array is split."""

Rules = Sequence[tuple[str, P]]
Tree = Any
"""A pytree of arrays, of jax.ShapeDtypeStruct, or of what is made for them leaf by leaf."""


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Mesh of axes (data, fsdp, tensor), all Auto: the compiler places the collectives.

    Args:
      data, fsdp, tensor: sizes >= 1; one of them may be -1 and takes the devices that are left.
      devices: all devices of all processes by default.

    Raises:
      ValueError: if the sizes do not multiply out to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for axis, size in sizes.items():
        if size == 0 or size < -1:
            raise ValueError(f"mesh axis {axis}={size} must be -1 or at least 1")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(
            f"mesh axes {' and '.join(free)} are both -1; only one can take the devices that are left, set the other "
            "to 1"
        )
    count, product = len(devices), math.prod(s for s in sizes.values() if s > 0)
    shown = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    if free and count % product:
        raise ValueError(
            f"mesh {shown}: {count} devices do not divide by {product}; the sizes other than {free[0]} must multiply "
            f"to one of {_divisors(count)}"
        )
    if free:
        sizes[free[0]] = count // product
    elif product != count:
        others = [
            f"{axis}={count // (product // size)}"
            for axis, size in sizes.items()
            if count % (product // size) == 0
        ]
        way_out = f"; {' or '.join(others)} would" if others else ""
        raise ValueError(
            f"mesh {shown} needs {product} devices and there are {count}: the sizes must multiply to {count}{way_out}"
        )
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        return Mesh(_over_slices(sizes, slices, devices), AXES, axis_types=types)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)


def _over_slices(
    sizes: dict[str, int], slices: int, devices: Sequence[jax.Device]
) -> np.ndarray:
    """TPU slices joined by the slow network: `data` spans them, or `fsdp` where that cannot, and `tensor` never."""
    outer = next((axis for axis in AXES[:2] if sizes[axis] % slices == 0), None)
    if outer is None:
        raise ValueError(
            f"mesh data={sizes['data']} x fsdp={sizes['fsdp']} x tensor={sizes['tensor']} on {slices} slices: data or "
            f"fsdp must be a multiple of {slices}, so that the tensor axis stays inside a slice"
        )
    across = [slices if axis == outer else 1 for axis in AXES]
    within = [size // count for size, count in zip(sizes.values(), across)]
    return mesh_utils.create_hybrid_device_mesh(within, across, devices)


def platform(mesh: Mesh) -> str:
    """The platform the mesh runs on: "cpu", "gpu" or "tpu".

    Kernels are chosen by this and never by the process' default backend: compiled ahead of time for a TPU, a program
    runs its Python on a host whose default backend is the CPU.
    """
    return mesh.devices.flat[0].platform


def path_str(path: tuple[Any, ...]) -> str:
    """A leaf's keys joined by "/", as the rules see them."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(mesh: Mesh, tree: Tree, rules: Rules) -> Tree:
    """The NamedSharding of every array in `tree`, by the first rule that fits its path.

    Scalars are replicated without a rule. In a tree with `params`, an array elsewhere whose path ends with a
    parameter's path (an optimizer's moments) takes the parameter's sharding if it has its shape, and is replicated if
    it has not (a factored moment, which is small).

    Args:
      mesh: the mesh.
      tree: arrays or jax.ShapeDtypeStructs; also a whole train state.
      rules: see the module; a PartitionSpec may be shorter than the array's rank.

    Returns:
      A tree like `tree` with a NamedSharding for each leaf.

    Raises:
      ValueError: no rule fits, or a dimension does not divide by the mesh axes that split it.
    """
    compiled = [(re.compile(rf"(?:.*/)?(?:{ending})"), spec) for ending, spec in rules]
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    named = [(path_str(path), np.shape(leaf)) for path, leaf in leaves]
    parameters = {
        path.removeprefix("params/"): shape
        for path, shape in named
        if path.startswith("params/")
    }

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        if not shape:
            return NamedSharding(mesh, P())
        if not path.startswith("params/"):
            keys = path.split("/")
            suffixes = ("/".join(keys[start:]) for start in range(1, len(keys)))
            owner = next((s for s in suffixes if s in parameters), None)
            if owner is not None and parameters[owner] != shape:
                return NamedSharding(mesh, P())
        for pattern, spec in compiled:
            if pattern.fullmatch(path):
                _check_divides(mesh, path, shape, spec)
                return NamedSharding(mesh, spec)
        raise ValueError(
            f"no sharding rule fits {path} of shape {shape}; add a rule for it, ({path.rsplit('/', 1)[-1]!r}, P()) to "
            "replicate it"
        )

    return jax.tree_util.tree_unflatten(treedef, [sharding(*each) for each in named])


def without_fsdp(spec: P) -> P:
    """A spec of which the fsdp axis splits nothing."""

    def kept(axes):
        if isinstance(axes, tuple):
            return tuple(axis for axis in axes if axis != "fsdp") or None
        return None if axes == "fsdp" else axes

    return P(*(kept(axes) for axes in spec))


def abstract(tree: Tree, tree_shardings: Tree) -> Tree:
    """`tree` as jax.ShapeDtypeStructs that carry `tree_shardings`: what a restore onto this mesh aims at."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        tree,
        tree_shardings,
    )


def init_sharded(
    init_fn: Callable[..., Tree], mesh: Mesh, rules: Rules, *args: Any
) -> Tree:
    """`init_fn(*args)`, built where it will live: no device ever holds the whole of it.

    The result shares no buffer with `args`, so it may be donated while, say, reference parameters given in `args` stay
    in use.

    Args:
      init_fn: pure function of arrays to a tree of arrays (params, or a whole train state).
      mesh, rules: as for `shardings`.
      *args: arrays for `init_fn`.
    """
    targets = shardings(mesh, jax.eval_shape(init_fn, *args), rules)
    with jax.set_mesh(mesh):
        return jax.jit(init_fn, out_shardings=targets)(*args)


def lower_init(
    init_fn: Callable[..., Tree], mesh: Mesh, rules: Rules, *args: Any
) -> jax.stages.Lowered:
    """The program of `init_sharded`, lowered for jax.ShapeDtypeStructs; nothing is built."""
    targets = shardings(mesh, jax.eval_shape(init_fn, *args), rules)
    with jax.set_mesh(mesh):
        return jax.jit(init_fn, out_shardings=targets).lower(*args)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 split over `data` and `fsdp`, the rest whole."""
    return NamedSharding(mesh, BATCH)


def batch_shards(mesh: Mesh) -> int:
    """The number of parts that axis 0 of a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(mesh: Mesh, size: int, name: str = "batch size") -> None:
    """ValueError, with the sizes that would do, unless `size` rows divide over the mesh."""
    shards = batch_shards(mesh)
    if size <= 0 or size % shards:
        raise ValueError(
            f"{name} {size} is not divisible by data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}; use "
            f"{_neighbours(size, shards)}"
        )


def check_tensor_size(mesh: Mesh, size: int, name: str) -> None:
    """ValueError, with the sizes that would do, unless `size` divides over the tensor axis."""
    shards = mesh.shape["tensor"]
    if size % shards:
        raise ValueError(
            f"{name} {size} is not divisible by tensor={shards}; use {_neighbours(size, shards)}, or a tensor axis of "
            f"{_divisors(size)}"
        )


def process_rows(mesh: Mesh, global_batch: int) -> np.ndarray:
    """int64[N], ascending: the rows of a global batch that this process' devices need.

    Taken from the sharding and not from the process' number: two processes that share a tensor axis need the same
    rows, and a mesh may order its devices as it likes.
    """
    check_batch_size(mesh, global_batch)
    spans = batch_sharding(mesh).addressable_devices_indices_map((global_batch,))
    rows = {span[0].indices(global_batch) for span in spans.values() if span}
    return np.concatenate([np.arange(*each) for each in sorted(rows)])


def put_batch(mesh: Mesh, batch: Tree, *, global_batch: int | None = None) -> Tree:
    """The batch on the mesh, axis 0 split over `data` and `fsdp`; scalars are replicated.

    Args:
      mesh: the mesh.
      batch: arrays `[B, ...]`. Without `global_batch`, the whole batch, equal on every process, of which each uploads
        the rows it owns; with it, only the rows `process_rows(mesh, global_batch)`, in that order.
      global_batch: number of rows over all processes.

    Raises:
      ValueError: the number of rows does not divide over the mesh, or is not what this process owns.
    """
    split, replicated = batch_sharding(mesh), NamedSharding(mesh, P())

    def where(path, leaf):
        if np.ndim(leaf) == 0:
            return replicated
        if global_batch is None:
            check_batch_size(mesh, len(leaf), f"batch array {path_str(path)} of size")
        return split

    places = jax.tree_util.tree_map_with_path(where, batch)
    if global_batch is None and jax.process_count() == 1:
        # All at once: what a small network learns from is sooner computed than put down array by array.
        return jax.device_put(batch, places)

    def put(path, leaf, place):
        if np.ndim(leaf) == 0:
            return jax.device_put(leaf, place)
        if global_batch is None:
            return jax.make_array_from_callback(
                np.shape(leaf), place, lambda index: leaf[index]
            )
        rows = process_rows(mesh, global_batch)
        if len(leaf) != len(rows):
            raise ValueError(
                f"batch array {path_str(path)} has {len(leaf)} rows, but this process owns {len(rows)} of the "
                f"{global_batch}; give the rows process_rows(mesh, {global_batch})"
            )

        def local(index):
            start, stop, _ = index[0].indices(global_batch)
            first = np.searchsorted(rows, start)
            return leaf[first : first + stop - start]

        # The global shape is always given: left to be inferred from local rows, each process would believe its own.
        return jax.make_array_from_callback(
            (global_batch, *np.shape(leaf)[1:]), place, local
        )

    return jax.tree_util.tree_map_with_path(put, batch, places)


def fetch(tree: Tree) -> Tree:
    """The whole of every array as a host array, on every process; called by all of them together."""

    def whole(leaf):
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


class ShardedStep:
    """A step compiled for one mesh: `(state, batch, *frozen) -> (state, metrics)`. Made by `jit_step`.

    Attributes:
      compilations: how many programs have been compiled so far; 1 in a healthy run with one batch shape.
    """

    def __init__(
        self,
        step: Callable[[Any, Any], tuple[Any, Mapping[str, jax.Array]]],
        mesh: Mesh,
        state_shardings: Tree,
        donate: bool,
    ):
        self._step = step
        self._name = getattr(step, "__name__", type(step).__name__)
        self._mesh = mesh
        self._state_shardings = state_shardings
        self._donate = donate
        self._programs: dict[Any, jax.stages.Compiled] = {}
        self._leaves_by_shapes: dict[Any, list[tuple[str, str]]] = {}

    @property
    def compilations(self) -> int:
        return len(self._programs)

    @property
    def programs(self) -> tuple[jax.stages.Compiled, ...]:
        """What has been compiled so far, to be looked at."""
        return tuple(self._programs.values())

    def lower(self, state: Any, batch: Any, *frozen: Any) -> jax.stages.Lowered:
        """The step lowered for these shapes (arrays or jax.ShapeDtypeStructs), not yet compiled."""
        split, replicated = (
            batch_sharding(self._mesh),
            NamedSharding(self._mesh, P()),
        )

        def of_batch(path, leaf):
            if np.ndim(leaf) == 0:
                return replicated
            check_batch_size(
                self._mesh, np.shape(leaf)[0], f"batch array {path_str(path)} of size"
            )
            return split

        batch_shardings = jax.tree_util.tree_map_with_path(of_batch, batch)
        jitted = jax.jit(
            self._step,
            # What is frozen stays where it lies.
            in_shardings=(
                self._state_shardings,
                batch_shardings,
                *(None for _ in frozen),
            ),
            out_shardings=(self._state_shardings, replicated),
            donate_argnums=(0,) if self._donate else (),
        )
        # Under the mesh, so that a model may constrain activations with bare PartitionSpecs.
        with jax.set_mesh(self._mesh):
            return jitted.lower(state, batch, *frozen)

    def __call__(
        self, state: Any, batch: Any, *frozen: Any
    ) -> tuple[Any, Mapping[str, jax.Array]]:
        leaves, treedef = jax.tree.flatten((state, batch, *frozen))
        shapes = tuple(np.shape(leaf) for leaf in leaves)
        signature = (treedef, shapes, tuple(_dtype(leaf) for leaf in leaves))
        program = self._programs.get(signature)
        if program is None:
            program = self._compile((state, batch, *frozen), signature, shapes)
        return program(state, batch, *frozen)

    def _compile(self, arguments, signature, shapes):
        leaves = [
            (path_str(path), str(_dtype(leaf)))
            for path, leaf in jax.tree_util.tree_flatten_with_path(arguments)[0]
        ]
        before = self._leaves_by_shapes.get(shapes)
        if before is not None:
            changed = [
                f"{old} is now {new}" for old, new in zip(before, leaves) if old != new
            ]
            logger.warning(
                "step %s is compiled again for the same shapes: %s",
                self._name,
                "; ".join(changed) or "the tree's structure changed",
            )
        start = time.monotonic()
        program = self.lower(*arguments).compile()
        self._programs[signature] = program
        self._leaves_by_shapes[shapes] = leaves
        logger.info(
            "compiled step %s in %.1f s (compilation %d)",
            self._name,
            time.monotonic() - start,
            self.compilations,
        )
        return program


def jit_step(
    step: Callable[[Any, Any], tuple[Any, Mapping[str, jax.Array]]],
    mesh: Mesh,
    state_shardings: Tree,
    *,
    donate: bool = True,
) -> ShardedStep:
    """A plain step, compiled for a mesh: state split as told, batch over data and fsdp, metrics replicated.

    Args:
      step: pure `(state, batch, *frozen) -> (state, metrics)`; every batch array has the rows on axis 0. What is frozen
        is read only, and never donated.
      mesh: the mesh.
      state_shardings: a NamedSharding per state leaf, as from `shardings`.
      donate: the new state reuses the old one's memory; the old one cannot be read afterwards.

    Returns:
      A callable of the same signature. A batch whose rows do not divide over the mesh is a ValueError before anything
      is compiled. A second compilation for the same shapes (a dtype that drifts between steps, a tree that changes) is
      logged as a warning naming what changed: it would otherwise only show as time lost.
    """
    return ShardedStep(step, mesh, state_shardings, donate)


def _check_divides(mesh: Mesh, path: str, shape: tuple[int, ...], spec: P) -> None:
    if len(spec) > len(shape):
        raise ValueError(
            f"the rule {spec} for {path} has {len(spec)} dimensions, but its shape is {shape}; shorten the rule or "
            "put a narrower one before it"
        )
    for dimension, (size, entry) in enumerate(zip(shape, spec)):
        axes = _axes(entry)
        unknown = [axis for axis in axes if axis not in mesh.shape]
        if unknown:
            raise ValueError(
                f"the rule {spec} for {path} names the axis {unknown[0]!r}; this mesh has {tuple(mesh.shape)}"
            )
        shards = math.prod(mesh.shape[axis] for axis in axes)
        if size % shards:
            split = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
            raise ValueError(
                f"{path} of shape {shape}: dimension {dimension} of size {size} is not divisible by {split}; use a "
                f"size of {_neighbours(size, shards)}, or split it {_divisors(size)} ways"
            )


def _axes(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _divisors(number: int) -> str:
    return _either(d for d in range(1, number + 1) if number % d == 0)


def _neighbours(size: int, divisor: int) -> str:
    below = size // divisor * divisor
    return _either(each for each in (below, below + divisor) if each > 0)


def _either(numbers: Iterable[int]) -> str:
    listed = [str(number) for number in numbers]
    return (
        listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} or {listed[-1]}"
    )
