"""Configs of every recipe at toy size, which tests start as processes."""

import json
import pathlib

import jax
import numpy as np
import yaml

from gvjax.recipes import single

ROUNDS = 8
TOY = {
    "task": {
        "name": "tour",
        "options": {"num_nodes": 6, "horizon": 4, "num_goals": 2},
    },
    "model": {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32},
    "logging": {"every": 1, "tensorboard": False},
    "checkpoints": {"every": 2, "keep": 2},
}
SMALL = {"steps": ROUNDS, "batch_size": 16}
SAMPLED = {"steps": ROUNDS, "prompts_per_step": 8}
PAIRS = {"count": 32, "heldout": 32}
JUDGED = {"evaluation": {"validation_prompts": 16}}
FROM_PAIRS = {"start": "sft", "pairs": PAIRS, **JUDGED, "select": "best"}
FROM_REWARDS = {"start": "sft", "reward_model": "reward", **JUDGED}
GROUPS = {"samples_per_prompt": 2, "epochs": 2, "evaluate_every": 3}
RECIPES = {
    "sft": {"settings": {"recipe": "sft", **SMALL}},
    "reward": {
        "start": "sft",
        "pairs": PAIRS,
        "settings": {"recipe": "reward", **SMALL, "evaluate_every": 3},
    },
    "dpo": {**FROM_PAIRS, "settings": {"recipe": "dpo", **SMALL, "evaluate_every": 3}},
    "hypo": {
        **FROM_PAIRS,
        "settings": {
            "recipe": "hypo",
            **SMALL,
            "on_policy_prompts": 8,
            "evaluate_every": 3,
        },
    },
    "online_dpo": {
        **FROM_REWARDS,
        "settings": {"recipe": "online_dpo", **SAMPLED, **GROUPS},
    },
    "policy_gradient": {
        **FROM_REWARDS,
        "settings": {
            "recipe": "policy_gradient",
            "algorithm": "grpo",
            **SAMPLED,
            **GROUPS,
        },
    },
    "ppo": {
        **FROM_REWARDS,
        "select": "best",
        "settings": {"recipe": "ppo", **SAMPLED, **GROUPS},
    },
    "rebel": {
        **FROM_REWARDS,
        "settings": {"recipe": "rebel", **SAMPLED, "evaluate_every": 3},
    },
    "rejection": {
        **FROM_REWARDS,
        "settings": {"recipe": "rejection", **SMALL, "n": 2, "evaluate_every": 3},
    },
}

STUDY = {
    "study": "toy",
    "seeds": [1],
    **{name: TOY[name] for name in ("task", "model")},
    "sft": SMALL,
    "pairs": PAIRS,
    "reward": {**SMALL, "evaluate_every": 4},
    "evaluation": {"test_prompts": 16, "validation_prompts": 16},
    "arms": {
        "DPO": {
            "road": "offline",
            "select": "best",
            "settings": {"recipe": "dpo", **SMALL, "evaluate_every": 4},
        },
        "RLOO": {
            "road": "online",
            "settings": {
                "recipe": "policy_gradient",
                **SAMPLED,
                "samples_per_prompt": 2,
            },
        },
    },
    "contrasts": [{"a": "RLOO", "b": "best offline", "margin": 0.05}],
}

GAP = {
    "gap": "toy",
    **{
        name: STUDY[name]
        for name in ("seeds", "task", "model", "sft", "pairs", "evaluation")
    },
    "scorers": {
        "learning_rates": [0.01],
        "steps": 4,
        "batch_size": 8,
        "evaluate_every": 2,
        "fractions": [1.0],
        "also": ["shuffled reward model"],
    },
    "samples": {
        "prompts": 8,
        "validation_prompts": 8,
        "per_prompt": 4,
        "opponents": 2,
        "best_of_n": [1, 2],
    },
    "pilot": {"online": "RLOO", "arms": STUDY["arms"]},
}


def write_runs(directory: pathlib.Path) -> None:
    """`<recipe>.yaml` for each, run in directories of their names, `study.yaml` and `gap.yaml`."""
    (directory / "study.yaml").write_text(yaml.safe_dump(STUDY))
    (directory / "gap.yaml").write_text(yaml.safe_dump(GAP))
    for name, fields in RECIPES.items():
        config = {"run_dir": name, **TOY, **fields}
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(config))


def assert_same(found: pathlib.Path, expected: pathlib.Path) -> None:
    """Metrics line for line, results, and parameters bit for bit."""
    for name in ("metrics.jsonl", "result.json"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    runs = [single.finished(directory) for directory in (found, expected)]
    kind = "policy" if runs[0].makes_policy else "reward_model"
    params = [getattr(run, kind)() for run in runs]
    if kind == "reward_model":
        params = [model.params for model in params]
    same = jax.tree.map(np.array_equal, *params)
    assert all(jax.tree.leaves(same)), same


def numbers_of(study: pathlib.Path, file: str = "results.json") -> tuple:
    """What the file holds and metrics of all stages, but for clock times and where it stands."""
    own = ("seconds", "config", "config_hash", "started")

    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in own}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    results = json.loads((study / file).read_text())
    metrics = {
        path.parent.name: path.read_bytes()
        for path in study.glob("stages/*/metrics.jsonl")
    }
    return timeless(results), metrics
