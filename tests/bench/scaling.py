#!/usr/bin/env python3
"""How a step's cost grows, CPU-seconds on random tokens: length, DPO and reward against SFT, micro-batches, packed rows.

python scaling.py [--steps 3]          one process, one table; the llama-30m shape, float32
"""

import argparse
import functools
import time

import jax
import numpy as np

import gvjax
from gvjax import optim, runtime
from gvjax.data import packing
from gvjax.models import heads, transformer
from gvjax.models.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=8192,
    embed_dim=512,
    num_layers=8,
    num_heads=8,
    mlp_dim=1376,
    rope_theta=1e6,
)
PROMPT, LENGTH, LONG = 512, 640, 2048


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


def sequences(rng, rows: int, length: int, start: int) -> gvjax.SequenceBatch:
    tokens = rng.integers(3, CONFIG.vocab_size, (rows, length), dtype=np.int32)
    mask = np.broadcast_to(np.arange(length) >= start, tokens.shape)
    return gvjax.SequenceBatch(tokens, mask)


def packed_rows(rng, rows: int) -> gvjax.SequenceBatch:
    """Some of the rows that 400 sequences of 64 to LENGTH tokens are packed into."""
    lengths = rng.integers(64, LENGTH + 1, 400)
    bins = packing.pack(lengths, LENGTH)
    segments = np.zeros((rows, LENGTH), np.int32)
    for row, which in enumerate(rng.permutation(len(bins))[:rows]):
        each = lengths[list(bins[which])]
        numbers = np.repeat(1 + np.arange(len(each)), each)
        segments[row, : len(numbers)] = numbers
    tokens = rng.integers(3, CONFIG.vocab_size, segments.shape, dtype=np.int32)
    return gvjax.SequenceBatch(tokens, segments > 0, segments)


def main():
    runtime.configure(keep_programs=False)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    steps = parser.parse_args().steps
    rng = np.random.default_rng(0)
    params = transformer.init(jax.random.key(0), CONFIG)
    logps_fn = transformer.token_logps_fn(CONFIG)

    def sft(rows, length, **options):
        make = functools.partial(gvjax.make_supervised_step, logps_fn, **options)
        return measured(make, params, sequences(rng, rows, length, 0), steps)

    usual = sft(2, LENGTH)
    long = sft(1, LONG)
    micro = sft(4, LENGTH, num_microbatches=2)
    packed = packed_rows(rng, 4)
    make = functools.partial(gvjax.make_supervised_step, logps_fn)
    real = int(packed.completion_mask.sum())
    packed_token = measured(make, params, packed, steps) / real
    halves = [sequences(rng, 1, LENGTH, PROMPT) for _ in range(2)]
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
    scorer = heads.reward_fn(CONFIG, pooling="last")
    reward = measured(
        functools.partial(gvjax.make_reward_step, scorer),
        heads.init(jax.random.key(1), CONFIG, params),
        pair,
        steps,
    )
    per_token = usual / (2 * LENGTH)
    print("| | measured | bar |\n|---|---|---|")
    for name, value, bar in (
        (f"a token at {LONG} over one at {LENGTH}", long / LONG / per_token, 1.15),
        ("DPO (reference included) over SFT", dpo / usual, 1.35),
        ("reward over SFT", reward / usual, 1.0),
        ("2 micro-batches over 2 steps", micro / (2 * usual), 1.03),
        (
            "a token of packed rows over one of full ones",
            packed_token / per_token,
            1 / 0.9,
        ),
    ):
        print(f"| {name} | {value:.2f} | {bar:.2f} |", flush=True)
    print(f"SFT step of 2 x {LENGTH} tokens: {usual:.2f} CPU-s")


main()
