"""One module per platform, each four pure functions of a JobSpec: `render`, `status`, `logs` and `stop`, to a Plan."""

import types

from launch.backends import gke, local, sky, slurm, tpu_vm, xpk

BY_NAME: dict[str, types.ModuleType] = {
    "local": local,
    "tpu-vm": tpu_vm,
    "gke": gke,
    "slurm": slurm,
    "sky": sky,
    "xpk": xpk,
}
