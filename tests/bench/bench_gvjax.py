#!/usr/bin/env python3
"""gvjax on the workload set W, made of its public parts. Each function user_* is what a user has to write for that task.

Variants: shared (the prompt of a pair or a group is run once in training), bf16, scan, remat.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu") if not os.environ.get(
    "BENCH_GPU"
) else None
import common  # noqa: E402

a = common.args(["sft", "rm", "dpo", "gen", "online"])
import dataclasses  # noqa: E402
import functools  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402

import gvjax  # noqa: E402
from gvjax import optim, runtime, sampling  # noqa: E402
from gvjax.models import decoding, groups, heads, hf, transformer  # noqa: E402
from gvjax.types import SharedPrompts  # noqa: E402

# As the command does it.
runtime.configure(keep_programs=False)
V = a.variants
config, params = hf.load_policy(a.dir, dtype="bfloat16" if "bf16" in V else "float32")
config = dataclasses.replace(
    config, scan_layers="scan" in V, remat="full" if "remat" in V else "none"
)


def adamw():
    return optim.make_adamw(common.LR, b2=0.999, max_grad_norm=common.CLIP)


def jit(step):
    return jax.jit(step, donate_argnums=0)


def logps_function(prompt_length, completion_length, group_size):
    """The model's log-probabilities; in variant shared, with each prompt run once."""
    plain = transformer.token_logps_fn(config, shortest_prompt=prompt_length)
    group = groups.group_logps_fn(config)
    model = SharedPrompts(group, plain, prompt_length, completion_length, group_size)
    return model if "shared" in V else plain


def user_sft(batches):
    tx = adamw()
    step = jit(gvjax.make_supervised_step(transformer.token_logps_fn(config), tx))
    state = gvjax.init_train_state(params, tx, copy=False)
    for batch in batches:
        state, metrics = step(state, batch)
        yield metrics


def user_rm(batches):
    tx = adamw()
    step = jit(gvjax.make_reward_step(heads.reward_fn(config, pooling="last"), tx))
    model = heads.init(jax.random.key(0), config, params)
    state = gvjax.init_train_state(model, tx, copy=False)
    for batch in batches:
        state, metrics = step(state, batch)
        yield metrics


def user_dpo(batches, prompt_length, completion_length):
    tx, logps = adamw(), logps_function(prompt_length, completion_length, 2)
    add_ref = jax.jit(functools.partial(gvjax.with_ref_logps, logps))
    step = jit(gvjax.make_dpo_step(logps, tx, beta=0.1))
    state = gvjax.init_train_state(params, tx)
    for batch in batches:
        state, metrics = step(state, add_ref(params, batch))
        yield metrics


@functools.partial(jax.jit, static_argnames="num_samples")
def sample(params, prompts, key, num_samples=1):
    return sampling.generate(
        decoding.decode_fn(config),
        functools.partial(decoding.init_cache, config),
        decoding.decode_params(config, params),
        prompts,
        np.full(len(prompts), prompts.shape[1]),
        key,
        max_new_tokens=common.GEN_NEW,
        num_samples=num_samples,
        share_prompts=num_samples > 1,
    )


def user_gen(prompts):
    for step in range(a.steps):
        yield sample(params, prompts, jax.random.key(step))


def user_online(prompt_batches, reward):
    tx = adamw()
    logps = logps_function(common.GEN_PROMPT, common.GEN_NEW, common.K)
    add_ref = jax.jit(functools.partial(gvjax.with_ref_logps, logps))
    step = jit(gvjax.make_policy_gradient_step(logps, tx, kl_coef=common.BETA_KL))
    state = gvjax.init_train_state(params, tx)
    for number, prompts in enumerate(prompt_batches):
        rollouts = sample(state.params, prompts, jax.random.key(number), common.K)
        advantages = gvjax.advantages.group_relative(reward(rollouts), common.K)
        batch = add_ref(params, gvjax.policy_batch(rollouts, advantages))
        state, metrics = step(state, batch)
        yield metrics


def pair_batches(prompts, chosen, rejected, rows):
    """A PreferenceBatch for each step."""
    mask = np.arange(prompts.shape[1] + chosen.shape[1]) >= prompts.shape[1]

    def sequences(completions, at):
        tokens = np.concatenate([prompts[at], completions[at]], axis=1)
        return gvjax.SequenceBatch(tokens, np.broadcast_to(mask, tokens.shape))

    for step in range(a.steps):
        at = rows(step)
        yield gvjax.PreferenceBatch(sequences(chosen, at), sequences(rejected, at))


def different_tokens(rollouts):
    completions = np.asarray(rollouts.tokens)[:, common.GEN_PROMPT :]
    return np.array([len(set(row)) for row in completions.tolist()], np.float32)


def main():
    s = common.Steps()
    prompts, chosen, rejected = common.pairs(a)
    lengths = prompts.shape[1], chosen.shape[1]
    tokens = sum(lengths)

    def rows(step):
        return np.arange(step * a.batch, (step + 1) * a.batch) % len(prompts)

    pairs = pair_batches(prompts, chosen, rejected, rows)
    if a.task == "sft":
        work = {"tokens": a.batch * tokens}
        # Every token is learned, as the peers do here.
        everywhere = (
            dataclasses.replace(
                pair.chosen, completion_mask=np.ones_like(pair.chosen.completion_mask)
            )
            for pair in pairs
        )
        user, results = user_sft, user_sft(everywhere)
    elif a.task == "rm":
        work = {"tokens": 2 * a.batch * tokens, "pairs": a.batch}
        user, results = user_rm, user_rm(pairs)
    elif a.task == "dpo":
        work = {"tokens": 2 * a.batch * tokens, "pairs": a.batch}
        user, results = user_dpo, user_dpo(pairs, *lengths)
    elif a.task == "gen":
        work = {"tokens": a.batch * common.GEN_NEW}
        user = user_gen
        results = user_gen(prompts[: a.batch, : common.GEN_PROMPT])
    else:
        samples = a.batch * common.K
        work = {"samples": samples, "tokens": samples * common.GEN_NEW}
        batches = (prompts[rows(step), : common.GEN_PROMPT] for step in range(a.steps))
        user, results = user_online, user_online(batches, different_tokens)
    s.start()
    first = None
    for result in results:
        jax.block_until_ready(result)
        s.end()
        first = first or result
    extra = {} if a.task == "gen" else {"first_loss": float(first["loss"])}
    lines = common.user_lines(user) + 5  # imports, loading, and the call with its data
    if a.task in ("gen", "online"):
        lines += common.user_lines(sample)
    version = f"gvjax {gvjax.__version__} / jax {jax.__version__}"
    common.emit("gvjax", version, a, s, work, lines=lines, extra=extra)


main()
