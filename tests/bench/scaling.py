#!/usr/bin/env python3
"""How a step's cost grows, CPU-seconds on random tokens: length, DPO and reward against SFT, micro-batches, packed rows.

python scaling.py [--steps 3] [--shape llama-30m]          one process, one table, float32
python scaling.py --shape pythia-1.4b --layers 2 --length   a shape too large for a CPU: some of its layers, how length counts
"""

import argparse
import dataclasses
import functools
import time

import jax
import numpy as np

import gvjax
from gvjax import optim, runtime
from gvjax.data import packing
from gvjax.models import cost, heads, shapes, transformer

PROMPT, LENGTH, LONG = 512, 640, 2048
# Set for these shapes; others are compared with what the operations grow by.
LENGTH_BARS = {"pythia-1.4b": 1.15, "smollm2-135m": 1.35}


def measured(make_step, params, batch, steps: int) -> float:
    """Median CPU-seconds of a step after the first two."""
    tx = optim.make_adamw(1e-5)
    step = jax.jit(make_step(tx), donate_argnums=0)
    state = gvjax.init_train_state(params, tx)
    spent = []
    for _ in range(steps + 2):
        begun = time.process_time()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        spent.append(time.process_time() - begun)
    return float(np.median(spent[2:]))


def sequences(rng, vocabulary, rows, length, start) -> gvjax.SequenceBatch:
    tokens = rng.integers(3, vocabulary, (rows, length), dtype=np.int32)
    mask = np.broadcast_to(np.arange(length) >= start, tokens.shape)
    return gvjax.SequenceBatch(tokens, mask)


def packed_rows(rng, vocabulary, rows) -> gvjax.SequenceBatch:
    """Some of the rows that 400 sequences of 64 to LENGTH tokens are packed into."""
    lengths = rng.integers(64, LENGTH + 1, 400)
    bins = packing.pack(lengths, LENGTH)
    segments = np.zeros((rows, LENGTH), np.int32)
    for row, which in enumerate(rng.permutation(len(bins))[:rows]):
        each = lengths[list(bins[which])]
        numbers = np.repeat(1 + np.arange(len(each)), each)
        segments[row, : len(numbers)] = numbers
    tokens = rng.integers(3, vocabulary, segments.shape, dtype=np.int32)
    return gvjax.SequenceBatch(tokens, segments > 0, segments)


def network(name: str, layers: int | None):
    """A shape; of fewer layers, with as much less of its vocabulary, so that the parts cost what they do of the whole."""
    config = shapes.shape(name)
    if layers is None:
        return config
    vocabulary = config.vocab_size * layers // config.num_layers
    return dataclasses.replace(config, num_layers=layers, vocab_size=vocabulary)


def main():
    runtime.configure(keep_programs=False)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--shape", default="llama-30m", help="one of gvjax' shapes")
    parser.add_argument("--layers", type=int, help="so many of its layers; all")
    parser.add_argument("--length", action="store_true", help="the first row only")
    options = parser.parse_args()
    steps = options.steps
    config = network(options.shape, options.layers)
    rng = np.random.default_rng(0)
    params = transformer.init(jax.random.key(0), config)
    logps_fn = transformer.token_logps_fn(config)

    def sft(rows, length, **more):
        make = functools.partial(gvjax.make_supervised_step, logps_fn, **more)
        batch = sequences(rng, config.vocab_size, rows, length, 0)
        return measured(make, params, batch, steps)

    def show(name, value, bar):
        print(f"| {name} | {value:.2f} | {bar:.2f} |", flush=True)

    usual = sft(2, LENGTH)
    per_token = usual / (2 * LENGTH)
    print(f"SFT step of 2 x {LENGTH} tokens: {usual:.2f} CPU-s")
    print("| | measured | bar |\n|---|---|---|")
    long = sft(1, LONG) / LONG
    more = cost.forward_flops(config, LONG) / cost.forward_flops(config, LENGTH)
    counted = more / (LONG / LENGTH)
    bar = LENGTH_BARS.get(options.shape, counted)
    name = f"a token at {LONG} over one at {LENGTH} (operations {counted:.2f})"
    show(name, long / per_token, bar)
    if options.length:
        return
    halves = [sequences(rng, config.vocab_size, 1, LENGTH, PROMPT) for _ in range(2)]
    zero = np.zeros(1, np.float32)
    pair = gvjax.PreferenceBatch(*halves, zero, zero)
    update = measured(
        functools.partial(gvjax.make_dpo_step, logps_fn), params, pair, steps
    )
    add_ref = jax.jit(functools.partial(gvjax.with_ref_logps, logps_fn))
    jax.block_until_ready(add_ref(params, pair))
    begun = time.process_time()
    for _ in range(steps):
        jax.block_until_ready(add_ref(params, pair))
    dpo = update + (time.process_time() - begun) / steps
    show("DPO (reference included) over SFT", dpo / usual, 1.35)
    scorer = heads.reward_fn(config, pooling="last")
    reward = measured(
        functools.partial(gvjax.make_reward_step, scorer),
        heads.init(jax.random.key(1), config, params),
        pair,
        steps,
    )
    show("reward over SFT", reward / usual, 1.0)
    micro = sft(4, LENGTH, num_microbatches=2)
    show("2 micro-batches over 2 steps", micro / (2 * usual), 1.03)
    packed = packed_rows(rng, config.vocab_size, 4)
    make = functools.partial(gvjax.make_supervised_step, logps_fn)
    real = int(packed.completion_mask.sum())
    packed_token = measured(make, params, packed, steps) / real
    show(
        "a token of packed rows over one of full ones",
        packed_token / per_token,
        1 / 0.9,
    )


main()
