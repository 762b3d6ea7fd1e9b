"""The command line: `python -m launch VERB ...`."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from launch import backends, hw, plan, runner
from launch import spec as spec_lib

_DESCRIPTION = """\
Start a gvjax job on this machine, TPU VMs, GKE, Slurm, SkyPilot or XPK.

  launch    check the job, write its files, start it
  status    what the platform says about it
  logs      follow the log of its first host
  stop      SIGTERM, time to checkpoint, and give the machines back
  watch     follow a job on TPU VMs: get new ones after a preemption, give them back at the end
  hardware  every accelerator name, with hosts, devices and memory

Each of them, hardware apart, takes --dry-run: it prints exactly what would be written and run, and runs nothing."""

_EXAMPLES = f"""\
what each backend needs
{spec_lib.needs()}

examples
  # two processes here, four virtual CPU devices each
  python -m launch launch --backend local --name try --accelerator cpu-8 --processes 2 --run-dir runs/try \\
      -- python -m gvjax run configs/tour/sft.yaml run_dir={{run_dir}}

  # what would a v5e-64 on GKE take? (prints the manifest and the kubectl commands)
  python -m launch launch --dry-run --backend gke --name sft --accelerator v5e-64 --mesh data=4,fsdp=-1 \\
      --image REGION-docker.pkg.dev/PROJECT/gvjax/gvjax:1 --project PROJECT --zone us-west4-a --cluster CLUSTER \\
      --run-dir gs://BUCKET/sft --secret HF_TOKEN \\
      -- python -m gvjax run configs/tour/sft.yaml 'mesh={{mesh}}' run_dir={{run_dir}}

  # afterwards, from the same machine
  python -m launch status sft
  python -m launch logs sft
  python -m launch stop sft

the program
  What follows -- runs in every process, without a shell. {{name}}, {{run_dir}} and {{mesh}} in it are filled in.

the exit codes it should use
   0  done
  64  wrong config or data: never started again; nor is 2, a command line that is not understood
  70  crash, 71 hang, and whatever else: started again, at most --retries times
  85  checkpointed after SIGTERM: started again, not counted

job files
  --job FILE reads the same keys from YAML (dashes or underscores); flags win over the file.

launch/README.md goes from nothing to a running job on each backend."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="VERB", title="verbs"
    )
    launch = verbs.add_parser(
        "launch",
        help="start a job",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_launch_flags(launch)
    for verb, text in (
        ("status", "what the platform says about a job"),
        ("logs", "follow the log of a job's first host"),
        ("stop", "SIGTERM, time to checkpoint, and give the machines back"),
        ("watch", "follow a job on TPU VMs through preemptions until it ends"),
    ):
        sub = verbs.add_parser(verb, help=text, description=text)
        sub.add_argument("name", help="the job's name, as given to launch")
        sub.add_argument("--dry-run", action="store_true", help="print, do not run")
    verbs.add_parser("hardware", help="list the accelerator names")
    return parser


def _add_launch_flags(launch: argparse.ArgumentParser) -> None:
    # SUPPRESS: a flag that was not given leaves no trace, so the job file and JobSpec's defaults stand.
    none: dict[str, Any] = {"default": argparse.SUPPRESS}
    add = launch.add_argument
    add("--dry-run", action="store_true", help="print what would run, and run nothing")
    add("--job", metavar="FILE", help="YAML with the keys below")
    add(
        "--watch",
        action="store_true",
        help="stay, as the verb watch does (tpu-vm)",
    )
    job = launch.add_argument_group("the job")
    add = job.add_argument
    add("--backend", choices=spec_lib.BACKENDS, **none)
    add("--name", help="lower-case letters, digits, dashes; at most 40", **none)
    add("--accelerator", help="such as v5e-256, v5p-128, h100-8, cpu-8", **none)
    add("--run-dir", metavar="DIR", help="gs://BUCKET/PATH or a shared path", **none)
    add("--mesh", help="checked here, such as data=4,fsdp=-1,tensor=4", **none)
    add("--env", action="append", metavar="NAME=VALUE", help="not secrets", **none)
    add(
        "--secret",
        action="append",
        metavar="NAME",
        dest="secrets",
        help="a variable's name; its value is never written or printed",
        **none,
    )
    add("--retries", type=int, help="restarts after failures (3)", **none)
    add("--grace", type=int, metavar="S", help="SIGTERM to SIGKILL (300)", **none)
    where = launch.add_argument_group("where (each backend says which it needs)")
    add = where.add_argument
    add("--slices", type=int, help="TPU slices (1)", **none)
    add("--processes", type=int, help="on CPUs, or GPUs of this machine", **none)
    add("--image", help="container image with gvjax", **none)
    add(
        "--setup",
        action="append",
        metavar="LINE",
        help="shell line before the job, on each host (slurm: on the first)",
        **none,
    )
    add("--workdir", help="defaults to here (local, slurm, sky)", **none)
    add(
        "--shared-mount",
        action="append",
        metavar="DIR",
        dest="shared_mounts",
        help="a directory that is the same on every host",
        **none,
    )
    for name, text in (
        ("project", "Google Cloud project"),
        ("zone", "Google Cloud zone (or a cluster's region)"),
        ("cluster", "GKE cluster"),
        ("namespace", "Kubernetes namespace (default)"),
        ("queue", "Kueue LocalQueue"),
        ("partition", "Slurm partition"),
        ("account", "Slurm account"),
        ("time-limit", "Slurm time limit, such as 24:00:00"),
    ):
        add(f"--{name}", help=text, **none)
    add("--spot", action="store_true", help="machines that may be taken away", **none)
    add("--reserved", action="store_true", help="from your TPU reservation", **none)
    launch.add_argument(
        "argv", nargs=argparse.REMAINDER, metavar="-- PROGRAM ...", help="what to run"
    )


def _job_from(args: argparse.Namespace) -> spec_lib.JobSpec:
    values: dict[str, Any] = {}
    if args.job:
        values = {
            key.replace("-", "_"): value
            for key, value in spec_lib.read(Path(args.job).read_text()).items()
        }
    flags = {
        key: value
        for key, value in vars(args).items()
        if key not in ("verb", "dry_run", "job", "watch", "argv")
    }
    if "env" in flags:
        flags["env"] = {**(values.get("env") or {}), **_pairs(flags["env"])}
    argv = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    if argv:
        flags["argv"] = argv
    values |= flags
    backend = values.get("backend")
    if backend in ("local", "slurm", "sky"):
        values["workdir"] = os.path.abspath(values.get("workdir") or os.getcwd())
    run_dir = values.get("run_dir")
    if backend == "local" and isinstance(run_dir, str) and "://" not in run_dir:
        values["run_dir"] = os.path.abspath(run_dir)
    return spec_lib.from_mapping(values)


def _pairs(items: list[str]) -> dict[str, str]:
    pairs = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(
                f"--env {item} has no value; write {item}=VALUE, or --secret {item} to pass it on from here"
            )
        pairs[name] = value
    return pairs


def _launched(name: str) -> spec_lib.JobSpec:
    path = runner.state_directory(name, os.environ) / "job.yaml"
    if not path.exists():
        known = sorted(p.parent.name for p in path.parent.parent.glob("*/job.yaml"))
        raise ValueError(
            f"no job {name!r} was launched from here; "
            + (f"known: {', '.join(known)}" if known else "none was at all")
        )
    return spec_lib.from_mapping(spec_lib.read(path.read_text()))


def _hardware() -> str:
    rows = [("name", "hosts", "chips/host", "devices", "GiB/device", "libtpu topology")]
    rows += [
        (
            row.name,
            str(row.hosts),
            str(row.chips_per_host),
            str(row.devices),
            f"{row.hbm_gib:g}" if row.hbm_gib else "-",
            row.topology or "-",
        )
        for row in hw.table().values()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in rows
    )


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code, 64 for a mistake in the job."""
    args = _parser().parse_args(argv)
    if args.verb == "hardware":
        print(_hardware())
        return 0
    launching = args.verb == "launch"
    try:
        spec = _job_from(args) if launching else _launched(args.name)
        _refuse_leaks(spec)
        directory = runner.state_directory(spec.name, os.environ)
        if launching and not args.dry_run and runner.supervisor_pid(directory):
            raise ValueError(
                f"job {spec.name!r} runs here already; `stop {spec.name}` it, or take another name"
            )
        work = _plan(spec, args.verb)
        watch = args.verb == "watch" or (launching and args.watch)
        if watch and work.watch is None:
            raise ValueError(
                f"only tpu-vm jobs are watched; {spec.backend} brings a preempted job back by itself"
            )
    except (ValueError, OSError) as error:
        print(f"launch: {error}", file=sys.stderr)
        return spec_lib.USER_ERROR
    if args.dry_run:
        print(plan.redact(plan.show(work), spec.secrets, os.environ), end="")
        return 0
    if launching:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "job.yaml").write_text(spec_lib.write(spec))
        (directory / runner.STOPPED).unlink(missing_ok=True)
    elif args.verb == "stop":
        (directory / runner.STOPPED).touch()
    return runner.run(work, directory, watch)


def _plan(spec: spec_lib.JobSpec, verb: str) -> plan.Plan:
    backend = backends.BY_NAME[spec.backend]
    if verb == "watch":
        return dataclasses.replace(
            backend.render(spec), title=spec.title("watch"), steps=()
        )
    make = {"launch": backend.render, "status": backend.status}
    make |= {"logs": backend.logs, "stop": backend.stop}
    return make[verb](spec)


def _refuse_leaks(spec: spec_lib.JobSpec) -> None:
    """A secret's value among a job's words would end up in scripts and manifests, whatever is done with its name."""
    words = {
        "the program's arguments": spec.argv,
        "env": spec.env.values(),
        "setup": spec.setup,
        "image": (spec.image,),
    }
    for name in spec.secrets:
        value = os.environ.get(name, "")
        for place, written in words.items():
            if len(value) >= 8 and value in " ".join(written):
                raise ValueError(
                    f"the value of secret {name} stands in {place}; let the program read ${name}"
                )


if __name__ == "__main__":
    sys.exit(main())
