"""One tiny equal footing for all recipe tests: SFT policy, pairs and reward model, made once."""

import dataclasses

import jax
import pytest
from kept_runs import make_run

from gvjax import config, sharding
from gvjax.recipes import reward, sft
from gvjax.recipes.ground import ground_of
from gvjax.recipes.inputs import Inputs
from gvjax.recipes.pairs import sampled_pairs
from gvjax.recipes.rewards import RewardModel
from gvjax.recipes.rows import role_rng
from gvjax.tasks.tour import Tour

MODEL = {"embed_dim": 32, "num_layers": 1, "num_heads": 2, "mlp_dim": 64}
SFT = config.SftSection(
    steps=300,
    batch_size=64,
    optimizer=config.OptimizerSection(learning_rate=5e-3, schedule="cosine"),
)
REWARD = config.RewardSection(
    steps=150,
    batch_size=64,
    evaluate_every=50,
    optimizer=config.OptimizerSection(learning_rate=2e-3),
)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The runs that the footing was made by, by recipe."""
    where = tmp_path_factory.mktemp("footing")
    return {name: make_run(where / name) for name in ("sft", "reward")}


@pytest.fixture(scope="session")
def inputs(runs) -> Inputs:
    task = Tour(seed=1, num_nodes=6, degree=2, num_goals=2, horizon=4)
    # One device: these tests are about recipes, and eight virtual ones cost time.
    ground = dataclasses.replace(
        ground_of(task, MODEL, config.MeshSection()),
        mesh=sharding.make_mesh(devices=jax.devices()[:1]),
    )
    policy = sft.train(SFT, ground, task, 0, runs["sft"]).params

    def prompts(split, count, **options):
        return task.prompts(role_rng(0, f"{split} prompts"), count, split, **options)

    def pairs(role, count, split):
        return sampled_pairs(
            ground, task, policy, prompts(split, count), seed=0, role=role, tau=0.02
        )

    made = Inputs(
        ground=ground,
        task=task,
        seed=0,
        policy=policy,
        reference=policy,
        prompts=prompts("train", 60, distinct=True),
        validation=prompts("validation", 200),
        pairs=pairs("pairs", 600, "train"),
        heldout=pairs("heldout", 100, "validation"),
    )
    trained = reward.train(REWARD, made, runs["reward"])
    return dataclasses.replace(
        made, reward_model=RewardModel(trained.params, REWARD.pooling)
    )
