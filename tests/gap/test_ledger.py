"""What an arm's stages come to: a ledger that counts all it made somebody do, once; its scorer; what its sweep chose."""

import functools
import types

import jax
import numpy as np
import pytest

from gvjax import config, sharding
from gvjax.gap import gathering, performing, planning, spending
from gvjax.gap.results import Ledger
from gvjax.gap.stages import Store
from gvjax.recipes import loop
from gvjax.recipes.rows import role_key

PAIRS, STEPS, PROMPTS, SAMPLES = 32, 3, 4, 5
HORIZON = 4
SECONDS = {"trial": 1.0, "reward": 10.0, "augmented": 100.0}
DPO = {"recipe": "dpo", "steps": 4, "evaluate_every": 2, "batch_size": 16}
ONLINE = {
    "recipe": "online_dpo",
    "steps": STEPS,
    "prompts_per_step": PROMPTS,
    "samples_per_prompt": SAMPLES,
}
GOLD = {"reward_model": 0.0, "verifier": {"path": "gold"}}
BEST = {"recipe": "best_of_n", "n": 2, "rewards": GOLD}
STUDY = {
    "study": "toy",
    "run_dir": "run",
    "seeds": [1],
    "task": {
        "name": "tour",
        "options": {"num_nodes": 6, "horizon": HORIZON, "num_goals": 2},
    },
    "model": {"embed_dim": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 8},
    "pairs": {"count": PAIRS, "heldout": 8},
    "evaluation": {"test_prompts": 64, "validation_prompts": 64},
    "augmentation": {"prompts": 8, "samples_per_prompt": 3},
    "arms": {
        "DPO": {"road": "offline", "settings": DPO, "sweep": [{"beta": 0.1}, {"beta": 1.0}]},
        "more": {"road": "offline", "data": "augmented", "settings": DPO},
        "relabelled": {"road": "offline", "data": "relabelled", "settings": DPO},
        "gold": {"road": "online", "settings": {**ONLINE, "rewards": GOLD}},
        "model": {"road": "online", "settings": ONLINE},
        "model from DPO": {"road": "online", "start": "DPO", "settings": ONLINE},
        "model from more": {"road": "online", "start": "more", "settings": ONLINE},
        "best": {"road": "selection", "settings": BEST, "sweep": [{"n": 2}, {"n": 16}]},
        "rejection": {
            "road": "online",
            "data": "augmented",
            "settings": {"recipe": "rejection", "n": 2, "rewards": GOLD, "steps": 2},
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def study():
    patch = pytest.MonkeyPatch()
    make, one = sharding.make_mesh, jax.devices()[:1]
    patch.setattr(
        sharding, "make_mesh", lambda **axes: make(**{**axes, "devices": one})
    )
    yield config.validate(config.StudyConfig, STUDY, "toy")
    patch.undo()


@pytest.fixture(scope="module")
def ledgers(study) -> dict[str, Ledger]:
    ground = planning.ground_for(study)

    def result(kind, arm="", trial=0):
        return {"seconds": SECONDS[kind]}

    ledger_of = functools.partial(gathering._ledger, study, ground, result=result)
    return {name: ledger_of(name) for name in study.arms}


@pytest.mark.parametrize(
    "arm, labels, completions, calls, gold, seconds",
    [
        ("DPO", PAIRS, 0, 0, 0, 2),
        ("more", PAIRS, 8 * 3, 8 * 3, 0, 1 + 10 + 100),
        ("relabelled", PAIRS, 0, 2 * PAIRS, 0, 1 + 10),
        ("gold", 0, 60, 0, 60, 1),
        ("model", PAIRS, 60, 60, 0, 1 + 10),
        ("model from DPO", PAIRS, 60, 60, 0, 2 + 1 + 10),
        # The reward model that ranks is the one that rewards.
        ("model from more", PAIRS, 24 + 60, 24 + 60, 0, 1 + 1 + 10 + 100),
        ("best", 0, 18 * PAIRS, 0, 18 * PAIRS, 2),
        ("rejection", 0, 2 * (PAIRS + 8), 0, 2 * (PAIRS + 8), 1),
    ],
)
def test_an_arm_pays_for_all_it_needs(
    arm, labels, completions, calls, gold, seconds, ledgers
):
    ledger = ledgers[arm]
    assert ledger.labels == labels
    assert ledger.sampled_tokens == completions * HORIZON
    assert ledger.reward_model_calls == calls
    assert ledger.gold_calls == gold
    assert ledger.seconds == seconds


def test_an_arm_that_goes_on_from_another_pays_for_both(ledgers):
    both = ledgers["DPO"] + ledgers["model"]
    found = ledgers["model from DPO"]
    assert found.trained_tokens == both.trained_tokens
    assert found.flops == both.flops


def test_scoring_costs_a_forward_pass(study, ledgers):
    ground = planning.ground_for(study)
    tokens = (ground.prompt_length + ground.completion_length) * 60
    assert spending.scored(ground, 60).flops == spending.forward_flops(ground, tokens)


def test_a_scorers_accuracy_is_that_of_labels():
    scorer = performing.scorer_numbers(
        np.array([2.0, 1.0, -1.0, 0.5]),
        pairs_of_gold(chosen=[1.0, 0.0, 0.5, 1.0], rejected=[0.0, 1.0, 0.5, 0.0]),
        fit_scale=False,
    )
    found = gathering._scorer_seed(1, {"scorer": scorer})
    assert found.accuracy == 3 / 4
    # Of one pair the label is against the gold rewards, and of one these are equal.
    assert found.gold_accuracy == 2 / 3


def pairs_of_gold(chosen, rejected) -> types.SimpleNamespace:
    golds = np.array(chosen), np.array(rejected)
    return types.SimpleNamespace(chosen_gold=golds[0], rejected_gold=golds[1])


def test_a_sweep_of_best_of_n_is_chosen_on_validation_prompts(
    study, tmp_path, monkeypatch
):
    plan = planning.plan_of(study, "code")
    scene = performing.Scene(study, plan, Store(tmp_path), seed=1, task_number=0)
    scene.policy = scene.ground.init_policy(role_key(1, "init"))
    scene.reward_model = None
    monkeypatch.setattr(scene, "pairs", lambda which: None)
    run = loop.Run(tmp_path, {}, study.logging)
    found = [scene.do_trial(run, arm="best", trial=trial) for trial in range(2)]
    assert found[0]["validation"] < found[1]["validation"]
    for trial, each in enumerate(found):
        stage = plan.of("trial", 1, 0, "best", trial)
        scene.store.finish(stage, each)
    assert scene.chosen_trial("best")[1] == 1
