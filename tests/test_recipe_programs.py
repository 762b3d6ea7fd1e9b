"""Compiled steps, read: nothing as large as all logits, no way back to Python, the state's memory used again, and as many
operations as were counted."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from gvjax import config, logps, sharding
from gvjax.models import cost
from gvjax.models.config import ModelConfig
from gvjax.plan.fitting import RECOMPUTED
from gvjax.recipes import dpo, online_dpo, policy_gradient, ppo, reward, sft
from gvjax.recipes.ground import Ground
from gvjax.recipes.programs import sampler
from gvjax.types import (
    ActorCriticBatch,
    PolicyBatch,
    PreferenceBatch,
    SequenceBatch,
)

# A vocabulary that no other size is a multiple of, and enough rows that the logits take several chunks.
VOCABULARY, PROMPT, COMPLETION, ROWS = 331, 64, 64, 32
MODEL = ModelConfig(
    vocab_size=VOCABULARY, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=32
)


@pytest.fixture(scope="module")
def ground():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return Ground(MODEL, mesh, None, 0, PROMPT, COMPLETION)


def sequences(rows):
    shape = (rows, PROMPT + COMPLETION)
    tokens = np.random.default_rng(rows).integers(1, VOCABULARY, shape, np.int32)
    mask = np.broadcast_to(np.arange(shape[1]) >= PROMPT, shape)
    return SequenceBatch(tokens, np.array(mask))


def pairs():
    some = np.ones(ROWS // 2, np.float32)
    half = ROWS // 2
    return PreferenceBatch(sequences(half), sequences(half), some, some)


def rollouts():
    made = sequences(ROWS)
    floats = np.zeros(made.tokens.shape, np.float32)
    return PolicyBatch(made.tokens, made.completion_mask, floats, floats, floats)


def programs(ground):
    """Recipe -> (its compiled training, the parameters it starts from, a batch)."""
    policy = ground.policy_shapes()
    critic = ground.reward_model_shapes()
    sampling = {"prompts_per_step": ROWS // 2, "samples_per_prompt": 2}
    grpo = config.PolicyGradientSection(
        algorithm="grpo", kl_in="loss", kl_estimator="k3", **sampling
    )
    floats = rollouts().advantages
    return {
        "sft": (
            sft.program(ground, config.SftSection(batch_size=ROWS))[0],
            policy,
            sequences(ROWS),
        ),
        "reward": (
            reward.program(ground, config.RewardSection(batch_size=ROWS // 2))[0],
            critic,
            pairs(),
        ),
        "dpo": (
            dpo.program(ground, config.DpoSection(batch_size=ROWS // 2))[0],
            policy,
            pairs(),
        ),
        "online_dpo": (
            online_dpo.program(
                ground, config.OnlineDpoSection(prompts_per_step=ROWS // 2)
            )[0],
            policy,
            pairs(),
        ),
        "grpo": (policy_gradient.program(ground, grpo)[0], policy, rollouts()),
        "ppo": (
            ppo.program(ground, config.PpoSection(**sampling))[0],
            {"policy": policy, "value": critic},
            ActorCriticBatch(rollouts(), floats, floats),
        ),
    }


def compiled(ground, name):
    """(compiled program, bytes of the state)."""
    training, shapes, batch = programs(ground)[name]
    params = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), shapes)
    state = training.start(params)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    training.step(state, ground.put(batch))
    (program,) = training.programs
    return program, held


def sizes(text):
    """Every array shape in a program, as tuples."""
    found = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", text)
    return {tuple(map(int, each.split(","))) for each in found}


CALLBACKS = ("callback", "xla_python", "outfeed", "infeed", "SendToHost")


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "online_dpo", "grpo", "ppo"])
def test_a_compiled_step(name, ground, monkeypatch):
    # A batch this small would be one chunk.
    monkeypatch.setattr(logps, "KEPT_LOGITS", 1)
    program, held = compiled(ground, name)
    text = program.as_text()
    # All logits would be ROWS · T · V numbers in whatever order; a chunk of them is a quarter of that.
    everything = ROWS * (PROMPT + COMPLETION - 1) * VOCABULARY
    logits = [math.prod(s) for s in sizes(text) if VOCABULARY in s]
    assert logits, "the vocabulary is nowhere: this looks at the wrong program"
    if name == "reward":
        # Nobody takes any: tokens are looked up in the embedding, and its gradient is as large.
        assert max(logits) == VOCABULARY * MODEL.embed_dim
    else:
        assert everything / 8 < max(logits) < everything / 2
    assert not [word for word in CALLBACKS if word in text]
    # The old state's memory becomes the new one's, all of it.
    assert program.memory_analysis().alias_size_in_bytes >= held


def test_the_sampling_loop_never_asks_the_host(ground):
    prompts = sequences(8).tokens[:, :PROMPT]
    lengths = np.full(8, PROMPT, np.int32)
    lowered = sampler(ground, 2).lower(
        ground.policy_shapes(), prompts, lengths, jax.random.key(0), np.arange(8)
    )
    text = lowered.compile().as_text()
    assert text.count(" while(") >= 1
    assert not [word for word in CALLBACKS if word in text]
    # The logits of one step, and of no whole completion or prompt.
    logits = [math.prod(s) for s in sizes(text) if VOCABULARY in s]
    assert max(logits) <= max(16 * VOCABULARY, VOCABULARY * MODEL.embed_dim)


# Wide enough for what is not counted to be little: the optimizer, norms, and the masked half of attention.
WIDE = ModelConfig(
    vocab_size=VOCABULARY, embed_dim=128, num_layers=1, num_heads=2, mlp_dim=2048
)


def operations(model):
    """XLA's count of an SFT step whose layers are unrolled and whose logits are one chunk, over three forwards."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    wide = Ground(model, mesh, None, 0, PROMPT, COMPLETION)
    training, _ = sft.program(wide, config.SftSection(batch_size=4))
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), sequences(4)
    )
    program = training.lower_step(wide.policy_shapes(), batch).compile()
    ours = 4 * cost.TRAINING * cost.forward_flops(model, PROMPT + COMPLETION)
    return program.cost_analysis()["flops"] / ours


def test_a_training_step_does_the_operations_that_are_counted():
    """A forward more, as with everything recomputed, would be seen."""
    counted = {
        remat: operations(dataclasses.replace(WIDE, remat=remat))
        for remat in RECOMPUTED
    }
    assert 1 < counted["none"] < 1.1
    assert counted["none"] < counted["dots"] < 1.1
    assert 1.2 < counted["full"] < 1.35
    # Operations are less than the time that `gvjax plan` predicts: what moves between memory and chip comes on top.
    for remat, share in RECOMPUTED.items():
        assert counted[remat] <= counted["none"] * (1 + share)
