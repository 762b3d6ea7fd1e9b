"""Sampled completions: drawn from the scorer's distribution, whoever stands beside them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from gvjax import advantages, sampling, sharding, steps
from gvjax.models import decoding, heads, transformer
from gvjax.models.config import ModelConfig
from gvjax.types import Rollouts

CONFIG = ModelConfig(
    vocab_size=10, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=24
)
PROMPTS = jnp.array([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0]])
LENGTHS = jnp.array([4, 2, 1])
EOS = 8


@pytest.fixture(scope="module")
def params():
    # Large enough for distributions that are far from uniform.
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(0, 0.5, p.shape), jnp.float32),
        transformer.init_shapes(CONFIG),
    )


def bigram_decode(params, tokens, positions, cache):
    """The cheapest model: logits are a row of a table."""
    last = jnp.argmax(positions, axis=1)[:, None]
    return params[jnp.take_along_axis(tokens, last, axis=1)[:, 0]], cache


TRANSFORMER = (
    decoding.decode_fn(CONFIG),
    functools.partial(decoding.init_cache, CONFIG),
)
BIGRAM = (bigram_decode, lambda batch, length: {})
TABLE = jnp.asarray(np.random.default_rng(0).normal(0, 1.5, (9, 9)), jnp.float32)


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("settings",))
def jitted(model, params, prompts, lengths, key, prompt_ids, *, settings):
    return sampling.generate(
        *model,
        params,
        prompts,
        lengths,
        key,
        prompt_ids=prompt_ids,
        **dict(settings),
    )


def sample(params, prompts=PROMPTS, lengths=LENGTHS, key=0, prompt_ids=None, **given):
    settings = {"max_new_tokens": 6, "num_samples": 2, "eos_id": EOS, **given}
    if prompt_ids is None:
        prompt_ids = jnp.arange(len(prompts))
    return jitted(
        BIGRAM if params is TABLE else TRANSFORMER,
        params,
        prompts,
        lengths,
        jax.random.key(key),
        prompt_ids,
        settings=tuple(settings.items()),
    )


@pytest.fixture(scope="module")
def rollouts(params):
    return sample(params)


def test_sampler_and_scorer_agree(params, rollouts):
    scored = jax.jit(transformer.token_logps_fn(CONFIG))(params, rollouts.tokens)
    mask = np.asarray(rollouts.completion_mask)
    np.testing.assert_allclose(rollouts.logps[mask], scored[mask], atol=1e-5)
    assert np.all(np.asarray(rollouts.logps)[~mask] == 0)
    assert rollouts.sampler_logps is None and rollouts.rewards is None


def test_bfloat16_sampler_and_scorer_agree_within_rounding(params):
    # The two add in different orders what is rounded to 2⁻⁹; scores here are up to 20 in size.
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    settings = (("max_new_tokens", 6), ("num_samples", 2))
    key = jax.random.key(0)
    model = (
        decoding.decode_fn(config),
        functools.partial(decoding.init_cache, config),
    )
    drawn = jitted(
        model, params, PROMPTS, LENGTHS, key, jnp.arange(3), settings=settings
    )
    scored = transformer.token_logps_fn(config)(params, drawn.tokens)
    mask = np.asarray(drawn.completion_mask)
    np.testing.assert_allclose(drawn.logps[mask], scored[mask], atol=0.1)


def test_layout_is_prompt_completion_padding(rollouts):
    tokens, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.completion_mask)
    assert tokens.shape == (6, 10) and rollouts.logps.shape == (6, 10)
    lengths = np.repeat(LENGTHS, 2)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(tokens[row, :length], PROMPTS[row // 2, :length])
        count = mask[row].sum()
        assert count >= 1
        np.testing.assert_array_equal(
            np.flatnonzero(mask[row]), length + np.arange(count)
        )
        completion = tokens[row, length : length + count]
        # One EOS at the end, or none and all six tokens.
        assert EOS not in completion[:-1]
        assert (completion[-1] == EOS) != sampling.truncated(rollouts, EOS)[row]
        assert completion[-1] == EOS or count == 6
        assert np.all(tokens[row, length + count :] == 0)
    counts = mask.sum(axis=1)
    assert counts.min() < 6 and counts.max() == 6, "the seed shows both kinds"


def test_any_of_several_eos_tokens_ends_a_completion(params):
    """As chat models have them: one for texts and one for turns. Up to its end each row is the one that never ends."""
    ends = (EOS, 3)
    drawn = sample(params, eos_id=ends, key=1)
    endless = sample(params, eos_id=None, key=1)
    seen = set()
    for row in range(len(drawn.tokens)):
        (places,) = np.nonzero(drawn.completion_mask[row])
        completion = np.asarray(drawn.tokens)[row, places]
        np.testing.assert_array_equal(completion, endless.tokens[row, places])
        assert not np.isin(completion[:-1], ends).any()
        cut = bool(sampling.truncated(drawn, ends)[row])
        assert cut == (completion[-1] not in ends) == (len(completion) == 6 and cut)
        seen.add(int(completion[-1]) if not cut else "cut")
    assert seen >= set(ends), "the seed shows both"


def test_padding_that_looks_like_the_eos_changes_nothing():
    rollouts = sample(TABLE)
    same = sample(TABLE, pad_id=EOS)
    np.testing.assert_array_equal(same.completion_mask, rollouts.completion_mask)
    np.testing.assert_array_equal(same.logps, rollouts.logps)
    np.testing.assert_array_equal(
        sampling.truncated(same, EOS), sampling.truncated(rollouts, EOS)
    )
    mask = np.asarray(same.completion_mask)
    after = np.arange(10) >= np.repeat(LENGTHS, 2)[:, None]
    assert np.all(np.asarray(same.tokens)[after & ~mask] == EOS)


def test_a_row_draws_the_same_alone_with_wider_padding_and_a_longer_limit(
    params, rollouts
):
    prompt = jnp.array([[5, 6, 3, 3, 3, 3]])
    alone = sample(
        params, prompt, jnp.array([2]), prompt_ids=jnp.array([1]), max_new_tokens=8
    )
    for row in range(2):
        together = rollouts.tokens[2 + row, 2:8]
        count = int(rollouts.completion_mask[2 + row].sum())
        np.testing.assert_array_equal(alone.tokens[row, 2:8][:count], together[:count])
        np.testing.assert_allclose(
            alone.logps[row, 2 : 2 + count],
            rollouts.logps[2 + row, 2 : 2 + count],
            atol=1e-5,
        )


def test_a_cache_that_grows_is_one_of_full_length(params, monkeypatch):
    """Rows of all lengths: most end before the cache has grown, some behind."""
    stops = sampling._stops(4, 130)
    assert stops == [65, 130]

    def drawn():
        return sample(params, num_samples=4, max_new_tokens=130, eos_id=4)

    growing = drawn()
    monkeypatch.setattr(sampling, "_stops", lambda width, count: [count])
    jitted.clear_cache()
    whole = drawn()
    np.testing.assert_array_equal(growing.tokens, whole.tokens)
    np.testing.assert_array_equal(growing.completion_mask, whole.completion_mask)
    # Sums over more slots, of zeros, are added in another order.
    np.testing.assert_allclose(growing.logps, whole.logps, atol=1e-6)
    scored = jax.jit(transformer.token_logps_fn(CONFIG))(params, growing.tokens)
    mask = np.asarray(growing.completion_mask)
    np.testing.assert_allclose(growing.logps[mask], scored[mask], atol=1e-5)
    counts = mask.sum(axis=1)
    assert counts.min() < stops[0] < counts.max() < 130


def test_the_cache_grows_only_where_it_saves_an_eighth():
    assert sampling._stops(64, 448) == [112, 224, 336, 448]
    assert sampling._stops(128, 150) == [75, 150]
    assert sampling._stops(64, 64) == [64]
    assert sampling._stops(512, 128) == [128]


@pytest.mark.parametrize("window", [None, 3])
def test_samples_that_read_their_prompt_together_are_those_with_copies(
    window, params, monkeypatch
):
    """Prompts of three lengths; the rows' own cache grows once, and a window ends in the prompt or behind it."""
    monkeypatch.setattr(sampling, "_stops", lambda width, count: [4, count])
    jitted.clear_cache()
    config = dataclasses.replace(CONFIG, sliding_window=window)
    model = (
        decoding.decode_fn(config),
        functools.partial(decoding.init_cache, config),
    )
    settings = {"max_new_tokens": 9, "num_samples": 4, "eos_id": EOS}

    def drawn(**more):
        key = jax.random.key(0)
        given = tuple({**settings, **more}.items())
        return jitted(
            model, params, PROMPTS, LENGTHS, key, jnp.arange(3), settings=given
        )

    together, apart = drawn(share_prompts=True), drawn()
    jitted.clear_cache()
    np.testing.assert_array_equal(together.tokens, apart.tokens)
    np.testing.assert_array_equal(together.completion_mask, apart.completion_mask)
    np.testing.assert_allclose(together.logps, apart.logps, atol=1e-5)
    assert len(np.unique(np.asarray(together.tokens[:4]), axis=0)) > 1
    counts = together.completion_mask.sum(axis=1)
    assert counts.min() < 4 < counts.max()
    scored = jax.jit(transformer.token_logps_fn(config))(params, together.tokens)
    mask = np.asarray(together.completion_mask)
    np.testing.assert_allclose(together.logps[mask], scored[mask], atol=1e-5)


def test_a_group_shares_a_prefill_without_sharing_draws():
    group = sample(TABLE, num_samples=4)
    assert len(np.unique(np.asarray(group.tokens[:4]), axis=0)) > 1
    fewer = sample(TABLE, num_samples=2)
    for prompt in range(3):
        np.testing.assert_array_equal(
            group.tokens[4 * prompt : 4 * prompt + 2],
            fewer.tokens[2 * prompt : 2 * prompt + 2],
        )


def test_sampled_frequencies_are_the_softmax():
    # 4000 first and second tokens of one prompt; the p-values of a right sampler are uniform, and the key is fixed.
    drawn = sample(
        TABLE, PROMPTS[:1], LENGTHS[:1], num_samples=4000, max_new_tokens=2, eos_id=None
    )
    first, second = np.asarray(drawn.tokens[:, 4:6]).T
    check_frequencies(first, jax.nn.softmax(TABLE[4]))
    common = np.bincount(first).argmax()
    check_frequencies(second[first == common], jax.nn.softmax(TABLE[common]))


def check_frequencies(tokens, probabilities):
    counts = np.bincount(tokens, minlength=9)
    expected = np.asarray(probabilities, np.float64)
    expected = expected / expected.sum() * len(tokens)
    rare = expected < 5
    counts = [*counts[~rare], counts[rare].sum()]
    expected = [*expected[~rare], expected[rare].sum()]
    if expected[-1] < 1:
        assert counts[-1] <= 6
        counts, expected = counts[:-1], expected[:-1]
        expected = np.array(expected) * np.sum(counts) / np.sum(expected)
    assert len(counts) > 2
    assert stats.chisquare(counts, expected).pvalue > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.5},
        {"top_k": 2},
        {"top_p": 0.6},
        {"top_k": 3, "top_p": 0.7, "temperature": 2.0},
    ],
    ids=str,
)
def test_truncated_support_and_temperature(settings):
    drawn = sample(
        TABLE,
        PROMPTS[:1],
        LENGTHS[:1],
        num_samples=1000,
        max_new_tokens=1,
        eos_id=None,
        allow_truncated_support=True,
        **settings,
    )
    logits = TABLE[4]
    scaled = np.asarray(logits, np.float64) / settings.get("temperature", 1.0)
    order = np.argsort(-scaled)[: settings.get("top_k", 9)]
    p = np.exp(scaled[order]) / np.exp(scaled[order]).sum()
    kept = order[np.cumsum(p) - p < settings.get("top_p", 1.1)]
    allowed = np.zeros(9)
    allowed[kept] = np.exp(scaled[kept]) / np.exp(scaled[kept]).sum()

    tokens = np.asarray(drawn.tokens[:, 4])
    assert set(tokens) <= set(kept)
    check = np.bincount(tokens, minlength=9) / 1000
    np.testing.assert_allclose(check, allowed, atol=0.06)
    # Both kinds of log-probability, and they differ.
    np.testing.assert_allclose(
        drawn.logps[:, 4], jax.nn.log_softmax(logits)[tokens], atol=1e-5
    )
    np.testing.assert_allclose(
        drawn.sampler_logps[:, 4], np.log(allowed[tokens]), atol=1e-4
    )


def test_greedy_takes_the_likeliest():
    drawn = sample(TABLE, temperature=0.0, allow_truncated_support=True, eos_id=None)
    tokens = np.asarray(drawn.tokens)
    likeliest = np.argmax(TABLE, axis=1)
    for row, length in enumerate(np.repeat(LENGTHS, 2)):
        before, after = tokens[row, length - 1 : length + 5], tokens[row, length:][:6]
        np.testing.assert_array_equal(after, likeliest[before])
    assert not np.any(drawn.sampler_logps)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"top_k": 3}, "top_k=3"),
        ({"top_p": 0.9}, "allow_truncated_support"),
        ({"temperature": 0.0}, "never draw some tokens"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": 0.0, "top_k": 3}, "do nothing"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        sample(TABLE, **settings)


def counting(next_tokens, calls):
    """A model of one-hot logits that draws `next_tokens[step]`, and counts how often it is run."""
    next_tokens = jnp.asarray(next_tokens)

    def decode_fn(params, tokens, positions, cache):
        jax.debug.callback(lambda: calls.append(1))
        logits = 100.0 * jax.nn.one_hot(next_tokens[:, cache["step"]], 9)
        return logits, {**cache, "step": cache["step"] + 1}

    return decode_fn, lambda batch, length: {"step": jnp.int32(0)}


@pytest.mark.parametrize("eos_id, runs", [(EOS, 3), (None, 160)])
def test_the_loop_ends_with_its_last_row(eos_id, runs):
    calls = []
    script = [[1, EOS, *[2] * 158], [1, 1, EOS, *[2] * 157]]
    decode_fn, init_cache = counting(script, calls)
    drawn = sampling.generate(
        decode_fn,
        init_cache,
        {},
        PROMPTS[:2],
        LENGTHS[:2],
        jax.random.key(0),
        max_new_tokens=160,
        eos_id=eos_id,
    )
    jax.effects_barrier()
    assert len(calls) == runs
    expected = [2, 3] if eos_id else [160, 160]
    np.testing.assert_array_equal(drawn.completion_mask.sum(axis=1), expected)


@pytest.mark.parametrize(
    ("compact", "batches"),
    [(None, [12] * 40), (1, [12] * 6 + [6] * 3 + [3] * 31), (4, [12] * 8 + [4] * 32)],
)
def test_rows_that_have_ended_are_run_no_more(compact, batches):
    """Twelve rows, of which row r ends after r tokens, the last after 40: the numbers that the model is run for."""
    calls = []
    ends = np.array([7, 40, 3, 9, 4, 8, 2, 10, 11, 5, 6, 4])

    def decode_fn(params, tokens, positions, cache):
        jax.debug.callback(lambda: calls.append(len(tokens)))
        drawn = positions.max(axis=1) - 3
        token = jnp.where(drawn + 1 >= cache["ends"], EOS, 1)
        return 100.0 * jax.nn.one_hot(token, 9), cache

    drawn = sampling.generate(
        decode_fn,
        lambda batch, length: {"ends": jnp.asarray(ends[:batch])},
        {},
        jnp.ones((12, 4), jnp.int32),
        jnp.full(12, 4),
        jax.random.key(0),
        max_new_tokens=50,
        eos_id=EOS,
        compact=compact,
    )
    jax.effects_barrier()
    np.testing.assert_array_equal(drawn.completion_mask.sum(axis=1), ends)
    assert calls == batches


@pytest.mark.parametrize("share_prompts", [False, True])
def test_leaving_out_what_has_ended_changes_nothing(share_prompts, params):
    prompts, lengths = jnp.tile(PROMPTS, (4, 1)), jnp.tile(LENGTHS, 4)
    settings = {"max_new_tokens": 40, "temperature": 0.5}
    whole = sample(params, prompts, lengths, **settings)
    alone = sample(
        params, prompts, lengths, **settings, compact=2, share_prompts=share_prompts
    )
    counts = np.sort(whole.completion_mask.sum(axis=1))
    # Both gatherings take place, and some rows outlive them.
    assert counts[12] < counts[17] - 1 < counts[-1] - 5
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_second_call_compiles_nothing():
    first = sample(TABLE)
    before = jitted._cache_size()
    again = sample(TABLE, PROMPTS[::-1], LENGTHS[::-1], key=1)
    assert jitted._cache_size() == before
    assert not np.array_equal(again.tokens, first.tokens)


@pytest.mark.parametrize(
    "settings", [{}, {"share_prompts": True}, {"share_prompts": True, "compact": 4}]
)
def test_one_program_generates_scores_and_differentiates_on_a_mesh(
    settings, params, rollouts
):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    logps_fn = transformer.token_logps_fn(CONFIG, mesh=mesh)
    prompts = jnp.concatenate([PROMPTS, PROMPTS[:1]])
    lengths = jnp.concatenate([LENGTHS, LENGTHS[:1]])

    @jax.jit
    def program(params, prompts, lengths):
        drawn = sampling.generate(
            decoding.decode_fn(CONFIG, mesh=mesh),
            functools.partial(decoding.init_cache, CONFIG, mesh=mesh),
            decoding.decode_params(CONFIG, params),
            prompts,
            lengths,
            jax.random.key(0),
            max_new_tokens=6,
            num_samples=2,
            eos_id=EOS,
            **settings,
        )
        gradient = jax.grad(lambda p: jnp.sum(logps_fn(p, drawn.tokens)))(params)
        return drawn, gradient

    splits = sharding.shardings(mesh, params, transformer.PARTITION_RULES)
    # Nine tokens do not divide over two devices: the vocabulary stays whole here.
    drawn, gradient = program(
        jax.device_put(params, splits), *sharding.put_batch(mesh, (prompts, lengths))
    )
    np.testing.assert_array_equal(drawn.tokens[:6], rollouts.tokens)
    np.testing.assert_allclose(drawn.logps[:6], rollouts.logps, atol=1e-5)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))


def test_one_program_generates_judges_and_updates(params, rollouts):
    """Samples, the rewards of a reward model, and the update that they make; nothing scores the samples again."""
    tx = optax.sgd(0.1)
    judge = heads.init(jax.random.key(1), CONFIG, params, zero=False)
    reward_fn = heads.reward_fn(CONFIG)
    step = steps.make_policy_gradient_step(transformer.token_logps_fn(CONFIG), tx)

    @jax.jit
    def program(state):
        drawn = sampling.generate(
            *TRANSFORMER,
            decoding.decode_params(CONFIG, state.params),
            PROMPTS,
            LENGTHS,
            jax.random.key(0),
            max_new_tokens=6,
            num_samples=2,
            eos_id=EOS,
        )
        rewards = reward_fn(judge, drawn.tokens, drawn.completion_mask)
        batch = steps.policy_batch(drawn, advantages.leave_one_out(rewards, 2))
        return drawn, rewards, step(state, batch)

    drawn, rewards, (updated, metrics) = program(steps.init_train_state(params, tx))
    np.testing.assert_array_equal(drawn.tokens, rollouts.tokens)
    alone = jax.jit(reward_fn)(judge, rollouts.tokens, rollouts.completion_mask)
    np.testing.assert_allclose(rewards, alone, atol=1e-4)
    assert np.std(rewards) > 0.1
    # The log-probabilities of the sampler are the old ones, and the update's forward agrees.
    for extreme in ("min", "max"):
        ratio = metrics[f"sampling/importance_sampling_ratio/{extreme}"]
        np.testing.assert_allclose(ratio, 1, atol=1e-4)
    # At ratio 1 the loss is minus the mean advantage of a token.
    of_rows = np.asarray(advantages.leave_one_out(rewards, 2))
    tokens = np.sum(drawn.completion_mask, axis=1)
    expected = -np.sum(of_rows * tokens) / np.sum(tokens)
    np.testing.assert_allclose(metrics["loss"], expected, atol=1e-3)
    moved = jax.tree.map(lambda new, old: jnp.any(new != old), updated.params, params)
    assert updated.step == 1 and all(jax.tree.leaves(moved))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_has_the_configs_dtype_and_a_head_a_key(dtype):
    cache = decoding.init_cache(dataclasses.replace(CONFIG, dtype=dtype), 3, 9)
    assert CONFIG.kv_heads == 2 < CONFIG.num_heads
    arrays = [*cache["keys"], *cache["values"]]
    assert len(arrays) == 2 * CONFIG.num_layers
    for array in arrays:
        assert array.shape == (3, 2, 9, CONFIG.width)
        assert array.dtype == dtype


def test_no_uniform_number_draws_a_token_of_probability_0():
    logits = jnp.array([[-jnp.inf, 0.0, -jnp.inf, 1.0, -jnp.inf]] * 2)
    extremes = jnp.array([0.0, 1.0 - 2.0**-24])
    np.testing.assert_array_equal(sampling._inverse_cdf(logits, extremes), [1, 3])
    # Of a larger vocabulary, whose sums are made in blocks.
    few = jnp.full((2, 1000), -jnp.inf).at[:, [130, 131, 700]].set(0.0)
    np.testing.assert_array_equal(sampling._inverse_cdf(few, extremes), [130, 700])


@pytest.mark.parametrize("vocabulary", [1, 7, 512, 1000])
def test_the_token_drawn_is_where_the_cumulative_probability_passes(vocabulary):
    rng = np.random.default_rng(vocabulary)
    logits = 3 * rng.normal(size=(200, vocabulary)).astype(np.float32)
    uniform = rng.random(200, np.float32)
    uniform[100:] = 1 - 2.0**-24
    drawn = np.asarray(sampling._inverse_cdf(jnp.asarray(logits), jnp.asarray(uniform)))
    weights = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float64)
    ends = np.cumsum(weights, axis=1)
    ends /= ends[:, -1:]
    rows = np.arange(200)
    starts = np.where(drawn > 0, ends[rows, drawn - 1], 0.0)
    assert np.all(starts <= uniform + 1e-6) and np.all(
        uniform < ends[rows, drawn] + 1e-6
    )


def test_best_of_n_takes_the_best_of_each_group():
    tokens = jnp.arange(12).reshape(6, 2)
    rollouts = Rollouts(tokens, tokens > 0, tokens * 1.0, rewards=jnp.arange(6.0))
    scores = jnp.array([0.0, 3.0, 1.0, 5.0, 5.0, -jnp.inf])
    best = sampling.best_of_n(rollouts, scores, 3)
    np.testing.assert_array_equal(best.tokens, tokens[jnp.array([1, 3])])
    np.testing.assert_array_equal(best.rewards, [1.0, 3.0])
    with pytest.raises(ValueError, match="6 rows are not whole groups of 4"):
        sampling.best_of_n(rollouts, scores, 4)
