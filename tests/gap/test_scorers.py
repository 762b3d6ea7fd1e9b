"""Scorers: one interface, same budget; what must be frozen is, and what must be worth nothing is."""

import types

import jax
import numpy as np
import pytest

from gvjax import config, sharding, tasks
from gvjax.gap import scorers
from gvjax.recipes import loop
from gvjax.recipes.ground import ground_of
from gvjax.recipes.inputs import Inputs
from gvjax.recipes.pairs import sampled_pairs
from gvjax.recipes.rows import role_key, role_rng

MODEL = {
    "embed_dim": 16,
    "num_layers": 1,
    "num_heads": 2,
    "mlp_dim": 32,
    "mlp_gated": False,
    "norm": "layer",
    "learned_positions": 16,
}
SECTION = config.ScorersSection(
    steps=4, batch_size=16, evaluate_every=2, pooling="last"
)


@pytest.fixture(scope="module")
def inputs():
    patch = pytest.MonkeyPatch()
    make = sharding.make_mesh
    patch.setattr(
        sharding,
        "make_mesh",
        lambda **axes: make(**{**axes, "devices": jax.devices()[:1]}),
    )
    task = tasks.load("tour", seed=1, num_nodes=6, horizon=4, num_goals=2)
    ground = ground_of(task, MODEL, config.MeshSection())
    patch.undo()
    policy = ground.init_policy(role_key(1, "init"))
    rng = role_rng(1, "prompts")
    pairs, heldout = (
        sampled_pairs(
            ground,
            task,
            policy,
            task.prompts(rng, count, split),
            seed=1,
            role=split,
            tau=0.2,
        )
        for count, split in ((32, "train"), (16, "validation"))
    )
    return Inputs(
        ground=ground,
        task=task,
        seed=1,
        policy=policy,
        reference=policy,
        prompts=pairs.prompts,
        validation=heldout.prompts,
        pairs=pairs,
        heldout=heldout,
    )


def trained(kind, inputs, tmp_path, section=SECTION, rate=1e-2):
    run = loop.Run(
        tmp_path / kind, {}, logging=config.LoggingSection(tensorboard=False)
    )
    found = scorers.train(kind, section, inputs, run, learning_rate=rate)
    return found, scorers.trained_scorer(
        kind, section, inputs.ground, found.params, inputs.policy
    )


def same(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


@pytest.mark.slow
def test_every_scorer_learns_and_scores_by_the_same_interface(inputs, tmp_path):
    pairs = inputs.heldout
    kinds = ("global reward model", "local reward model", "DPO implicit reward")
    for kind in kinds:
        found, scorer = trained(kind, inputs, tmp_path)
        assert [point["round"] for point in found.curve] == [2, 4]
        best = max(found.curve, key=lambda point: point["log_likelihood"])
        assert found.round == best["round"]
        chosen = scorer.score(pairs.prompts, pairs.chosen)
        rejected = scorer.score(pairs.prompts, pairs.rejected)
        np.testing.assert_array_equal(scorer.margins(pairs), chosen - rejected)
        assert np.abs(scorer.margins(pairs)).max() > 0
        np.testing.assert_allclose(
            scorer.margins(pairs.swapped(np.ones(len(pairs), bool))),
            -scorer.margins(pairs),
            atol=1e-5,
        )


@pytest.mark.slow
def test_frozen_features_stay_and_the_head_moves(inputs, tmp_path):
    found, _ = trained("frozen features", inputs, tmp_path)
    trunk = {k: v for k, v in inputs.policy.items() if k != "unembed"}
    assert same(found.params["trunk"], trunk)
    assert np.abs(found.params["head"]["kernel"]).max() > 0


def test_the_probe_reads_what_the_verifier_does_not():
    local = config.ScorersSection(pooling="sum")
    assert local.verifier == "local reward model"
    assert scorers.pooling_of("global reward model", local) == "last"
    mean = config.ScorersSection(pooling="mean")
    assert mean.verifier == "global reward model"
    assert scorers.pooling_of("global reward model", mean) == "mean"
    assert scorers.pooling_of("local reward model", mean) == "sum"
    assert scorers.pooling_of("shuffled reward model", mean) == "mean"


def test_the_untrained_scorers_are_gold_and_the_policys_own_log_probability(inputs):
    pairs = inputs.heldout
    gold = scorers.untrained_scorer("gold", inputs.task, inputs.ground, inputs.policy)
    np.testing.assert_allclose(
        gold.margins(pairs), pairs.chosen_gold - pairs.rejected_gold, atol=1e-6
    )
    # Where rewards go by rows, as a dataset's do, pairs have forgotten theirs.
    rows = types.SimpleNamespace(reward=None)
    by_rows = scorers.untrained_scorer("gold", rows, inputs.ground, inputs.policy)
    np.testing.assert_array_equal(by_rows.margins(pairs), gold.margins(pairs))
    own = scorers.untrained_scorer(
        "own log-probability", inputs.task, inputs.ground, inputs.policy
    )
    np.testing.assert_allclose(
        own.score(pairs.prompts, pairs.chosen), pairs.ref_chosen_logps, atol=1e-4
    )


def test_swapped_pairs_change_everything_that_hangs_on_the_label(inputs):
    pairs = inputs.pairs
    rows = np.arange(len(pairs)) % 2 == 0
    turned = pairs.swapped(rows)
    np.testing.assert_array_equal(turned.chosen.tokens[rows], pairs.rejected.tokens[rows])  # fmt: skip
    np.testing.assert_array_equal(turned.chosen.tokens[~rows], pairs.chosen.tokens[~rows])  # fmt: skip
    np.testing.assert_array_equal(turned.rejected_gold[rows], pairs.chosen_gold[rows])
    np.testing.assert_array_equal(
        turned.ref_chosen_logps[rows], pairs.ref_rejected_logps[rows]
    )
    np.testing.assert_array_equal(
        turned.swapped(rows).chosen.tokens, pairs.chosen.tokens
    )
