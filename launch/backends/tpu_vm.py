"""Cloud TPU VMs: a queued resource is asked for, awaited, and the job started on every host under systemd.

Under systemd and not in the ssh session, so that the job outlives the laptop; SIGTERM from a maintenance event or a
spot preemption reaches systemd, which passes it on. JAX finds coordinator, process count and index by itself, from
the metadata server, slices included.
"""

import shlex

from launch import bucket
from launch import spec as spec_lib
from launch.backends import bash
from launch.plan import Command, File, Plan, Step, Wait, Watch

_TAKEN = "TERMINATED"
"""Stands in the exit_code file of a host that was told to shut down with the job unfinished."""


def render(spec: spec_lib.JobSpec) -> Plan:
    files = [
        File("job.sh", _job(spec)),
        File("start.sh", _start(spec)),
        File("setup.sh", _setup(spec)),
    ]
    start: tuple[Step, ...] = (
        _create(spec),
        _wait(spec),
        *_start_everywhere(spec, files),
    )
    watch = Watch(
        state=_state(spec),
        lost=("SUSPENDED", "FAILED", _TAKEN),
        ended=_ssh(
            spec,
            _nodes(spec)[0],
            "0",
            f"cat {_directory(spec)}/exit_code",
            "exit code",
        ),
        recover=(_delete(spec), *start),
        release=(_delete(spec),),
    )
    return Plan(title=spec.title(), files=tuple(files), steps=start, watch=watch)


def status(spec: spec_lib.JobSpec) -> Plan:
    unit, directory = _unit(spec), _directory(spec)
    asked = f"hostname; systemctl is-active {unit}; cat {directory}/exit_code 2>/dev/null || true"
    steps = (
        _state(spec),
        *(
            _ssh(spec, node, "all", asked, f"unit and exit code on {node}")
            for node in _nodes(spec)
        ),
    )
    return Plan(title=spec.title("status of"), steps=steps)


def logs(spec: spec_lib.JobSpec) -> Plan:
    follow = f"tail -n 200 -F {_directory(spec)}/log"
    tail = _ssh(spec, _nodes(spec)[0], "0", follow, "follow host 0's log")
    return Plan(title=spec.title("logs of"), steps=(tail,))


def stop(spec: spec_lib.JobSpec) -> Plan:
    halt = f"sudo systemctl stop {_unit(spec)}"
    steps = (
        *(
            _ssh(spec, node, "all", halt, f"SIGTERM on {node}", may_fail=True)
            for node in _nodes(spec)
        ),
        _delete(spec),
    )
    return Plan(title=spec.title("stop"), steps=steps)


def _where(spec: spec_lib.JobSpec) -> tuple[str, ...]:
    return (f"--zone={spec.zone}", f"--project={spec.project}")


def _nodes(spec: spec_lib.JobSpec) -> tuple[str, ...]:
    if spec.slices == 1:
        return (spec.name,)
    return tuple(f"{spec.name}-{index}" for index in range(spec.slices))


def _unit(spec: spec_lib.JobSpec) -> str:
    return f"gvjax-{spec.name}"


def _directory(spec: spec_lib.JobSpec) -> str:
    return f".gvjax/{spec.name}"  # below the home directory, where ssh begins


def _queued(verb: str) -> tuple[str, ...]:
    return ("gcloud", "compute", "tpus", "queued-resources", verb)


def _create(spec: spec_lib.JobSpec) -> Command:
    hardware = spec.hardware
    nodes = (
        (f"--node-id={spec.name}",)
        if spec.slices == 1
        else (f"--node-count={spec.slices}", f"--node-prefix={spec.name}")
    )
    return Command(
        (
            *_queued("create"),
            spec.name,
            *_where(spec),
            f"--accelerator-type={hardware.gcloud_type}",
            f"--runtime-version={hardware.runtime_version}",
            *nodes,
            *(["--spot"] if spec.spot else []),
            *(["--reserved"] if spec.reserved else []),
            # Logs and checkpoints go to the bucket with the VM's own identity.
            "--scopes=https://www.googleapis.com/auth/cloud-platform",
        ),
        "ask for the TPUs",
    )


def _state(spec: spec_lib.JobSpec) -> Command:
    return Command(
        (*_queued("describe"), spec.name, *_where(spec), "--format=value(state.state)"),
        "state of the TPUs",
    )


def _wait(spec: spec_lib.JobSpec) -> Wait:
    return Wait(
        _state(spec),
        until="ACTIVE",
        never=("FAILED", "SUSPENDING", "SUSPENDED", "DELETING"),
    )


def _delete(spec: spec_lib.JobSpec) -> Command:
    return Command(
        (*_queued("delete"), spec.name, *_where(spec), "--force", "--quiet"),
        "give the TPUs back",
        may_fail=True,
    )


def _ssh(
    spec: spec_lib.JobSpec,
    node: str,
    worker: str,
    command: str,
    why: str,
    tries: int = 1,
    may_fail: bool = False,
) -> Command:
    return Command(
        (
            *("gcloud", "compute", "tpus", "tpu-vm", "ssh", node),
            *_where(spec),
            f"--worker={worker}",
            f"--command={command}",
        ),
        why,
        tries=tries,
        may_fail=may_fail,
    )


def _start_everywhere(spec: spec_lib.JobSpec, files: list[File]) -> list[Command]:
    """Prepare every slice before any is started: the first to start waits for the last only two minutes."""
    directory = _directory(spec)
    commands = []
    for node in _nodes(spec):
        make = f"mkdir -p {directory}"
        # A VM that has just become ACTIVE may not take ssh yet.
        commands.append(_ssh(spec, node, "all", make, f"reach {node}", tries=8))
        commands.append(
            Command(
                (
                    *("gcloud", "compute", "tpus", "tpu-vm", "scp"),
                    *(file.path for file in files),
                    f"{node}:{directory}/",
                    *_where(spec),
                    "--worker=all",
                ),
                f"copy the scripts to {node}",
            )
        )
        run = f"bash {directory}/setup.sh"
        commands.append(_ssh(spec, node, "all", run, f"prepare {node}"))
    for node in _nodes(spec):
        run = f"bash {directory}/start.sh"
        commands.append(_ssh(spec, node, "all", run, f"start the job on {node}"))
    return commands


def _setup(spec: spec_lib.JobSpec) -> str:
    lines = ["# Once on each host, before the job.", "set -euo pipefail"]
    if name := bucket.of(spec.run_dir):
        lines += bucket.mounting(name)
    lines += spec.setup
    if spec.image:
        registry = spec.image.partition("/")[0]
        lines.append('sudo usermod -aG docker "$USER"')
        if registry.endswith(("gcr.io", "-docker.pkg.dev")):
            lines.append(f"gcloud auth configure-docker {registry} --quiet")
        pull = shlex.join(["docker", "pull", spec.image])
        lines.append(f"sg docker -c {shlex.quote(pull)}")
    return bash.script(*lines)


def _start(spec: spec_lib.JobSpec) -> str:
    unit, directory = _unit(spec), f"$HOME/{_directory(spec)}"
    properties = [
        # SIGTERM to the supervising shell alone, which passes it on; SIGKILL to all that is left after the grace.
        "--property=KillMode=mixed",
        f"--property=TimeoutStopSec={spec.grace}",
        f'--property="StandardOutput=append:{directory}/log"',
        "--property=StandardError=inherit",
    ]
    if spec.image:
        # Killing the docker client leaves the container running.
        properties.append(
            f'--property="ExecStopPost=-/usr/bin/docker rm --force {unit}"'
        )
    words = [
        f"sudo systemd-run --unit={unit} --collect",
        '--uid="$(id -u)" --gid="$(id -g)"',
        *properties,
        f'bash "{directory}/job.sh"',
    ]
    return bash.script(
        "# Starts job.sh on this host so that it outlives the ssh session.",
        "set -euo pipefail",
        f'rm -f "{directory}/exit_code"',
        " \\\n  ".join(words),
    )


def _shared(spec: spec_lib.JobSpec) -> tuple[str, ...]:
    """Directories of the host that a container has to see."""
    name = bucket.of(spec.run_dir)
    mounted = (bucket.mount_point(name),) if name else ()
    return (*mounted, *spec.shared_mounts)


def _job(spec: spec_lib.JobSpec) -> str:
    unit = _unit(spec)
    directory = f"$HOME/{_directory(spec)}"
    lines = [
        f"# One host's process of {spec.name}: runs it, and again as its exit code says.",
        "# However this ends, it says how: a watch waits for that. The end of the host is not the end of the job.",
        f"outcome={_TAKEN}",
        f"""trap 'echo "$outcome" >"{directory}/exit_code"' EXIT""",
        "set -u",
        "leave() {",
        '  outcome="$1"',
        '  exit "$1"',
        "}",
        *bash.exports(spec.env),
    ]
    for name in spec.secrets:
        # Secret Manager hands the value to this VM's own identity; it passes through no other machine.
        lines += [
            f'{name}="$(gcloud secrets versions access latest --secret={name} --project={spec.project})" || '
            f"leave {spec_lib.USER_ERROR}",
            f"export {name}",
        ]
    lines += ["", *bash.supervise(spec.retries), ""]
    command = shlex.join(spec.command)
    if spec.image:
        names = [f"--env={name}" for name in (*spec.env, *spec.secrets)]
        docker = [
            "docker",
            "run",
            "--rm",
            f"--name={unit}",
            "--privileged",
            "--net=host",
        ]
        for shared in _shared(spec):
            docker.append(f"--volume={shared}:{shared}")
        command = f"{shlex.join([*docker, *names, spec.image])} {command}"
        lines.append(f"docker rm --force {unit} >/dev/null 2>&1")
    lines += [
        f'cd "$HOME" || leave {spec_lib.CRASH}',
        f"supervise {command}",
        "code=$?",
        '[[ $stopping -eq 1 ]] || outcome="$code"',
    ]
    if bucket.of(spec.run_dir):
        target = shlex.quote(f"{spec.run_dir.rstrip('/')}/logs/")
        lines.append(f'gcloud storage cp "{directory}/log" {target}"$(hostname).log"')
    lines.append('exit "$code"')
    return bash.script(*lines)
