"""Slurm: one batch script. JAX reads coordinator, count and index from Slurm's own variables.

Slurm sends SIGTERM to the tasks `grace` seconds before the time limit, and when it preempts the job. What the tasks
exit with decides: 85 goes back into the queue, other failures do so up to `retries` times, 64 and 2 never.
"""

import os
import shlex

from launch import spec as spec_lib
from launch.backends import bash
from launch.plan import Command, File, Plan, Saved


def render(spec: spec_lib.JobSpec) -> Plan:
    log = _log(spec)
    steps = (
        Command(("mkdir", "-p", os.path.dirname(log)), "a place for the log"),
        Command(("sbatch", "--parsable", "job.sbatch"), "submit", save="job_id"),
    )
    return Plan(
        title=spec.title(),
        files=(File("job.sbatch", script(spec)),),
        steps=steps,
        # Slurm hands the environment of `sbatch` on to the tasks, so a secret must be set here.
        secrets=spec.secrets,
    )


def status(spec: spec_lib.JobSpec) -> Plan:
    queue = Command(
        ("squeue", "--jobs", Saved("job_id")), "in the queue", may_fail=True
    )
    show = Command(
        ("scontrol", "show", "job", Saved("job_id")),
        "state and exit code",
        may_fail=True,
    )
    return Plan(title=spec.title("status of"), steps=(queue, show))


def logs(spec: spec_lib.JobSpec) -> Plan:
    tail = Command(("tail", "-n", "200", "-F", _log(spec)), "follow the log")
    return Plan(title=spec.title("logs of"), steps=(tail,))


def stop(spec: spec_lib.JobSpec) -> Plan:
    cancel = Command(("scancel", Saved("job_id")), "SIGTERM, Slurm's KillWait, SIGKILL")
    return Plan(title=spec.title("stop"), steps=(cancel,))


def _log(spec: spec_lib.JobSpec) -> str:
    """Beside the checkpoints."""
    return os.path.join(spec.run_dir, f"{spec.name}.log")


def script(spec: spec_lib.JobSpec) -> str:
    per_node = spec.num_processes // spec.num_hosts
    options = {
        "job-name": spec.name,
        "nodes": str(spec.num_hosts),
        "ntasks-per-node": str(per_node),
        "gpus-per-node": str(per_node) if spec.hardware.kind == "gpu" else "",
        "partition": spec.partition,
        "account": spec.account,
        "time": spec.time_limit,
        "chdir": spec.workdir,
        "output": _log(spec),
        "open-mode": "append",
        "signal": f"TERM@{spec.grace}",
    }
    lines = [
        f"#SBATCH --{name}={shlex.quote(value)}"
        for name, value in options.items()
        if value
    ]
    lines += [
        "#SBATCH --requeue",
        "set -u",
        *bash.exports({**spec.env, **spec.cpu_env}),
        *_setup(spec),
        "",
        "# Without a trap SIGTERM would end this shell before the tasks have checkpointed.",
        "stopping=0",
        "trap 'stopping=1' TERM",
        f"srun --kill-on-bad-exit=1 --export=ALL{_container(spec)} {shlex.join(spec.command)}",
        "code=$?",
        "",
        f"failures_file={shlex.quote(os.path.splitext(_log(spec))[0])}.$SLURM_JOB_ID.failures",
        f"if [[ {bash.ended('$code')} ]]; then",
        '  rm -f "$failures_file"',
        '  exit "$code"',
        "fi",
        "# scancel or preemption: Slurm itself knows whether the job comes back, and a cancelled one must not.",
        'state="$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)"',
        "if [[ $stopping -eq 1 || $state != RUNNING ]]; then",
        '  exit "$code"',
        "fi",
        "failures=0",
        'if [[ -f "$failures_file" ]]; then failures="$(<"$failures_file")"; fi',
        f"if [[ $code -ne {spec_lib.PREEMPTED} ]]; then",
        "  failures=$((failures + 1))",
        '  echo "$failures" >"$failures_file"',
        f"  if [[ $failures -gt {spec.retries} ]]; then",
        f'    echo "launch: exit code $code; no restarts left of {spec.retries}"',
        '    rm -f "$failures_file"',
        '    exit "$code"',
        "  fi",
        "fi",
        f'echo "launch: exit code $code; back into the queue (failures: $failures of {spec.retries})"',
        'scontrol requeue "$SLURM_JOB_ID"',
        'exit "$code"',
    ]
    return bash.script(*lines)


def _setup(spec: spec_lib.JobSpec) -> list[str]:
    """In this shell, whose environment srun hands on."""
    if not spec.setup:
        return []
    failed = f'echo "launch: a line of --setup failed"; exit {spec_lib.USER_ERROR}'
    return [f"trap {shlex.quote(failed)} ERR", *spec.setup, "trap - ERR"]


def _container(spec: spec_lib.JobSpec) -> str:
    """Pyxis' option, where there is an image."""
    return f" {shlex.quote(f'--container-image={spec.image}')}" if spec.image else ""
