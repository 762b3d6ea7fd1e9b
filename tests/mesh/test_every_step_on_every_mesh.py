"""Every step and the sampler give the same numbers on any mesh, through what the recipes compile."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvjax import config, sharding
from gvjax.models import heads, transformer
from gvjax.models.config import ModelConfig
from gvjax.plan import hlo
from gvjax.recipes import dpo, online_dpo, policy_gradient, ppo, reward, sft, single
from gvjax.recipes.ground import Ground, ground_of
from gvjax.recipes.programs import sampler, scorer
from gvjax.recipes.rows import role_key
from gvjax.tasks.tour import Tour
from gvjax.types import PreferenceBatch, Rollouts, SequenceBatch, SharedPrompts

MESHES = {
    "8x1x1": (8, 1, 1),
    "1x8x1": (1, 8, 1),
    "1x1x8": (1, 1, 8),
    "2x2x2": (2, 2, 2),
}
MODEL = ModelConfig(vocab_size=24, embed_dim=16, num_layers=1, num_heads=8, mlp_dim=16)
ROWS, PROMPT, COMPLETION, GROUP = 16, 3, 4, 2
OPTIMIZER = config.OptimizerSection(learning_rate=1e-2)
ROUND = {"prompts_per_step": ROWS // GROUP, "samples_per_prompt": GROUP}


def ground_on(sizes, model=MODEL) -> Ground:
    data, fsdp, tensor = sizes
    devices = jax.devices()[: data * fsdp * tensor]
    mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)
    return Ground(model, mesh, None, 0, PROMPT, COMPLETION)


def random_tokens(seed, vocab_size=MODEL.vocab_size):
    shape = (ROWS, PROMPT + COMPLETION)
    tokens = np.random.default_rng(seed).integers(1, vocab_size, shape)
    return tokens.astype(np.int32)


def sequences(seed, vocab_size=MODEL.vocab_size) -> SequenceBatch:
    """Completions of 1 to 4 tokens behind prompts of 3."""
    places = np.arange(PROMPT + COMPLETION)
    lengths = np.random.default_rng(seed + 1).integers(1, COMPLETION + 1, (ROWS, 1))
    mask = (places >= PROMPT) & (places < PROMPT + lengths)
    return SequenceBatch(random_tokens(seed, vocab_size), mask)


def pairs(vocab_size=MODEL.vocab_size) -> PreferenceBatch:
    rng = np.random.default_rng(5)
    ref_chosen, ref_rejected = rng.normal(-9, 1, (2, ROWS)).astype(np.float32)
    return PreferenceBatch(
        sequences(1, vocab_size),
        sequences(3, vocab_size),
        ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected,
    )


def rollouts() -> Rollouts:
    rng, batch = np.random.default_rng(6), sequences(7)
    logps = rng.normal(-3, 0.1, batch.tokens.shape).astype(np.float32)
    rewards = rng.normal(size=ROWS).astype(np.float32)
    masked = np.where(batch.completion_mask, logps, 0)
    return Rollouts(batch.tokens, batch.completion_mask, masked, rewards=rewards)


@functools.cache
def host_params(model=MODEL):
    """(policy, reward model) with heads that are not 0."""
    policy = transformer.init(jax.random.key(0), model)
    scored = heads.init(jax.random.key(1), model, policy, zero=False)
    return jax.tree.map(np.asarray, (policy, scored))


def placed(ground: Ground):
    targets = (ground.policy_shapes(), ground.reward_model_shapes())
    return jax.tree.map(
        lambda leaf, target: jax.device_put(leaf, target.sharding),
        host_params(ground.model),
        targets,
    )


def make_sft(ground):
    settings = config.SftSection(steps=3, batch_size=ROWS, optimizer=OPTIMIZER)
    compiled, _ = sft.program(ground, settings)
    return compiled, placed(ground)[0], ground.put(sequences(0))


def make_reward(ground):
    settings = config.RewardSection(steps=3, batch_size=ROWS, optimizer=OPTIMIZER)
    compiled, _ = reward.program(ground, settings)
    return compiled, placed(ground)[1], ground.put(pairs())


def make_dpo(ground):
    settings = config.DpoSection(steps=3, batch_size=ROWS, optimizer=OPTIMIZER)
    compiled, _ = dpo.program(ground, settings)
    batch = pairs(ground.model.vocab_size)
    return compiled, placed(ground)[0], ground.put(batch)


def make_online_dpo(ground):
    settings = config.OnlineDpoSection(steps=3, optimizer=OPTIMIZER, **ROUND)
    compiled, _, pair_up, add_ref = online_dpo.program(ground, settings)
    policy = placed(ground)[0]
    return compiled, policy, add_ref(policy, pair_up(ground.put(rollouts())))


def make_policy_gradient(ground):
    settings = config.PolicyGradientSection(
        algorithm="grpo", steps=3, optimizer=OPTIMIZER, **ROUND
    )
    compiled, _, prepare = policy_gradient.program(ground, settings)
    policy, sampled = placed(ground)[0], ground.put(rollouts())
    batch = SequenceBatch(sampled.tokens, sampled.completion_mask)
    return compiled, policy, prepare(sampled, scorer(ground)(policy, batch))[0]


def make_ppo(ground):
    settings = config.PpoSection(steps=3, optimizer=OPTIMIZER, **ROUND)
    compiled, _, prepare = ppo.program(ground, settings)
    (policy, critic), sampled = placed(ground), ground.put(rollouts())
    batch = SequenceBatch(sampled.tokens, sampled.completion_mask)
    ready, _ = prepare(critic, sampled, scorer(ground)(policy, batch))
    return compiled, {"policy": policy, "value": critic}, ready


CASES = {
    "sft": make_sft,
    "reward": make_reward,
    "dpo": make_dpo,
    "online dpo": make_online_dpo,
    "policy gradient": make_policy_gradient,
    "ppo": make_ppo,
}


def train(make, ground):
    """(losses of three steps, parameters after them)."""
    compiled, params, batch = make(ground)
    state, losses = compiled.start(params), []
    for _ in range(3):
        state, metrics = compiled.step(state, batch)
        assert metrics["skipped"] == 0
        losses.append(float(metrics["loss"]))
    return losses, jax.tree.map(np.asarray, state.params)


@functools.cache
def on_one_device(name):
    return train(CASES[name], ground_on((1, 1, 1)))


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, atol=1e-6)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected[1]):
        other = functools.reduce(lambda node, key: node[key.key], path, found[1])
        error = np.linalg.norm(other - leaf) / max(np.linalg.norm(leaf), 1e-3)
        assert error < 1e-5, jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        # Every axis at once; one at a time where asked for.
        mesh if mesh == "2x2x2" else pytest.param(mesh, marks=pytest.mark.exhaustive)
        for mesh in MESHES
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_three_steps_are_the_same_as_on_one_device(name, mesh):
    losses, _ = expected = on_one_device(name)
    assert len(set(losses)) == 3
    assert_same(train(CASES[name], ground_on(MESHES[mesh])), expected)


def sample_on(ground):
    prompts = random_tokens(0)[:8, :PROMPT]
    lengths, ids = np.full(8, PROMPT, np.int32), np.arange(8)
    prompts, lengths, ids = ground.put((prompts, lengths, ids))
    sample = sampler(ground, GROUP)
    drawn = sample(placed(ground)[0], prompts, lengths, role_key(0, "test"), ids)
    return jax.tree.map(np.asarray, drawn)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_the_sampler_draws_the_same(mesh):
    expected = sample_on(ground_on((1, 1, 1)))
    found = sample_on(ground_on(MESHES[mesh]))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.completion_mask, expected.completion_mask)
    np.testing.assert_allclose(found.logps, expected.logps, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_matrices_may_be_gathered_once_for_sampling():
    """In place of at every token; the same ones are drawn."""
    often = ground_on((1, 4, 2))
    once = dataclasses.replace(often, gather_for_sampling=True)
    found, expected = sample_on(once), sample_on(often)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logps, expected.logps, rtol=1e-6, atol=1e-6)
    prompts, ids = once.put((np.ones((8, PROMPT), np.int32), np.arange(8)))
    lowered = sampler(once, GROUP).lower(
        placed(once)[0], prompts, ids, role_key(0, "test"), ids
    )
    moved = hlo.collectives(lowered.compile().as_text(), dict(once.mesh.shape))
    over_fsdp = {each.kind: each.count for each in moved if each.axes == "fsdp"}
    # Seven matrices of the one layer and the embeddings.
    assert over_fsdp == {"all-gather": 8}


@pytest.mark.slow
def test_completions_that_have_ended_may_be_left_out():
    """On four shards of rows, in numbers that they divide; the same ones are drawn."""
    whole = dataclasses.replace(ground_on((2, 2, 2)), eos_id=5, completion_length=24)
    compact = dataclasses.replace(whole, compact_sampling=True)
    found, expected = sample_on(compact), sample_on(whole)
    counts = np.sort(expected.completion_mask.sum(axis=1))
    assert counts[len(counts) // 2] < counts[-1] - 2
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logps, expected.logps, rtol=1e-6, atol=1e-6)


def test_activations_are_constrained_and_logits_stay_split():
    ground = ground_on((2, 2, 2))
    policy, batch = placed(ground)[0], ground.put(sequences(0))
    lowered = jax.jit(ground.logps_fn).lower(policy, batch.tokens)
    assert lowered.as_text().count("sharding_constraint") >= 2
    program = lowered.compile().as_text()
    # What a device holds of the logits [rows, time, vocabulary]: its rows, and half the vocabulary.
    rows, half = ROWS // 4, MODEL.vocab_size // 2
    assert re.search(rf"f32\[({rows},)?\d+,{half}\]", program)
    gathered = re.findall(r"= \S*?\[([\d,]*)\]\S* all-gather", program)
    assert gathered, program
    assert not any(shape.endswith(f",{MODEL.vocab_size}") for shape in gathered)


def test_a_vocabulary_that_does_not_divide_stays_whole_and_changes_nothing():
    model = dataclasses.replace(MODEL, vocab_size=21)
    ground = ground_on((2, 2, 2), model)
    split = ground.policy_shapes()["embed"]["embedding"].sharding.spec
    assert tuple(split) == (None, "fsdp")
    even = ground_on((2, 2, 2)).policy_shapes()["embed"]["embedding"].sharding.spec
    assert tuple(even) == ("tensor", "fsdp")
    expected = train(make_dpo, ground_on((1, 1, 1), model))
    assert_same(train(make_dpo, ground), expected)


TOUR = Tour(seed=1, num_nodes=6, degree=2, num_goals=2, horizon=4)
SIZES = {"embed_dim": 32, "num_layers": 1, "num_heads": 4, "mlp_dim": 64}


@pytest.mark.parametrize(
    "sizes, mesh, message",
    [
        (
            {"num_heads": 2},
            {"data": 1, "tensor": 8},
            "model.num_heads 2 is not divisible by tensor=8; use 8, or a tensor axis of 1 or 2",
        ),
        (
            {"num_kv_heads": 1},
            {"data": 4, "tensor": 2},
            "model.kv_heads 1 is not divisible by tensor=2; use 2, or a tensor axis of 1",
        ),
        (
            {"embed_dim": 12, "num_heads": 2},
            {"data": 1, "fsdp": 8},
            "size 12 is not divisible by fsdp=8; use a size of 8 or 16, or split it",
        ),
        ({}, {"data": 3}, "data=3 x fsdp=1 x tensor=1 needs 3 devices and there are 8"),
        (
            {"sliding_window": 4},
            {"share_prompts": True},
            "share_prompts is true and the model has a sliding window of 4",
        ),
    ],
)
def test_networks_that_do_not_fit_the_mesh_are_refused(sizes, mesh, message):
    with pytest.raises(config.ConfigError, match=message):
        ground_of(TOUR, {**SIZES, **sizes}, config.MeshSection(**mesh))


@pytest.mark.parametrize(
    "section, platform, shared",
    [
        (None, "cpu", True),
        (None, "gpu", False),
        (True, "gpu", True),
        (False, "cpu", False),
    ],
)
def test_prompts_are_shared_where_it_is_said_or_known_to_pay(
    section, platform, shared, monkeypatch
):
    ground = ground_of(TOUR, SIZES, config.MeshSection(share_prompts=section))
    monkeypatch.setattr(sharding, "platform", lambda mesh: platform)
    assert isinstance(ground.group_logps_fn(4), SharedPrompts) == shared


@pytest.mark.parametrize(
    "section, message",
    [
        (
            config.SftSection(steps=1, batch_size=12),
            "batch_size 12 is not divisible by data=8 x fsdp=1; use 8 or 16",
        ),
        (
            config.RebelSection(steps=1, prompts_per_step=4),
            "prompts_per_step 4 is not divisible by data=8 x fsdp=1; use 8",
        ),
    ],
)
def test_batches_that_do_not_divide_are_refused_before_anything_is_compiled(
    section, message
):
    ground = ground_of(TOUR, SIZES, config.MeshSection())
    with pytest.raises(config.ConfigError, match=message):
        single.check(section, ground)


def test_not_a_number_is_skipped_on_a_mesh():
    ground = ground_on((2, 2, 2))
    compiled, params, batch = make_reward(ground)
    state = compiled.start(params)
    before = jax.tree.map(np.asarray, (state.params, state.opt_state))
    margin = jnp.full(ROWS, jnp.nan)
    bad = dataclasses.replace(batch, margin=jax.device_put(margin, batch_split(ground)))
    state, metrics = compiled.step(state, bad)
    assert metrics["skipped"] == 1 and state.step == 1
    after = jax.tree.map(np.asarray, (state.params, state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    state, metrics = compiled.step(state, batch)
    assert metrics["skipped"] == 0 and state.step == 2
    assert np.any(
        np.asarray(state.params["head"]["kernel"]) != params["head"]["kernel"]
    )


def batch_split(ground):
    return sharding.batch_sharding(ground.mesh)


def test_every_shard_leaves_out_its_own_chunks():
    """Some shards have nothing to score, some little: the same numbers and gradient as on one device."""
    tokens = random_tokens(0)
    scored = sequences(0).completion_mask & (np.arange(ROWS) < ROWS // 2)[:, None]
    weights = np.random.default_rng(8).normal(size=tokens.shape).astype(np.float32)

    def on(ground):
        logps_fn = transformer.token_logps_fn(MODEL, chunk_size=8, mesh=ground.mesh)

        def total(params, tokens, scored):
            logps = logps_fn(params, tokens, scored=scored)
            return jnp.sum(logps * weights), logps

        grad = jax.jit(jax.grad(total, has_aux=True))
        return jax.device_get(grad(placed(ground)[0], *ground.put((tokens, scored))))

    found, expected = on(ground_on(MESHES["2x2x2"])), on(ground_on((1, 1, 1)))
    assert (expected[1][scored][:, None] < 0).all() and not expected[1][~scored].any()
    chex.assert_trees_all_close(found, expected, atol=1e-5)
