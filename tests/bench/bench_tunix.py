#!/usr/bin/env python3
"""Tunix (google-tunix) on the workload set W, through its own trainers, sampler and GRPO learner.

Tunix has no reward-model trainer and no online DPO: those rows are absent.  Variants: remat, nokl."""

import logging
import os
import warnings

warnings.filterwarnings("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("JAX_PLATFORMS", "cpu") if not os.environ.get(
    "BENCH_GPU"
) else None
import common  # noqa: E402

a = common.args(["sft", "dpo", "gen", "online"])
import importlib.metadata  # noqa: E402
import json  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from tunix.generate import sampler as sampler_lib  # noqa: E402
from tunix.models.llama3 import model as llama  # noqa: E402
from tunix.models.llama3 import params as llama_params  # noqa: E402
from tunix.rl import common as rl_common  # noqa: E402
from tunix.sft import peft_trainer  # noqa: E402
from tunix.sft.dpo import dpo_trainer  # noqa: E402

logging.getLogger().setLevel(logging.ERROR)
V = a.variants
hf = json.loads((a.dir / "config.json").read_text())
MESH = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))


def user_model():
    cfg = llama.ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf["head_dim"],
        num_kv_heads=hf["num_key_value_heads"],
        rope_theta=int(hf["rope_theta"]),
        norm_eps=hf["rms_norm_eps"],
        weight_tying=True,
        remat_config=llama.RematConfig.DECODER
        if "remat" in V
        else llama.RematConfig.NONE,
    )
    return llama_params.create_model_from_safe_tensors(
        str(a.dir), cfg, MESH, dtype=jnp.float32
    )


def adamw():
    return optax.chain(optax.clip_by_global_norm(common.CLIP), optax.adamw(common.LR))


def user_sft(batches):
    def model_input(x):
        return {
            "input_tokens": x.input_tokens,
            "input_mask": x.input_mask,
            "positions": rl_common.build_positions_from_mask(x.input_mask),
            "attention_mask": rl_common.make_causal_attn_mask(x.input_mask),
        }

    cfg = peft_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=a.steps)
    t = peft_trainer.PeftTrainer(user_model(), adamw(), cfg).with_gen_model_input_fn(
        model_input
    )
    with MESH:
        t.train(
            peft_trainer.TrainingInput(input_tokens=x, input_mask=np.ones_like(x, bool))
            for x in batches
        )


def user_dpo(batches):
    cfg = dpo_trainer.DPOTrainingConfig(
        eval_every_n_steps=10**9, max_steps=a.steps, beta=0.1
    )
    t = dpo_trainer.DPOTrainer(user_model(), user_model(), adamw(), cfg)

    def one(x):
        return np.ones_like(x, bool)

    with MESH:
        t.train(
            dpo_trainer.TrainingInput(
                prompt_ids=p,
                prompt_mask=one(p),
                chosen_ids=c,
                chosen_mask=one(c),
                rejected_ids=r,
                rejected_mask=one(r),
            )
            for p, c, r in batches
        )


def user_gen(prompts):
    tok = AutoTokenizer.from_pretrained(str(a.dir))
    cache = sampler_lib.CacheConfig(
        cache_size=common.GEN_PROMPT + common.GEN_NEW,
        num_layers=hf["num_hidden_layers"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf["head_dim"],
    )
    s = sampler_lib.Sampler(user_model(), tok, cache)
    return lambda i: s(
        prompts,
        max_generation_steps=common.GEN_NEW,
        max_prompt_length=common.GEN_PROMPT,
        temperature=1.0,
        top_p=1.0,
        seed=i,
        forbidden_tokens=(1,),
    )


def reward(prompts, completions, **_):
    return [float(len(set(c.split()))) for c in completions]


def user_online(batches):
    from tunix.rl import rl_cluster as rc
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rollout import base_rollout

    tok = AutoTokenizer.from_pretrained(str(a.dir))
    roles = dict.fromkeys((rc.Role.ACTOR, rc.Role.REFERENCE, rc.Role.ROLLOUT), MESH)
    cluster = rc.RLCluster(
        actor=user_model(),
        reference=user_model(),
        tokenizer=tok,
        cluster_config=rc.ClusterConfig(
            role_to_mesh=roles,
            rollout_engine="vanilla",
            training_config=rc.RLTrainingConfig(
                actor_optimizer=adamw(),
                eval_every_n_steps=10**9,
                max_steps=a.steps,
                mini_batch_size=a.batch,
                train_micro_batch_size=a.batch,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=common.GEN_NEW,
                max_prompt_length=common.GEN_PROMPT,
                temperature=1.0,
                top_p=1.0,
                kv_cache_size=common.GEN_PROMPT + common.GEN_NEW,
            ),
        ),
    )
    learner = GRPOLearner(
        cluster,
        GRPOConfig(
            num_generations=common.K,
            num_iterations=1,
            beta=0.0 if "nokl" in V else common.BETA_KL,
        ),
        reward_fns=[reward],
    )
    with MESH:
        learner.train(batches)


def clocked(s, make):
    """Batches one after the other; the trainer's asking for the next one ends a step."""
    s.start()
    for i in range(a.steps + 1):
        if i:
            s.end()
        if i < a.steps:
            yield make(i)


def main():
    import workload

    s = common.Steps()
    P, C, R = common.pairs(a)
    n = len(P[0]) + len(C[0])

    def rows(i):
        return [(i * a.batch + j) % len(P) for j in range(a.batch)]

    ver = "tunix {} / jax {}".format(
        importlib.metadata.version("google-tunix"), jax.__version__
    )
    if a.task == "sft":
        fn, work = user_sft, {"tokens": a.batch * n}
        fn(clocked(s, lambda i: np.concatenate([P[rows(i)], C[rows(i)]], 1)))
    elif a.task == "dpo":
        fn, work = user_dpo, {"tokens": 2 * a.batch * n, "pairs": a.batch}
        fn(clocked(s, lambda i: (P[rows(i)], C[rows(i)], R[rows(i)])))
    elif a.task == "gen":
        fn, work = user_gen, {"tokens": a.batch * common.GEN_NEW}
        go = fn([workload.text(p[: common.GEN_PROMPT]) for p in P[: a.batch]])
        s.start()
        for i in range(a.steps):
            out = go(i)
            s.end()
        assert len(out.tokens) == a.batch and all(
            len(t) == common.GEN_NEW for t in out.tokens
        )
    else:
        fn, work = (
            user_online,
            {
                "samples": a.batch * common.K,
                "tokens": a.batch * common.K * common.GEN_NEW,
            },
        )
        fn(
            clocked(
                s,
                lambda i: {
                    "prompts": np.array(
                        [workload.text(P[j][: common.GEN_PROMPT]) for j in rows(i)]
                    )
                },
            )
        )
    lines = (
        common.user_lines(fn)
        + common.user_lines(user_model)
        + common.user_lines(adamw)
        + 6
    )
    common.emit("tunix", ver, a, s, work, lines=lines)


main()
