#!/usr/bin/env python3
"""gvjax on one GPU: the rows of `gvjax bench` that `peers_gpu.py` has its own of, a JSON line as each ends.

    python tests/bench/gpu_gvjax.py --model pythia-1.4b --rows sft,dpo,decode-64 --out rows.jsonl
    JAX_PLATFORMS=cpu python tests/bench/gpu_gvjax.py --toy --out rows.jsonl      a check of the program itself

What is timed, and how, is `gvjax bench`'s. Only the sizes are chosen here, so that both sides do the same work:

    sft            every token is learned, as the peers do: 2 prompt tokens, the rest completion
    dpo            the update alone, as a run makes it; `reference` is the pass over the same pairs that a peer's step holds
    online         a round of GRPO, 4 samples a prompt, KL to a reference in the loss; what scoring by a reward model took
                   is left out, since TRL is given a line of Python for it. online-shared runs each prompt once
    decode-N       N prompts. rollout_s and the rates are of all of it, prefill included; step_s is a step alone

A row that does not fit is tried once more with its activations computed again (remat dots), and says so.
"""

import argparse
import dataclasses
import datetime
import gc
import json
import time
import traceback

from gvjax import __version__, runtime

runtime.configure(keep_programs=False)

import jax  # noqa: E402

from gvjax import sharding  # noqa: E402
from gvjax.bench import timing, works  # noqa: E402
from gvjax.bench.footing import Footing  # noqa: E402
from gvjax.bench.request import DEFAULT_SIZES, Request, make_request  # noqa: E402

K, TOY_BATCH, LARGE = 4, 8, 100e9


@dataclasses.dataclass(frozen=True)
class Asked:
    """A row of `gvjax bench`; None is its default there."""

    row: str
    batch: int | None = None
    all_learned: bool = False
    share_prompts: bool | None = None


def asked(name: str) -> Asked:
    row, _, more = name.partition("-")
    if row == "decode":
        return Asked("decode", batch=int(more))
    if row == "online":
        # The activations of 64 samples of pythia-1.4b want more than 80 GB.
        limit = timing.memory_limit() or 0
        batch = 64 if limit > LARGE else 32
        return Asked("grpo", batch=batch, share_prompts=more == "shared")
    return Asked(row, all_learned=row == "sft")


def request(options, wanted: Asked, remat: str) -> Request:
    shape = "tiny" if options.toy else options.model
    sizes = DEFAULT_SIZES[shape]["accelerator"]
    prompt, completion = sizes.prompt, sizes.completion
    batch = wanted.batch or sizes.batch
    if options.toy:
        batch, prompt, completion = min(batch, TOY_BATCH), 16, 16
    if wanted.all_learned:
        prompt, completion = 2, prompt + completion - 2
    return make_request(
        shape=shape,
        batch=batch,
        lengths=f"{prompt}+{completion}",
        group=K,
        dtype="bfloat16",
        remat=remat,
        scan=options.scan,
        mesh="",
        only=[wanted.row],
        repeats=options.repeats,
        share_prompts=wanted.share_prompts,
    )


def measured(made: Request, wanted: Asked, ceilings: timing.Ceilings) -> dict:
    """The row as `gvjax bench` finds it, and what follows from it."""
    with works.work(wanted.row, Footing(made)) as work:
        # Planning would compile programs that are not timed.
        work = dataclasses.replace(work, planned_memory=lambda: None)
        row = timing.measure(wanted.row, work, repeats=made.repeats, ceilings=ceilings)
    seconds, shares = row.seconds, row.shares
    found = dataclasses.asdict(row) | {
        "batch": made.sizes.batch,
        "lengths": [made.sizes.prompt, made.sizes.completion],
        "remat": made.model.remat,
        "step_s": seconds,
        "tokens_s": row.tokens_per_second,
        "samples_s": row.samples_per_second,
        "flops_s": row.mfu and row.mfu * ceilings.flops,
        "bytes_s": row.of_bandwidth and row.of_bandwidth * ceilings.bytes,
    }
    if wanted.row == "decode":
        # Of a call, `step_s` is what is between the two parts, by the number of steps.
        apart = shares["generate"] - shares["prefill"]
        if apart <= 0:
            raise ValueError("the prefill took as long as the whole rollout")
        steps = made.sizes.completion - 1
        rollout = seconds * steps * shares["generate"] / apart
        found["rollout_s"] = rollout
        found["samples_s"] = made.sizes.batch / rollout
        found["tokens_s"] = made.sizes.batch * made.sizes.completion / rollout
    if wanted.row == "grpo":
        found["scoring_s"] = seconds * shares["score"]
        found["step_s"] = step = seconds - found["scoring_s"]
        found["samples_s"] = made.sizes.batch / step
        found["tokens_s"] = made.sizes.batch * made.sizes.length / step
        found["flops_s"] = None  # it counts the scoring
    return found


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def attempt(options, name: str, ceilings: timing.Ceilings) -> dict:
    wanted = asked(name)
    for remat in ("none", "dots"):
        try:
            return measured(request(options, wanted, remat), wanted, ceilings)
        except Exception as error:  # one row's failure leaves the others
            traceback.print_exc()
            failed = {"failed": failure(error)}
            if "RESOURCE_EXHAUSTED" not in str(error):
                return failed
        gc.collect()
    return failed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pythia-1.4b", help="one of gvjax' shapes")
    parser.add_argument(
        "--rows", default="sft,reward,dpo,reference,prefill,decode-16,online"
    )
    parser.add_argument("--out", required=True, help="JSON lines are added to it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--until", type=float, default=float("inf"), help="no row starts after it"
    )
    parser.add_argument(
        "--scan",
        action=argparse.BooleanOptionalAction,
        help="run the layers as one scan; by default as a run does on this device",
    )
    parser.add_argument("--toy", action="store_true", help="a tiny network")
    options = parser.parse_args()
    # A program found on disk would hide what compiling costs.
    jax.config.update("jax_enable_compilation_cache", False)
    about = {
        "side": "gvjax",
        "model": "toy" if options.toy else options.model,
        "device": jax.devices()[0].device_kind,
        "version": f"gvjax {__version__} / jax {jax.__version__}",
        "date": datetime.date.today().isoformat(),
    }

    def write(row: str, found: dict):
        line = json.dumps({**about, "row": row, **found})
        print(line, flush=True)
        with open(options.out, "a") as out:
            out.write(line + "\n")

    mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
    ceilings = timing.ceilings(mesh, "bfloat16", small=options.toy)
    write("ceilings", {"matmul": ceilings.flops, "copy": ceilings.bytes})
    for name in filter(None, options.rows.split(",")):
        if time.time() > options.until:
            write(name, {"left_out": "the time was spent"})
            continue
        write(name, attempt(options, name, ceilings))
        gc.collect()


main()
