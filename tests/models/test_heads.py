"""Rewards and values: poolings by hand, and nothing behind the completion counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvjax.models import heads, transformer
from gvjax.models.config import ModelConfig

CONFIG = ModelConfig(vocab_size=12, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=24)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 12, (3, 8)), jnp.int32)
# Prompts of 3, 2 and 4 tokens; completions of 4, 3 and none.
MASK = jnp.array([[0, 0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0, 0], [0] * 8], bool)
POOLINGS = [
    ("last", "completion"),
    ("mean", "completion"),
    ("sum", "completion"),
    ("mean", "all"),
    ("sum", "all"),
]


@pytest.fixture(scope="module")
def params():
    params = heads.init(jax.random.key(0), CONFIG, zero=False)
    return {**params, "head": {**params["head"], "bias": jnp.array([0.3])}}


@pytest.fixture(scope="module")
def scores(params):
    states = transformer.hidden(CONFIG, params["trunk"], TOKENS)
    head = params["head"]
    return np.asarray(states) @ np.asarray(head["kernel"][:, 0]) + 0.3


@pytest.mark.parametrize("shortest_prompt", [0, 2])
@pytest.mark.parametrize("pooling, over", POOLINGS)
def test_poolings_by_hand(params, scores, pooling, over, shortest_prompt):
    reward_fn = heads.reward_fn(
        CONFIG, pooling=pooling, over=over, shortest_prompt=shortest_prompt
    )
    got = reward_fn(params, TOKENS, MASK)
    first = (0, 0) if over == "all" else (3, 2)
    read = [scores[0, first[0] : 7], scores[1, first[1] : 5]]
    pool = {"last": lambda s: s[-1], "mean": np.mean, "sum": np.sum}[pooling]
    np.testing.assert_allclose(got, [pool(read[0]), pool(read[1]), 0], atol=1e-5)


@pytest.mark.parametrize("pooling, over", POOLINGS)
def test_what_follows_the_completion_changes_no_reward(params, pooling, over):
    rewards = jax.jit(heads.reward_fn(CONFIG, pooling=pooling, over=over))
    after = jnp.arange(8) > jnp.array([6, 4, 7])[:, None]
    other = jnp.pad(jnp.where(after, 9, TOKENS), ((0, 0), (0, 3)), constant_values=5)
    mask = jnp.pad(MASK, ((0, 0), (0, 3)))
    np.testing.assert_allclose(
        rewards(params, other, mask), rewards(params, TOKENS, MASK), atol=1e-5
    )


def test_token_rewards_add_up_to_the_sum(params):
    tokens = heads.token_rewards_fn(CONFIG)(params, TOKENS, MASK)
    rewards = heads.reward_fn(CONFIG, pooling="sum")(params, TOKENS, MASK)
    np.testing.assert_allclose(jnp.sum(tokens, axis=1), rewards, atol=1e-5)
    assert np.all((np.asarray(tokens) != 0) == np.asarray(MASK))


def test_a_value_knows_the_tokens_before_its_own(params, scores):
    values = heads.values_fn(CONFIG)
    got = values(params, TOKENS)
    np.testing.assert_allclose(got[:, 1:], scores[:, :-1], atol=1e-5)
    np.testing.assert_array_equal(got[:, 0], 0)
    changed = values(params, TOKENS.at[:, 4].set((TOKENS[:, 4] + 1) % 12))
    np.testing.assert_array_equal(changed[:, :5], got[:, :5])
    assert np.all(changed[:, 5] != got[:, 5])


def test_heads_start_at_zero_or_small_and_drop_the_unembedding():
    config = ModelConfig(
        vocab_size=12,
        embed_dim=512,
        num_layers=1,
        num_heads=2,
        mlp_dim=8,
        tied_embeddings=False,
    )
    policy = transformer.init(jax.random.key(0), config)
    zero = heads.init(jax.random.key(1), config, policy)
    assert "unembed" in policy and "unembed" not in zero["trunk"]
    assert zero["trunk"]["layers"] is policy["layers"]
    assert not np.any(zero["head"]["kernel"])
    small = heads.init(jax.random.key(1), config, policy, zero=False)
    np.testing.assert_allclose(np.std(small["head"]["kernel"]), 513**-0.5, rtol=0.15)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"over": "prompt"}, "over is 'prompt'"),
        ({"pooling": "last", "over": "all"}, "leave `over` at 'completion'"),
    ],
)
def test_impossible_poolings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        heads.reward_fn(CONFIG, **settings)
