#!/usr/bin/env python3
"""Runs peers x tasks x models, interleaved in rounds so that all peers meet the same machine, one process at a time.

    run_matrix.py --venvs DIR --data DIR --out FILE [--rounds 3] [--models ...] [--peers ...] [--tasks ...]

Each row of OUT is one process's JSON line.  A peer whose venv (or source) is missing is skipped with a word."""

import argparse
import os
import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
# peer -> (venv, script, {task: [variants]})
PEERS = {
    "gvjax": (
        "gvjax",
        "bench_gvjax.py",
        {
            "sft": [""],
            "rm": [""],
            "dpo": ["", "shared"],
            "gen": [""],
            "online": ["", "shared"],
        },
    ),
    "trl": (
        "trl",
        "bench_trl.py",
        {
            "sft": ["", "compile"],
            "rm": ["", "compile"],
            "dpo": ["", "compile", "precompute"],
            "gen": ["", "static"],
            "online": ["", "compile", "rloo", "odpo"],
        },
    ),
    "tunix": (
        "tunix",
        "bench_tunix.py",
        {"sft": [""], "dpo": [""], "gen": [""], "online": [""]},
    ),
    "plain-jax": (
        "tunix",
        "floor_jax.py",
        {
            "sft": ["blocked"],
            "rm": ["blocked"],
            "dpo": ["blocked"],
            "gen": ["icdf"],
            "online": ["blocked,icdf"],
        },
    ),
}
STEPS = {
    "tiny-llama": {"sft": 12, "rm": 12, "dpo": 12, "gen": 8, "online": 7},
    "llama-30m": {"sft": 5, "rm": 5, "dpo": 5, "gen": 4, "online": 4},
    "smollm2-135m": {"sft": 4, "rm": 4, "dpo": 4, "gen": 3, "online": 3},
}
# Large temporaries kept by malloc instead of given back and faulted in again: fair to all, worth most to XLA, whose threads
# keep to arenas of their own, which no large block fits in, unless there is one arena.
ENV = {
    "OMP_NUM_THREADS": "2",
    "MKL_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "-1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}


def main():
    ap = argparse.ArgumentParser()
    for k in ("venvs", "data", "out"):
        ap.add_argument(
            "--" + k, required=True, type=lambda s: str(pathlib.Path(s).resolve())
        )
    ap.add_argument("--src", default="")
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--models", default="tiny-llama")
    ap.add_argument("--tasks", default="sft,rm,dpo,gen,online")
    ap.add_argument("--peers", default=",".join(PEERS))
    ap.add_argument("--variants", default="all", choices=["all", "first", "two"])
    ap.add_argument("--limit", type=int, default=600, help="seconds for one process")
    a = ap.parse_args()
    for r in range(a.rounds):
        for model in a.models.split(","):
            for task in a.tasks.split(","):
                for peer in a.peers.split(","):
                    venv, script, table = PEERS[peer]
                    py = pathlib.Path(a.venvs) / venv / "bin" / "python"
                    if task not in table:
                        continue
                    if not py.exists():
                        if r == 0:
                            print(f"-- {peer}: not installed, skipped", flush=True)
                        continue
                    for v in table[task][
                        : {"all": None, "first": 1, "two": 2}[a.variants]
                    ]:
                        cmd = [
                            str(py),
                            str(HERE / script),
                            task,
                            "--model",
                            model,
                            "--data",
                            a.data,
                            "--steps",
                            str(STEPS[model][task]),
                            "--variant",
                            v,
                        ]
                        t = time.time()
                        env = dict(
                            os.environ,
                            **ENV,
                            BENCH_OUT=a.out,
                            BENCH_SRC=a.src,
                            BENCH_T0=repr(t),
                        )
                        try:
                            p = subprocess.run(
                                cmd,
                                env=env,
                                cwd=HERE,
                                capture_output=True,
                                text=True,
                                timeout=a.limit,
                            )
                            word = (
                                "ok"
                                if p.returncode == 0
                                else "FAILED " + p.stderr.strip().split("\n")[-1][:150]
                            )
                        except subprocess.TimeoutExpired:
                            word = "TIMED OUT"
                        print(
                            f"round {r} {model} {task} {peer} {v or '-'}: {word} ({time.time() - t:.0f} s)",
                            flush=True,
                        )


if __name__ == "__main__":
    sys.exit(main())
