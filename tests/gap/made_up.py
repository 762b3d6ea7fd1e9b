"""Made-up results in the shape of a real study, for tests only: no number here was measured."""

import numpy as np

from gvjax.gap.results import (
    BEST_OFFLINE,
    ArmResult,
    BestOfN,
    Contrast,
    CurvePoint,
    Ledger,
    Sample,
    ScorerResult,
    ScorerSeed,
    SeedResult,
    StudyResults,
    TaskResult,
)

# name, road, gold on the main task, gold on the twin, kl, final step, reward-model calls
ARMS = [
    ("SFT", "start", 0.36, 0.35, 0.0, 0, 0),
    ("DPO", "offline", 0.38, 0.35, 0.7, 400, 0),
    ("DPO, twice the compute", "offline", 0.385, 0.345, 1.1, 800, 0),
    ("DPO + NLL", "offline", 0.415, 0.352, 2.4, 400, 0),
    ("DPO + NLL, relabelled samples", "relabelled", 0.55, 0.35, 1.6, 1200, 76_800),
    ("HyPO", "offline", 0.40, 0.35, 1.2, 400, 0),
    ("Online DPO", "online", 0.53, 0.20, 4.4, 300, 76_800),
    ("RLOO", "online", 0.63, 0.34, 4.3, 300, 76_800),
    ("Best of 16, reward model", "selection", 0.68, 0.35, 1.83, 0, 16_000),
]


def study(seeds=(5, 6, 7, 8, 9), prompts=120, curves=True) -> StudyResults:
    """A study of two tasks: the main one with a lead for online arms, and its twin without one."""
    return StudyResults(
        name="Tour, both roads",
        config={
            "study": {"seeds": list(seeds), "pairs": 1000, "tuning_budget": 3},
            "model": {"embed_dim": 64, "num_layers": 2},
            "arms": {"dpo": {"beta": [1.0, 3.0], "learning_rate": [3e-4, 1e-3]}},
        },
        config_hash="9f2c51d07be3a8846a1f",
        versions={"gvjax": "0.1.0", "jax": "0.10.2", "device": "cpu, 2 cores"},
        started="2026-01-01T09:30:00+00:00",
        tasks=(
            task("tour", "main", 2, seeds, prompts, curves),
            task("hidden goals", "twin", 3, seeds, prompts, curves),
        ),
        contrasts=(
            Contrast("tour", "RLOO", BEST_OFFLINE, margin=0.05),
            Contrast("tour", "Online DPO", BEST_OFFLINE, margin=0.05, primary=False),
            Contrast("tour", BEST_OFFLINE, "SFT", primary=False),
            Contrast("hidden goals", "RLOO", BEST_OFFLINE, margin=0.06),
        ),
    )


def task(name, role, column, seeds, prompts, curves) -> TaskResult:
    generator = np.random.default_rng(column)
    offsets = generator.normal(0, 0.012, len(seeds))
    arms = []
    for arm_name, road, *rest in ARMS:
        centre, kl, steps, calls = rest[column - 2], rest[2], rest[3], rest[4]
        results = []
        for seed, offset in zip(seeds, offsets):
            mean = centre + offset + generator.normal(0, 0.02 if steps else 0.004)
            gold = np.round((mean + generator.normal(0, 0.25, prompts)) * 30) / 30
            far = kl * generator.uniform(0.8, 1.2)
            curve = []
            for i in range(1, 7 if steps and curves else 1):
                share = i / 6
                height = 0.36 + (float(gold.mean()) - 0.36) * share**0.8
                height += generator.normal(0, 0.006) if i < 6 else 0.0
                curve.append(CurvePoint(steps * i // 6, height, far * share, 10.0))
            results.append(
                SeedResult(
                    seed=seed,
                    gold=tuple(float(g) for g in gold),
                    kl=far,
                    length=10.0 + generator.normal(0, 0.1),
                    step=steps,
                    setting={"learning_rate": 1e-3, "beta": 0.3} if steps else {},
                    curve=tuple(curve),
                    ledger=Ledger(
                        labels=1000 if steps else 0,
                        prompts=1000 if steps else 0,
                        sampled_tokens=calls * 10,
                        trained_tokens=steps * 64 * 28,
                        flops=steps * 64 * 28 * 6e5 + calls * 2e6,
                        seconds=steps * 0.05 + calls * 1e-4,
                        reward_model_calls=calls,
                    ),
                    extra={
                        **({"validation_gold": float(gold.mean())} if steps else {}),
                        **({"reward_model_accuracy": 0.85} if calls else {}),
                    },
                )
            )
        arms.append(ArmResult(arm_name, road, tuple(results), f"{arm_name}, made up."))

    def scorer(scorer_name, log_likelihood, accuracy):
        return ScorerResult(
            scorer_name,
            tuple(
                ScorerSeed(
                    seed,
                    log_likelihood + generator.normal(0, 0.012),
                    accuracy + generator.normal(0, 0.01),
                )
                for seed in seeds
            ),
        )

    main = role == "main"
    sizes = (1, 2, 4, 8, 16, 32)
    heights = {
        "gold": [0.36, 0.51, 0.61, 0.71, 0.77, 0.84],
        "reward model": [0.36, 0.485, 0.56, 0.64, 0.68, 0.71],
        "DPO implicit reward": [0.36, 0.38, 0.38, 0.39, 0.38, 0.38],
    }
    return TaskResult(
        task=name,
        role=role,
        arms=tuple(arms),
        prompts="nested",
        scorers=(
            scorer("gold", -0.504, 0.82),
            scorer("reward model", -0.63 if main else -0.72, 0.85 if main else 0.5),
            scorer("DPO implicit reward", -0.707, 0.53 if main else 0.5),
        ),
        best_of_n=tuple(
            BestOfN(
                scorer_name,
                sizes,
                tuple(
                    tuple(float(v) + float(generator.normal(0, 0.01)) for v in values)
                    for _ in seeds
                ),
            )
            for scorer_name, values in heights.items()
        )
        if main
        else (),
        samples=(
            Sample(
                "start 3 · goals 7 12 19",
                {
                    "SFT": "5 9 9 2 14 3 7 7 1 0",
                    "DPO + NLL": "5 7 7 2 14 3 9 12 12 4",
                    "RLOO": "7 7 12 12 4 19 19 19 19 19",
                },
                {"SFT": 1 / 3, "DPO + NLL": 2 / 3, "RLOO": 1.0},
            ),
            Sample(
                "start 0 · goals 2 8 15",
                {"SFT": "1 1 <b>4</b> 2 2 0", "RLOO": "2 2 8 8 15 15"},
                {"SFT": 1 / 3, "RLOO": 1.0},
            ),
        ),
        optimum=1.0,
        description="Visit three goals on a known graph in ten steps; gold is goals visited less invalid moves."
        if main
        else "The same walks and prompts, but the goals are a hash of the prompt: nothing to learn that carries over.",
    )
