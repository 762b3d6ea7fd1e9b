"""What the names of accelerators mean to a compiler: topology, usable memory, and the ceilings of the hardware.

Names are `<generation>-<count>` as the clouds sell them: the count is of chips for v5e and v6e, of TensorCores (two a
chip) for v4, v5p and tpu7x, and of GPUs for GPUs, on hosts of 8. `v5p-64` has 32 chips.
"""

import dataclasses
import difflib
import math

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of accelerators.

    Attributes:
      name: as in the names of targets.
      platform: "tpu" or "cuda".
      memory: GiB per device that a program may use. TPU: what the compiler grants. GPU: the card's memory, of which
        `GPU_SHARE` is used.
      flops: dense bf16 operations a second and device, by the maker's data sheet.
      bandwidth: bytes a second and device between the chip and its memory, by the same.
      counted: what the name's count counts, per chip.
      devices: what `jax.devices()` counts, per chip.
      topologies: chips along each side of the slices it comes in; () for GPUs.
      chip_config: libtpu's chip_config_name, where its default is not how jobs run.
      config: the text of XLA's GpuTargetConfigProto; "" for TPUs.
    """

    name: str
    platform: str
    memory: float
    flops: float
    bandwidth: float
    counted: int = 1
    devices: int = 1
    topologies: tuple[str, ...] = ()
    chip_config: str | None = None
    config: str = ""


GPU_SHARE = 0.9
"""XLA_PYTHON_CLIENT_MEM_FRACTION that runs are launched with (stock JAX: 0.75)."""

GPUS_PER_HOST = 8

_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
    *("4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
)


def _gpu_config(
    *, name, cores, capability, memory, bandwidth, clock, l2, shared, registers=65536
) -> str:
    """A GpuTargetConfigProto: what XLA has to know of a card that it does not see.

    Args:
      name: of the device.
      cores: streaming multiprocessors.
      capability: (major, minor).
      memory, l2: bytes.
      bandwidth: bytes a second.
      clock: GHz.
      shared: bytes of shared memory that one block may ask for.
      registers: in a multiprocessor.
    """
    major, minor = capability
    # Hopper's and Blackwell's accelerated instructions are asked for by the `a` features.
    features = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared + 1024}
  shared_memory_per_block_optin: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  registers_per_core_limit: {registers}
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor}{features} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""


def _gpu(
    name: str, memory: float, flops: float, bandwidth: float, title: str, **config
) -> Chip:
    text = _gpu_config(
        name=title, memory=int(memory * GIB), bandwidth=int(bandwidth), **config
    )
    return Chip(name, "cuda", memory, flops, bandwidth, config=text)


_AMPERE = {"capability": (8, 0), "cores": 108, "clock": 1.41, "shared": 166912}
_HOPPER = {"capability": (9, 0), "cores": 132, "shared": 232448}
CHIPS = (
    Chip(
        *("v4", "tpu", 30.75, 275e12, 1.228e12),
        counted=2,
        topologies=_CUBES,
        chip_config="megacore",
    ),
    Chip("v5e", "tpu", 15.75, 197e12, 0.819e12, topologies=_SQUARES),
    Chip("v5p", "tpu", 95.74, 459e12, 2.765e12, counted=2, topologies=_CUBES),
    Chip("v6e", "tpu", 31.25, 918e12, 1.64e12, topologies=_SQUARES),
    # A chip of 2307 TFLOP/s and 7.37 TB/s is two devices.
    Chip(
        *("tpu7x", "tpu", 94.75, 1153e12, 3.69e12),
        counted=2,
        devices=2,
        topologies=_CUBES,
    ),
    _gpu("a100-40gb", 40.0, 312e12, 1.555e12, "A100-SXM4-40GB", l2=41943040, **_AMPERE),
    _gpu("a100-80gb", 80.0, 312e12, 2.039e12, "A100-SXM4-80GB", l2=41943040, **_AMPERE),
    _gpu(
        "h100",
        79.6,
        989e12,
        3.35e12,
        "H100 80GB HBM3",
        clock=1.98,
        l2=52428800,
        **_HOPPER,
    ),
    _gpu("h200", 140.4, 989e12, 4.8e12, "H200", clock=1.98, l2=62914560, **_HOPPER),
    _gpu(
        *("b200", 179.1, 2250e12, 8.0e12, "B200"),
        capability=(10, 0),
        cores=148,
        clock=1.965,
        l2=132644864,
        shared=232448,
    ),
)
"""The generations."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine to compile for.

    Attributes:
      name: such as "v5e-256".
      chip: its generation.
      topology: of one slice; libtpu's ("v5e:16x16"), or XLA's for GPUs ("1x4x8": slices, hosts, GPUs a host).
      slice_devices: devices of one slice.
      slices: how many, joined by the data-centre network.
      host_bounds: TPU chips of one host along x, y and z; None for GPUs.
    """

    name: str
    chip: Chip
    topology: str
    slice_devices: int
    slices: int = 1
    host_bounds: tuple[int, int, int] | None = None

    @property
    def devices(self) -> int:
        return self.slice_devices * self.slices

    @property
    def usable(self) -> float:
        """Bytes per device that a program may take."""
        share = 1.0 if self.chip.platform == "tpu" else GPU_SHARE
        return self.chip.memory * GIB * share

    @property
    def tensor_reach(self) -> int:
        """Devices on the fast wires, which the tensor axis may not leave: of a slice, or of a GPU host."""
        if self.chip.platform == "tpu":
            return self.slice_devices
        return min(GPUS_PER_HOST, self.slice_devices)

    def describe(self) -> str:
        """One line for a person."""
        slices = f"{self.slices} slices of " if self.slices > 1 else ""
        return (
            f"{slices}{self.name}: {self.devices} devices, {self.usable / GIB:.2f} GiB usable on each, "
            f"{self.chip.flops / 1e12:.0f} TFLOP/s bf16, {self.chip.bandwidth / 1e12:.2f} TB/s"
        )


def table() -> dict[str, Target]:
    """Every target of one slice by its name, TPUs first."""
    rows: dict[str, Target] = {}
    for chip in CHIPS:
        for sides in chip.topologies:
            chips = math.prod(int(side) for side in sides.split("x"))
            # One host drives 1, 4 or 8 chips of the flat generations (8 as the whole 2x4 slice), 4 of the others.
            bounds = {"1x1": (1, 1, 1), "2x4": (2, 4, 1)}.get(sides, (2, 2, 1))
            name = f"{chip.name}-{chips * chip.counted}"
            topology = f"{chip.name}:{sides}"
            rows[name] = Target(
                name, chip, topology, chips * chip.devices, host_bounds=bounds
            )
        if chip.platform == "cuda":
            for count in (1, 2, 4, 8, 16, 32, 64, 128, 256):
                on_host = min(count, GPUS_PER_HOST)
                topology = f"1x{count // on_host}x{on_host}"
                name = f"{chip.name}-{count}"
                rows[name] = Target(name, chip, topology, count)
    return rows


def target(name: str, slices: int = 1) -> Target:
    """What a name means; `8xh100`, `v5litepod-16` and libtpu's `v5e:4x4` are understood too.

    Raises:
      ValueError: there is no such machine (the nearest ones are named), or it does not come in slices.
    """
    rows = table()
    spelt = name.lower().replace("v5litepod", "v5e")
    count, times, rest = spelt.partition("x")
    if times and count.isdigit() and not rest[:1].isdigit():
        spelt = f"{rest}-{count}"
    by_topology = {row.topology: row for row in rows.values()}
    found = rows.get(spelt) or by_topology.get(spelt)
    if found is None:
        raise ValueError(
            f"there is no accelerator {name!r}; did you mean {_near_misses(spelt)}?"
        )
    if slices < 1:
        raise ValueError(f"slices is {slices}; it must be at least 1")
    if slices > 1 and found.chip.platform != "tpu":
        raise ValueError(
            f"{name} does not come in slices; name all GPUs of the job, e.g. "
            f"{found.chip.name}-{found.slice_devices * slices}"
        )
    return dataclasses.replace(found, slices=slices)


def _near_misses(name: str) -> str:
    rows = table()
    generation, _, count = name.rpartition("-")
    sizes = [
        int(row.rpartition("-")[2])
        for row in rows
        if row.rpartition("-")[0] == generation
    ]
    if sizes and count.isdigit():
        # A known generation in a size it does not come in: the sizes on either side.
        below = [size for size in sizes if size < int(count)][-1:]
        above = [size for size in sizes if size > int(count)][:1]
        return " or ".join(f"{generation}-{size}" for size in below + above)
    near = difflib.get_close_matches(name, list(rows), n=3, cutoff=0.5)
    return " or ".join(near or [f"{chip.name}-8" for chip in CHIPS])
