"""The jobs whose plans are kept in golden/: every backend, on a few accelerators each.

After a change that is meant, `python tests/launch/launch_cases.py` writes the golden files anew; read the diff.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from launch import backends, plan
from launch import spec as spec_lib

GOLDEN = Path(__file__).parent / "golden"

_PROGRAM = (
    *("python", "-m", "gvjax", "run", "configs/dpo.yaml"),
    *("run_dir={run_dir}", "note=it's on {name}"),
)
_GOOGLE = {"project": "my-project", "zone": "us-east5-b"}
_GKE = {**_GOOGLE, "cluster": "pods", "image": "us-docker.pkg.dev/my-project/r/gvjax:1"}
_BUCKET = "gs://my-bucket/runs/dpo"
_ATTACHED = {"run_dir": "/data/runs/dpo", "shared_mounts": ("/data",)}
_ENV = {"JAX_LOG_LEVEL": "info", "NOTE": "two words"}

_JOBS: dict[str, dict[str, Any]] = {
    "local-cpu-8-two-processes": {
        "backend": "local",
        "accelerator": "cpu-8",
        "processes": 2,
        "run_dir": "/home/me/runs/dpo",
        "workdir": "/home/me/gvjax",
        "secrets": ("HF_TOKEN",),
        "mesh": {"data": 2, "fsdp": -1},
    },
    "local-h100-8": {
        "backend": "local",
        "accelerator": "h100-8",
        "run_dir": "/home/me/runs/dpo",
    },
    "tpu-vm-v5e-16-setup": {
        "backend": "tpu-vm",
        "accelerator": "v5e-16",
        **_GOOGLE,
        "setup": ("pip install 'gvjax[tpu]'",),
        "run_dir": _BUCKET,
        "env": _ENV,
        "secrets": ("HF_TOKEN",),
        "spot": True,
    },
    "tpu-vm-v5p-128-image-reserved": {
        "backend": "tpu-vm",
        "accelerator": "v5p-128",
        **_GOOGLE,
        "image": "us-docker.pkg.dev/my-project/r/gvjax:1",
        "run_dir": _BUCKET,
        "env": _ENV,
        "secrets": ("HF_TOKEN", "WANDB_API_KEY"),
        "reserved": True,
        "grace": 600,
    },
    "tpu-vm-v6e-256-two-slices": {
        "backend": "tpu-vm",
        "accelerator": "v6e-256",
        **_GOOGLE,
        "slices": 2,
        "setup": ("pip install 'gvjax[tpu]'",),
        "run_dir": _BUCKET,
        "mesh": {"data": 2, "fsdp": 64, "tensor": 4},
    },
    "gke-v5e-256-two-slices": {
        "backend": "gke",
        "accelerator": "v5e-256",
        **_GKE,
        "slices": 2,
        "queue": "team-a",
        "run_dir": _BUCKET,
        "env": _ENV,
        "secrets": ("HF_TOKEN",),
        "retries": 10,
    },
    "gke-v6e-8-spot": {
        "backend": "gke",
        "accelerator": "v6e-8",
        **_GKE,
        "spot": True,
        "run_dir": _BUCKET,
    },
    "gke-tpu7x-128": {
        "backend": "gke",
        "accelerator": "tpu7x-128",
        **_GKE,
        "run_dir": _BUCKET,
    },
    "gke-h100-32": {
        "backend": "gke",
        "accelerator": "h100-32",
        **_GKE,
        "namespace": "research",
        "run_dir": _BUCKET,
        "env": _ENV,
        "secrets": ("HF_TOKEN",),
        "mesh": {"fsdp": -1, "tensor": 8},
    },
    "gke-a100-40gb-1": {
        "backend": "gke",
        "accelerator": "a100-40gb-1",
        **_GKE,
        "run_dir": _BUCKET,
    },
    "slurm-h100-32": {
        "backend": "slurm",
        "accelerator": "h100-32",
        "partition": "gpu",
        "account": "rlhf",
        "time_limit": "2-00:00:00",
        "workdir": "/home/me/gvjax",
        "run_dir": "/lustre/me/runs/dpo",
        "setup": ("source .venv/bin/activate",),
        "env": _ENV,
        "secrets": ("HF_TOKEN",),
    },
    "slurm-cpu-4-two-nodes": {
        "backend": "slurm",
        "accelerator": "cpu-4",
        "processes": 2,
        "workdir": "/home/me/gvjax",
        "run_dir": "/home/me/runs/dpo",
        "env": {"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"},
        "grace": 20,
    },
    "slurm-h200-8-image": {
        "backend": "slurm",
        "accelerator": "h200-8",
        "image": "nvcr.io#nvidia/jax:25.10-py3",
        "workdir": "/home/me/gvjax",
        "run_dir": "/lustre/me/runs/dpo",
    },
    "sky-v6e-16": {
        "backend": "sky",
        "accelerator": "v6e-16",
        "zone": "us-east5-b",
        "workdir": "/home/me/gvjax",
        "setup": ("pip install '.[tpu]'",),
        "run_dir": _BUCKET,
        "secrets": ("HF_TOKEN",),
    },
    "sky-h100-16-spot": {
        "backend": "sky",
        "accelerator": "h100-16",
        "image": "docker.io/me/gvjax:1",
        "run_dir": _BUCKET,
        "env": _ENV,
        "secrets": ("HF_TOKEN", "WANDB_API_KEY"),
        "spot": True,
    },
    "xpk-v5e-256-two-slices": {
        "backend": "xpk",
        "accelerator": "v5e-256",
        **_GKE,
        "slices": 2,
        **_ATTACHED,
        "env": _ENV,
        "secrets": ("HF_TOKEN",),
    },
    "xpk-v5p-128": {
        "backend": "xpk",
        "accelerator": "v5p-128",
        **_GKE,
        **_ATTACHED,
    },
}

CASES = {
    name: spec_lib.JobSpec(**{"name": "dpo-1b", "argv": _PROGRAM, **job})
    for name, job in _JOBS.items()
}


def text(spec: spec_lib.JobSpec) -> str:
    """What --dry-run prints for every verb."""
    backend = backends.BY_NAME[spec.backend]
    verbs = (backend.render, backend.status, backend.logs, backend.stop)
    return "\n".join(plan.show(verb(spec)) for verb in verbs)


if __name__ == "__main__":
    for stale in GOLDEN.glob("*.txt"):
        stale.unlink()
    for name, spec in CASES.items():
        (GOLDEN / f"{name}.txt").write_text(text(spec))
    print(f"wrote {len(CASES)} files in {GOLDEN}")
