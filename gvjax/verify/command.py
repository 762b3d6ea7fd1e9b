"""`gvjax verify`: run the checks, print the table, fail if one fails."""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from gvjax.usage import ExitCode, Parser
from gvjax.verify import estimators, own_loss, signs, theory
from gvjax.verify.check import Check, Row


def checks() -> tuple[Check, ...]:
    """Every check, in the order of the table."""
    return (*theory.CHECKS, *estimators.CHECKS, *signs.checks())


def run(check: Check, seed: int) -> Row:
    """Runs one check."""
    return Row(check.name, check.formula, float(check.error(seed)), check.tolerance)


def timed(name: str, row: Callable[[], Row]) -> Row:
    """Runs one row in 64-bit floats. An exception is a failed row, so that one broken loss does not hide what the others do."""
    start = time.perf_counter()
    try:
        with jax.enable_x64(True):
            result = row()
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        result = Row(name, text, float("inf"), 0.0)
    return dataclasses.replace(result, seconds=time.perf_counter() - start)


def table(rows: Sequence[Row]) -> Table:
    """The rows for a terminal."""
    result = Table("check", "formula", "error", "tolerance", "pass")
    for row in rows:
        error = row.error if isinstance(row.error, str) else f"{row.error:.1e}"
        tolerance = "" if row.tolerance is None else f"{row.tolerance:.0e}"
        words = {True: "pass", False: "[bold red]FAIL[/]", None: "fact"}
        # Formulas have square brackets, which rich would read as markup.
        result.add_row(
            escape(row.check),
            escape(row.formula),
            escape(error),
            tolerance,
            words[row.passed],
        )
    return result


def main(argv: Sequence[str]) -> int:
    """Runs `gvjax verify`.

    Args:
      argv: the arguments after `verify`.

    Returns:
      Exit code: 0 when all checks pass, 1 when one fails, 64 when the request itself is wrong.
    """
    parser = Parser(
        prog="gvjax verify",
        description="Check losses, estimators and theorems exactly, on problems small enough to enumerate.",
    )
    parser.add_argument("--list", action="store_true", help="name the checks, run none")
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        default="",
        help="run the checks whose name contains this, in any case",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of every random problem (default 0)"
    )
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="write the rows to this file too"
    )
    parser.add_argument(
        "--loss",
        metavar="PACKAGE.FILE:LOSS",
        help="check this preference loss of yours instead",
    )
    options = parser.parse_args(argv)
    try:
        work = _work(options)
    except ValueError as error:
        print(f"gvjax verify: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    if options.list:
        print("\n".join(name for name, _ in work))
        return 0

    rows = []
    start = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(work))
        for name, row in work:
            progress.update(task, description=name)
            rows.append(timed(name, row))
            progress.advance(task)
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(table(rows))
    failed = [row.check for row in rows if row.passed is False]
    required = sum(row.passed is not None for row in rows)
    print(
        f"{required - len(failed)} of {required} checks passed in {time.perf_counter() - start:.0f} s"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    if options.json:
        _write(options.json, options.seed, rows)
    return ExitCode.CHECK_FAILED if failed else ExitCode.DONE


def _work(options: argparse.Namespace) -> list[tuple[str, Callable[[], Row]]]:
    """What was asked for, as (name, thing to run)."""
    work: list[tuple[str, Callable[[], Row]]]
    if options.loss:
        loss = own_loss.load(options.loss)
        work = own_loss.battery(loss, options.seed)
    else:
        work = [
            (check.name, functools.partial(run, check, options.seed))
            for check in checks()
        ]
    chosen = [item for item in work if options.only.lower() in item[0].lower()]
    if not chosen:
        raise ValueError(
            f"--only {options.only!r} matches no check; `gvjax verify --list` names them"
        )
    return chosen


def _write(path: Path, seed: int, rows: Sequence[Row]) -> None:
    record = {
        "seed": seed,
        "passed": all(row.passed is not False for row in rows),
        "checks": [
            # JSON has no infinity.
            {
                **dataclasses.asdict(row),
                "error": row.error if row.error != float("inf") else "infinite",
                "passed": row.passed,
            }
            for row in rows
        ],
    }
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
