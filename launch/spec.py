"""JobSpec: everything a job is, checked whole before anything runs or any cloud is called."""

import dataclasses
import math
import os
import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from launch import bucket, hw

# The exit codes a gvjax process and its supervisors agree on.
DONE = 0
USAGE = 2  # what Python and its argument parsers say of a command line that they do not understand
USER_ERROR = 64  # wrong config or data: a restart would only repeat it
CRASH = 70
HANG = 71
PREEMPTED = 85  # checkpointed after SIGTERM: restart, and do not count it
# Every other code (134, 137, 143: a peer or the host died) is a failure like CRASH and HANG: restart, counted.

HOPELESS = (USAGE, USER_ERROR)
"""Never restarted."""

PORT = 8476
"""Where process 0 listens for the others, on machines a job has to itself."""

AXES = ("data", "fsdp", "tensor")

_REQUIRED = {
    "local": (),
    "tpu-vm": ("project", "zone"),
    "gke": ("project", "zone", "cluster", "image"),
    "slurm": (),
    "sky": (),
    "xpk": ("project", "zone", "cluster", "image"),
}
_OPTIONAL = {
    "local": ("processes", "workdir"),
    "tpu-vm": ("image", "setup", "slices", "spot", "reserved", "shared_mounts"),
    "gke": ("namespace", "queue", "spot", "slices"),
    "slurm": (
        *("processes", "workdir", "image", "setup", "shared_mounts"),
        *("partition", "account", "time_limit"),
    ),
    "sky": ("zone", "workdir", "image", "setup", "spot", "shared_mounts"),
    "xpk": ("slices", "shared_mounts"),
}
_ALWAYS = (
    *("name", "backend", "argv", "accelerator", "mesh"),
    *("env", "secrets", "run_dir", "retries", "grace"),
)
BACKENDS = tuple(_REQUIRED)

_MOUNTS = ("tpu-vm", "gke", "sky")
"""Backends that mount a bucket where the program runs."""
_NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/local", "/scratch/local")
_MISSING_IMAGE = "the container image that has gvjax in it"
_MISSING = {
    "project": "your Google Cloud project id",
    "zone": "such as us-east5-b",
    "cluster": "the GKE cluster's name",
    "image": _MISSING_IMAGE,
}


@dataclasses.dataclass(frozen=True)
class JobSpec:
    """One job. Making one raises ValueError with every problem found, so a JobSpec in hand is a valid one.

    Attributes:
      name: lower-case letters, digits and dashes, at most 40; names the job on every platform.
      backend: one of BACKENDS.
      argv: the program every process runs, without a shell. `{name}`, `{run_dir}` and `{mesh}` in it are filled in.
      accelerator: a name in `hw.table()`.
      run_dir: where checkpoints go: a directory that every host sees, or `gs://BUCKET/PATH`, which some backends mount.
      slices: TPU slices joined by the data-center network.
      processes: for CPUs, and for GPUs on one machine; otherwise the hardware decides.
      mesh: sizes of the axes data, fsdp and tensor; one may be -1. Empty leaves it to the program.
      image: container image.
      setup: shell lines run before the job, for hosts that come without gvjax: on each host; under Slurm on the first
        one, in the batch script, whose environment all processes get. A line that fails ends the job.
      env: plain settings. Values are printed, so secrets are refused here.
      secrets: names of environment variables; values never enter a spec or a plan.
      workdir: directory the program starts in (local, slurm) or that is copied to the hosts (sky).
      shared_mounts: directories that are the same on every host, where a path cannot say so itself.
      retries: counted restarts: those after a failure. Checkpointed preemptions are not counted.
      grace: seconds from SIGTERM to SIGKILL; at least the time one checkpoint takes.
      project, zone, cluster, namespace, queue: where, on Google Cloud; queue is a Kueue LocalQueue.
      spot, reserved: how the machines are paid for.
      partition, account, time_limit: Slurm's; time_limit as "D-HH:MM:SS" or "HH:MM:SS".
    """

    name: str
    backend: str
    argv: tuple[str, ...]
    accelerator: str
    run_dir: str
    slices: int = 1
    processes: int | None = None
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    image: str = ""
    setup: tuple[str, ...] = ()
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    workdir: str = ""
    shared_mounts: tuple[str, ...] = ()
    retries: int = 3
    grace: int = 300
    project: str = ""
    zone: str = ""
    cluster: str = ""
    namespace: str = "default"
    queue: str = ""
    spot: bool = False
    reserved: bool = False
    partition: str = ""
    account: str = ""
    time_limit: str = ""

    def __post_init__(self):
        problems = _problems(self)
        if problems:
            noun = "problem" if len(problems) == 1 else "problems"
            raise ValueError(
                f"{len(problems)} {noun} in job {self.name!r}; nothing was started\n"
                + "\n".join(f"  - {problem}" for problem in problems)
            )

    @property
    def hardware(self) -> hw.Accelerator:
        return hw.accelerator(self.accelerator)

    @property
    def num_hosts(self) -> int:
        """Machines over all slices."""
        if self.hardware.kind == "cpu" and self.backend == "slurm":
            return self.num_processes
        return self.hardware.hosts * self.slices

    @property
    def num_processes(self) -> int:
        """JAX processes in the job: one per GPU under Slurm, whose JAX support pins one GPU to a task, else one per host."""
        if self.processes is not None:
            return self.processes
        if self.hardware.kind == "cpu":
            return 1
        if self.backend == "slurm":
            return self.hardware.devices
        return self.num_hosts

    @property
    def num_devices(self) -> int:
        return self.hardware.devices * self.slices

    @property
    def full_mesh(self) -> dict[str, int]:
        """`mesh` with the -1 worked out."""
        known = math.prod(size for size in self.mesh.values() if size > 0)
        return {
            axis: self.num_devices // known if size == -1 else size
            for axis, size in self.mesh.items()
        }

    @property
    def command(self) -> tuple[str, ...]:
        """`argv` filled in."""
        fill = {
            "{name}": self.name,
            "{run_dir}": bucket.directory(self.run_dir),
            # As YAML, which is what an override `mesh={mesh}` of `gvjax run` takes.
            "{mesh}": "{"
            + ", ".join(f"{axis}: {n}" for axis, n in self.full_mesh.items())
            + "}",
        }
        words = []
        for word in self.argv:
            for placeholder, value in fill.items():
                word = word.replace(placeholder, value)
            words.append(word)
        return tuple(words)

    @property
    def cpu_env(self) -> dict[str, str]:
        """For virtual CPU devices: what makes JAX show this process its share of them."""
        if self.hardware.kind != "cpu":
            return {}
        share = self.num_devices // self.num_processes
        flags = [
            flag
            for flag in self.env.get("XLA_FLAGS", "").split()
            if "xla_force_host_platform_device_count" not in flag
        ]
        flags.append(f"--xla_force_host_platform_device_count={share}")
        return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}

    def title(self, verb: str = "launch") -> str:
        slices = f"{self.slices} slices of " if self.slices > 1 else ""
        return (
            f"{verb} {self.name} on {slices}{self.hardware.name} by {self.backend}: "
            f"{self.hardware.describe()}{' in each slice' * (self.slices > 1)}; "
            f"{self.num_processes} processes"
        )


def needs() -> str:
    """What each backend needs and what else it takes, a line each."""
    lines = []
    for backend in BACKENDS:
        required = " ".join(map(_flag, _REQUIRED[backend])) or "nothing more"
        optional = " ".join(map(_flag, _OPTIONAL[backend]))
        lines.append(f"  {backend:7} needs {required}; takes {optional}")
    return "\n".join(lines)


def _flag(field: str) -> str:
    """The command-line flag of a field: lists are given one item at a time."""
    singular = {"secrets": "secret", "shared_mounts": "shared_mount"}.get(field, field)
    return "--" + singular.replace("_", "-")


def _problems(spec: JobSpec) -> list[str]:
    if spec.backend not in BACKENDS:
        return [f"backend {spec.backend!r} is none of {', '.join(BACKENDS)}"]
    problems = []
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", spec.name):
        problems.append(
            f"name {spec.name!r} must be 1 to 40 lower-case letters, digits and dashes, beginning with a letter and "
            "not ending with a dash: it becomes a host name"
        )
    if not spec.argv:
        problems.append(
            "there is no program to run; give it after --, as in `-- python -m gvjax ...`"
        )
    if spec.retries < 0:
        problems.append(f"retries {spec.retries} must be at least 0")
    if spec.grace < 1:
        problems.append(
            f"grace {spec.grace} s must be at least 1, and long enough for one checkpoint"
        )
    problems += _wrong_options(spec)
    problems += _wrong_environment(spec)
    problems += _wrong_run_dir(spec)
    try:
        hardware = spec.hardware
    except ValueError as error:
        return [*problems, str(error)]
    problems += _wrong_hardware(spec, hardware)
    if not problems:
        # What follows divides devices among processes and axes, so it needs the rest to be right.
        problems += _wrong_processes(spec, hardware)
        problems += _wrong_mesh(spec, hardware)
    return problems


def _wrong_options(spec: JobSpec) -> list[str]:
    problems = []
    required, optional = _REQUIRED[spec.backend], _OPTIONAL[spec.backend]
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        flag = _flag(field.name)
        if field.name in required:
            if not value:
                problems.append(f"{spec.backend} needs {flag}: {_MISSING[field.name]}")
        elif field.name not in (*_ALWAYS, *optional) and value != field.default:
            users = [b for b in BACKENDS if field.name in _REQUIRED[b] + _OPTIONAL[b]]
            problems.append(
                f"{spec.backend} has no use for {flag} (got {value!r}); leave it out, or take the backend "
                f"{' or '.join(users)}"
            )
    if spec.backend == "tpu-vm" and not (spec.image or spec.setup):
        problems.append(
            f"tpu-vm needs --image ({_MISSING_IMAGE}) or --setup (a line that installs it): a TPU VM comes empty"
        )
    if spec.spot and spec.reserved:
        problems.append("spot and reserved exclude each other; choose one")
    if spec.time_limit and not re.fullmatch(r"(\d+-)?\d+:\d\d:\d\d", spec.time_limit):
        problems.append(
            f"time_limit {spec.time_limit!r} must look like 24:00:00 or 2-00:00:00"
        )
    if spec.workdir and not os.path.isabs(spec.workdir):
        problems.append(f"workdir {spec.workdir!r} must be an absolute path")
    return problems


def _wrong_environment(spec: JobSpec) -> list[str]:
    problems = []
    for name in (*spec.env, *spec.secrets):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            problems.append(
                f"{name!r} is not a name an environment variable can have"
                + ("; a secret is given by name, not by value" * (name in spec.secrets))
            )
        elif name in ("GVJAX_COORDINATOR", "GVJAX_NUM_PROCESSES", "GVJAX_PROCESS_ID"):
            problems.append(f"{name} is set by the launcher itself; leave it out")
    for name, value in spec.env.items():
        if {"TOKEN", "SECRET", "PASSWORD", "PASSWD", "KEY"} & set(
            name.upper().split("_")
        ):
            problems.append(
                f"{name} looks like a secret, and env values end up in plans and manifests; pass it by name: "
                f"--secret {name}"
            )
        if "\n" in value or "\0" in value:
            problems.append(f"the value of {name} must be one line")
    for name in sorted(set(spec.env) & set(spec.secrets)):
        problems.append(f"{name} is both a setting and a secret; choose one")
    return problems


def _wrong_run_dir(spec: JobSpec) -> list[str]:
    run_dir = spec.run_dir
    if not run_dir:
        return ["run_dir is missing: say where checkpoints go"]
    if "://" in run_dir:
        return _wrong_bucket(spec)
    if spec.backend == "local":
        return []
    path = os.path.normpath(run_dir)

    def under(root: str) -> bool:
        return path == root or path.startswith(root.rstrip("/") + "/")

    problem = f"run_dir {run_dir!r} is not shared between hosts: "
    if any(under(os.path.normpath(mount)) for mount in spec.shared_mounts):
        return []
    if spec.backend == "slurm":
        if not os.path.isabs(path):
            return [problem + "give an absolute path on the cluster's file system"]
        if any(under(root) for root in _NODE_LOCAL):
            return [
                problem
                + "such paths are one node's own disk; take the cluster's file system, or vouch for it with "
                "--shared-mount"
            ]
        return []
    ways_out = []
    if spec.backend in _MOUNTS:
        ways_out.append("use gs://BUCKET/PATH")
    if "shared_mounts" in _OPTIONAL[spec.backend]:
        ways_out.append("a path under a mount you name with --shared-mount")
    way_out = ", or ".join(ways_out)
    return [problem + f"it is on the disk of one machine, gone with it; {way_out}"]


def _wrong_bucket(spec: JobSpec) -> list[str]:
    run_dir = spec.run_dir
    if not run_dir.startswith("gs://"):
        return [
            f"run_dir {run_dir!r} is no place for a run, which is written as files, with directories that are renamed; "
            f"use gs://BUCKET/PATH with {' or '.join(_MOUNTS)}, or a path on a shared file system"
        ]
    if not bucket.of(run_dir):
        return [f"run_dir {run_dir!r} has no bucket; write gs://BUCKET/PATH"]
    if spec.backend in _MOUNTS:
        return []
    if spec.backend == "xpk":
        return [
            f"run_dir {run_dir!r}: XPK mounts buckets by itself; `xpk storage attach` this one (launch/README.md says "
            "how), and give a path in its mount point, which you name with --shared-mount"
        ]
    return [
        f"run_dir {run_dir!r}: a run is written as files, and {spec.backend} mounts no buckets; mount it on every host "
        "and give the path of the mount"
    ]


def _wrong_hardware(spec: JobSpec, hardware: hw.Accelerator) -> list[str]:
    name, kind, backend = hardware.name, hardware.kind, spec.backend
    problems = []
    if spec.slices < 1:
        problems.append(f"slices {spec.slices} must be at least 1")
    elif spec.slices > 1 and kind != "tpu":
        problems.append(
            f"slices are of TPUs; for more hosts ask for more GPUs in one name, such as h100-16, not {spec.slices} x "
            f"{name}"
        )
    if kind == "cpu" and backend not in ("local", "slurm"):
        problems.append(
            f"{backend} starts TPUs and GPUs; {name} runs on local or slurm"
        )
    if backend == "local" and hardware.hosts > 1:
        problems.append(
            f"local means this machine, and {name} is {hardware.hosts} hosts; choose a backend that rents them"
        )
    if backend == "tpu-vm":
        if kind != "tpu":
            problems.append(f"tpu-vm starts TPUs; for {name} use gke, slurm or sky")
        elif hardware.runtime_version is None:
            problems.append(
                f"there are no TPU VMs of {name}: it comes only with gke or xpk"
            )
    if backend == "gke" and kind == "gpu" and hardware.machine_type is None:
        problems.append(
            f"Google Cloud has no machine with {hardware.chips_per_host} of these GPUs; on gke ask for 8 or more"
        )
    if backend == "xpk" and kind == "gpu":
        problems.append(
            f"XPK gives a GPU process no rank that JAX can read; start {name} with gke"
        )
    if backend == "slurm" and kind == "tpu":
        problems.append(f"Slurm has no TPUs; start {name} with tpu-vm, gke or xpk")
    if backend == "sky" and kind == "tpu":
        if hardware.sky is None:
            problems.append(f"SkyPilot has no {name}: it comes only with gke or xpk")
        if spec.image:
            problems.append(
                "SkyPilot runs no container on TPU VMs; leave --image out and install with --setup"
            )
    return problems


def _wrong_processes(spec: JobSpec, hardware: hw.Accelerator) -> list[str]:
    processes = spec.num_processes
    if processes < 1:
        return [f"processes {processes} must be at least 1"]
    if spec.processes is None:
        return []
    if hardware.kind == "tpu" and processes > 1:
        return [
            f"a TPU host runs one process for all its chips, not {processes}; leave --processes out"
        ]
    if hardware.kind == "gpu" and spec.backend == "slurm":
        return [
            "under Slurm JAX wants one process per GPU, and so it is; leave --processes out"
        ]
    if spec.num_devices % processes:
        divisors = [
            n for n in range(1, spec.num_devices + 1) if spec.num_devices % n == 0
        ]
        return [
            f"{spec.num_devices} devices do not divide among {processes} processes; use one of {divisors}"
        ]
    return []


def _wrong_mesh(spec: JobSpec, hardware: hw.Accelerator) -> list[str]:
    if not spec.mesh:
        if any("{mesh}" in word for word in spec.argv):
            return ["argv has {mesh} but no mesh was given; add --mesh"]
        return []
    unknown = [axis for axis in spec.mesh if axis not in AXES]
    if unknown:
        return [f"mesh axis {unknown[0]!r} is none of {', '.join(AXES)}"]
    wrong = [axis for axis, size in spec.mesh.items() if size == 0 or size < -1]
    if wrong:
        return [f"mesh axis {wrong[0]}={spec.mesh[wrong[0]]} must be -1 or at least 1"]
    if list(spec.mesh.values()).count(-1) > 1:
        return ["only one mesh axis can be -1, and takes the devices that are left"]
    shown = " x ".join(f"{axis}={size}" for axis, size in spec.mesh.items())
    devices = spec.num_devices
    product = math.prod(size for size in spec.mesh.values() if size > 0)
    if -1 in spec.mesh.values():
        if devices % product:
            return [
                f"mesh {shown}: {devices} devices do not divide by {product}; make the given sizes multiply to a "
                f"divisor of {devices}"
            ]
    elif product != devices:
        ways = [
            f"{axis}={devices // (product // size)}"
            for axis, size in spec.mesh.items()
            if devices % (product // size) == 0
        ]
        way_out = f"; {' or '.join(ways)} would fit" if ways else ""
        return [
            f"mesh {shown} makes {product} devices, but {hardware.name}"
            f"{f' x {spec.slices} slices' if spec.slices > 1 else ''} has {devices}{way_out}"
        ]
    # The tensor axis talks in every layer, so it must stay on the fast wires: within a slice, or within a GPU host.
    tensor = spec.full_mesh.get("tensor", 1)
    if hardware.kind == "gpu":
        reach, where = hardware.devices_per_host, "one host's NVLink"
    else:
        reach, where = hardware.devices, "one slice"
    if reach % tensor:
        divisors = [n for n in range(1, reach + 1) if reach % n == 0]
        return [
            f"tensor={tensor} would reach beyond {where} ({reach} devices of {hardware.name}), over the slow network "
            f"in every layer; use one of {divisors}"
        ]
    return []


def parse_mesh(text: str) -> dict[str, int]:
    """`"data=2,fsdp=-1"` as a mapping."""
    mesh = {}
    for part in text.split(","):
        axis, equals, size = part.strip().partition("=")
        if not (equals and re.fullmatch(r"-?\d+", size)) or axis in mesh:
            raise ValueError(f"mesh {text!r} must look like data=2,fsdp=-1,tensor=4")
        mesh[axis] = int(size)
    return mesh


def from_mapping(values: Mapping[str, Any]) -> JobSpec:
    """A JobSpec from what a YAML file or the command line holds; strict about names and types.

    Raises:
      ValueError: for an unknown or missing key, a value of the wrong type, or a job that makes no sense.
    """
    fields = {field.name: field for field in dataclasses.fields(JobSpec)}
    clean = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in fields:
            raise ValueError(
                f"{key!r} is not a key of a job; the keys are {', '.join(fields)}"
            )
        clean[name] = _typed(name, value)
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and name not in clean
    ]
    if missing:
        flags = ", ".join(map(_flag, missing))
        raise ValueError(
            f"the job lacks {flags}".replace("--argv", "a program after --")
        )
    return JobSpec(**clean)


def _typed(name: str, value: Any) -> Any:
    if name in ("slices", "processes", "retries", "grace"):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    if name in ("spot", "reserved"):
        if isinstance(value, bool):
            return value
        raise ValueError(f"{name} must be true or false, not {value!r}")
    if name == "mesh":
        if isinstance(value, str):
            return parse_mesh(value)
        if isinstance(value, Mapping) and all(type(n) is int for n in value.values()):
            return dict(value)
        raise ValueError(f"mesh must look like data=2,fsdp=-1, not {value!r}")
    if name == "env":
        if not isinstance(value, Mapping):
            raise ValueError(f"env must map names to values, not be {value!r}")
        for key, item in value.items():
            if not isinstance(item, str | int | float) or isinstance(item, bool):
                raise ValueError(f"env {key}: quote {item!r}, so that it is text")
        return {str(key): str(item) for key, item in value.items()}
    if name in ("argv", "setup", "secrets", "shared_mounts"):
        if isinstance(value, str):
            return tuple(shlex.split(value)) if name == "argv" else (value,)
        if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise ValueError(f"{name} must be a list of strings, not {value!r}")
    if isinstance(value, str):
        return value
    raise ValueError(f"{name} must be text, not {value!r}; quote it")


def read(text: str) -> dict[str, Any]:
    """The mapping in a job's YAML file."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the job file is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError("the job file must be a mapping, such as `name: my-job`")
    return values


def write(spec: JobSpec) -> str:
    """YAML that `read` and `from_mapping` turn back into `spec`."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if isinstance(value, Mapping):
            if value:
                values[field.name] = dict(value)
        elif value != field.default:
            values[field.name] = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(values, sort_keys=False, width=120)
