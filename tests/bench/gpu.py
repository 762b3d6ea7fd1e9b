#!/usr/bin/env python3
"""gvjax beside its peers on one GPU, in under nine minutes: the rows that have a bar first.

    python tests/bench/gpu.py --out gpu.jsonl [--budget 520]

Each program runs by itself, and adds a JSON line to the file as each of its rows ends. What would start too late is left out
and said so; given the same file again, on the same device, only the rows are run that it has no measurement of. What the
programs print goes to gpu.log beside the file. Standard library only.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
# What a row that has begun may still take when the time is spent, before it is killed.
LAST_ROW = 40


@dataclasses.dataclass(frozen=True)
class Part:
    """One program's rows. `seconds`: below so many left, it is not started."""

    program: str
    model: str
    rows: str
    seconds: float = 30


PYTHIA, SMOLLM2 = "pythia-1.4b", "smollm2-135m"
PARTS = (
    Part("gvjax", PYTHIA, "sft,dpo,reference,reward,decode-256,decode-64,decode-16"),
    Part("peers", PYTHIA, "trl-sft-compile,trl-dpo-compile"),
    Part("peers", PYTHIA, "generate-16,generate-64,generate-256,trl-online"),
    Part("gvjax", PYTHIA, "online,online-shared"),
    Part("gvjax", SMOLLM2, "sft"),
    Part("peers", SMOLLM2, "trl-sft-compile"),
    Part("peers", PYTHIA, "trl-reward-compile"),
    Part("peers", PYTHIA, "generate-16-static,generate-64-static,generate-256-static"),
    Part("peers", PYTHIA, "trl-sft,trl-reward,trl-dpo,trl-online-static"),
    Part("gvjax", PYTHIA, "prefill,rloo,online_dpo"),
    Part("peers", PYTHIA, "trl-sft-compile-bf16,torch-sft-compile,torch-dpo-compile"),
)


def rows_of(path: pathlib.Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def measured(rows: list[dict], device: str | None) -> set[tuple[str, str]]:
    """(model, row) of what was measured on a device; None is any."""
    return {
        (row["model"], row["row"])
        for row in rows
        if "step_s" in row and device in (None, row["device"])
    }


def device_name() -> str | None:
    try:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]  # fmt: skip
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    print("device, driver:", said.strip(), flush=True)
    return said.splitlines()[0].split(",")[0].strip()


def run(command: list[str], log, seconds: float) -> str:
    """Runs a program; says what became of it where that is not the usual."""
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        # Its own helpers too: compilers and loaders.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "killed: the time was spent"
    return "" if code == 0 else f"it ended with {code}"


def last_line(path: pathlib.Path) -> str:
    return path.read_text(errors="replace").rstrip().rpartition("\n")[2]


def shown(row: dict) -> str:
    name = f"{row['side']} {row['model']} {row['row']}: "
    if "matmul" in row:
        return (
            name + f"{row['matmul'] / 1e12:.0f} TFLOP/s, {row['copy'] / 1e12:.2f} TB/s"
        )
    if "step_s" in row:
        return name + f"{row['step_s'] * 1e3:.2f} ms"
    failed = row.get("failed", "").partition("\n")[0]
    return name + (failed or "left out, " + row.get("left_out", ""))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument(
        "--budget", type=float, default=520, help="seconds, for everything"
    )
    parser.add_argument("--gvjax-python", default=sys.executable)
    parser.add_argument("--peers-python", default=sys.executable)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--toy", action="store_true", help="tiny networks, to check the programs"
    )
    options = parser.parse_args()
    begun = time.time()
    end = begun + options.budget
    until = end - LAST_ROW
    device = device_name() or ("cpu" if options.device == "cpu" else None)
    environment = os.environ
    if options.device == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
    path = [str(HERE.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    environment["PYTHONUNBUFFERED"] = "1"
    programs = {
        "gvjax": [options.gvjax_python, str(HERE / "gpu_gvjax.py")],
        "peers": [options.peers_python, str(HERE / "peers_gpu.py"), "--device", options.device],
    }  # fmt: skip
    log_path = options.out.with_suffix(".log")
    with open(log_path, "a") as log:
        for part in PARTS:
            before = rows_of(options.out)
            # A toy's rows are all of one model.
            model = "toy" if options.toy else part.model
            had = measured(before, device)
            wanted = [row for row in part.rows.split(",") if (model, row) not in had]
            if not wanted:
                continue
            left = until - time.time()
            trouble = "the time was spent"
            if left > part.seconds or options.toy:
                command = [*programs[part.program], "--model", part.model, "--rows", ",".join(wanted), "--out",
                           str(options.out), "--until", str(until), *["--toy"] * options.toy]  # fmt: skip
                trouble = run(command, log, max(end - time.time(), 1))
            new = rows_of(options.out)[len(before) :]
            if trouble.startswith("it ended") and not new:
                # It could not even be imported, and nothing it is compared with is of use without it.
                sys.exit(f"{part.program}: {trouble}; {last_line(log_path)}")
            told = {row["row"] for row in new}
            for row in wanted:
                if row not in told:
                    new.append({"side": part.program, "model": model, "device": device, "row": row,
                                "left_out": trouble or "not reported"})  # fmt: skip
                    with open(options.out, "a") as out:
                        out.write(json.dumps(new[-1]) + "\n")
            for row in new:
                print(f"{time.time() - begun:4.0f} s  {shown(row)}", flush=True)
    print(flush=True)
    subprocess.run([sys.executable, str(HERE / "gpu_table.py"), str(options.out)])


main()
