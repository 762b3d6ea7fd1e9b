"""What a recipe compiles: the very programs it runs, with the shapes it runs them on, and what lies beside them.

A stage holds more in memory than the program that is running: the reference policy while the policy is updated, the
optimizer while samples are drawn. `Stage.held` lists what lives as long as the stage; each program says which of it are
its arguments, and the rest is added to its peak.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gvjax import config, sharding
from gvjax.models import cost, lora
from gvjax.recipes import (
    dpo,
    hypo,
    online_dpo,
    policy_gradient,
    ppo,
    rebel,
    rejection,
    reward,
    sft,
)
from gvjax.recipes.ground import KEY_SHAPE, CompiledTraining, Ground
from gvjax.recipes.programs import in_parts, reward_scorer, sampler, scorer
from gvjax.types import (
    Params,
    PreferenceBatch,
    Rollouts,
    SequenceBatch,
    SharedPrompts,
)

TRAINING_ADAPTERS = 2
"""Forwards that one forward and the gradient of adapters cost: what they lie beside is frozen and has none."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call must do at least, on each device: arithmetic on the config, never the compiler's estimate.

    Attributes:
      flops: operations that the mathematics needs; what is recomputed to save memory is not counted.
      bytes: that must move between memory and chip.
    """

    flops: float = 0.0
    bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted program of a recipe.

    Attributes:
      name: what it does.
      key: equal for equal programs, so that recipes share compilations.
      lower: lowers it for ShapeDtypeStructs on the mesh, for all seeds that are done at once.
      seeds: that it runs for at once: all of them, or where it makes what one begins with, 1.
      arguments: which of the stage's `held` are its arguments or its results.
      early: it runs before there is a train state, so that neither its parameters nor the optimizer are there yet.
      donates: bytes per device that it must hand on in place; 0 where it donates nothing.
      cache: bytes per device of keys and values that it builds.
      work: on each device.
    """

    name: str
    key: Hashable
    lower: Callable[[], jax.stages.Lowered]
    seeds: int = 1
    arguments: tuple[str, ...] = ()
    early: bool = False
    donates: int = 0
    cache: int = 0
    work: Work = Work()


@dataclasses.dataclass(frozen=True)
class Stage:
    """One recipe, or one thing that a study does once.

    Attributes:
      name: for people.
      held: bytes per device of what stays in memory, by name, of one seed.
      programs: in the order in which they first run.
      batch: the field that says how many rows an update takes, with its value; None where nothing is trained.
      seeds: that are done at once.
    """

    name: str
    held: dict[str, int]
    programs: tuple[Program, ...]
    batch: tuple[str, int] | None = None
    seeds: int = 1

    def beside(self, program: Program) -> int:
        """Bytes per device of what lies in memory while a program runs and is not among its arguments."""
        total = 0
        for name, size in self.held.items():
            if program.early and name in _STATE:
                continue
            read = program.seeds if name in program.arguments else 0
            total += size * (self.seeds - read)
        return total


_STATE = ("params", "optimizer")


def bytes_per_device(tree: Any) -> int:
    """Bytes that each device holds of a tree of ShapeDtypeStructs with shardings."""

    def held(leaf: jax.ShapeDtypeStruct) -> int:
        shape = leaf.shape
        if leaf.sharding is not None:
            shape = leaf.sharding.shard_shape(shape)
        size = leaf.dtype.itemsize
        for side in shape:
            size *= side
        return size

    return sum(map(held, jax.tree.leaves(tree)))


def shared_by(ground: Ground, group: int) -> int:
    """Of `group` rows of one prompt in a row, for how many it is run once: for all, or for 1 where that does not pay."""
    model = ground.group_logps_fn(group)
    length = ground.prompt_length + ground.completion_length
    return group if isinstance(model, SharedPrompts) and model.pays(length) else 1


def forward_flops(
    ground: Ground, rows: int, *, scored: bool = True, group: int = 1
) -> float:
    """Operations of the forward pass of rows as long as may be, on all devices together.

    Args:
      ground: network, mesh and lengths.
      rows: sequences.
      scored: whether logits are taken, of completions; a reward model and a critic take none.
      group: rows in a row that have the same prompt, which a policy may share.
    """
    prompt, completion = ground.prompt_length, ground.completion_length
    if scored and shared_by(ground, group) > 1:
        return (
            rows / group * cost.grouped_flops(ground.model, prompt, completion, group)
        )
    return rows * cost.forward_flops(
        ground.model, prompt + completion, scored=completion if scored else 0
    )


def decode_bytes(ground: Ground, rows: int) -> float:
    """Bytes that one step of decoding must read on each device, caches half full of completions.

    Every data shard reads its own copy of the matrices, which the tensor axis alone splits.
    """
    own = -(-rows // sharding.batch_shards(ground.mesh))
    average = ground.prompt_length + ground.completion_length / 2
    return cost.decode_bytes(ground.model, own, average) / ground.mesh.shape["tensor"]


def stage_of(
    name: str,
    section: config.Recipe,
    ground: Ground,
    *,
    pairs: config.PairsSection | None,
    evaluated: int,
    select: str = "last",
    pooling: str = "sum",
    seeds: int = 1,
) -> Stage:
    """What a recipe holds and compiles.

    Args:
      name: for people.
      section: its settings.
      ground: network, mesh and lengths.
      pairs: the preference data that is sampled first; None where it comes from elsewhere or is not used.
      evaluated: prompts that the policy is judged on; 0: none.
      select: `best` keeps a second copy of the policy.
      pooling: of the reward model that scores.
      seeds: that are done at once.
    """
    parts = _Parts(ground, pooling, seeds)
    programs = list(parts.sampled_pairs(pairs)) if pairs is not None else []
    held = {"reference": bytes_per_device(parts.policy)}
    match section:
        case config.SftSection():
            compiled, _ = sft.program(ground, section)
            packed = section.packed_length
            batch: Any = parts.sequences(section.batch_size, packed)
            work = parts.training(section.batch_size, packed=packed)
            programs = [] if ground.checkpoint is not None else [parts.init_policy()]
            if ground.lora is None:
                held = {}
            training = parts.train(compiled, parts.trained, batch, work)
        case config.RewardSection():
            compiled, _ = reward.program(ground, section)
            packed = section.packed_length
            batch = parts.pairs(section.batch_size, packed)
            work = parts.training(
                2 * section.batch_size, parts.reward_model, packed=packed
            )
            programs.append(parts.init_reward_model(section.zero_head))
            training = parts.train(
                compiled, parts.reward_model, batch, work, source=(), base=False
            )
            pairs_read = pairs.heldout if pairs is not None else evaluated
            programs += [*training, parts.reward_scoring(parts.part(pairs_read))]
            return parts.stage(name, held, parts.reward_model, programs, section)
        case config.DpoSection():
            compiled, _ = dpo.program(ground, section)
            packed = section.packed_length
            batch = parts.pairs(section.batch_size, packed)
            group = compiled.group_size
            work = parts.training(2 * section.batch_size, packed=packed, group=group)
            training = parts.train(compiled, parts.trained, batch, work)
        case config.HypoSection():
            compiled, _ = hypo.program(ground, section)
            fresh = section.on_policy_prompts
            batch = (
                parts.pairs(section.batch_size),
                parts.sequences(fresh),
                parts.row(fresh),
            )
            work = parts.training(2 * section.batch_size + fresh)
            programs += [parts.sampling(fresh, 1), parts.scoring(fresh)]
            training = parts.train(compiled, parts.trained, batch, work)
        case config.OnlineDpoSection():
            compiled, _, pair_up, add_ref = online_dpo.program(ground, section)
            samples = section.samples_per_prompt
            rows = section.prompts_per_step * samples
            rollouts = parts.rollouts(rows)
            unreferenced = parts.made(pair_up, rollouts)
            batch = parts.made(add_ref, parts.policy, unreferenced)
            learned = 2 * len(batch.chosen.tokens)
            group = compiled.group_size
            work = parts.training(learned, group=group)
            programs += [
                parts.sampling(section.prompts_per_step, samples),
                *parts.judging(section.rewards, rows, held),
                parts.program("pair up", pair_up, rollouts),
                parts.program(
                    *("reference scoring", add_ref, parts.policy, unreferenced),
                    arguments=("reference",),
                    work=parts.forward(learned, group=group),
                ),
            ]
            training = parts.train(compiled, parts.trained, batch, work)
        case config.PolicyGradientSection() | config.PpoSection():
            by_ppo = isinstance(section, config.PpoSection)
            compiled, _, prepare = (ppo if by_ppo else policy_gradient).program(
                ground, section
            )
            samples = section.samples_per_prompt
            rows = section.prompts_per_step * samples
            programs += [
                parts.sampling(section.prompts_per_step, samples),
                *parts.judging(section.rewards, rows, held),
                parts.scoring(rows, group=1 if by_ppo else samples),
            ]
            rollouts, ref_logps = parts.rollouts(rows), parts.columns(rows)
            if by_ppo:
                trained = {"policy": parts.trained, "value": parts.reward_model}
                programs.insert(0, parts.init_reward_model(True))
                state = compiled.state_shapes(trained)
                prepared: tuple[Any, ...] = (
                    state.params["value"],
                    rollouts,
                    ref_logps,
                )
                read: tuple[str, ...] = ("params",)
            else:
                trained, prepared, read = parts.trained, (rollouts, ref_logps), ()
            batch, _ = parts.made(prepare, *prepared)
            work = parts.training(rows, group=compiled.group_size)
            if by_ppo:
                critic = parts.training(rows, parts.reward_model)
                work = Work(work.flops + critic.flops, work.bytes + critic.bytes)
            programs.append(
                parts.program("advantages", prepare, *prepared, arguments=read)
            )
            training = parts.train(compiled, trained, batch, work)
            policy = trained
            return parts.stage(
                *(name, held, policy, [*programs, *training], section),
                best=select == "best",
                evaluated=evaluated,
            )
        case config.RebelSection():
            compiled, _, prepare = rebel.program(ground, section)
            rows = 2 * section.prompts_per_step
            rollouts, ref_logps = parts.rollouts(rows), parts.columns(rows)
            batch, _ = parts.made(prepare, rollouts, ref_logps)
            programs += [
                parts.sampling(section.prompts_per_step, 2),
                *parts.judging(section.rewards, rows, held),
                parts.scoring(rows),
                parts.program("pair up", prepare, rollouts, ref_logps),
            ]
            work = parts.training(rows)
            training = parts.train(compiled, parts.trained, batch, work)
        case config.RejectionSection():
            compiled, _ = rejection.program(ground, section)
            rows = parts.part(ground.rows_per_call // section.n * section.n)
            batch = parts.sequences(section.batch_size)
            programs += [
                parts.sampling(rows // section.n, section.n),
                *parts.judging(section.rewards, rows, held),
            ]
            work = parts.training(section.batch_size)
            training = parts.train(compiled, parts.trained, batch, work)
        case config.BestOfNSection():
            prompts = parts.part(ground.rows_per_call // section.n)
            sampling = parts.sampling(prompts, section.n, arguments=("reference",))
            judging = parts.judging(section.rewards, prompts * section.n, held)
            return Stage(name, held, (*programs, sampling, *judging), seeds=seeds)
        case _:
            raise TypeError(f"no rule for what {type(section).__name__} compiles")
    return parts.stage(
        *(name, held, parts.trained, [*programs, *training], section),
        best=select == "best",
        evaluated=evaluated,
    )


class _Parts:
    """The shapes and programs that recipes share, on one ground."""

    def __init__(self, ground: Ground, pooling: str, seeds: int):
        self._ground = ground
        self._seeds = seeds
        self._pooling: Any = pooling
        self._split = sharding.batch_sharding(ground.mesh)
        self._length = ground.prompt_length + ground.completion_length
        self.policy: Params = ground.policy_shapes()
        self.trained: Params = ground.trained_shapes()
        self._base = self.policy if ground.lora is not None else None
        self.reward_model: Params = ground.reward_model_shapes()

    # Shapes.

    def _rows(self, *shape: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._split)

    def row(self, rows: int) -> Any:
        return self._rows(rows, dtype=jnp.float32)

    def columns(self, rows: int) -> Any:
        return self._rows(rows, self._length, dtype=jnp.float32)

    def sequences(self, rows: int, packed: int | None = None) -> SequenceBatch:
        """Of one sequence a row, or of several in rows of `packed` tokens."""
        shape = rows, packed or self._length
        tokens = self._rows(*shape, dtype=jnp.int32)
        mask = self._rows(*shape, dtype=jnp.bool_)
        return SequenceBatch(tokens, mask, tokens if packed else None)

    def pairs(self, rows: int, packed: int | None = None) -> PreferenceBatch:
        sequences = self.sequences(rows, packed)
        if packed is None:
            ref_logps = self.row(rows)
            return PreferenceBatch(sequences, sequences, ref_logps, ref_logps)
        # How many share a row is up to the data: those here have a quarter of the length that they may have.
        shape = rows, 4 * packed // self._length
        numbers = self._rows(*shape, dtype=jnp.float32)
        return PreferenceBatch(
            *(sequences, sequences, numbers, numbers),
            weight=numbers,
            swapped=self._rows(*shape, dtype=jnp.bool_),
        )

    def rollouts(self, rows: int) -> Rollouts:
        sequences = self.sequences(rows)
        return Rollouts(
            sequences.tokens,
            sequences.completion_mask,
            self.columns(rows),
            rewards=self.row(rows),
        )

    def made(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a program makes of shapes, put where a step wants it."""
        whole = NamedSharding(self._ground.mesh, P())

        def placed(leaf):
            where = self._split if leaf.ndim else whole
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        return jax.tree.map(placed, jax.eval_shape(function, *arguments))

    def part(self, rows: int) -> int:
        """Rows of one call when so many are walked through in parts."""
        return len(in_parts(self._ground, rows, self._ground.rows_per_call)[0])

    # Arithmetic.

    def _work(self, flops: float, data: float) -> Work:
        """Both are split over all devices, except that every data shard reads its own copy of the matrices, and are of all
        seeds that are done at once."""
        return Work(self._seeds * flops / self._ground.mesh.size, self._seeds * data)

    def _matrices(self, scored: bool) -> float:
        """Bytes of the network's matrices that one pass reads on each device."""
        model = self._ground.model
        numbers = cost.body_params(model) + scored * cost.head_params(model)
        return numbers * cost.ITEMSIZE[model.dtype] / self._ground.mesh.shape["tensor"]

    def forward(self, rows: int, *, scored: bool = True, group: int = 1) -> Work:
        flops = forward_flops(self._ground, rows, scored=scored, group=group)
        return self._work(flops, self._matrices(scored))

    def training(
        self,
        rows: int,
        trained: Params | None = None,
        *,
        packed: int | None = None,
        group: int = 1,
    ) -> Work:
        """An update of a policy; or of what has no logits and no adapters, if `trained` says so."""
        one = self.forward(rows, scored=trained is None, group=group)
        adapters = trained is None and self._base is not None
        forwards = TRAINING_ADAPTERS if adapters else cost.TRAINING
        changed = bytes_per_device(self.trained if trained is None else trained)
        # AdamW's 28 bytes of each 4.
        updated = self._seeds * cost.update_bytes(1) * changed / 4
        # Packed rows are full of sequences, here of ones as long as may be.
        flops = one.flops * (packed or self._length) / self._length
        return Work(forwards * flops, forwards * one.bytes + updated)

    # Programs.

    def program(
        self, name: str, function: Callable[..., Any], *arguments: Any, **more: Any
    ) -> Program:
        """A jitted function on shapes."""
        made_of = tuple(
            (leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(arguments)
        )
        held: tuple[str, ...] = more.pop("arguments", ())
        lower: Any = function
        seeds = self._seeds
        return Program(
            name,
            ("call", id(function), made_of, seeds),
            lambda: lower.lower(*arguments, count=seeds),
            seeds=seeds,
            arguments=held,
            **more,
        )

    def init_policy(self) -> Program:
        ground = self._ground
        return Program(
            "init", ("init", id(ground)), ground.lower_init_policy, early=True
        )

    def init_reward_model(self, zero_head: bool) -> Program:
        ground = self._ground
        return Program(
            "init reward model",
            ("init reward model", id(ground), zero_head),
            lambda: ground.lower_init_reward_model(zero_head=zero_head),
            arguments=("reference",),
            early=True,
        )

    def train(
        self,
        compiled: CompiledTraining,
        params: Params,
        batch: Any,
        work: Work,
        *,
        source: tuple[str, ...] = ("reference",),
        base: bool = True,
    ) -> list[Program]:
        """The making of the first state from `source`, or from what is let go of then, and the update.

        Where adapters are trained (and `base` says that it is a policy that is), the update reads the frozen weights.
        """
        state = compiled.state_shapes(params)
        frozen = self._base if base else None
        read = () if frozen is None else ("reference",)
        seeds = self._seeds
        return [
            Program(
                "start",
                ("start", id(self._ground), str(jax.tree.structure(state))),
                lambda: compiled.lower_start(params),
                arguments=(*_STATE, *(source if frozen is None else ())),
            ),
            Program(
                "train step",
                ("step", id(compiled), seeds),
                lambda: compiled.lower_step(params, batch, frozen, seeds),
                seeds=seeds,
                arguments=(*_STATE, *read),
                donates=seeds * bytes_per_device(state),
                work=work,
            ),
        ]

    def sampling(
        self,
        prompts: int,
        samples: int,
        arguments: tuple[str, ...] = ("params",),
        *,
        early: bool = False,
        temperature: float = 1.0,
    ) -> Program:
        """Prefill and decoding, one program."""
        ground = self._ground
        model, mesh = ground.model, ground.mesh
        shards = sharding.batch_shards(mesh)
        rows = prompts * samples
        flops = prompts * cost.grouped_flops(
            model, ground.prompt_length, ground.completion_length, samples
        )
        data = ground.completion_length * decode_bytes(ground, rows)
        split = mesh.shape["tensor"]
        cache = -(-rows // shards) * self._length * cost.cache_bytes(model) // split
        cache *= self._seeds
        ids = self._rows(prompts, dtype=jnp.int32)
        policy = self.policy
        if self._base is not None and "params" in arguments:
            policy = lora.adapted(self._base, self.trained)
            arguments = (*arguments, "reference")
        return self.program(
            f"sample {prompts} x {samples}",
            sampler(ground, samples, temperature),
            policy,
            self._rows(prompts, ground.prompt_length, dtype=jnp.int32),
            *(ids, KEY_SHAPE, ids),
            arguments=arguments,
            early=early,
            cache=cache,
            work=self._work(flops, data),
        )

    def scoring(self, rows: int, group: int = 1) -> Program:
        # Where nothing is shared, that of groups is the same program.
        group = shared_by(self._ground, group)
        return self.program(
            f"score {rows}" if group == 1 else f"score {rows} by {group}",
            scorer(self._ground, group),
            self.policy,
            self.sequences(rows),
            arguments=("reference",),
            work=self.forward(rows, group=group),
        )

    def reward_scoring(
        self, rows: int, arguments: tuple[str, ...] = ("params",)
    ) -> Program:
        sequences = self.sequences(rows)
        return self.program(
            f"reward scoring {rows}",
            reward_scorer(self._ground, self._pooling),
            self.reward_model,
            sequences.tokens,
            sequences.completion_mask,
            arguments=arguments,
            work=self.forward(rows, scored=False),
        )

    def judging(
        self, rewards: config.RewardSources, rows: int, held: dict[str, int]
    ) -> list[Program]:
        """Scoring by the reward model, which is held from then on; a verifier in Python compiles nothing."""
        if not rewards.reward_model:
            return []
        held["reward model"] = bytes_per_device(self.reward_model)
        return [self.reward_scoring(rows, arguments=("reward model",))]

    def sampled_pairs(self, pairs: config.PairsSection) -> list[Program]:
        half = self._ground.rows_per_call // 2
        prompts = len(in_parts(self._ground, pairs.count, half)[0])
        return [
            self.sampling(
                prompts,
                2,
                arguments=("reference",),
                early=True,
                temperature=pairs.temperature,
            )
        ]

    def stage(
        self,
        name: str,
        held: dict[str, int],
        trained: Params,
        programs: list[Program],
        section: config.Recipe,
        *,
        best: bool = False,
        evaluated: int = 0,
    ) -> Stage:
        """A stage that trains: what it holds in the end, and the judging of its policy."""
        params = bytes_per_device(trained)
        step = next(each for each in programs if each.name == "train step")
        optimizer = step.donates // self._seeds - params
        held = {"params": params, "optimizer": optimizer, **held}
        if best:
            held["best policy"] = bytes_per_device(self.policy)
        if evaluated and section.recipe != "sft":
            rows = self.part(evaluated)
            programs = [*programs, self.sampling(rows, 1), self.scoring(rows)]
        field = "batch_size" if hasattr(section, "batch_size") else "prompts_per_step"
        # What is judged with may be what was sampled or scored with before.
        once = {(each.key, each.arguments, each.early): each for each in programs}
        batch = (field, getattr(section, field))
        return Stage(name, held, tuple(once.values()), batch, self._seeds)
