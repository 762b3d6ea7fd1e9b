"""Plans every preset of configs/plan for every machine, and writes plan.json and plan.md beside this file.

    python configs/results/make_plan.py              what is missing; it may be stopped and goes on where it was
    python configs/results/make_plan.py --minutes 8  stops beginning new ones after so long
    python configs/results/make_plan.py --only 8xh100 --recipe sft --again

Each row is `gvjax plan PRESET --on MACHINE --no-search --json`, in one process, because recipes share programs; compiled at
O0: peaks are 6 to 11% higher than those of the compiler's whole pipeline. Needs the extras `plan` and `plan-gpu`, no
accelerator, and a few core-minutes for each row.
"""

import argparse
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Iterator

from gvjax.plan import command

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
MODELS = ("pythia-1.4b", "pythia-2.8b", "llama-8b")
MACHINES = ("8xh100", "v5e-16", "v5e-64", "v5e-256", "v5p-64", "v6e-64")
RECIPES = ("sft", "reward", "DPO", "online DPO", "RLOO")
ONLINE = ("online DPO", "RLOO")
"""These sample before every update."""
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--only", help="a machine")
    parser.add_argument("--model", help="a preset")
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="of a row")
    parser.add_argument("--again", action="store_true", help="what is there, too")
    asked = parser.parse_args()
    file = HERE / "plan.json"
    plans = json.loads(file.read_text()) if file.exists() else {}
    begun = time.monotonic()
    # The largest first: the others are in less doubt.
    for model, machine in itertools.product(reversed(MODELS), MACHINES):
        name = f"{model} on {machine}"
        if asked.only not in (None, machine) or asked.model not in (None, model):
            continue
        stages = plans.setdefault(name, {})
        wanted = [
            recipe
            for recipe in asked.recipe or RECIPES
            if asked.again or recipe not in stages
        ]
        if not wanted:
            continue
        if time.monotonic() - begun > 60 * asked.minutes:
            return
        for stage in planned(model, machine, wanted):
            stages[stage["stage"]] = stage
            file.write_text(json.dumps(plans, indent=1, sort_keys=True) + "\n")
            (HERE / "plan.md").write_text(table(plans))
            seconds = time.monotonic() - begun
            print(f"{name}, {stage['stage']}: {seconds:.0f} s", flush=True)


def planned(model: str, machine: str, recipes: list[str]) -> Iterator[dict]:
    """The stages of a plan as they are compiled, without what the table does not show."""
    words = [str(ROOT / f"configs/plan/{model}.yaml"), "--on", machine, "--no-search"]
    words += [word for recipe in recipes for word in ("--only", recipe)]
    for event in command.events(command.request_of(words)):
        if trouble := event.get("error") or event.get("crash"):
            sys.exit(f"gvjax plan {' '.join(words)}: {trouble}")
        if stage := event.get("stage"):
            for row in stage["programs"]:
                row["collectives"] = row["collectives"][:4]
            yield stage


def table(plans: dict) -> str:
    compiled = sum(len(stages) for stages in plans.values())
    lines = [
        "# What fits where",
        "",
        "Peak GiB per device of each recipe's hungriest program, with all that lies in memory beside it, of what a program",
        "may use; **bold** does not fit. Below it that program, and the time that no update can beat (arithmetic of the",
        "config over the chip's data sheet; no step was run). 256 pairs or prompts an update, 512 + 128 tokens, float32",
        "parameters and AdamW, bfloat16 compute, full remat, everything split over `fsdp`. `v5p-64` has 32 chips.",
        "",
        "The least times leave out the network. Under `fsdp` every token that is sampled gathers every matrix (1.4B: 336 GB",
        "to each device for 512 samples of 128 tokens; see `collectives` in the JSON), which may well be what it takes.",
        "`mesh.gather_for_sampling=true` gathers them once, where they fit whole beside the rest; a `tensor` axis gathers less.",
        "",
        "Where something does not fit, `gvjax plan` looks for what would (micro-batches, remat, sharding); this table does not.",
        "",
        "Made by `python configs/results/make_plan.py`, at O0, with nothing but CPUs; see [plan.json](plan.json) for every",
        "program's bytes, operations and collectives.",
        "",
        f"{compiled} of {len(MODELS) * len(MACHINES) * len(RECIPES)} plans are compiled; where some are missing, the same command goes on.",
        "",
        f"| model | on | usable | {' | '.join(RECIPES)} |",
        f"|---|---|---|{'---|' * len(RECIPES)}",
    ]
    for model in MODELS:
        for machine in MACHINES:
            stages = plans.get(f"{model} on {machine}")
            if not stages:
                continue
            cells = [
                cell(stages[each]) if each in stages else "not compiled"
                for each in RECIPES
            ]
            usable = next(iter(stages.values()))["usable"] / GIB
            lines.append(
                f"| {model} | {machine} | {usable:.2f} | {' | '.join(cells)} |"
            )
    return "\n".join(lines) + "\n"


def cell(stage: dict) -> str:
    """The peak, whose it is, and the least time of an update."""
    peak = max(stage["programs"], key=lambda row: row["total"])
    step = next(row for row in stage["programs"] if row["program"] == "train step")
    value = f"{stage['peak'] / GIB:.2f}"
    drawn = [
        row["seconds_at_least"]
        for row in stage["programs"]
        if stage["stage"] in ONLINE and row["program"].startswith("sample 256 x 2")
    ]
    sampling = "".join(f"<br>sampling ≥ {seconds:.2g} s" for seconds in drawn)
    return (
        f"{value if stage['fits'] else f'**{value}**'}<br>{peak['program']}"
        f"<br>update ≥ {step['seconds_at_least']:.2g} s{sampling}"
    )


if __name__ == "__main__":
    main()
