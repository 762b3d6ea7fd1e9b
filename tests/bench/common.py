"""Shared by the peer programs: arguments, step timing, one JSON line out.  Standard library only."""

import argparse
import inspect
import json
import os
import pathlib
import re
import resource
import statistics
import time

T0 = float(
    os.environ.get("BENCH_T0") or time.time()
)  # set by the launcher just before exec

# Batch (sequences, or pairs for rm/dpo, or prompts x 4 for online) per model; the same for every peer.
BATCH = {
    "tiny-llama": {"sft": 32, "rm": 16, "dpo": 16, "gen": 64, "online": 16},
    "llama-30m": {"sft": 4, "rm": 2, "dpo": 2, "gen": 64, "online": 8},
    "smollm2-135m": {"sft": 2, "rm": 1, "dpo": 1, "gen": 16, "online": 2},
    "pythia-1.4b": {"sft": 64, "rm": 32, "dpo": 32, "gen": 256, "online": 64},
}
GEN_PROMPT, GEN_NEW, K = (
    64,
    64,
    4,
)  # rollout: 64-token prompt, 64 new tokens; 4 samples for a prompt
LR, CLIP, BETA_KL = 1e-5, 1.0, 0.04
UNITS = {
    "sft": "tokens",
    "rm": "pairs",
    "dpo": "pairs",
    "gen": "tokens",
    "online": "samples",
}


def args(tasks):
    ap = argparse.ArgumentParser()
    ap.add_argument("task", choices=tasks)
    ap.add_argument("--model", default="tiny-llama")
    ap.add_argument("--data", required=True, help="the folder that workload.py filled")
    ap.add_argument("--steps", type=int, default=12)
    ap.add_argument("--batch", type=int, default=0)
    ap.add_argument(
        "--variant",
        default="",
        help="peer-specific configuration names, comma-separated",
    )
    a = ap.parse_args()
    a.dir = pathlib.Path(a.data).resolve() / a.model
    a.batch = a.batch or BATCH[a.model][a.task]
    a.variants = set(filter(None, a.variant.split(",")))
    return a


def pairs(a):
    import numpy as np

    z = np.load(a.dir / "pairs.npz")
    return z["prompt"], z["chosen"], z["rejected"]


def busy():
    """CPU seconds that the whole machine has spent so far (0 where /proc/stat is not there)."""
    try:
        with open("/proc/stat") as stat:
            f = [int(x) for x in stat.readline().split()[1:9]]
        return (sum(f) - f[3] - f[4]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return 0.0


class Steps:
    """Collects, at the end of each step, the wall clock, this process's CPU seconds and the machine's."""

    def __init__(self):
        self.t = []

    def start(self):
        self.startup = time.time() - T0
        self.end()

    def end(self):
        self.t.append((time.perf_counter(), time.process_time(), busy()))


def user_lines(fn):
    """Code lines of a function body: what a user has to write (blank lines, comments, docstring left out)."""
    src = inspect.getsource(fn).split("\n")[1:]
    src = [s for s in src if s.strip() and not s.strip().startswith(("#", '"""'))]
    return len([s for s in src if not re.match(r"\s*[\)\]\}]+,?\s*$", s)])


def emit(peer, version, a, steps, work, lines=None, note="", warm=2, extra=None):
    """work: dict unit -> amount per step.  Wall-clock figures are medians over the steps after the warm-up;
    'others' is the CPU share of the machine that other processes took meanwhile (1.0 = one core)."""
    d = [tuple(y - x for x, y in zip(p, q)) for p, q in zip(steps.t, steps.t[1:])]
    body = d[warm:] if len(d) > warm + 1 else d[1:] or d
    wall = [x[0] for x in body]
    med = statistics.median(wall)
    row = dict(
        peer=peer,
        version=version,
        task=a.task,
        model=a.model,
        variant=a.variant,
        batch=a.batch,
        n=len(body),
        step_s=med,
        step_min=min(wall),
        step_max=max(wall),
        walls=[round(x, 4) for x in wall],
        cpu_s=statistics.median(x[1] for x in body),
        cpu_min=min(x[1] for x in body),
        others=sum(max(0.0, x[2] - x[1]) for x in body) / sum(wall),
        first_s=d[0][0],
        compile_cpu_s=max(
            0.0,
            sum(x[1] for x in d[:warm]) - warm * statistics.median(x[1] for x in body),
        ),
        startup_s=steps.startup,
        total_cpu_s=time.process_time(),
        rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        work=work,
        lines=lines,
        note=note,
        **(extra or {}),
    )
    out = os.environ.get("BENCH_OUT")
    line = json.dumps(row)
    if out:
        with open(out, "a") as f:
            f.write(line + "\n")
    print("RESULT " + line, flush=True)
