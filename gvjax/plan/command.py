"""`gvjax plan`: asks a process of its own what fits, and shows its answer.

The compilers want an environment that a training process must not have (it would take itself for a part of a pod), so
they run in a process of their own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console

import gvjax
from gvjax import config
from gvjax.plan import report, targets
from gvjax.usage import ExitCode, Parser

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # Both silence libtpu's search for the metadata of the machine it is not on.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-256",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Two plans at a time, or of two people, would otherwise fight over a lock file.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # How much is optimised is what --full says, whatever the user has set for runs.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "false",
}
"""What the compiling process gets, and nobody else: some of it would mislead a run about where it is."""

_DESCRIPTION = """\
Compiles every program of a run or a study for a machine that is not there, and says what fits.

  gvjax plan configs/plan/pythia-1.4b.yaml --on v5e-256
  gvjax plan configs/plan/llama-8b.yaml --on 8xh100 --mesh fsdp=8 --max-batch
  gvjax plan configs/plan/llama-8b.yaml --on v5e-256 --slices 2 --mesh data=2,fsdp=256

Bytes, operations and times are of each device. `at least` is what the arithmetic of the config and the data sheet of
the chip allow: no step can be faster, and none will be as fast. Needs the extra `plan` for TPUs, `plan-gpu` for GPUs.
"""

_EPILOG = """\
exit codes: 0 it fits, 3 it does not, 64 the config or the machine's name is wrong, or the compiler is not installed
"""


def main(argv: Sequence[str]) -> int:
    """Plans; returns the exit code."""
    parsed = _parser().parse_intermixed_args(argv)
    console = Console()
    try:
        request = _request(parsed)
        target = targets.target(parsed.on, parsed.slices)
        config.load(parsed.config, request["overrides"])
    except ValueError as error:
        print(f"gvjax plan: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    if not parsed.json:
        console.print(target.describe(), highlight=False)
    stages: list[dict[str, Any]] = []
    with console.status("starting the compiler") as status:
        if parsed.json or not console.is_terminal:
            status.stop()
        for event in events(request):
            if "compiling" in event:
                status.update(f"compiling {event['compiling']}")
                if not console.is_terminal:
                    print(f"compiling {event['compiling']}", file=sys.stderr)
            elif "stage" in event:
                stages.append(event["stage"])
                if not parsed.json:
                    report.show(event["stage"], console)
            elif "error" in event:
                print(f"gvjax plan: {event['error']}", file=sys.stderr)
                return ExitCode.USER_ERROR
            else:
                print(event["crash"], file=sys.stderr)
                return ExitCode.CRASH
    fits = all(stage["fits"] for stage in stages)
    if parsed.json:
        print(json.dumps(_json(parsed, target, stages), indent=1))
    else:
        console.print(report.verdict(stages, parsed.on), highlight=False)
    return ExitCode.DONE if fits else ExitCode.DOES_NOT_FIT


def events(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the compiling process says, then what it died of, if it did.

    Args:
      request: of `request_of`.

    Yields:
      {"compiling": name of a program}, {"stage": see `report.stage_json`}, {"error": ...} or {"crash": ...}.
    """
    command = [sys.executable, "-m", "gvjax.plan", json.dumps(request)]
    with tempfile.TemporaryFile("w+") as noise:
        # libtpu and XLA talk about the machine they miss; it is shown where something went wrong only.
        process = subprocess.Popen(
            command,
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=noise,
            text=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.terminate()
        if process.wait() not in (ExitCode.DONE, ExitCode.USER_ERROR):
            noise.seek(0)
            said = "".join(noise.readlines()[-30:])
            yield {
                "crash": f"{said}\ngvjax plan: the compiler left with code {process.returncode}"
            }


def request_of(argv: Sequence[str]) -> dict[str, Any]:
    """What the compiling process is asked, from the words of a command line."""
    return _request(_parser().parse_intermixed_args(argv))


def _request(parsed: argparse.Namespace) -> dict[str, Any]:
    overrides = [*parsed.overrides]
    if parsed.mesh is not None:
        overrides += [f"mesh.{axis}={size}" for axis, size in parsed.mesh.items()]
    return {
        "config": parsed.config,
        "overrides": overrides,
        "on": parsed.on,
        "slices": parsed.slices,
        "only": parsed.only,
        "full": parsed.full,
        "search": parsed.search,
        "max_batch": parsed.max_batch,
    }


def _json(
    parsed: argparse.Namespace, target: targets.Target, stages: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "config": parsed.config,
        "overrides": _request(parsed)["overrides"],
        "on": target.name,
        "slices": target.slices,
        "devices": target.devices,
        "pipeline": "full" if parsed.full else "O0",
        "gvjax": gvjax.__version__,
        "fits": all(stage["fits"] for stage in stages),
        "stages": stages,
    }


def _mesh(text: str) -> dict[str, int]:
    """`fsdp=-1,tensor=4` -> sizes; an axis that is not named is 1."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1}
    seen = set()
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or axis in seen or not size.removeprefix("-").isdigit():
            raise argparse.ArgumentTypeError(
                f"{text!r} must look like data=2,fsdp=-1,tensor=4"
            )
        seen.add(axis)
        sizes[axis] = int(size)
    return sizes


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gvjax plan",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a YAML file of a run or a study")
    add("overrides", nargs="*", metavar="key=value", default=[], help="changes to it")
    add("--on", required=True, metavar="NAME", help="such as v5e-256, v6e-64, 8xh100")
    add("--slices", type=int, default=1, help="TPU slices, joined by the slow network")
    add(
        "--mesh",
        type=_mesh,
        help="such as data=4,fsdp=-1,tensor=4; an axis left out is 1",
    )
    add(
        "--only",
        action="append",
        default=[],
        metavar="STAGE",
        help="of a study: sft, reward or an arm's name; may be given again",
    )
    add(
        "--full",
        action="store_true",
        help="the compiler's whole pipeline (slower, and peaks about a tenth lower); collectives as they will run",
    )
    add("--max-batch", action="store_true", help="look for the largest batches")
    add(
        "--no-search",
        dest="search",
        action="store_false",
        help="do not look for what would fit where something does not, or for what fits and recomputes less",
    )
    add("--json", action="store_true", help="print all of it as JSON")
    return parser
