"""A plan as JSON, as tables for people, and its verdict."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from gvjax.plan.fitting import Planned, Row
from gvjax.plan.targets import GIB, Target

Json = Mapping[str, Any]


def stage_json(planned: Planned, target: Target) -> dict[str, Any]:
    """One stage; bytes and operations are of each device."""
    return {
        "stage": planned.stage.name,
        "fits": planned.fits,
        "peak": planned.peak,
        "usable": int(planned.usable),
        "headroom": int(planned.usable) - planned.peak,
        "held": {
            name: planned.stage.seeds * size
            for name, size in planned.stage.held.items()
        },
        "batch": planned.stage.batch,
        "largest_batch": planned.most,
        "remedies": [planned.cheapest] if planned.cheapest and not planned.fits else [],
        "cheaper": planned.cheapest if planned.fits else None,
        "programs": [_row_json(row, planned, target) for row in planned.rows],
    }


def _row_json(row: Row, planned: Planned, target: Target) -> dict[str, Any]:
    program, compiled = row.program, row.compiled
    held = planned.stage.held
    parts = {
        name: program.seeds * held[name] for name in program.arguments if name in held
    }
    parts["beside"] = row.beside
    parts["cache"] = program.cache
    parts["activations"] = max(row.total - sum(parts.values()), 0)
    work, chip = program.work, target.chip
    return {
        "program": program.name,
        "total": row.total,
        "peak": compiled.peak,
        "refused": compiled.refused,
        "parts": parts,
        "donated": program.donates,
        "aliased": compiled.aliased,
        "flops": work.flops,
        "bytes": work.bytes,
        "seconds_at_least": max(work.flops / chip.flops, work.bytes / chip.bandwidth),
        "bound": "compute"
        if work.flops / chip.flops > work.bytes / chip.bandwidth
        else "memory",
        "collectives": [dataclasses.asdict(each) for each in compiled.collectives],
        "kernels": compiled.kernels,
        "largest_array": compiled.largest_array,
        "host_calls": compiled.host_calls,
        "compile_seconds": round(compiled.seconds, 1),
    }


def show(stage: Json, console: Console) -> None:
    """One stage: what each program takes, then what it does."""
    room = Table("program", title=_title(stage), title_justify="left")
    for name in ("GiB", "headroom"):
        room.add_column(name, justify="right", no_wrap=True)
    room.add_column("of it")
    work = Table("program")
    for name in ("TFLOP", "GB moved", "at least", "compiled in"):
        work.add_column(name, justify="right", no_wrap=True)
    for row in stage["programs"]:
        total, left = row["total"], stage["usable"] - row["total"]
        headroom = f"[red]{_gib(left)}[/]" if left < 0 or row["refused"] else _gib(left)
        parts = "  ".join(
            f"{name} {_gib(size)}"
            for name, size in row["parts"].items()
            if size >= 0.005 * GIB
        )
        room.add_row(row["program"], _gib(total), headroom, parts)
        if row["flops"]:
            work.add_row(
                row["program"],
                f"{row['flops'] / 1e12:.3g}",
                f"{row['bytes'] / 1e9:.3g}",
                f"{_seconds(row['seconds_at_least'])} ({row['bound']})",
                f"{row['compile_seconds']:.1f} s",
            )
    console.print(room)
    console.print(work)
    for row in stage["programs"]:
        if moved := collectives(row["collectives"]):
            console.print(f"  {row['program']}: {moved}", highlight=False)
    for text, peak in stage["remedies"]:
        console.print(f"  would fit: {text} ({_gib(peak)} GiB)", highlight=False)
    if stage["cheaper"] is not None:
        text, peak = stage["cheaper"]
        console.print(
            f"  fits too, and recomputes less: {text} ({_gib(peak)} GiB)",
            highlight=False,
        )
    if stage["largest_batch"] is not None:
        field, rows = stage["largest_batch"]
        console.print(f"  largest batch that fits: {field}={rows}", highlight=False)


def verdict(stages: Sequence[Json], target: str) -> str:
    """One sentence."""
    worst = max(stages, key=lambda stage: stage["peak"] / stage["usable"])
    program = max(worst["programs"], key=lambda row: row["total"])["program"]
    share = worst["peak"] / worst["usable"]
    what = f"{worst['stage']}'s {program} takes {_gib(worst['peak'])} of {_gib(worst['usable'])} GiB ({share:.0%})"
    missing = [stage["stage"] for stage in stages if not stage["fits"]]
    if missing:
        return f"does not fit on {target}: {', '.join(missing)}; {what}"
    return f"fits on {target}: {what}"


def _title(stage: Json) -> str:
    batch = stage["batch"]
    rows = "" if batch is None else f", {batch[0]}={batch[1]}"
    return f"{stage['stage']}{rows}: {'fits' if stage['fits'] else 'DOES NOT FIT'}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def collectives(found: Sequence[Json]) -> str:
    """Kind, axes, count, and the bytes that arrive on each device; below a megabyte they are left out."""
    return ", ".join(
        f"{each['count']} {each['kind']} over {each['axes']} ({each['bytes'] / 1e9:.2g} GB)"
        for each in found
        if each["bytes"] >= 1e6
    )
