"""What each accelerator name means: the one table of hosts, chips, memory and what every platform calls it.

Names are `<generation>-<count>`. For TPUs they are Google's accelerator types, and so the count is of *chips* for v5e
and v6e but of *TensorCores* (two a chip) for v4, v5p and tpu7x: `v5p-128` has 64 chips. For GPUs the count is of GPUs
over all hosts, for `cpu-N` of virtual CPU devices.

Topologies, device counts, host counts and usable memory of the TPUs are what libtpu 0.0.42 reports for the topology
name; `tests/launch/test_launch_hw.py` asks it again wherever libtpu is installed.
"""

import dataclasses
import difflib
import functools
import math


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One accelerator, as much of it as one job slice uses.

    Attributes:
      name: the canonical name, such as "v5e-16" or "h100-32".
      kind: "tpu", "gpu" or "cpu".
      hosts: machines in one slice.
      chips_per_host: TPU chips or GPUs on each.
      devices: what `jax.devices()` counts in one slice (tpu7x shows two devices a chip).
      hbm_gib: memory per device, GiB. TPU: what the compiler grants a program. GPU: `memory.total` of nvidia-smi, of
        which JAX takes XLA_PYTHON_CLIENT_MEM_FRACTION.
      topology: libtpu's topology name, such as "v5e:4x4"; None for GPUs and CPUs.
      host_bounds: chips of one host along x, y, z: libtpu's chips_per_host_bounds.
      chip_config: libtpu's chip_config_name, where its default is not how jobs run.
      gcloud_type, runtime_version: `gcloud compute tpus` names; runtime_version is None where there are no TPU VMs.
      gke_accelerator, gke_topology, machine_type: GKE node labels; machine_type is None where Google Cloud has no such
        machine.
      sky: SkyPilot's name, count left out.
    """

    name: str
    kind: str
    hosts: int
    chips_per_host: int
    devices: int
    hbm_gib: float | None = None
    topology: str | None = None
    host_bounds: tuple[int, int, int] | None = None
    chip_config: str | None = None
    gcloud_type: str | None = None
    runtime_version: str | None = None
    gke_accelerator: str | None = None
    gke_topology: str | None = None
    machine_type: str | None = None
    sky: str | None = None

    @property
    def chips(self) -> int:
        """TPU chips or GPUs in one slice."""
        return self.hosts * self.chips_per_host

    @property
    def devices_per_host(self) -> int:
        return self.devices // self.hosts

    def describe(self) -> str:
        """One line for a person, such as "16 devices on 4 hosts x 4 chips, 15.75 GiB each"."""
        if self.kind == "cpu":
            return f"{self.devices} virtual CPU devices"
        unit = "chips" if self.kind == "tpu" else "GPUs"
        return (
            f"{self.devices} devices on {self.hosts} hosts x {self.chips_per_host} "
            f"{unit}, {self.hbm_gib:g} GiB each"
        )


@dataclasses.dataclass(frozen=True)
class _TpuGeneration:
    name: str
    cores_counted: int  # what the number in Google's name counts, per chip
    devices_per_chip: int
    hbm_gib: float
    gcloud: str
    runtime_version: str | None
    gke: str
    machine: str  # with {} for the chips per host
    topologies: tuple[str, ...]
    chip_config: str | None = None


_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
    *("4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
)

_TPUS = (
    _TpuGeneration(
        name="v4",
        cores_counted=2,
        devices_per_chip=1,
        hbm_gib=30.75,
        gcloud="v4",
        runtime_version="tpu-ubuntu2204-base",
        gke="tpu-v4-podslice",
        machine="ct4p-hightpu-{}t",
        topologies=_CUBES,
        chip_config="megacore",
    ),
    _TpuGeneration(
        name="v5e",
        cores_counted=1,
        devices_per_chip=1,
        hbm_gib=15.75,
        gcloud="v5litepod",
        runtime_version="v2-alpha-tpuv5-lite",
        gke="tpu-v5-lite-podslice",
        machine="ct5lp-hightpu-{}t",
        topologies=_SQUARES,
    ),
    _TpuGeneration(
        name="v5p",
        cores_counted=2,
        devices_per_chip=1,
        hbm_gib=95.74,
        gcloud="v5p",
        runtime_version="v2-alpha-tpuv5",
        gke="tpu-v5p-slice",
        machine="ct5p-hightpu-{}t",
        topologies=_CUBES,
    ),
    _TpuGeneration(
        name="v6e",
        cores_counted=1,
        devices_per_chip=1,
        hbm_gib=31.25,
        gcloud="v6e",
        runtime_version="v2-alpha-tpuv6e",
        gke="tpu-v6e-slice",
        machine="ct6e-standard-{}t",
        topologies=_SQUARES,
    ),
    _TpuGeneration(
        name="tpu7x",
        cores_counted=2,
        devices_per_chip=2,
        hbm_gib=94.75,
        gcloud="tpu7x",
        runtime_version=None,  # Ironwood is rented through GKE alone
        gke="tpu7x",
        machine="tpu7x-standard-{}t",
        topologies=_CUBES,
    ),
)


@dataclasses.dataclass(frozen=True)
class _GpuModel:
    name: str
    hbm_gib: float
    gke: str
    machines: dict[int, str]  # GPUs per host -> machine type
    sky: str


_GPUS = (
    _GpuModel(
        name="a100-40gb",
        hbm_gib=40.0,
        gke="nvidia-tesla-a100",
        machines={n: f"a2-highgpu-{n}g" for n in (1, 2, 4, 8)},
        sky="A100",
    ),
    _GpuModel(
        name="a100-80gb",
        hbm_gib=80.0,
        gke="nvidia-a100-80gb",
        machines={n: f"a2-ultragpu-{n}g" for n in (1, 2, 4, 8)},
        sky="A100-80GB",
    ),
    _GpuModel(
        name="h100",
        hbm_gib=79.6,
        gke="nvidia-h100-80gb",
        machines={n: f"a3-highgpu-{n}g" for n in (1, 2, 4, 8)},
        sky="H100",
    ),
    _GpuModel(
        name="h200",
        hbm_gib=140.4,
        gke="nvidia-h200-141gb",
        machines={8: "a3-ultragpu-8g"},
        sky="H200",
    ),
    _GpuModel(
        name="b200",
        hbm_gib=179.1,
        gke="nvidia-b200",
        machines={8: "a4-highgpu-8g"},
        sky="B200",
    ),
)

_GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)


def _tpu(generation: _TpuGeneration, shape: str) -> Accelerator:
    chips = math.prod(int(side) for side in shape.split("x"))
    # One host drives 1, 4 or 8 chips of the flat generations (8 only as the whole 2x4 slice), and 4 of the others.
    bounds = {"1x1": (1, 1, 1), "2x4": (2, 4, 1)}.get(shape, (2, 2, 1))
    per_host = math.prod(bounds)
    count = chips * generation.cores_counted
    return Accelerator(
        name=f"{generation.name}-{count}",
        kind="tpu",
        hosts=chips // per_host,
        chips_per_host=per_host,
        devices=chips * generation.devices_per_chip,
        hbm_gib=generation.hbm_gib,
        topology=f"{generation.name}:{shape}",
        host_bounds=bounds,
        chip_config=generation.chip_config,
        gcloud_type=f"{generation.gcloud}-{count}",
        runtime_version=generation.runtime_version,
        gke_accelerator=generation.gke,
        gke_topology=shape,
        machine_type=generation.machine.format(per_host),
        sky=f"tpu-{generation.gcloud}-{count}" if generation.runtime_version else None,
    )


def _gpu(model: _GpuModel, count: int) -> Accelerator:
    per_host = min(count, 8)
    return Accelerator(
        name=f"{model.name}-{count}",
        kind="gpu",
        hosts=count // per_host,
        chips_per_host=per_host,
        devices=count,
        hbm_gib=model.hbm_gib,
        gke_accelerator=model.gke,
        machine_type=model.machines.get(per_host),
        sky=model.sky,
    )


@functools.cache
def table() -> dict[str, Accelerator]:
    """Every accelerator by its canonical name, TPUs first."""
    rows = [_tpu(tpu, shape) for tpu in _TPUS for shape in tpu.topologies]
    rows += [_gpu(model, count) for model in _GPUS for count in _GPU_COUNTS]
    rows += [
        Accelerator(name=f"cpu-{n}", kind="cpu", hosts=1, chips_per_host=n, devices=n)
        for n in _CPU_COUNTS
    ]
    return {row.name: row for row in rows}


def accelerator(name: str) -> Accelerator:
    """The row for `name`; Google's own spellings (`v5litepod-16`) are understood too.

    Raises:
      ValueError: for an unknown name, naming the nearest ones.
    """
    rows = table()
    by_gcloud = {row.gcloud_type: row for row in rows.values() if row.gcloud_type}
    row = rows.get(name.lower()) or by_gcloud.get(name.lower())
    if row is None:
        raise ValueError(
            f"accelerator {name!r} is unknown; did you mean {_near_misses(name)}? "
            "`python -m launch hardware` lists all"
        )
    return row


def _near_misses(name: str) -> str:
    generation, _, count = name.lower().rpartition("-")
    generations = list(dict.fromkeys(row.rpartition("-")[0] for row in table()))
    if generation in generations and count.isdigit():
        # A known generation in a size it does not come in: the sizes on either side.
        sizes = [
            int(row.rpartition("-")[2])
            for row in table()
            if row.rpartition("-")[0] == generation
        ]
        below = [size for size in sizes if size < int(count)][-1:]
        above = [size for size in sizes if size > int(count)][:1]
        near = [f"{generation}-{size}" for size in below + above]
    else:
        near = difflib.get_close_matches(name.lower(), list(table()), n=3, cutoff=0.5)
        near = near or [f"{each}-8" for each in generations]
    return " or ".join(near)
