#!/usr/bin/env python3
"""What run_matrix.py measured, as tables: every row, and gvjax's ratios to its peers beside their bars.

    python tests/bench/summary.py rows.jsonl > tests/bench/results/peers.md

Ratios are of rates by CPU-seconds, over 1 is faster; of several rounds of a row the median counts (of memory the last), of several
configurations of a peer its fastest. Standard library only.
"""

import collections
import json
import statistics
import sys

MODELS = ("tiny-llama", "llama-30m")
TASKS = {
    "sft": "SFT",
    "rm": "reward",
    "dpo": "DPO",
    "gen": "rollout",
    "online": "online, k = 4",
}
# (task, gvjax's variant): least ratio to TRL and to Tunix, on each model. None: no bar.
BARS = {
    ("sft", ""): ((0.70, 1.6), (0.85, 1.5)),
    ("rm", ""): ((0.70, None), (0.85, None)),
    ("dpo", ""): ((0.80, 1.7), (1.0, 1.8)),
    ("dpo", "shared"): ((None, None), (1.4, 2.5)),
    ("gen", ""): ((1.8, 1.7), (1.6, 1.9)),
    ("online", ""): ((1.1, 1.8), (1.2, 1.8)),
    ("online", "shared"): ((1.1, 1.8), (1.2, 1.8)),
}
FLOOR = 0.95


def outcome(ratio: float | None, bar: float | None) -> str:
    if ratio is None:
        return "–"
    if bar is None:
        return f"{ratio:.2f}"
    return (
        f"{ratio:.2f} ≥ {bar:.2f}" if ratio >= bar else f"**{ratio:.2f} < {bar:.2f}**"
    )


def main():
    rounds = collections.defaultdict(list)
    with open(sys.argv[1]) as lines:
        for line in lines:
            row = json.loads(line)
            rounds[row["model"], row["task"], row["peer"], row["variant"]].append(row)
    cost = {
        key: statistics.median(row["cpu_s"] for row in rows)
        for key, rows in rounds.items()
    }

    def best(model, task, peer):
        found = [
            seconds
            for (one, other, who, _), seconds in cost.items()
            if (one, other, who) == (model, task, peer)
        ]
        return min(found, default=None)

    versions = sorted(
        {(rows[0]["peer"], rows[0]["version"]) for rows in rounds.values()}
    )
    print(
        "Versions: "
        + "; ".join(f"{peer}: {version}" for peer, version in versions)
        + "\n"
    )
    print(
        "| model, task | gvjax, CPU-s | over TRL's best | over Tunix | over plain JAX |"
    )
    print("|---|---|---|---|---|")
    for number, model in enumerate(MODELS):
        for (task, variant), bars in BARS.items():
            mine = cost.get((model, task, "gvjax", variant))
            if mine is None:
                continue
            limits = (*bars[number], FLOOR)
            cells = []
            for peer, bar in zip(("trl", "tunix", "plain-jax"), limits):
                theirs = best(model, task, peer)
                cells.append(outcome(theirs and theirs / mine, bar))
            name = f"{model} {TASKS[task]}" + (", shared prompts" if variant else "")
            print(f"| {name} | {mine:.3f} | " + " | ".join(cells) + " |")
    print(
        "\n| model, task | peer | n | CPU-s a step | clock, s | compiling, CPU-s | start, s | peak MB | others, cores |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for model in MODELS:
        for task, title in TASKS.items():
            keys = [key for key in rounds if key[:2] == (model, task)]
            for key in sorted(keys, key=cost.get):
                rows = rounds[key]

                def of(name, rows=rows):
                    return statistics.median(row[name] for row in rows)

                peer = f"{key[2]} {key[3]}".strip()
                print(
                    f"| {model} {title} | {peer} | {sum(row['n'] for row in rows)} | {cost[key]:.3f} | {of('step_s'):.3f} |"
                    f" {of('compile_cpu_s'):.1f} | {of('startup_s'):.1f} | {rows[-1]['rss_mb']:.0f} | {of('others'):.2f} |"
                )


main()
