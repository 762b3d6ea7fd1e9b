#!/usr/bin/env python3
"""What gpu.py measured, as tables: every bar of a GPU with what was measured beside it, and every row.

    python tests/bench/gpu_table.py gpu.jsonl > tests/bench/results/gpu.md

Of a row that was measured several times, the last counts. Shares are of the ceilings that the peers' program measures (a
bfloat16 product of random numbers, a copy), or of gvjax's own where it did not run. Of several configurations of a peer its
fastest counts, whatever its precision. Without rows, every bar says "not measured". Standard library only.
"""

import dataclasses
import json
import sys
from collections.abc import Callable

PYTHIA, SMOLLM2 = "pythia-1.4b", "smollm2-135m"


@dataclasses.dataclass(frozen=True)
class Value:
    """A measured number, and which row of a peer it is against."""

    number: float
    against: str = ""


class Missing(Exception):
    """A row that a bar needs was not measured; says why, where that is known."""


class Rows:
    """The rows of one device.

    Args:
      rows: as they were written.
    """

    def __init__(self, rows: list[dict]):
        self.found = {}
        self.trouble = {}
        self.ceilings = {}
        for row in rows:
            key = row["model"], row["row"]
            if row["row"] == "ceilings":
                if "matmul" in row:
                    self.ceilings[row["side"]] = row
            elif "step_s" in row:
                self.found[key] = row
            else:
                self.trouble[key] = row.get("failed") or row.get("left_out", "")

    def row(self, model: str, name: str) -> dict:
        if (model, name) in self.found:
            return self.found[model, name]
        raise Missing(self.trouble.get((model, name), ""))

    def ceiling(self, kind: str) -> float:
        for side in ("peers", "gvjax"):
            if side in self.ceilings:
                return self.ceilings[side][kind]
        raise Missing("no ceilings")

    def fastest(self, model: str, prefix: str) -> dict:
        """The fastest of a peer's configurations: the row of that name, or with more behind it."""
        rows = [
            row
            for (one, name), row in self.found.items()
            if one == model and (name == prefix or name.startswith(f"{prefix}-"))
        ]
        if not rows:
            raise Missing(self.trouble.get((model, prefix), ""))
        return max(rows, key=lambda row: row["samples_s"])


def product_share(model: str, *names: str) -> Callable[[Rows], Value]:
    """Share of the measured product that the useful operations come to, of rows run one after the other."""

    def value(rows: Rows) -> Value:
        each = [rows.row(model, name) for name in names]
        done = sum(row["flops_s"] * row["step_s"] for row in each)
        return Value(done / sum(row["step_s"] for row in each) / rows.ceiling("matmul"))

    return value


def copy_share(model: str, name: str) -> Callable[[Rows], Value]:
    """Share of the measured copy that the bytes of a step of decoding come to."""
    return lambda rows: Value(rows.row(model, name)["bytes_s"] / rows.ceiling("copy"))


def over(
    model: str, names: tuple[str, ...], peer: str, needs: str
) -> Callable[[Rows], Value]:
    """gvjax's rate, of rows run one after the other, over the fastest configuration of a peer.

    Args:
      needs: the configuration without which there is nothing to say.
    """

    def value(rows: Rows) -> Value:
        each = [rows.row(model, name) for name in names]
        rows.row(model, needs)
        other = rows.fastest(model, peer)
        batches = {row["batch"] for row in (*each, other)}
        if len(batches) > 1:
            raise Missing(
                f"batches differ: {', '.join(map(str, sorted(batches)))} sequences"
            )
        mine = 1 / sum(1 / row["samples_s"] for row in each)
        return Value(mine / other["samples_s"], other["row"])

    return value


@dataclasses.dataclass(frozen=True)
class Bar:
    """What is asked of a number: `least`, and what is hoped for."""

    name: str
    least: float
    value: Callable[[Rows], Value]
    hoped: str = ""


def training(model: str, task: str, names: tuple[str, ...]) -> Bar:
    compiled = f"trl-{task}-compile"
    value = over(model, names, f"trl-{task}", compiled)
    return Bar(f"{model} {task} over TRL", 1.0, value, "aim 1.3")


def rollout(batch: int, least: float) -> Bar:
    peer = f"generate-{batch}"
    value = over(PYTHIA, (f"decode-{batch}",), peer, peer)
    return Bar(f"{PYTHIA} rollout over transformers, batch {batch}", least, value)


def decoding(batch: int, least: float) -> Bar:
    value = copy_share(PYTHIA, f"decode-{batch}")
    return Bar(f"{PYTHIA} decoding, batch {batch}, share of the copy", least, value)


def online(name: str, what: str, least: float) -> Bar:
    value = over(PYTHIA, (name,), "trl-online", "trl-online")
    return Bar(f"{PYTHIA} online, k = 4, {what}over TRL", least, value)


DPO = ("dpo", "reference")
BARS = (
    Bar(f"{PYTHIA} SFT, share of the product", 0.55, product_share(PYTHIA, "sft"), "stretch 0.60"),
    Bar(f"{PYTHIA} DPO, reference included, share of the product", 0.50, product_share(PYTHIA, *DPO)),
    Bar(f"{PYTHIA} reward, share of the product", 0.50, product_share(PYTHIA, "reward")),
    Bar(f"{SMOLLM2} SFT, share of the product", 0.30, product_share(SMOLLM2, "sft")),
    training(PYTHIA, "sft", ("sft",)),
    training(PYTHIA, "dpo", DPO),
    training(PYTHIA, "reward", ("reward",)),
    training(SMOLLM2, "sft", ("sft",)),
    decoding(256, 0.60),
    decoding(64, 0.50),
    decoding(16, 0.40),
    rollout(16, 5.0),
    rollout(64, 3.0),
    rollout(256, 1.5),
    online("online", "", 2.0),
    online("online-shared", "shared prompts, ", 3.0),
)  # fmt: skip


def outcome(bar: Bar, rows: Rows) -> str:
    """The cells `measured` and `against`."""
    try:
        value = bar.value(rows)
    except Missing as missing:
        why = str(missing)
        return (
            "not measured" + (f" ({why.splitlines()[0][:120]})" if why else "") + " |"
        )
    met = value.number >= bar.least
    number = f"{value.number:.2f}" if met else f"**{value.number:.2f}**"
    return f"{number} | {value.against}"


def bars_table(rows: Rows) -> list[str]:
    lines = ["| what | bar | measured | against |", "|---|---|---|---|"]
    for bar in BARS:
        least = f"≥ {bar.least:.2f}" + (f" ({bar.hoped})" if bar.hoped else "")
        lines.append(f"| {bar.name} | {least} | {outcome(bar, rows)} |")
    return lines


def rows_table(rows: Rows) -> list[str]:
    head = ("model", "row", "sequences", "step, ms", "samples/s", "tokens/s", "of the product", "of the copy", "first call, s",
            "peak GB", "how")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]

    def share(row, rate, kind):
        return f"{row[rate] / rows.ceiling(kind):.2f}" if row.get(rate) else ""

    def number(row, name, form, unit=1):
        return format(row[name] / unit, form) if row.get(name) else ""

    for (model, name), row in sorted(rows.found.items()):
        how = [f"weights {row['weights']}"] if "weights" in row else []
        how += [f"remat {row['remat']}"] if row.get("remat", "none") != "none" else []
        side = "gvjax " if row["side"] == "gvjax" else ""
        cells = (
            model,
            side + name,
            str(row["batch"]),
            f"{row['step_s'] * 1e3:.2f}",
            number(row, "samples_s", ",.1f"),
            number(row, "tokens_s", ",.0f"),
            share(row, "flops_s", "matmul"),
            share(row, "bytes_s", "copy"),
            number(row, "first_seconds", ".1f"),
            number(row, "peak_memory", ".1f", 1e9),
            ", ".join(how),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def about(rows: Rows) -> str:
    """Versions, dates and ceilings."""
    every = [*rows.found.values(), *rows.ceilings.values()]
    versions = sorted({row["version"] for row in every})
    dates = sorted({row["date"] for row in every})
    best = (
        f"{'gvjax' if side == 'gvjax' else 'torch'} {row['matmul'] / 1e12:.0f} TFLOP/s and {row['copy'] / 1e12:.2f} TB/s"
        for side, row in sorted(rows.ceilings.items())
    )
    return f"{', '.join(dates)}. Versions: {'; '.join(versions)}. Ceilings by {', by '.join(best)}."


def main():
    by_device: dict[str, list[dict]] = {}
    for path in sys.argv[1:]:
        with open(path) as lines:
            for line in lines:
                row = json.loads(line)
                by_device.setdefault(row["device"] or "no device", []).append(row)
    if not by_device:
        print("One H200 or H100, bfloat16: nothing has been measured yet.\n")
        print("\n".join(bars_table(Rows([]))))
    for device, found in by_device.items():
        rows = Rows(found)
        print(f"## {device}\n\n{about(rows)}\n")
        print("\n".join(bars_table(rows)) + "\n")
        print("\n".join(rows_table(rows)) + "\n")


main()
