#!/usr/bin/env python3
"""TRL on the workload set W.  Each function user_* is what a TRL user has to write for that task.

Variants: nofused (AdamW not fused), compile (torch_compile), eager (attention), bf16 (autocast), ckpt (gradient
checkpointing), precompute (reference log-probabilities once, ahead of DPO), static (static KV cache), nokl (beta=0, no
reference); of the online task: rloo, odpo (trl.experimental.online_dpo) instead of GRPO."""

import os
import warnings

warnings.filterwarnings("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
import common  # noqa: E402

a = common.args(["sft", "rm", "dpo", "gen", "online"])
import tempfile  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(int(os.environ.get("BENCH_THREADS", "2")))
CUDA = torch.cuda.is_available()
V = a.variants
MODEL = str(a.dir)
OUT = tempfile.mkdtemp(prefix="gvbench-")


class Clock(TrainerCallback):
    def __init__(self, steps):
        self.s = steps

    def on_train_begin(self, *_, **__):
        if CUDA:
            torch.cuda.synchronize()
        self.s.start()

    def on_step_end(self, *_, **__):
        if CUDA:
            torch.cuda.synchronize()
        self.s.end()


# The settings that make TRL fast here: no logging, saving, progress bar or checkpointing of activations.
FAST = {
    "output_dir": OUT,
    "max_steps": a.steps,
    "learning_rate": common.LR,
    "max_grad_norm": common.CLIP,
    "report_to": [],
    "logging_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": not CUDA,
    "bf16": "bf16" in V,
    "gradient_checkpointing": "ckpt" in V,
    "optim": "adamw_torch_fused" if "nofused" not in V else "adamw_torch",
    "torch_compile": "compile" in V,
    "dataloader_pin_memory": CUDA,
    "lr_scheduler_type": "constant",
}
INIT = {"dtype": "float32", "attn_implementation": "eager" if "eager" in V else "sdpa"}


def user_sft(data, clock):
    cfg = trl.SFTConfig(
        **FAST,
        per_device_train_batch_size=a.batch,
        max_length=None,
        model_init_kwargs=INIT,
    )
    t = trl.SFTTrainer(MODEL, args=cfg, train_dataset=data, callbacks=[clock])
    t.train()


def user_rm(data, clock):
    cfg = trl.RewardConfig(
        **FAST,
        per_device_train_batch_size=a.batch,
        max_length=None,
        model_init_kwargs=INIT,
    )
    t = trl.RewardTrainer(MODEL, args=cfg, train_dataset=data, callbacks=[clock])
    t.train()


def user_dpo(data, clock):
    cfg = trl.DPOConfig(
        **FAST,
        per_device_train_batch_size=a.batch,
        max_length=None,
        beta=0.1,
        precompute_ref_log_probs="precompute" in V,
        model_init_kwargs=INIT,
    )
    t = trl.DPOTrainer(MODEL, args=cfg, train_dataset=data, callbacks=[clock])
    t.train()


def user_gen(prompts):
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, **INIT).eval()
    gen = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": common.GEN_NEW,
        "min_new_tokens": common.GEN_NEW,
        "pad_token_id": 0,
    }
    if "static" in V:
        gen["cache_implementation"] = "static"
    ids = torch.tensor(prompts)
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **gen)


def reward(completions, **_):
    return [float(len(set(c.split()))) for c in completions]  # how many different words


def user_online(data, clock):
    kind = trl.RLOOTrainer if "rloo" in V else trl.GRPOTrainer
    config = trl.RLOOConfig if "rloo" in V else trl.GRPOConfig
    cfg = config(
        **FAST,
        per_device_train_batch_size=a.batch * common.K,
        num_generations=common.K,
        max_completion_length=common.GEN_NEW,
        temperature=1.0,
        top_k=0,
        model_init_kwargs=INIT,
        beta=0.0 if "nokl" in V else common.BETA_KL,
        cache_implementation="static" if "static" in V else None,
    )
    t = kind(
        MODEL, reward_funcs=reward, args=cfg, train_dataset=data, callbacks=[clock]
    )
    t.train()


def user_odpo(data, clock):
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, **INIT)
    tok = transformers.AutoTokenizer.from_pretrained(MODEL)
    cfg = OnlineDPOConfig(
        **FAST,
        per_device_train_batch_size=a.batch,
        max_new_tokens=common.GEN_NEW,
        max_length=2 * common.GEN_NEW + 8,
        temperature=1.0,
        top_k=0,
    )
    t = OnlineDPOTrainer(
        model,
        reward_funcs=reward,
        args=cfg,
        train_dataset=data,
        processing_class=tok,
        callbacks=[clock],
    )
    t.train()


def main():
    import workload

    s = common.Steps()
    clock = Clock(s)
    P, C, R = common.pairs(a)
    n = len(P[0]) + len(C[0])
    ver = f"trl {trl.__version__} / transformers {transformers.__version__} / torch {torch.__version__}"
    peer = "trl"
    if a.task == "sft":
        data = Dataset.from_dict(
            {"input_ids": [list(map(int, p)) + list(map(int, c)) for p, c in zip(P, C)]}
        )
        fn, work = user_sft, {"tokens": a.batch * n}
        fn(data, clock)
    elif a.task == "rm":

        def j(x, y):
            return [list(map(int, p)) + list(map(int, c)) for p, c in zip(x, y)]

        fn, work = user_rm, {"tokens": 2 * a.batch * n, "pairs": a.batch}
        fn(Dataset.from_dict({"chosen_ids": j(P, C), "rejected_ids": j(P, R)}), clock)
    elif a.task == "dpo":
        # DPOTrainer tokenizes text itself and adds one end token: one word less keeps the length the same.
        def t(x, cut=0, lead=""):
            return [lead + workload.text(r[: len(r) - cut]) for r in x]

        fn, work = user_dpo, {"tokens": 2 * a.batch * n, "pairs": a.batch}
        fn(
            Dataset.from_dict(
                {"prompt": t(P), "chosen": t(C, 1, " "), "rejected": t(R, 1, " ")}
            ),
            clock,
        )
    elif a.task == "gen":
        fn, work = user_gen, {"tokens": a.batch * common.GEN_NEW}
        prompts = P[: a.batch, : common.GEN_PROMPT]
        with torch.inference_mode():
            go = fn(prompts)
            s.start()
            for _ in range(a.steps):
                out = go()
                if CUDA:
                    torch.cuda.synchronize()
                s.end()
        assert out.shape == (a.batch, common.GEN_PROMPT + common.GEN_NEW), out.shape
    else:
        data = Dataset.from_dict(
            {"prompt": [workload.text(p[: common.GEN_PROMPT]) for p in P]}
        )
        if (
            "odpo" in V
        ):  # Online DPO: two samples for a prompt, so twice the prompts make the same samples
            a.batch *= 2
            fn, work = (
                user_odpo,
                {"samples": 2 * a.batch, "tokens": 2 * a.batch * common.GEN_NEW},
            )
        else:
            fn, work = (
                user_online,
                {
                    "samples": a.batch * common.K,
                    "tokens": a.batch * common.K * common.GEN_NEW,
                },
            )
        fn(data, clock)
    lines = common.user_lines(fn) + 3  # imports, and the call with its data
    common.emit(peer, ver, a, s, work, lines=lines)


main()
