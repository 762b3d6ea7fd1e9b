"""Shared prompts give the numbers of the plain layout, and hold no more than they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvjax import steps
from gvjax.models import groups, transformer
from gvjax.models.config import ModelConfig
from gvjax.types import PreferenceBatch, SequenceBatch, SharedPrompts

PROMPT, COMPLETION, GROUP = 7, 6, 3
SHAPE = {
    "vocab_size": 50,
    "embed_dim": 32,
    "num_layers": 1,
    "num_heads": 4,
    "mlp_dim": 64,
}


def ragged(rng, groups_of: int) -> SequenceBatch:
    """Three prompts of 7, 3 and 1 tokens; completions of 0 to 6 tokens, the first of the first group empty."""
    width = PROMPT + COMPLETION
    tokens = np.zeros((3 * groups_of, width), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row in range(len(tokens)):
        start = (PROMPT, 3, 1)[row // groups_of]
        count = rng.integers(1, COMPLETION + 1) if row else 0
        prompt = np.random.default_rng(row // groups_of).integers(1, 50, start)
        tokens[row, :start] = prompt
        tokens[row, start : start + count] = rng.integers(1, 50, count)
        mask[row, start : start + count] = True
    return SequenceBatch(tokens, mask)


def both(config: ModelConfig, group_size: int):
    plain, shared = transformer.token_logps_fn(config), groups.group_logps_fn(config)
    return plain, SharedPrompts(shared, plain, PROMPT, COMPLETION, group_size)


@pytest.mark.parametrize(
    "change",
    [
        {
            "num_kv_heads": 2,
            "attention_softcap": 5.0,
            "logit_softcap": 3.0,
            "scan_layers": True,
            "remat": "full",
        },
        {
            "learned_positions": 13,
            "norm": "layer",
            "tied_embeddings": False,
            "head_dim": 16,
        },
    ],
    ids=["capped", "learned positions, weights kept"],
)
def test_a_group_has_the_log_probabilities_and_gradients_of_its_rows(change):
    config = ModelConfig(**SHAPE, **change)
    params = transformer.init(jax.random.key(0), config)
    rng = np.random.default_rng(0)
    batch = ragged(rng, GROUP)
    weights = jnp.asarray(rng.normal(size=batch.tokens.shape), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def found(logps_fn, params):
        def weighed(params):
            logps = steps.completion_logps(logps_fn, params, batch)
            return jnp.sum(weights * logps), logps

        (_, logps), grads = jax.value_and_grad(weighed, has_aux=True)(params)
        return logps, grads

    plain, shared = (found(logps_fn, params) for logps_fn in both(config, GROUP))
    np.testing.assert_allclose(shared[0], plain[0], atol=1e-5)
    for one, other in zip(jax.tree.leaves(shared[1]), jax.tree.leaves(plain[1])):
        scale = max(1.0, float(jnp.abs(other).max()))
        np.testing.assert_allclose(one / scale, other / scale, atol=1e-5)


def test_pairs_share_their_prompt_whatever_stands_behind_the_completions():
    config = ModelConfig(**SHAPE)
    params = transformer.init(jax.random.key(0), config)
    rows = ragged(np.random.default_rng(0), 2)
    noise = np.where(rows.completion_mask, 0, 9) * (
        np.arange(rows.tokens.shape[1]) > PROMPT
    )
    pairs = PreferenceBatch(
        SequenceBatch(rows.tokens[::2], rows.completion_mask[::2]),
        SequenceBatch((rows.tokens + noise)[1::2], rows.completion_mask[1::2]),
    )
    add_ref = jax.jit(steps.with_ref_logps, static_argnums=0)
    plain, shared = (add_ref(logps_fn, params, pairs) for logps_fn in both(config, 2))
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        np.testing.assert_allclose(
            getattr(shared, name), getattr(plain, name), atol=1e-5
        )


def test_the_program_does_the_products_of_one_prompt():
    config = ModelConfig(**SHAPE)
    shapes = transformer.init_shapes(config)
    tokens = jax.ShapeDtypeStruct((16, 64 + 16), jnp.int32)
    mask = jax.ShapeDtypeStruct(tokens.shape, bool)
    plain = transformer.token_logps_fn(config)
    shared = SharedPrompts(groups.group_logps_fn(config), plain, 64, 16, 4)

    def flops(logps_fn):
        def score(params, tokens, mask):
            batch = SequenceBatch(tokens, mask)
            return steps.completion_logps(logps_fn, params, batch)

        return jax.jit(score).lower(shapes, tokens, mask).cost_analysis()["flops"]

    # 4 · 79 tokens a prompt against 64 + 4 · 15.
    assert flops(shared) < 0.45 * flops(plain)


def test_packed_and_narrow_batches_take_the_plain_layout():
    def never(*_):
        raise AssertionError("the prompt was shared")

    def plain(_, tokens, segments=None):
        return tokens * 0.5

    model = SharedPrompts(never, plain, PROMPT, COMPLETION, 2)
    wide = SequenceBatch(jnp.ones((2, 13), int), jnp.ones((2, 13), bool))
    with pytest.raises(AssertionError, match="was shared"):
        steps.completion_logps(model, None, wide)
    narrow = SequenceBatch(wide.tokens[:, :8], wide.completion_mask[:, :8])
    packed = SequenceBatch(wide.tokens, wide.completion_mask, wide.tokens)
    for batch in (narrow, packed):
        assert steps.completion_logps(model, None, batch).shape == batch.tokens.shape


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="sliding_window is 8"):
        groups.group_logps_fn(ModelConfig(**SHAPE, sliding_window=8))
    config = ModelConfig(**SHAPE)
    params = transformer.init(jax.random.key(0), config)
    batch = ragged(np.random.default_rng(0), GROUP)
    with pytest.raises(ValueError, match="9 rows are not whole groups of 2"):
        steps.completion_logps(both(config, 2)[1], params, batch)
