"""SkyPilot: a managed job, which SkyPilot moves to new machines when the old ones are preempted.

Restarts after failures happen on the machines, by the loop in the run block, because SkyPilot's own counted restarts
cannot leave out exit code 64; a checkpointed preemption (85) is given to SkyPilot, which never counts it.
"""

import shlex

import yaml

from launch import bucket
from launch import spec as spec_lib
from launch.backends import bash
from launch.plan import Command, File, Plan


class _Block(str):
    """A string that YAML writes line by line."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _Block,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", str(text), style="|"
    ),
)


def render(spec: spec_lib.JobSpec) -> Plan:
    text = yaml.dump(task(spec), Dumper=_Dumper, sort_keys=False, width=120)
    secrets = [word for name in spec.secrets for word in ("--secret", name)]
    launch = Command(
        (
            *("sky", "jobs", "launch", "--name", spec.name, "--yes", "--detach-run"),
            *secrets,
            "task.yaml",
        ),
        "hand the job to SkyPilot",
    )
    return Plan(
        title=spec.title(),
        files=(File("task.yaml", text),),
        steps=(launch,),
        secrets=spec.secrets,
    )


def status(spec: spec_lib.JobSpec) -> Plan:
    queue = Command(
        ("sky", "jobs", "queue"), f"all managed jobs, {spec.name} among them"
    )
    return Plan(title=spec.title("status of"), steps=(queue,))


def logs(spec: spec_lib.JobSpec) -> Plan:
    follow = Command(("sky", "jobs", "logs", "--name", spec.name), "follow the log")
    return Plan(title=spec.title("logs of"), steps=(follow,))


def stop(spec: spec_lib.JobSpec) -> Plan:
    cancel = Command(("sky", "jobs", "cancel", "--name", spec.name, "--yes"), "cancel")
    return Plan(title=spec.title("stop"), steps=(cancel,))


def task(spec: spec_lib.JobSpec) -> dict:
    """The task as a mapping."""
    hardware = spec.hardware
    resources: dict = {}
    if hardware.kind == "tpu":
        # A TPU slice is one SkyPilot node whatever its hosts; the run block runs on each host.
        resources["accelerators"] = f"{hardware.sky}:1"
        resources["accelerator_args"] = {"runtime_version": hardware.runtime_version}
        resources["infra"] = f"gcp/*/{spec.zone}" if spec.zone else "gcp"
    else:
        resources["accelerators"] = f"{hardware.sky}:{hardware.chips_per_host}"
        if spec.zone:
            resources["infra"] = f"gcp/*/{spec.zone}"
    if spec.image:
        resources["image_id"] = f"docker:{spec.image}"
    resources["use_spot"] = spec.spot
    resources["job_recovery"] = {
        "max_restarts_on_errors": 0,
        "recover_on_exit_codes": [spec_lib.PREEMPTED],
    }
    values: dict = {"name": spec.name, "resources": resources}
    values["num_nodes"] = spec.num_hosts if hardware.kind == "gpu" else 1
    if spec.workdir:
        values["workdir"] = spec.workdir
    if name := bucket.of(spec.run_dir):
        mount = {"source": f"gs://{name}", "mode": "MOUNT"}
        values["file_mounts"] = {bucket.mount_point(name): mount}
    if spec.env:
        values["envs"] = dict(spec.env)
    if spec.secrets:
        values["secrets"] = dict.fromkeys(spec.secrets)
    if spec.setup:
        values["setup"] = _Block(setup(spec))
    values["run"] = _Block(run(spec))
    return values


def setup(spec: spec_lib.JobSpec) -> str:
    return bash.script("set -euo pipefail", *spec.setup)


def run(spec: spec_lib.JobSpec) -> str:
    lines = ["set -u"]
    if spec.hardware.kind == "gpu" and spec.num_processes > 1:
        lines += [
            f'GVJAX_COORDINATOR="$(head -n 1 <<<"$SKYPILOT_NODE_IPS"):{spec_lib.PORT}"',
            "export GVJAX_COORDINATOR",
            'export GVJAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES"',
            'export GVJAX_PROCESS_ID="$SKYPILOT_NODE_RANK"',
        ]
    if spec.hardware.kind == "tpu":
        # SkyPilot counts a slice as one node, which would pass for a job of one process; JAX asks the TPU itself.
        lines.append("unset SKYPILOT_NODE_IPS SKYPILOT_NUM_NODES SKYPILOT_NODE_RANK")
    lines += [*bash.supervise(spec.retries), f"supervise {shlex.join(spec.command)}"]
    return bash.script(*lines)
