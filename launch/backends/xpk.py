"""XPK: one `xpk workload create`, for clusters that XPK made.

XPK's own rules decide on restarts: every restart is counted, 85 too, so give it more retries than elsewhere.
"""

import shlex

from launch import spec as spec_lib
from launch.backends import gke
from launch.plan import Command, File, Plan


def render(spec: spec_lib.JobSpec) -> Plan:
    hardware = spec.hardware
    files = []
    environment = []
    if spec.env or spec.secrets:
        # A bare name takes its value from the environment of `xpk`.
        lines = [f"{name}={value}" for name, value in spec.env.items()]
        files.append(File("env", "\n".join([*lines, *spec.secrets]) + "\n"))
        environment = ["--env-file=env"]
    codes = f"{spec_lib.CRASH},{spec_lib.HANG},{spec_lib.PREEMPTED}"
    create = Command(
        (
            *("xpk", "workload", "create"),
            *_where(spec),
            f"--workload={spec.name}",
            f"--tpu-type={hardware.gcloud_type}",
            f"--num-slices={spec.slices}",
            f"--docker-image={spec.image}",
            f"--max-restarts={spec.retries}",
            f"--restart-on-exit-codes={codes}",
            f"--termination-grace-period-seconds={spec.grace}",
            *environment,
            # XPK runs this in a shell; `exec` puts the program in the shell's place, where SIGTERM arrives.
            f"--command=exec {shlex.join(spec.command)}",
        ),
        "create the workload",
    )
    return Plan(
        title=spec.title(),
        files=tuple(files),
        steps=(create,),
        secrets=spec.secrets,
    )


def status(spec: spec_lib.JobSpec) -> Plan:
    show = Command(
        ("xpk", "workload", "list", *_where(spec), f"--filter-by-job={spec.name}"),
        "the workload",
    )
    return Plan(title=spec.title("status of"), steps=(show,))


def logs(spec: spec_lib.JobSpec) -> Plan:
    # A workload is a JobSet, so kubectl reads its log.
    steps = (gke.credentials(spec), gke.first_host_log(spec))
    return Plan(title=spec.title("logs of"), steps=steps)


def stop(spec: spec_lib.JobSpec) -> Plan:
    delete = Command(
        (
            *("xpk", "workload", "delete"),
            *_where(spec),
            f"--workload={spec.name}",
            "--force",
        ),
        "delete the workload",
    )
    return Plan(title=spec.title("stop"), steps=(delete,))


def _where(spec: spec_lib.JobSpec) -> tuple[str, ...]:
    return (
        f"--cluster={spec.cluster}",
        f"--project={spec.project}",
        f"--zone={spec.zone}",
    )
