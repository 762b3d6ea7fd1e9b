"""What is shown and kept of a benchmark: a table, a JSON file, and ratios to an earlier one."""

import dataclasses
import datetime
import json
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax
from rich.table import Table

from gvjax import __version__
from gvjax.bench.request import Request
from gvjax.bench.timing import Ceilings, Row

_DIFFERING = (
    "device",
    "devices",
    "platform",
    "mesh",
    "dtype",
    "remat",
    "scan_layers",
    "share_prompts",
    "versions",
)
"""Fields in which two benchmarks that are compared may differ; where they do, it is said."""


@dataclasses.dataclass(frozen=True)
class Report:
    """A benchmark that has been run.

    Attributes:
      shape, sizes, mesh, dtype, remat, scan_layers, share_prompts: what was asked.
      device, devices, platform: what it ran on, how many of it, and its kind.
      versions: of what decides the speed.
      date: day it was run, ISO.
      ceilings: what the machine does at best.
      rows: what was found.
    """

    shape: str
    sizes: Mapping[str, int]
    mesh: Mapping[str, int]
    dtype: str
    remat: str
    scan_layers: bool | None
    device: str
    devices: int
    platform: str
    versions: Mapping[str, str]
    date: str
    ceilings: Ceilings
    rows: tuple[Row, ...]
    share_prompts: bool | None = None


def make_report(request: Request, ceilings: Ceilings, rows: tuple[Row, ...]) -> Report:
    """The rows with everything one must know to compare them later."""
    device = request.mesh.devices.flat[0]
    return Report(
        shape=request.shape,
        sizes=dataclasses.asdict(request.sizes),
        mesh=dict(request.mesh.shape),
        dtype=request.model.dtype,
        remat=request.model.remat,
        scan_layers=request.model.scan_layers,
        device=_processor() if request.platform == "cpu" else device.device_kind,
        devices=request.mesh.size,
        platform=request.platform,
        versions={
            "gvjax": __version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
        date=datetime.date.today().isoformat(),
        ceilings=ceilings,
        rows=rows,
        share_prompts=request.share_prompts,
    )


def save(report: Report, path: pathlib.Path) -> None:
    """Writes a report as JSON."""
    record = dataclasses.asdict(report)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def load(path: pathlib.Path) -> Report:
    """Reads what `save` wrote.

    Raises:
      ValueError: it is no such file.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["ceilings"] = Ceilings(**record["ceilings"])
        record["rows"] = tuple(Row(**row) for row in record["rows"])
        return Report(**record)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(
            f"{path} is no benchmark of this version; write one with `gvjax bench --json {path}`"
        ) from None


def check_comparable(new: Request, old: Report, path: pathlib.Path) -> None:
    """Refuses ratios that would mean nothing; device, dtype, mesh and versions may differ, that is what ratios are for.

    Raises:
      ValueError: another network or other sizes.
    """
    if old.shape != new.shape:
        raise ValueError(
            f"--against {path}: it timed the shape {old.shape}, and this is {new.shape}; use --shape {old.shape}"
        )
    sizes = dataclasses.asdict(new.sizes)
    if dict(old.sizes) != sizes:
        raise ValueError(
            f"--against {path}: it timed {_shown(old.sizes)}, and this is {_shown(sizes)}; use --batch"
            f" {old.sizes['batch']} --lengths {old.sizes['prompt']}+{old.sizes['completion']} --group"
            f" {old.sizes['group']}"
        )


def heading(report: Report) -> str:
    """What was run, how and on what, in three lines."""
    mesh, versions = _value(report.mesh), _value(report.versions)
    sizes = report.sizes
    best = report.ceilings
    return (
        f"{report.shape} {report.dtype}, {sizes['batch']} sequences of {sizes['prompt']}+{sizes['completion']} tokens,"
        f" groups of {sizes['group']}, on {report.devices} x {report.device} ({mesh})\n"
        f"remat {report.remat}, scan_layers {_value(report.scan_layers)}, share_prompts {_value(report.share_prompts)};"
        f" {versions}; {report.date}\n"
        f"measured ceilings: {best.flops / 1e12:.3g} TFLOP/s in one matrix product,"
        f" {best.bytes / 1e9:.3g} GB/s in one copy"
    )


def comparison(new: Report, old: Report, path: pathlib.Path) -> str:
    """What a benchmark is compared with, and in what the two differ beside their figures."""
    differing = [
        f"{field} {_value(getattr(old, field))} -> {_value(getattr(new, field))}"
        for field in _DIFFERING
        if getattr(old, field) != getattr(new, field)
    ]
    return f"against {path}: {heading(old)}\ndiffering: {'; '.join(differing) or 'nothing'}"


def table(report: Report, against: Report | None = None) -> Table:
    """The rows for a terminal.

    Args:
      report: what was found.
      against: an earlier one; adds how many times as fast this one is.
    """
    columns = [
        "row",
        "median",
        "spread",
        "CPU s",
        "tokens/s",
        "rows/s",
        "MFU",
        "of copy",
        "padding",
        "parts of the time",
        "compile s",
        "peak MiB",
        "plan MiB",
    ]
    made = Table(*columns, *(["x faster"] if against is not None else []))
    before = {row.name: row for row in against.rows} if against is not None else {}
    for row in report.rows:
        cells = [
            row.name,
            _seconds(row.seconds),
            f"{row.spread:.0%}",
            f"{row.cpu_seconds:.3g}",
            _rate(row.tokens_per_second),
            _rate(row.samples_per_second),
            _share(row.mfu),
            _share(row.of_bandwidth),
            _share(row.padding),
            "  ".join(f"{name} {share:.1%}" for name, share in row.shares.items()),
            "" if row.first_seconds is None else f"{row.first_seconds:.1f}",
            _mebibytes(row.peak_memory),
            _mebibytes(row.planned_memory),
        ]
        if against is not None:
            old = before.get(row.name)
            cells.append("" if old is None else f"{old.seconds / row.seconds:.2f}")
        made.add_row(*cells)
    return made


def _processor() -> str:
    """The name of this machine's processor; JAX calls them all "cpu"."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        named = [line for line in lines if line.startswith("model name")]
        return f"{len(named)} cores of {named[0].split(':')[1].strip()}"
    except (OSError, IndexError):
        return platform.processor() or platform.machine() or "cpu"


def _value(value: Any) -> str:
    """A field of a report for people."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={each}" for name, each in value.items())
    return "default" if value is None else str(value)


def _shown(sizes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def _rate(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:,.0f}"
