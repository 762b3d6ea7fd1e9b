"""What the compiled programs hold: no whole logits, no call to the host, the old state's memory used again."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from gvjax import optim, sampling, steps
from gvjax.models import decoding, groups, heads, transformer
from gvjax.models.config import ModelConfig
from gvjax.types import PreferenceBatch, SequenceBatch, SharedPrompts

ROWS, PROMPT, COMPLETION, VOCABULARY, CHUNK = 4, 40, 24, 113, 32
WIDTH = PROMPT + COMPLETION
CONFIG = ModelConfig(
    vocab_size=VOCABULARY, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=40
)
ONE_LAYER = dataclasses.replace(CONFIG, num_layers=1)


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
def dpo(shared: bool, config: ModelConfig = CONFIG) -> tuple[jax.stages.Compiled, int]:
    """A compiled DPO step, and the number of arrays in its state."""
    plain = transformer.token_logps_fn(
        config, chunk_size=CHUNK, shortest_prompt=PROMPT, platform="cpu"
    )
    grouped = groups.group_logps_fn(config, chunk_size=CHUNK)
    model = SharedPrompts(grouped, plain, PROMPT, COMPLETION, 2)
    logps_fn = model if shared else plain
    tx = optim.make_adamw(1e-3)
    state = jax.eval_shape(
        lambda: steps.init_train_state(transformer.init(jax.random.key(0), config), tx)
    )
    half = SequenceBatch(
        jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.int32),
        jax.ShapeDtypeStruct((ROWS, WIDTH), bool),
    )
    logps = jax.ShapeDtypeStruct((ROWS,), jnp.float32)
    batch = PreferenceBatch(half, half, logps, logps)
    step = jax.jit(steps.make_dpo_step(logps_fn, tx), donate_argnums=0)
    return step.lower(state, batch).compile(), len(jax.tree.leaves(state))


BFLOAT16 = dataclasses.replace(CONFIG, dtype="bfloat16")


def test_in_bfloat16_only_products_are():
    """Parameters, both moments, the loss and log-probabilities stay float32."""
    model = transformer.token_logps_fn(BFLOAT16, chunk_size=CHUNK, platform="cpu")
    tx = optim.make_adamw(1e-3)
    begun = jax.eval_shape(
        lambda: steps.init_train_state(
            transformer.init(jax.random.key(0), BFLOAT16), tx
        )
    )
    tokens = jax.ShapeDtypeStruct((2, WIDTH), jnp.int32)
    batch = SequenceBatch(tokens, jax.ShapeDtypeStruct((2, WIDTH), bool))
    step = steps.make_supervised_step(model, tx)
    state, metrics = jax.eval_shape(step, begun, batch)
    logps = jax.eval_shape(model, state.params, tokens)
    floats = [
        leaf
        for leaf in jax.tree.leaves((state, metrics, logps))
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    # Each parameter with its two moments, the metrics, and the log-probabilities.
    assert len(floats) == 3 * len(jax.tree.leaves(begun.params)) + len(metrics) + 1
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}

    text = jax.jit(step).lower(begun, batch).as_text()
    form = r"dot_general .*precision = \[(\w+), .*: \(tensor<([\dx]*)x(\w+)>, tensor<([\dx]*)x(\w+)>\)"
    products = re.findall(form, text)
    wide = [
        (left, right)
        for _, left_shape, left, right_shape, right in products
        if {str(CONFIG.mlp_dim), str(3 * CONFIG.embed_dim)}
        & set(f"{left_shape}x{right_shape}".split("x"))
    ]
    # The MLP's three matrices in each of two layers, and their two gradients each, at least.
    assert len(wide) >= 2 * 3 * 3
    assert set(wide) == {("bf16", "bf16")}
    for precision, *operands in products:
        if operands[1::2] != ["bf16", "bf16"]:
            # Rotations, and sums over what softmax takes.
            assert precision == "HIGHEST", operands


@functools.cache
def sampler(config: ModelConfig = CONFIG, share_prompts: bool = False) -> str:
    """The program that samples 3 completions of each of 4 prompts."""
    params = transformer.init_shapes(config)

    @jax.jit
    def sample(params, prompts, lengths, key):
        return sampling.generate(
            decoding.decode_fn(config),
            functools.partial(decoding.init_cache, config),
            decoding.decode_params(config, params),
            prompts,
            lengths,
            key,
            max_new_tokens=COMPLETION,
            num_samples=3,
            eos_id=1,
            share_prompts=share_prompts,
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


@pytest.mark.parametrize("share_prompts, slots", [(False, WIDTH), (True, COMPLETION)])
def test_samples_that_share_a_prompt_keep_their_own_tokens_only(share_prompts, slots):
    heads, width = CONFIG.num_heads, CONFIG.embed_dim // CONFIG.num_heads
    shape = rf"f32\[{3 * ROWS},{heads},(\d+),{width}\]"
    found = re.findall(shape, sampler(share_prompts=share_prompts))
    assert max(map(int, found)) == slots


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


def test_the_last_layer_runs_what_is_asked_for():
    """Of prompts the last token predicts; the others have done their part when the last layer has their keys and values."""
    width = CONFIG.mlp_dim
    of_completions = 2 * (COMPLETION - 1)
    judge = heads.reward_fn(ONE_LAYER, pooling="last", platform="cpu")
    trunk = jax.eval_shape(lambda: heads.init(jax.random.key(0), ONE_LAYER))
    rows = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.int32)
    mask = jax.ShapeDtypeStruct((ROWS, WIDTH), bool)
    judged = jax.jit(judge).lower(trunk, rows, mask).compile().as_text()
    for text, all_rows, asked_for in (
        (sampler(ONE_LAYER), ROWS * PROMPT, ROWS),
        (
            dpo(True, ONE_LAYER)[0].as_text(),
            ROWS * (PROMPT + of_completions),
            ROWS * (1 + of_completions),
        ),
        (
            dpo(False, ONE_LAYER)[0].as_text(),
            2 * ROWS * (WIDTH - 1),
            2 * ROWS * COMPLETION,
        ),
        (judged, ROWS * WIDTH, ROWS),
    ):
        assert f"[{asked_for},{width}]" in text
        assert f"[{all_rows},{width}]" not in text


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared prompts"])
def test_angles_are_computed_once_and_not_at_every_head(shared):
    """A loop over what reads them would hold their cosine, and compute it for every number it writes."""
    positions = ROWS * (PROMPT + 2 * COMPLETION) if shared else WIDTH
    loops = [c for c in dpo(shared)[0].as_text().split("\n\n") if " cosine(" in c]
    assert loops
    for loop in loops:
        found = re.search(r"ROOT \S+ = f32\[([\d,]+)\]", loop)
        assert found is not None, loop
        written = math.prod(map(int, found[1].split(",")))
        assert written <= positions * CONFIG.width // 2


def memory(model: ModelConfig, rows: int, length: int) -> int:
    """Bytes that an SFT step holds besides its state and its batch."""
    tx = optim.make_adamw(1e-3)
    state = jax.eval_shape(
        lambda: steps.init_train_state(transformer.init(jax.random.key(0), model), tx)
    )
    shape = rows, length
    batch = SequenceBatch(
        jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool)
    )
    logps_fn = transformer.token_logps_fn(model)
    step = jax.jit(steps.make_supervised_step(logps_fn, tx), donate_argnums=0)
    return step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes


def memory_of_a_layer(model: ModelConfig, rows: int, length: int) -> float:
    """By how much it grows with each layer."""
    deeper = dataclasses.replace(model, num_layers=model.num_layers + 4)
    return (memory(deeper, rows, length) - memory(model, rows, length)) / 4


def test_scores_of_one_layer_are_there_at_a_time():
    """Backwards they depend on nothing that comes backwards, and XLA would compute those of all layers at once."""
    rows, length, num_heads = 4, 256, 4
    model = ModelConfig(
        vocab_size=16, embed_dim=8, num_layers=2, num_heads=num_heads, mlp_dim=8
    )
    # Blocks of 128 queries over 128 and over 256 keys.
    scores = 4 * rows * num_heads * 128 * (128 + 256)
    assert memory_of_a_layer(model, rows, length) < scores


@pytest.mark.parametrize(
    ("gated", "activation", "kept"),
    [(True, "silu", 2), (False, "gelu_tanh", 1)],
)
def test_a_layer_keeps_what_enters_its_activation(gated, activation, kept):
    """And nothing that comes of it: arrays as wide as the MLP are the larger part of what the backward pass finds."""
    rows, length, width = 4, 64, 512
    model = ModelConfig(
        vocab_size=16,
        embed_dim=8,
        num_layers=2,
        num_heads=1,
        mlp_dim=width,
        mlp_gated=gated,
        activation=activation,
    )
    grown = memory_of_a_layer(model, rows, length)
    assert kept <= grown / (4 * rows * length * width) < kept + 0.5
