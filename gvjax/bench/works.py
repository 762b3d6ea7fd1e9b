"""The rows: for each what it runs, and what that must cost at least."""

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gvjax import config, steps
from gvjax.bench.footing import BATCHES, SEED, Footing
from gvjax.bench.timing import Work
from gvjax.checkpoint import Checkpoints
from gvjax.data import schema, sources
from gvjax.data.ahead import Ahead
from gvjax.data.batches import Batches
from gvjax.data.examples import Examples, LengthPolicy, encode_rows
from gvjax.data.tokenizer import ByteTokenizer
from gvjax.models import cost, decoding, heads
from gvjax.plan.programs import Program, decode_bytes, forward_flops, stage_of
from gvjax.recipes import dpo, online_dpo, policy_gradient, ppo, reward, sft
from gvjax.recipes.ground import CompiledTraining
from gvjax.recipes.loop import Clock
from gvjax.recipes.programs import reward_scorer, sampler, scorer
from gvjax.recipes.rows import role_key, role_rng
from gvjax.types import Params, PreferenceBatch, SequenceBatch

POOLING: heads.Pooling = "last"
"""What the reward model's head reads, as most published ones do."""


@contextlib.contextmanager
def work(name: str, footing: Footing) -> Iterator[Work]:
    """The work of a row, for as long as it is timed; what it held is freed behind it."""
    with contextlib.ExitStack() as stack:
        yield _MAKERS[name](footing, stack)


# Training.


def program_memory(program: jax.stages.Compiled, platform: str) -> int | None:
    """Bytes that a program holds at most on one device, by the compiler's account; None where it keeps none."""
    stats = program.memory_analysis()
    if stats is None:
        return None
    if platform != "cpu":
        # Arguments and temporaries together would count twice what is donated.
        return stats.peak_memory_in_bytes
    # There, the peak leaves the temporaries out.
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
    )


def _memory(compiled: CompiledTraining, platform: str) -> int | None:
    found = [program_memory(program, platform) for program in compiled.programs]
    return max((each for each in found if each is not None), default=None)


def planned_memory(
    footing: Footing, section: config.Recipe, compiled: CompiledTraining
) -> int | None:
    """Bytes on each device that `gvjax plan` finds a recipe to need: its largest program with what lies beside it.

    Args:
      footing: where it runs.
      section: its settings.
      compiled: its training, which has run: that program is not compiled again.

    Returns:
      None where the compiler keeps no account.
    """
    platform = footing.request.platform
    stage = stage_of(
        section.recipe,
        section,
        footing.ground,
        pairs=None,
        # A reward model is always judged on some pairs: on the fewest there can be.
        evaluated=1 if section.recipe == "reward" else 0,
        pooling=POOLING,
    )

    def peak(program: Program) -> int | None:
        if program.name == "train step":
            return _memory(compiled, platform)
        if program.key not in footing.peaks:
            made = program.lower().compile()
            footing.peaks[program.key] = program_memory(made, platform)
        return footing.peaks[program.key]

    found = [(peak(program), stage.beside(program)) for program in stage.programs]
    return max((p + beside for p, beside in found if p is not None), default=None)


def _accounts(
    footing: Footing, section: config.Recipe, compiled: CompiledTraining
) -> dict[str, Any]:
    """What is known of a recipe's memory beside what is measured."""
    return {
        "compiled_memory": functools.partial(
            _memory, compiled, footing.request.platform
        ),
        "planned_memory": functools.partial(planned_memory, footing, section, compiled),
    }


def _training(
    footing: Footing,
    section: config.Recipe,
    compiled: CompiledTraining,
    params: Params,
    batches: list[Any],
    **counts: Any,
) -> Work:
    state = compiled.start(params)

    def once(number: int, clock: Clock):
        nonlocal state
        with clock.part("data") as made:
            batch = footing.ground.put(batches[number % len(batches)])
            made.append(batch)
        state, metrics = compiled.step(state, batch)
        return metrics

    return Work(once, rest="train", **_accounts(footing, section, compiled), **counts)


def _of_sequences(
    footing: Footing, *, forwards: float, heads: bool, group: int = 1
) -> dict[str, Any]:
    """Counts of a step over the batch's sequences at full length, `group` in a row with one prompt."""
    sizes = footing.request.sizes
    flops = forward_flops(footing.ground, sizes.batch, scored=heads, group=group)
    return {"tokens": sizes.batch * sizes.length, "flops": forwards * flops}


def _sft(footing: Footing, stack) -> Work:
    size = footing.request.sizes.batch
    section = config.SftSection(batch_size=size)
    compiled, _ = sft.program(footing.ground, section)
    batches = [footing.sequences("sft", i, size) for i in range(BATCHES)]
    counts = _of_sequences(footing, forwards=cost.TRAINING, heads=True)
    start = footing.policy
    return _training(footing, section, compiled, start, batches, samples=size, **counts)


def _packed(
    footing: Footing,
    section: config.Recipe,
    compiled: CompiledTraining,
    kind: type[schema.Row],
) -> Work:
    """A step on rows of mixed lengths, as many to a batch as fill the positions of the full-length one."""
    sizes, model = footing.request.sizes, footing.request.model
    paired = kind is schema.PreferenceRow
    rows = sizes.batch // (2 if paired else 1)
    examples = _examples(footing, kind)
    if paired:
        logps = role_rng(SEED, "bench reference").uniform(-9, -1, (2, len(examples)))
        reference = logps.astype(np.float32)
        examples = dataclasses.replace(examples, ref_logps=(reference[0], reference[1]))
    packed = Batches(examples, batch_size=rows, seed=SEED, packing=True)
    every = [packed.batch_at(step) for step in range(packed.batches_per_epoch)]
    # One shape, the widest there is: the few that fill a shorter bucket would count their compiling.
    width = max(map(_width, every))
    full = [batch for batch in every if _width(batch) == width][:BATCHES]
    per_sequence = [
        cost.forward_flops(model, length, scored=scored)
        for batch in full
        for length, scored in _lengths(batch)
    ]
    tokens = [length for batch in full for length, _ in _lengths(batch)]
    return _training(
        footing,
        section,
        compiled,
        footing.policy,
        full,
        tokens=sum(tokens) // len(full),
        samples=len(tokens) // len(full) // (2 if paired else 1),
        flops=cost.TRAINING * sum(per_sequence) / len(full),
        padding=1 - sum(tokens) / len(full) / (sizes.batch * width),
    )


def _sides(batch: SequenceBatch | PreferenceBatch) -> list[SequenceBatch]:
    if isinstance(batch, PreferenceBatch):
        return [batch.chosen, batch.rejected]
    return [batch]


def _width(batch: SequenceBatch | PreferenceBatch) -> int:
    return _sides(batch)[0].tokens.shape[1]


def _lengths(batch: SequenceBatch | PreferenceBatch) -> list[tuple[int, int]]:
    """(tokens, completion tokens) of every sequence of a packed batch."""
    found = []
    for side in _sides(batch):
        for segments, mask in zip(np.asarray(side.segments), side.completion_mask):
            whole = np.bincount(segments)[1:]
            completions = np.bincount(segments[mask], minlength=len(whole) + 1)[1:]
            found += list(zip(whole.tolist(), completions.tolist()))
    return found


def _sft_packed(footing: Footing, stack) -> Work:
    section = _packed_sft(footing)
    compiled, _ = sft.program(footing.ground, section)
    return _packed(footing, section, compiled, schema.DemonstrationRow)


def _packed_sft(footing: Footing) -> config.SftSection:
    sizes = footing.request.sizes
    return config.SftSection(batch_size=sizes.batch, packed_length=sizes.length)


def _dpo_packed(footing: Footing, stack) -> Work:
    size = footing.request.sizes.batch // 2
    length = footing.request.sizes.length
    section = config.DpoSection(batch_size=size, beta=0.1, packed_length=length)
    compiled, _ = dpo.program(footing.ground, section)
    return _packed(footing, section, compiled, schema.PreferenceRow)


def _reward(footing: Footing, stack) -> Work:
    size = footing.request.sizes.batch // 2
    section = config.RewardSection(batch_size=size, pooling=POOLING)
    compiled, _ = reward.program(footing.ground, section)
    batches = [footing.pairs("reward", i, size) for i in range(BATCHES)]
    counts = _of_sequences(footing, forwards=cost.TRAINING, heads=False)
    start = footing.reward_model
    return _training(footing, section, compiled, start, batches, samples=size, **counts)


def _dpo(footing: Footing, stack) -> Work:
    size = footing.request.sizes.batch // 2
    section = config.DpoSection(batch_size=size, beta=0.1)
    compiled, _ = dpo.program(footing.ground, section)
    batches = [footing.pairs("dpo", i, size) for i in range(BATCHES)]
    counts = _of_sequences(footing, forwards=cost.TRAINING, heads=True, group=2)
    start = footing.policy
    return _training(footing, section, compiled, start, batches, samples=size, **counts)


def _reference(footing: Footing, stack) -> Work:
    size = footing.request.sizes.batch // 2
    ground = footing.ground
    score = jax.jit(functools.partial(steps.with_ref_logps, ground.logps_fn))
    batches = [footing.pairs("reference", i, size) for i in range(BATCHES)]

    def once(number: int, clock: Clock):
        scored = score(footing.policy, ground.put(batches[number % BATCHES]))
        return scored.ref_chosen_logps, scored.ref_rejected_logps

    counts = _of_sequences(footing, forwards=1, heads=True)
    return Work(once, samples=size, **counts)


# Rollouts.


def _prefill_program(footing: Footing) -> Callable[..., Any]:
    """`(params, tokens, lengths) -> logits, cache` after running prompts into an empty cache, as samplers do first."""
    model, mesh = footing.request.model, footing.request.mesh
    sizes = footing.request.sizes
    decode = decoding.decode_fn(model, mesh=mesh)

    @jax.jit
    def prefill(params, tokens, lengths):
        places = jnp.arange(sizes.prompt)[None]
        positions = jnp.where(places < lengths[:, None], places, -1)
        # As the sampler: room for the prompts alone, and more once they have been run.
        cache = decoding.init_cache(model, len(tokens), sizes.prompt, mesh=mesh)
        params = decoding.decode_params(model, params)
        return decode(params, tokens, positions, cache)

    return prefill


def _prefill(footing: Footing, stack) -> Work:
    sizes, model = footing.request.sizes, footing.request.model
    program = _prefill_program(footing)
    tokens, lengths, _ = footing.prompts("prefill", 0, sizes.batch)
    return Work(
        lambda number, clock: program(footing.policy, tokens, lengths),
        tokens=sizes.batch * sizes.prompt,
        samples=sizes.batch,
        flops=sizes.batch * cost.forward_flops(model, sizes.prompt, scored=1),
    )


def _decode(footing: Footing, stack) -> Work:
    """All steps of a completion together, less the prefill: one step alone would be timed with its launch."""
    sizes = footing.request.sizes
    prefill, sample = _prefill_program(footing), sampler(footing.ground, 1)
    tokens, lengths, ids = footing.prompts("decode", 0, sizes.batch)

    def once(number: int, clock: Clock):
        key = role_key(SEED, "bench decode", number)
        with clock.part("prefill") as made:
            made.append(prefill(footing.policy, tokens, lengths))
        with clock.part("generate") as made:
            rollouts = sample(footing.policy, tokens, lengths, key, ids)
            made.append(rollouts)
        return rollouts

    # The first token comes out of the prefill.
    count = sizes.completion - 1
    return Work(
        once,
        tokens=sizes.batch,
        samples=sizes.batch,
        moved=footing.request.mesh.size * decode_bytes(footing.ground, sizes.batch),
        reading=lambda _, parts: (parts["generate"] - parts["prefill"]) / count,
    )


def _round(
    footing: Footing,
    section: config.Recipe,
    compiled: CompiledTraining,
    start: Params,
    policy_of: Callable[[Params], Params],
    prepare: Callable[[Any, Any, Clock], Any],
    *,
    updates: int,
    flops: float,
) -> Work:
    """Generate, score, prepare (which takes the reference's log-probabilities) and update, as the recipes do."""
    sizes, ground = footing.request.sizes, footing.ground
    prompts = sizes.batch // sizes.group
    sample = sampler(ground, sizes.group)
    score = reward_scorer(ground, POOLING)
    state = compiled.start(start)
    # Made before the clock runs.
    reward_model = footing.reward_model

    def once(number: int, clock: Clock):
        nonlocal state
        with clock.part("data") as made:
            tokens, lengths, ids = footing.prompts("online", number, prompts)
            made.append(tokens)
        key = role_key(SEED, "bench online", number)
        with clock.part("generate") as made:
            rollouts = sample(policy_of(state.params), tokens, lengths, key, ids)
            made.append(rollouts)
        with clock.part("score") as made:
            rewards = score(reward_model, rollouts.tokens, rollouts.completion_mask)
            rollouts = dataclasses.replace(rollouts, rewards=rewards)
            made.append(rewards)
        with clock.part("reference") as made:
            batch = prepare(state.params, rollouts, clock)
            made.append(batch)
        for _ in range(updates):
            state, metrics = compiled.step(state, batch)
        return metrics

    model = footing.request.model
    made = prompts * cost.grouped_flops(
        model, sizes.prompt, sizes.completion, sizes.group
    )
    scored = forward_flops(ground, sizes.batch, scored=False)
    return Work(
        once,
        tokens=sizes.batch * sizes.length,
        samples=sizes.batch,
        flops=made + scored + flops,
        rest="train",
        **_accounts(footing, section, compiled),
    )


def _ref_logps(footing: Footing, rollouts, group: int = 1):
    sequences = SequenceBatch(rollouts.tokens, rollouts.completion_mask)
    return scorer(footing.ground, group)(footing.policy, sequences)


def _online_dpo(footing: Footing, stack) -> Work:
    sizes = footing.request.sizes
    prompts = sizes.batch // sizes.group
    section = config.OnlineDpoSection(
        prompts_per_step=prompts, samples_per_prompt=sizes.group
    )
    compiled, _, pair_up, add_ref = online_dpo.program(footing.ground, section)

    def prepare(params, rollouts, clock):
        return add_ref(footing.policy, pair_up(rollouts))

    # The best and the worst of each prompt are learned from.
    forward = forward_flops(footing.ground, 2 * prompts, group=2)
    return _round(
        footing,
        section,
        compiled,
        footing.policy,
        lambda params: params,
        prepare,
        updates=section.epochs,
        flops=(1 + cost.TRAINING * section.epochs) * forward,
    )


def _policy_gradient(footing: Footing, stack, **settings: Any) -> Work:
    sizes = footing.request.sizes
    section = config.PolicyGradientSection(
        prompts_per_step=sizes.batch // sizes.group,
        samples_per_prompt=sizes.group,
        **settings,
    )
    compiled, _, make_batch = policy_gradient.program(footing.ground, section)

    def prepare(params, rollouts, clock):
        return make_batch(rollouts, _ref_logps(footing, rollouts, sizes.group))[0]

    forward = forward_flops(footing.ground, sizes.batch, group=sizes.group)
    return _round(
        footing,
        section,
        compiled,
        footing.policy,
        lambda params: params,
        prepare,
        updates=section.epochs,
        flops=(1 + cost.TRAINING * section.epochs) * forward,
    )


def _ppo(footing: Footing, stack) -> Work:
    sizes = footing.request.sizes
    section = config.PpoSection(
        prompts_per_step=sizes.batch // sizes.group, samples_per_prompt=sizes.group
    )
    compiled, _, make_batch = ppo.program(footing.ground, section)
    critic = footing.ground.init_reward_model(
        role_key(SEED, "bench critic"), footing.policy, zero_head=True
    )

    def prepare(params, rollouts, clock):
        return make_batch(params["value"], rollouts, _ref_logps(footing, rollouts))[0]

    policy = forward_flops(footing.ground, sizes.batch)
    value = forward_flops(footing.ground, sizes.batch, scored=False)
    trained = cost.TRAINING * section.epochs
    return _round(
        footing,
        section,
        compiled,
        {"policy": footing.policy, "value": critic},
        lambda params: params["policy"],
        prepare,
        updates=section.epochs,
        flops=(1 + trained) * (policy + value),
    )


# Disk and data.


def _checkpoints(footing: Footing, stack: contextlib.ExitStack):
    """(checkpoints in a temporary directory, a train state)."""
    size = footing.request.sizes.batch
    compiled, _ = sft.program(footing.ground, config.SftSection(batch_size=size))
    state = compiled.start(footing.policy)
    directory = stack.enter_context(tempfile.TemporaryDirectory())
    kept = Checkpoints(pathlib.Path(directory), every_steps=1, keep_latest=1)
    stack.enter_context(kept)
    return kept, state


def _save(footing: Footing, stack: contextlib.ExitStack) -> Work:
    kept, state = _checkpoints(footing, stack)

    def once(number: int, clock: Clock):
        with clock.part("copy"):
            kept.save(number + 1, state, {})
        with clock.part("write"):
            kept.wait()

    return Work(once)


def _restore(footing: Footing, stack: contextlib.ExitStack) -> Work:
    kept, state = _checkpoints(footing, stack)
    kept.save(1, state, {})
    kept.wait()
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        ),
        state,
    )
    return Work(lambda number, clock: kept.restore(abstract).state)


def _text(footing: Footing, kind: type[schema.Row]) -> sources.Rows:
    """Rows of random letters of mixed lengths: from an eighth of the longest to all of it, with BOS and EOS."""
    sizes = footing.request.sizes
    rng = role_rng(SEED, "bench text")

    def letters(longest: int) -> str:
        count = int(rng.integers(max(longest // 8, 1), longest, endpoint=True))
        return bytes(rng.integers(97, 123, count, dtype=np.uint8)).decode()

    def row() -> schema.Row:
        first, second = (letters(sizes.completion - 1) for _ in range(2))
        prompt = letters(sizes.prompt - 1)
        if kind is schema.PreferenceRow:
            return schema.PreferenceRow(prompt, first, second)
        return schema.DemonstrationRow(prompt, first)

    # Enough for some batches of packed rows, each of which holds about two.
    return sources.from_rows([row() for _ in range(max(512, 12 * sizes.batch))])


def _examples(footing: Footing, kind: type[schema.Row]) -> Examples:
    sizes = footing.request.sizes
    # Quarters of the longest, so that a short row is not padded to the end.
    buckets = sorted({-(-sizes.length * part // 4) for part in (1, 2, 3, 4)})
    policy = LengthPolicy(tuple(each for each in buckets if each >= 2))
    return encode_rows(_text(footing, kind), ByteTokenizer(), policy)


def _encode(footing: Footing, stack) -> Work:
    rows = _text(footing, schema.PreferenceRow)
    policy = LengthPolicy((footing.request.sizes.length,))

    def once(number: int, clock: Clock):
        encode_rows(rows, ByteTokenizer(), policy)

    return Work(once, samples=len(rows))


def _data(footing: Footing, stack) -> Work:
    """SFT fed by the input pipeline; the first call, which does not count, runs a batch of every bucket.

    Each is a program of its own, and would otherwise be compiled in whichever call first meets it.
    """
    size, ground = footing.request.sizes.batch, footing.ground
    section = _packed_sft(footing)
    compiled, _ = sft.program(ground, section)
    state = compiled.start(footing.policy)
    examples = _examples(footing, schema.DemonstrationRow)
    batches = Batches(examples, batch_size=size, seed=SEED, packing=True)
    feed = Ahead(batches.batch_at)
    every = map(batches.batch_at, range(batches.batches_per_epoch))
    of_width = {_width(batch): batch for batch in every}

    def once(number: int, clock: Clock):
        nonlocal state
        while of_width:
            state, _ = compiled.step(state, ground.put(of_width.popitem()[1]))
        with clock.part("data"):
            # Not waited for: the copy to the device overlaps the step before, as in a run.
            batch = ground.put(feed(number))
        state, metrics = compiled.step(state, batch)
        return metrics

    return Work(
        once,
        samples=size,
        rest="train",
        **_accounts(footing, section, compiled),
    )


_MAKERS: dict[str, Callable[[Footing, contextlib.ExitStack], Work]] = {
    "sft": _sft,
    "sft_packed": _sft_packed,
    "reward": _reward,
    "dpo": _dpo,
    "dpo_packed": _dpo_packed,
    "reference": _reference,
    "online_dpo": _online_dpo,
    "rloo": functools.partial(_policy_gradient, algorithm="rloo"),
    "grpo": functools.partial(
        _policy_gradient,
        algorithm="grpo",
        kl_in="loss",
        kl_estimator="k3",
        kl_coef=0.04,
    ),
    "ppo": _ppo,
    "prefill": _prefill,
    "decode": _decode,
    "save": _save,
    "restore": _restore,
    "encode": _encode,
    "data": _data,
}
