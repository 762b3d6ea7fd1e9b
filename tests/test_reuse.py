"""The README's example in other people's code: the same lines with a Linen, an NNX and a bare-dict model."""

import contextlib
import io
import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gvjax

EXAMPLE = """\
import functools, gvjax, jax, optax

forward = lambda params, tokens: my_model.apply({"params": params}, tokens)  # logits [B, T, V]
logps_fn, tx = gvjax.logps_from_logits(forward), optax.adamw(5e-7)
add_ref = jax.jit(functools.partial(gvjax.with_ref_logps, logps_fn))
step = jax.jit(gvjax.make_dpo_step(logps_fn, tx, beta=0.1), donate_argnums=0)
state = gvjax.init_train_state(ref_params, tx)
for batch in preference_batches:  # gvjax.PreferenceBatch: tokens and masks of chosen and rejected
    state, metrics = step(state, add_ref(ref_params, batch))
    print(f"{metrics['loss']:.4f}")  # first 0.6931 = ln 2: the policy still is the reference
"""
ONLINE = """\
step = jax.jit(gvjax.make_policy_gradient_step(logps_fn, tx), donate_argnums=0)
state = gvjax.init_train_state(ref_params, tx)
for _ in range(rounds):
    rollouts = sample(state.params)  # gvjax.Rollouts: tokens, masks and logps of your sampler, rewards of your verifier
    advantages = gvjax.advantages.leave_one_out(rollouts.rewards, group_size=4)  # RLOO: 4 samples of each prompt
    state, metrics = step(state, gvjax.policy_batch(rollouts, advantages))
"""
FORWARD = 'my_model.apply({"params": params}, tokens)'
V, D = 11, 8


class Linen(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(V)(nn.Embed(V, D)(tokens))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.unembed = nnx.Linear(D, V, rngs=rngs)

    def __call__(self, tokens):
        return self.unembed(self.embed(tokens))


def linen():
    model = Linen()
    params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return FORWARD, {"my_model": model, "ref_params": params}


def nnx_model():
    graphdef, params = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param)
    names = {"nnx": nnx, "graphdef": graphdef, "ref_params": params}
    return "nnx.merge(graphdef, params)(tokens)", names


def bare_dict():
    rng = np.random.default_rng(0)
    shapes = {"embed": (V, D), "unembed": (D, V)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return 'params["embed"][tokens] @ params["unembed"]', {
        "ref_params": jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    }


def preference_batches(count=3):
    rng = np.random.default_rng(1)
    places = np.arange(10)
    for _ in range(count):
        ends = rng.integers(5, 11, (2, 4, 1))
        chosen, rejected = (
            gvjax.SequenceBatch(
                tokens=rng.integers(0, V, (4, 10), np.int32),
                completion_mask=(places >= 4) & (places < end),
            )
            for end in ends
        )
        yield gvjax.PreferenceBatch(chosen, rejected)


@pytest.mark.parametrize("make", [linen, nnx_model, bare_dict])
def test_the_example_prints_ln_2_first_and_then_learns(make):
    forward, names = make()
    before = jax.tree.map(np.asarray, names["ref_params"])
    example = EXAMPLE.replace(FORWARD, forward).replace("5e-7", "0.05")
    names["preference_batches"] = list(preference_batches()) * 4
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(example, names)
    losses = [float(line) for line in printed.getvalue().split()]
    assert printed.getvalue().startswith("0.6931\n")
    assert losses[0] == round(math.log(2), 4)
    assert losses[-1] < losses[1] < 1
    # The state was donated; the reference is still there, unchanged.
    jax.tree.map(np.testing.assert_array_equal, names["ref_params"], before)
    assert names["state"].step == 12


@pytest.mark.parametrize("make", [linen, nnx_model, bare_dict])
def test_the_online_example_raises_its_rewards(make):
    """The verifier likes one token; the sampler draws completions of four tokens, each by itself."""
    forward, names = make()
    rng = np.random.default_rng(2)
    prompts = np.repeat(rng.integers(0, V, (8, 3), np.int32), 4, axis=0)
    liked, rewards = 5, []

    def sample(params):
        tokens = jnp.asarray(np.pad(prompts, ((0, 0), (0, 4))))
        for place in range(3, 7):
            logits = names["forward"](params, tokens)[:, place - 1]
            drawn = rng.gumbel(size=logits.shape) + np.asarray(logits)
            tokens = tokens.at[:, place].set(drawn.argmax(1).astype(np.int32))
        mask = jnp.broadcast_to(jnp.arange(7) >= 3, tokens.shape)
        found = ((tokens == liked) & mask).sum(1).astype(jnp.float32)
        rewards.append(float(found.mean()))
        return gvjax.Rollouts(tokens, mask, names["logps_fn"](params, tokens), found)

    names |= {"preference_batches": [], "rounds": 40, "sample": sample}
    exec(EXAMPLE.replace(FORWARD, forward).replace("5e-7", "0.05") + ONLINE, names)
    assert np.mean(rewards[-5:]) > 2 * np.mean(rewards[:2])


def test_the_examples_are_the_readmes():
    readme = pathlib.Path(__file__).parents[1].joinpath("README.md").read_text()
    for example in (EXAMPLE, ONLINE):
        assert f"```python\n{example}```" in readme
