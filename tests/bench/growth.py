"""How cost grows: step time and memory against batch, length, depth, width, vocabulary and group size, each against its analytic order.

    python tests/bench/growth.py --out tests/bench/results

writes growth.json, growth.md and growth.svg. Processor seconds and the compiler's own account of memory are what is
compared: on a machine that does other things too, the clock says little. Not a test; run it on a machine you know.
"""

import argparse
import dataclasses
import json
import pathlib

import jax
import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from gvjax import runtime, sharding
from gvjax.bench.command import run
from gvjax.bench.report import Report
from gvjax.bench.request import Request, Sizes
from gvjax.models import cost, shapes
from gvjax.models.config import ModelConfig

BASE = Sizes(batch=8, prompt=64, completion=64, group=4)
ALLOWANCE = 1.15
"""By how much a growth may exceed its analytic order before it is called faster: what repeats differ by."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """One thing that grows.

    Attributes:
      name: of it.
      row: what is timed.
      values: ascending.
      settings: from a value to (network, sizes).
      memory: highest power of the value that memory may grow with.
    """

    name: str
    row: str
    values: tuple[int, ...]
    settings: object
    memory: str


def _sized(**changes):
    return dataclasses.replace(BASE, **changes)


def _shaped(**changes) -> ModelConfig:
    return dataclasses.replace(shapes.TINY, **changes)


AXES = (
    Axis(
        "batch",
        "sft",
        (4, 8, 16),
        lambda v: (shapes.TINY, _sized(batch=v)),
        "linear",
    ),
    Axis(
        "length",
        "sft",
        (64, 128, 256, 512),
        lambda v: (shapes.TINY, _sized(prompt=v // 2, completion=v // 2)),
        # Scores of all queries and keys are kept for the backward pass where no fused kernel recomputes them.
        "quadratic",
    ),
    Axis(
        "layers",
        "sft",
        (2, 4, 8),
        lambda v: (_shaped(num_layers=v), BASE),
        "linear",
    ),
    Axis(
        "width",
        "sft",
        (64, 128, 256),
        lambda v: (_shaped(embed_dim=v, mlp_dim=4 * v, num_heads=v // 32), BASE),
        "quadratic",
    ),
    Axis(
        "vocabulary",
        "sft",
        (512, 2048, 8192),
        lambda v: (_shaped(vocab_size=v), BASE),
        "linear",
    ),
    Axis(
        "group",
        "rloo",
        (2, 4, 8),
        lambda v: (shapes.TINY, _sized(batch=4 * v, group=v)),
        "linear",
    ),
)
POWERS = {"linear": 1, "quadratic": 2}


def flops(row: str, model: ModelConfig, sizes: Sizes) -> float:
    """Operations the mathematics needs, as `gvjax bench` counts them."""
    forward = cost.forward_flops(model, sizes.length, scored=sizes.completion)
    if row == "sft":
        return cost.TRAINING * sizes.batch * forward
    prompts = sizes.batch // sizes.group
    made = prompts * cost.grouped_flops(
        model, sizes.prompt, sizes.completion, sizes.group
    )
    scored = sizes.batch * cost.forward_flops(model, sizes.length, scored=0)
    return made + scored + (1 + cost.TRAINING) * sizes.batch * forward


def measured(axis: Axis, repeats: int) -> tuple[list[dict], Report]:
    """A line for every value of an axis."""
    lines = []
    for value in axis.values:
        model, sizes = axis.settings(value)
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        request = Request("tiny", model, sizes, mesh, (axis.row,), repeats)
        report = run(request, small=True)
        (row,) = report.rows
        lines.append(
            {
                "axis": axis.name,
                "value": value,
                "seconds": row.seconds,
                "cpu_seconds": row.cpu_seconds,
                "memory": row.compiled_memory,
                "flops": flops(axis.row, model, sizes),
            }
        )
        print(lines[-1], flush=True)
        # What one size compiled is of no use to the next.
        jax.clear_caches()
    return lines, report


def judged(axis: Axis, lines: list[dict]) -> dict:
    """Growth from the first value to the last, of time against operations and of memory against its order."""
    first, last = lines[0], lines[-1]
    times = last["cpu_seconds"] / first["cpu_seconds"]
    operations = last["flops"] / first["flops"]
    memory = last["memory"] / first["memory"]
    order = (last["value"] / first["value"]) ** POWERS[axis.memory]
    return {
        "axis": axis.name,
        "values": [line["value"] for line in lines],
        "time_grew": times,
        "operations_grew": operations,
        "memory_grew": memory,
        "memory_order": order,
        "within": times <= ALLOWANCE * operations and memory <= ALLOWANCE * order,
    }


def table(found: list[dict], lines: list[dict], report: Report) -> str:
    """Markdown."""
    versions = ", ".join(
        f"{name} {version}" for name, version in report.versions.items()
    )
    text = [
        "# How cost grows\n",
        f"Measured {report.date} on {report.device}, float32, {versions}; written by `tests/bench/growth.py`. A step of"
        " SFT around a network of 4 layers of width 128, 8 sequences of 64 + 64 tokens; for the group size a round of"
        " RLOO on 4 prompts. Time is processor time, memory what the compiler says that the training program needs."
        " GPU and TPU: not measured.\n",
        "| grows | from, to | time | operations | memory | its order | within |",
        "|---|---|---|---|---|---|---|",
    ]
    text += [
        f"| {each['axis']} | {each['values'][0]}, {each['values'][-1]} | {each['time_grew']:.2f}x |"
        f" {each['operations_grew']:.2f}x | {each['memory_grew']:.2f}x | {each['memory_order']:.0f}x |"
        f" {'yes' if each['within'] else 'no'} |"
        for each in found
    ]
    text += [
        "",
        f"Within: time grew by at most {ALLOWANCE} times what the operations did, memory by at most that times its"
        " order.\n",
        "| axis | value | CPU ms a step | 10⁹ operations | CPU ms per 10⁹ | MiB |",
        "|---|---|---|---|---|---|",
    ]
    text += [
        f"| {line['axis']} | {line['value']} | {line['cpu_seconds'] * 1e3:.0f} | {line['flops'] / 1e9:.2f} |"
        f" {line['cpu_seconds'] * 1e12 / line['flops']:.1f} | {line['memory'] / 2**20:.1f} |"
        for line in lines
    ]
    return "\n".join(text) + "\n"


def plot(path: pathlib.Path, lines: list[dict]) -> None:
    """Time and memory against every axis, with the analytic order of time dashed."""
    figure, axes = pyplot.subplots(2, len(AXES), figsize=(3 * len(AXES), 5.5))
    for column, axis in enumerate(AXES):
        some = [line for line in lines if line["axis"] == axis.name]
        values = [line["value"] for line in some]
        above, below = axes[:, column]
        seconds = [line["cpu_seconds"] for line in some]
        above.loglog(values, seconds, "o-", base=2, label="measured")
        order = [seconds[0] * line["flops"] / some[0]["flops"] for line in some]
        above.loglog(values, order, "k--", base=2, label="operations")
        memory = [line["memory"] / 2**20 for line in some]
        below.loglog(values, memory, "o-", base=2)
        above.set_title(axis.name)
        below.set_xlabel(axis.name)
    axes[0, 0].set_ylabel("CPU seconds a step")
    axes[1, 0].set_ylabel("MiB, compiled")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    runtime.configure(keep_programs=False)
    jax.config.update("jax_enable_compilation_cache", False)
    options.out.mkdir(parents=True, exist_ok=True)
    lines, found = [], []
    for axis in AXES:
        some, report = measured(axis, options.repeats)
        lines += some
        found.append(judged(axis, some))
        record = {
            "date": report.date,
            "device": report.device,
            "versions": dict(report.versions),
            "lines": lines,
            "growth": found,
        }
        (options.out / "growth.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "growth.md").write_text(table(found, lines, report))
    plot(options.out / "growth.svg", lines)


if __name__ == "__main__":
    main()
