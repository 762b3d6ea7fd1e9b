"""What the compiled programs hold: no whole logits, no call to the host, the old state's memory used again."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from gvjax import optim, sampling, steps
from gvjax.models import decoding, groups, transformer
from gvjax.models.config import ModelConfig
from gvjax.types import PreferenceBatch, SequenceBatch, SharedPrompts

ROWS, PROMPT, COMPLETION, VOCABULARY, CHUNK = 4, 40, 24, 113, 32
WIDTH = PROMPT + COMPLETION
CONFIG = ModelConfig(
    vocab_size=VOCABULARY, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=48
)


def shapes_of(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def most_logits(text: str) -> int:
    """Elements of the largest array in a program of which one axis is the vocabulary and none the embedding."""
    found = [0]
    for dims in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", text):
        shape = [int(size) for size in dims.split(",")]
        if VOCABULARY in shape and CONFIG.embed_dim not in shape:
            found.append(math.prod(shape))
    return max(found)


@functools.cache
def dpo(shared: bool) -> tuple[jax.stages.Compiled, int]:
    """A compiled DPO step, and the number of arrays in its state."""
    plain = transformer.token_logps_fn(CONFIG, chunk_size=CHUNK)
    grouped = groups.group_logps_fn(CONFIG, chunk_size=CHUNK)
    model = SharedPrompts(grouped, plain, PROMPT, COMPLETION, 2)
    logps_fn = model if shared else plain
    tx = optim.make_adamw(1e-3)
    state = jax.eval_shape(
        lambda: steps.init_train_state(transformer.init(jax.random.key(0), CONFIG), tx)
    )
    half = SequenceBatch(
        jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.int32),
        jax.ShapeDtypeStruct((ROWS, WIDTH), bool),
    )
    logps = jax.ShapeDtypeStruct((ROWS,), jnp.float32)
    batch = PreferenceBatch(half, half, logps, logps)
    step = jax.jit(steps.make_dpo_step(logps_fn, tx), donate_argnums=0)
    return step.lower(state, batch).compile(), len(jax.tree.leaves(state))


@functools.cache
def sampler() -> str:
    """The program that samples 3 completions of each of 4 prompts."""
    params = transformer.init_shapes(CONFIG)

    @jax.jit
    def sample(params, prompts, lengths, key):
        return sampling.generate(
            decoding.decode_fn(CONFIG),
            functools.partial(decoding.init_cache, CONFIG),
            decoding.decode_params(CONFIG, params),
            prompts,
            lengths,
            key,
            max_new_tokens=COMPLETION,
            num_samples=3,
            eos_id=1,
        )

    prompts = jax.ShapeDtypeStruct((ROWS, PROMPT), jnp.int32)
    lengths = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    key = shapes_of(jax.random.key(0))
    return sample.lower(params, prompts, lengths, key).compile().as_text()


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared prompts"])
def test_the_step_holds_a_chunk_of_the_logits_and_never_all(shared):
    logits = most_logits(dpo(shared)[0].as_text())
    # Chunks of one size: at most CHUNK positions each, a little fewer.
    assert 0 < logits <= CHUNK * VOCABULARY


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared prompts"])
def test_every_array_of_the_old_state_is_used_again(shared):
    compiled, arrays = dpo(shared)
    header = compiled.as_text().split("\n", 1)[0]
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", header)
    assert aliases is not None, header
    assert len(re.findall(r"(?:may|must)-alias", aliases[1])) == arrays


def test_no_program_calls_the_host():
    for text in (dpo(False)[0].as_text(), dpo(True)[0].as_text(), sampler()):
        assert not re.search(r"callback|infeed|outfeed|\bsend\(|\brecv\(", text)


def test_the_sampler_is_one_loop_whose_prompts_are_run_once():
    text = sampler()
    loops = [line for line in text.splitlines() if " while(" in line]
    # The decode loop alone carries the cache.
    carrying = [loop for loop in loops if f",{WIDTH},8]" in loop]
    assert len(carrying) == 1
    width = CONFIG.mlp_dim
    assert f"[{ROWS * PROMPT},{width}]" in text
    assert f"[{3 * ROWS * PROMPT},{width}]" not in text


def test_scores_of_one_layer_are_there_at_a_time():
    """Backwards they depend on nothing that comes backwards, and XLA would compute those of all layers at once."""
    rows, length, heads = 4, 256, 4

    def memory(layers: int) -> int:
        model = ModelConfig(
            vocab_size=16, embed_dim=8, num_layers=layers, num_heads=heads, mlp_dim=8
        )
        tx = optim.make_adamw(1e-3)
        state = jax.eval_shape(
            lambda: steps.init_train_state(
                transformer.init(jax.random.key(0), model), tx
            )
        )
        shape = rows, length
        batch = SequenceBatch(
            jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool)
        )
        logps_fn = transformer.token_logps_fn(model)
        step = jax.jit(steps.make_supervised_step(logps_fn, tx), donate_argnums=0)
        compiled = step.lower(state, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Blocks of 128 queries over 128 and over 256 keys.
    scores = 4 * rows * heads * 128 * (128 + 256)
    assert (memory(6) - memory(2)) / 4 < scores
