"""`gvjax bench`: ask, run, show."""

import argparse
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
from rich.console import Console
from rich.progress import Progress

from gvjax.bench import report, timing, works
from gvjax.bench.footing import Footing
from gvjax.bench.request import ROWS, Request, make_request
from gvjax.models.shapes import SHAPES
from gvjax.usage import ExitCode, Parser

_DESCRIPTION = """\
Times every part of the library on this machine, with random weights and random tokens, and says how far each is from
what the machine can do: training steps as a share (MFU) of a matrix product measured here, decoding as a share of a
copy measured here.

  gvjax bench                                            all rows of a tiny network, a few minutes on a laptop
  gvjax bench --shape smollm2-135m --only sft,decode     two rows of a real one
  gvjax bench --json before.json                         keep the numbers; then, after a change or on another machine:
  gvjax bench --against before.json                      how many times as fast each row has become; what else differs
                                                         between the two is said
"""

_READING = """\
how to read the table
  median, spread   over the repeats; a spread above some 10% says that the machine is busy: trust "CPU s" then
  MFU              useful operations over the measured matrix-product rate. Useful is what the mathematics needs, each
                   sequence by itself: recomputing (remat) does not raise it, sharing a prompt does
  of copy          bytes it must move over the measured copy rate, of decoding: it reads all weights and the cache each
                   step
  padding          share of the positions that hold no token
  parts            of a round's time; train is what the named parts leave
  compile s        how much longer the first call took; what an earlier row compiled is not compiled again
  peak MiB         held at most by one device during the row, the weights that all rows start from among it. A GPU or
                   TPU says only what it held at most so far, so it is empty where an earlier row held more: time a row
                   alone with --only. On a CPU: by this process, its libraries and the compiler included
  plan MiB         what `gvjax plan` would say that the recipe needs on one device, evaluations left out: its largest
                   program, by the compiler's account, with the weights and optimizer that lie beside it. Of packed rows
                   the training program is the one that ran

rows
"""


def main(argv: Sequence[str]) -> int:
    """Runs `gvjax bench`.

    Args:
      argv: the arguments after `bench`.

    Returns:
      Exit code: 0, or 64 when the request cannot be run.
    """
    options = _parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        request = make_request(
            shape=options.shape,
            batch=options.batch,
            lengths=options.lengths,
            group=options.group,
            dtype=options.dtype,
            remat=options.remat,
            scan=options.scan,
            mesh=options.mesh,
            only=[name for name in options.only.split(",") if name],
            repeats=options.repeats,
            share_prompts=options.share_prompts,
        )
        against = None
        if options.against is not None:
            against = report.load(options.against)
            report.check_comparable(request, against, options.against)
        if options.json is not None and not options.json.parent.is_dir():
            raise ValueError(
                f"--json {options.json}: {options.json.parent} is no folder"
            )
    except ValueError as error:
        print(f"gvjax bench: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    # A program found on disk would hide what compiling costs.
    jax.config.update("jax_enable_compilation_cache", False)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=len(request.rows) + 1)

        def tell(name: str) -> None:
            progress.update(bar, description=name)
            progress.advance(bar)

        found = run(request, tell)
    console.print(report.heading(found), highlight=False)
    if against is not None:
        compared = report.comparison(found, against, options.against)
        console.print(compared, highlight=False, markup=False)
    console.print(report.table(found, against))
    if options.json is not None:
        report.save(found, options.json)
    return 0


def run(
    request: Request,
    tell: Callable[[str], None] = lambda name: None,
    *,
    small: bool = False,
) -> report.Report:
    """Times the rows of a request.

    Args:
      request: what to time.
      tell: told the name of what comes next.
      small: measure the machine's ceilings on sizes that take milliseconds; for tests.
    """
    tell("ceilings")
    best = timing.ceilings(request.mesh, request.model.dtype, small=small)
    footing = Footing(request)

    def timed(name: str) -> timing.Row:
        tell(name)
        with works.work(name, footing) as work:
            return timing.measure(name, work, repeats=request.repeats, ceilings=best)

    # Each in a call of its own: a name that stays behind would hold one row's state while the next one's is made.
    rows = tuple(timed(name) for name in request.rows)
    return report.make_report(request, best, rows)


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<16} {what}" for name, what in ROWS.items())
    parser = Parser(
        prog="gvjax bench",
        description=_DESCRIPTION,
        epilog=_READING + listed,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shape",
        choices=tuple(SHAPES),
        default="tiny",
        help="the network (default tiny)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="sequences in a step; pairs are two, a group of completions is --group (default by shape and device)",
    )
    parser.add_argument(
        "--lengths",
        metavar="P+C",
        help="prompt and completion tokens, as in 512+128 (default by shape)",
    )
    parser.add_argument(
        "--group", type=int, metavar="K", help="completions of a prompt (default 4)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of activations and matrix products (default float32 on a CPU, else bfloat16)",
    )
    parser.add_argument(
        "--remat",
        choices=("none", "dots", "full"),
        default="none",
        help="what the backward pass recomputes (default none)",
    )
    parser.add_argument(
        "--scan",
        action=argparse.BooleanOptionalAction,
        help="run the layers as one scan, or not (default by platform and depth, as in a run)",
    )
    parser.add_argument(
        "--share-prompts",
        action=argparse.BooleanOptionalAction,
        help="train on pairs and groups with their prompt run once, or not (default where it is known to pay)",
    )
    parser.add_argument(
        "--mesh",
        default="",
        metavar="AXES",
        help="as in fsdp=4,tensor=2; data takes the devices that are left",
    )
    parser.add_argument(
        "--only", default="", metavar="ROWS", help="comma-separated; all by default"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="calls that count (5)"
    )
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="write the numbers there too"
    )
    parser.add_argument(
        "--against",
        type=pathlib.Path,
        metavar="FILE",
        help="an earlier --json; adds how many times as fast each row is",
    )
    return parser
