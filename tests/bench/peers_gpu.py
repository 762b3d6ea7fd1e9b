#!/usr/bin/env python3
"""The peers on one GPU: TRL's trainers, transformers' generate, a loop of plain PyTorch; a JSON line as each row ends.

    python tests/bench/peers_gpu.py --model pythia-1.4b --rows trl-sft-compile,generate-64 --out rows.jsonl
    python tests/bench/peers_gpu.py --device cpu --toy --out rows.jsonl      a check of the program itself

It measures its own ceilings first: a bfloat16 matrix product of random numbers, and a copy. Networks are built from a
config with random weights, tokens are random and never special: nothing is downloaded. bfloat16 products; TRL's weights are
float32 under autocast, as gvjax's are. Where `-bf16` is named, and where it samples, the weights and AdamW's moments are
bfloat16 too, which is less to move.

Useful operations (what the task needs, whatever the program does): 2 a parameter and token forward and 4 backward, the
causal half of attention, the output head only where a token is scored, nothing for what is computed again. TRL's step of DPO
holds the reference's pass.

Needs torch, transformers and tokenizers, and for the rows of TRL also trl.
"""

import argparse
import datetime
import functools
import gc
import itertools
import json
import os
import statistics
import tempfile
import time
import traceback
import warnings

warnings.filterwarnings("ignore")
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}.items():
    os.environ.setdefault(name, value)

import torch  # noqa: E402
import transformers  # noqa: E402
import workload  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

K, LR, CLIP, KL = 4, 1e-5, 1.0, 0.04
WARM_UPS, LARGE = 3, 100e9
# Sequences of an SFT step, by the network; pairs are half as many. As `gvjax bench` has them.
BATCH = {"pythia-1.4b": 32, "smollm2-135m": 64}

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--model", default="pythia-1.4b", choices=tuple(workload.MODELS))
parser.add_argument("--rows", default="trl-sft,trl-dpo,trl-reward,generate-16")
parser.add_argument("--out", required=True, help="JSON lines are added to it")
parser.add_argument("--device", default="cuda")
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument(
    "--until", type=float, default=float("inf"), help="no row starts after it"
)
parser.add_argument("--toy", action="store_true", help="a tiny network")
options = parser.parse_args()

DEVICE = torch.device(options.device)
CUDA = DEVICE.type == "cuda"
NAME = "tiny-neox" if options.toy else options.model
MODEL = workload.MODELS[NAME]
PROMPT, COMPLETION = MODEL["P"], MODEL["C"]
LENGTH = PROMPT + COMPLETION
SEQUENCES = BATCH.get(NAME, 4)
SCRATCH = tempfile.TemporaryDirectory(prefix="gvjax-peers-")
WORK = SCRATCH.name


def online_samples() -> int:
    """Completions of an online round, by what fits; gvjax takes as many."""
    if not CUDA:
        return 2 * K
    memory = torch.cuda.get_device_properties(DEVICE).total_memory
    return 64 if memory > LARGE else 32


def wait():
    if CUDA:
        torch.cuda.synchronize()


def timed(call, repeats=0, warm=WARM_UPS) -> list[float]:
    """Seconds of each call, on a GPU all queued work included."""
    seconds = []
    for number in range(warm + (repeats or options.repeats)):
        wait()
        begun = time.perf_counter()
        call()
        wait()
        if number >= warm:
            seconds.append(time.perf_counter() - begun)
    return seconds


def row(seconds, *, batch, tokens=None, samples=None, flops=None, **more) -> dict:
    median = statistics.median(seconds)
    found = {
        "batch": batch,
        "step_s": median,
        "best_s": min(seconds),
        "worst_s": max(seconds),
        "repeats": len(seconds),
        "tokens_s": tokens and tokens / median,
        "samples_s": samples and samples / median,
        "flops_s": flops and flops / median,
        **more,
    }
    if CUDA:
        found["peak_memory"] = torch.cuda.max_memory_allocated()
    return found


def forward_flops(scored: int) -> float:
    """Useful operations forwards, of one sequence of which `scored` tokens go through the output head."""
    head = MODEL["vocab"] * MODEL["d"]
    body = workload.n_params(MODEL)[1] - head
    attention = 2 * MODEL["layers"] * MODEL["d"] * LENGTH**2
    return 2 * body * LENGTH + attention + 2 * head * scored


def decode_bytes(batch: int) -> float:
    """Bytes that a step of decoding must read: the matrices once, and every key and value at the mean length."""
    each = MODEL["d"] // MODEL["heads"] * MODEL["kv"]
    cache = (PROMPT + COMPLETION / 2) * 2 * MODEL["layers"] * each
    return 2 * (workload.n_params(MODEL)[1] + batch * cache)


@functools.cache
def folder() -> str:
    """Where the config and the tokenizer lie."""
    return str(workload.make(NAME, WORK, pairs=1, weights=False))


def build(kind=AutoModelForCausalLM, dtype=torch.bfloat16, **settings):
    config = AutoConfig.from_pretrained(folder())
    config._attn_implementation = "sdpa"
    config.use_cache = False
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.device(DEVICE):
        torch.set_default_dtype(dtype)
        try:
            model = kind.from_config(config)
        finally:
            torch.set_default_dtype(torch.float32)
    return model.to(dtype)


def random_tokens(rows: int, length: int) -> torch.Tensor:
    low, high = workload.N_SPECIAL, MODEL["vocab"]
    return torch.randint(low, high, (rows, length), device=DEVICE)


def ceilings() -> dict:
    size = 512 if options.toy else 8192
    left, right = (
        torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)
    )
    count = 2 ** (24 if options.toy else 32)
    source = torch.empty(count, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)

    def rate(amount, call):
        # Queued one behind the other, or a call would be timed with its launch.
        times = 10

        def all_of_them():
            for _ in range(times):
                call()

        return times * amount / statistics.median(timed(all_of_them, repeats=3, warm=1))

    return {
        "matmul": rate(2 * size**3, lambda: torch.matmul(left, right)),
        "copy": rate(2 * source.numel(), lambda: target.copy_(source)),
    }


# Plain PyTorch.


def stepper(model, loss, compiled: bool):
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=CUDA)
    network = torch.compile(model) if compiled else model

    def step():
        loss(network).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def logps(network, tokens, start):
    """[rows, LENGTH − start]: log p of the tokens from `start` on; the head only where one is scored."""
    kept = LENGTH - start + 1
    logits = network(input_ids=tokens, logits_to_keep=kept).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), tokens[:, start:].flatten(), reduction="none"
    )
    return -losses.view(len(tokens), -1)


def torch_sft(compiled: bool) -> dict:
    model, tokens = build(), random_tokens(SEQUENCES, LENGTH)
    step = stepper(model, lambda net: -logps(net, tokens, 1).mean(), compiled)
    flops = 3 * SEQUENCES * forward_flops(LENGTH - 1)
    return row(
        timed(step),
        batch=SEQUENCES,
        tokens=tokens.numel(),
        samples=SEQUENCES,
        flops=flops,
        weights="bfloat16",
    )


def torch_dpo(compiled: bool) -> dict:
    model, reference = build(), build().eval()
    tokens, pairs = random_tokens(SEQUENCES, LENGTH), SEQUENCES // 2
    frozen = torch.compile(reference) if compiled else reference

    def loss(network):
        with torch.no_grad():
            before = logps(frozen, tokens, PROMPT).sum(-1)
        gained = logps(network, tokens, PROMPT).sum(-1) - before
        margins = 0.1 * (gained[:pairs] - gained[pairs:])
        return -torch.nn.functional.logsigmoid(margins).mean()

    return row(
        timed(stepper(model, loss, compiled)),
        batch=SEQUENCES,
        tokens=tokens.numel(),
        samples=pairs,
        flops=4 * SEQUENCES * forward_flops(COMPLETION),
        weights="bfloat16",
    )


# transformers' generate.


def generate(batch: int, cache: str | None) -> dict:
    """Rates of whole rollouts, and step_s, by what many tokens take more than two."""
    if options.toy:
        batch = min(batch, 4)
    model = build().eval()
    model.config.use_cache = True
    prompts, few = random_tokens(batch, PROMPT), 2
    settings = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(prompts),
    }
    if cache:
        settings["cache_implementation"] = cache

    @torch.inference_mode()
    def call(new):
        tokens = model.generate(
            prompts, max_new_tokens=new, min_new_tokens=new, **settings
        )
        assert tokens.shape == (batch, PROMPT + new), tokens.shape

    warm = 2 if cache else 1
    whole = timed(lambda: call(COMPLETION), repeats=2, warm=warm)
    start = statistics.median(timed(lambda: call(few), repeats=2, warm=warm))
    step = (statistics.median(whole) - start) / (COMPLETION - few)
    found = row(
        whole,
        batch=batch,
        tokens=batch * COMPLETION,
        samples=batch,
        weights="bfloat16",
        rollout_s=statistics.median(whole),
        bytes_s=decode_bytes(batch) / step,
    )
    return found | {"step_s": step}


# TRL.


def trl_settings(task: str, count: int, compiled: bool) -> dict:
    """What makes TRL fast here: no logging, saving, progress bar or recomputed activations."""
    return {
        "output_dir": WORK,
        "max_steps": options.repeats + WARM_UPS,
        "per_device_train_batch_size": count,
        "learning_rate": LR,
        "max_grad_norm": CLIP,
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": True,
        "use_cpu": not CUDA,
        "gradient_checkpointing": False,
        "torch_compile": compiled,
        "optim": "adamw_torch_fused" if CUDA else "adamw_torch",
        "lr_scheduler_type": "constant",
        "dataloader_num_workers": 2 if CUDA and task != "online" else 0,
    }


def different_words(completions, **_):
    return [float(len(set(text.split()))) for text in completions]


def trl_trainer(
    task: str, count: int, dtype, cache: str | None, settings: dict, callbacks: list
):
    import trl
    from datasets import Dataset

    rows = count * (options.repeats + WARM_UPS)

    def ids(length):
        return random_tokens(rows, length).tolist()

    def texts(length, lead=""):
        return [lead + workload.text(each) for each in ids(length)]

    common = {
        "processing_class": transformers.AutoTokenizer.from_pretrained(folder()),
        "callbacks": callbacks,
    }
    if task == "sft":
        return trl.SFTTrainer(
            build(dtype=dtype),
            args=trl.SFTConfig(**settings, max_length=None),
            train_dataset=Dataset.from_dict({"input_ids": ids(LENGTH)}),
            **common,
        )
    if task == "reward":
        data = {"chosen_ids": ids(LENGTH), "rejected_ids": ids(LENGTH)}
        return trl.RewardTrainer(
            build(AutoModelForSequenceClassification, dtype, num_labels=1),
            args=trl.RewardConfig(**settings, max_length=None),
            train_dataset=Dataset.from_dict(data),
            **common,
        )
    if task == "dpo":
        # It tokenizes text itself and adds one end token: one word less keeps the length the same.
        data = {
            "prompt": texts(PROMPT),
            "chosen": texts(COMPLETION - 1, " "),
            "rejected": texts(COMPLETION - 1, " "),
        }
        return trl.DPOTrainer(
            build(dtype=dtype),
            build(dtype=dtype),
            args=trl.DPOConfig(**settings, max_length=None, beta=0.1),
            train_dataset=Dataset.from_dict(data),
            **common,
        )
    config = trl.GRPOConfig(
        **settings,
        num_generations=K,
        max_completion_length=COMPLETION,
        temperature=1.0,
        top_k=0,
        beta=KL,
        cache_implementation=cache,
    )
    model = build(dtype=dtype)
    # It loads its reference from where it believes the policy came from.
    model.save_pretrained(folder())
    model.config._name_or_path = folder()
    return trl.GRPOTrainer(
        model,
        reward_funcs=different_words,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": texts(PROMPT)}),
        **common,
    )


def trl_row(task: str, words: list[str]) -> dict:
    import trl

    marks = []

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.on_step_end()

        def on_step_end(self, *_, **__):
            wait()
            marks.append(time.perf_counter())

    sequences = online_samples() if task == "online" else SEQUENCES
    rows = sequences // (2 if task in ("reward", "dpo") else 1)
    all_bfloat16 = "bf16" in words or task == "online"
    dtype = torch.bfloat16 if all_bfloat16 else torch.float32
    cache = "static" if "static" in words else None
    settings = trl_settings(task, rows, "compile" in words)
    trl_trainer(task, rows, dtype, cache, settings, [Clock()]).train()
    seconds = [after - before for before, after in itertools.pairwise(marks)][WARM_UPS:]
    flops = {
        "sft": 3 * sequences * forward_flops(LENGTH - 1),
        "reward": 3 * sequences * forward_flops(0),
        "dpo": 4 * sequences * forward_flops(COMPLETION),
    }
    return row(
        seconds,
        batch=sequences,
        tokens=sequences * LENGTH,
        samples=rows,
        flops=flops.get(task),
        weights="bfloat16" if all_bfloat16 else "float32",
        version=f"trl {trl.__version__} / {VERSION}",
    )


VERSION = f"transformers {transformers.__version__} / torch {torch.__version__}"


def measured(name: str) -> dict:
    """A row by its name: ceilings, torch-TASK, generate-N or trl-TASK, with -compile, -static or -bf16 behind."""
    side, *words = name.split("-")
    if side == "ceilings":
        return ceilings()
    if side == "generate":
        return generate(int(words[0]), "static" if "static" in words else None)
    if side == "torch":
        return {"sft": torch_sft, "dpo": torch_dpo}[words[0]]("compile" in words)
    return trl_row(words[0], words[1:])


def main():
    about = {
        "side": "peers",
        "model": "toy" if options.toy else NAME,
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "version": VERSION,
        "date": datetime.date.today().isoformat(),
    }
    torch.manual_seed(0)
    for name in ["ceilings", *filter(None, options.rows.split(","))]:
        begun = time.time()
        if begun > options.until:
            found = {"left_out": "the time was spent"}
        else:
            try:
                found = measured(name)
            except Exception as error:  # one row's failure leaves the others
                traceback.print_exc()
                found = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            found["took_s"] = time.time() - begun
        line = json.dumps({**about, "row": name, **found})
        print(line, flush=True)
        with open(options.out, "a") as out:
            out.write(line + "\n")
        torch.compiler.reset()
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
