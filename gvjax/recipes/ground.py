"""What every arm stands on: one network on one mesh, and the compiling of steps for it."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gvjax import config, lanes, optim, sharding, steps, tasks
from gvjax.models import (
    families,
    groups,
    heads,
    hf,
    lora,
    shapes,
    transformer,
)
from gvjax.models.config import ModelConfig
from gvjax.models.lora import LoraConfig
from gvjax.models.platforms import traits
from gvjax.tasks.task import Task
from gvjax.types import (
    EosId,
    LogpsFn,
    Metrics,
    Params,
    RewardFn,
    SharedPrompts,
    Step,
    TrainState,
)

Built = TypeVar("Built")


KEY_SHAPE = jax.eval_shape(lambda: jax.random.key(0))
"""What a random key is to a program that is lowered and not run."""

WHOLE_VOCABULARY_RULES = (
    ("embed/embedding", P(None, "fsdp")),
    ("unembed/kernel", P("fsdp", None)),
)
"""In front of a model's rules: its vocabulary is not split."""


@dataclasses.dataclass(frozen=True)
class Ground:
    """The static things that compiled programs depend on; two tasks of the same shape share their programs.

    Attributes:
      model: the network, of policies and of reward models' trunks.
      mesh: the devices.
      eos_id: the token that ends a completion, or several of which each does; None where all have `completion_length` tokens.
      pad_id: what stands behind completions.
      prompt_length, completion_length: the longest of each, in tokens.
      checkpoint: weights of transformers that policies start from; None starts from random ones.
      lora: what is trained instead of the whole policy; None trains all of it.
      rows_per_call: completions in one compiled call where nothing is learned.
      gather_for_sampling: sampling reads matrices that the fsdp axis does not split.
      compact_sampling: sampling goes on without the completions that have ended.
      share_prompts: the completions of one prompt are trained on with the prompt run once; None is where that is known to
        pay, on a CPU.
      shortest_prompt: tokens that every prompt has at least; 0 where that is not known.

    A policy is either plain parameters or, while adapters are trained, `lora.adapted(base, adapters)`; every function
    here takes both.
    """

    model: ModelConfig
    mesh: Mesh
    eos_id: EosId | None
    pad_id: int
    prompt_length: int
    completion_length: int
    checkpoint: str | None = None
    lora: LoraConfig | None = None
    rows_per_call: int = 512
    gather_for_sampling: bool = False
    compact_sampling: bool = False
    share_prompts: bool | None = None
    shortest_prompt: int = 0

    @property
    def logps_fn(self) -> LogpsFn:
        """Token log-probabilities of a policy."""
        plain = transformer.token_logps_fn(
            self.model, shortest_prompt=self.shortest_prompt, mesh=self.mesh
        )
        return plain if self.lora is None else of_params(plain, self.with_adapters)

    def group_logps_fn(self, group_size: int) -> LogpsFn | SharedPrompts:
        """The same for batches whose rows come in groups of one prompt, which is run once if prompts are shared."""
        shares = self.share_prompts
        if shares is None:
            shares = traits(sharding.platform(self.mesh)).shares_prompts
        if group_size == 1 or not shares or self.model.sliding_window is not None:
            return self.logps_fn
        model = SharedPrompts(
            groups.group_logps_fn(self.model, mesh=self.mesh),
            transformer.token_logps_fn(
                self.model, shortest_prompt=self.shortest_prompt, mesh=self.mesh
            ),
            self.prompt_length,
            self.completion_length,
            group_size,
        )
        return model if self.lora is None else of_params(model, self.with_adapters)

    def with_adapters(self, policy: Params) -> Params:
        """A policy as the decoder reads it: its adapters, if it has any, beside the frozen kernels."""
        if self.lora is None or "lora" not in policy:
            return policy
        base = jax.lax.stop_gradient(policy["base"])
        return lora.apply(base, policy["lora"], self.lora)

    def merged(self, policy: Params) -> Params:
        """A policy as plain parameters, its adapters added to the kernels."""
        if self.lora is None or "lora" not in policy:
            return policy
        return sharding.init_sharded(
            functools.partial(lora.merge, config=self.lora),
            self.mesh,
            self.rules,
            policy["base"],
            policy["lora"],
        )

    def reward_fn(self, pooling: heads.Pooling) -> RewardFn:
        """The reward model over this network's trunk."""
        return heads.reward_fn(
            self.model,
            pooling=pooling,
            shortest_prompt=self.shortest_prompt,
            mesh=self.mesh,
        )

    @property
    def rules(self) -> sharding.Rules:
        """Where every parameter lives, of policies and of reward models.

        A vocabulary that does not divide over the tensor axis stays whole on it: tasks have a few dozen tokens, and
        padding them up would put tokens into the model that no task knows.
        """
        rules: sharding.Rules = heads.PARTITION_RULES
        if self.lora is not None:
            rules = (*lora.PARTITION_RULES, *rules)
        if self.model.vocab_size % self.mesh.shape["tensor"] == 0:
            return rules
        return (*WHOLE_VOCABULARY_RULES, *rules)

    def put(self, batch: Any) -> Any:
        """A batch of host arrays, on the mesh."""
        return sharding.put_batch(self.mesh, batch)

    def init_policy(self, key: jax.Array) -> Params:
        """Parameters of a policy: the checkpoint's, else random ones.

        Raises:
          ConfigError: the checkpoint does not hold what its config says.
        """
        if self.checkpoint is not None:
            with config.refusing("model.checkpoint"):
                return hf.load_policy(
                    self.checkpoint,
                    shardings=lambda shapes: sharding.shardings(
                        self.mesh, shapes, self.rules
                    ),
                    dtype=self.model.dtype,
                )[1]
        return sharding.init_sharded(
            lambda key: transformer.init(key, self.model),
            self.mesh,
            self.rules,
            key,
        )

    def init_trained(self, key: jax.Array, policy: Params) -> Params:
        """What training a policy changes, at its start: the policy itself, or adapters that do nothing yet."""
        if (adapters := self.lora) is None:
            return policy
        return sharding.init_sharded(
            lambda key: lora.init(key, transformer.init_shapes(self.model), adapters),
            self.mesh,
            self.rules,
            key,
        )

    def init_reward_model(
        self, key: jax.Array, policy: Params, *, zero_head: bool
    ) -> Params:
        """A reward model that starts from a policy's trunk."""
        return sharding.init_sharded(
            lambda key, policy: heads.init(key, self.model, policy, zero=zero_head),
            self.mesh,
            self.rules,
            key,
            policy,
        )

    def lower_init_policy(self) -> jax.stages.Lowered:
        """The program of `init_policy` without a checkpoint, not yet compiled."""
        return sharding.lower_init(
            lambda key: transformer.init(key, self.model),
            self.mesh,
            self.rules,
            KEY_SHAPE,
        )

    def lower_init_reward_model(self, *, zero_head: bool) -> jax.stages.Lowered:
        """The program of `init_reward_model`, not yet compiled."""
        return sharding.lower_init(
            lambda key, policy: heads.init(key, self.model, policy, zero=zero_head),
            self.mesh,
            self.rules,
            KEY_SHAPE,
            self.policy_shapes(),
        )

    def trained_shapes(self) -> Params:
        """What training a policy changes, as ShapeDtypeStructs on this mesh: see `init_trained`."""
        if (adapters := self.lora) is None:
            return self.policy_shapes()
        made = transformer.init_shapes(self.model)
        return self._abstract(
            jax.eval_shape(lambda: lora.init(jax.random.key(0), made, adapters))
        )

    def policy_shapes(self) -> Params:
        """A policy's parameters as ShapeDtypeStructs on this mesh: what a restore aims at."""
        return self._abstract(transformer.init_shapes(self.model))

    def reward_model_shapes(self) -> Params:
        """A reward model's parameters as ShapeDtypeStructs on this mesh."""
        made = jax.eval_shape(lambda: heads.init(jax.random.key(0), self.model))
        return self._abstract(made)

    def _abstract(self, made: Params) -> Params:
        placed = sharding.shardings(self.mesh, made, self.rules)
        return sharding.abstract(made, placed)

    def compiler(
        self,
        make_step: Callable[[Any], Step],
        tx: optax.GradientTransformation,
        *,
        group_size: int = 1,
    ) -> "CompiledTraining":
        """A train step and the making of its first state, each compiled once for the mesh.

        Args:
          make_step: from the policy's LogpsFn, or its SharedPrompts, to the step.
          tx: its optimizer.
          group_size: rows in a row that share a prompt: 2 for pairs.
        """
        return CompiledTraining(self, make_step, tx, group_size)


def of_params(model: Any, change: Callable[[Params], Params]) -> Any:
    """The model, a LogpsFn or SharedPrompts, reading `change` of the parameters it is given."""
    if isinstance(model, SharedPrompts):
        return dataclasses.replace(
            model,
            logps_fn=of_params(model.logps_fn, change),
            plain=of_params(model.plain, change),
        )

    @functools.wraps(model)
    def logps_fn(params, *rest, **options):
        return model(change(params), *rest, **options)

    return logps_fn


class CompiledTraining:
    """A train step on a mesh: `start(params)` makes the state, `step(state, batch)` donates it and returns the next.

    Where adapters are trained the state holds them alone, and `step(state, batch, base)` is given the policy they are
    for, which it only reads: there is no second copy of the weights, in memory or in checkpoints.

    In lanes, `step` takes that of all of them at once.
    """

    def __init__(
        self,
        ground: Ground,
        make_step: Callable[[Any], Step],
        tx: optax.GradientTransformation,
        group_size: int = 1,
    ):
        self._ground = ground
        self._make_step = make_step
        self.group_size = group_size
        self._start = jax.jit(functools.partial(steps.init_train_state, tx=tx))
        self._layout: Any = None
        self._laying_out = threading.Lock()
        self._latest = threading.local()
        self._step: sharding.ShardedStep | None = None
        self._steps_of_lanes: dict[int, sharding.ShardedStep] = {}

    def start(self, params: Params) -> TrainState:
        """The state at step 0; it shares no buffer with `params`."""
        self._lay_out(params)
        return self._start(params)

    def state_shapes(self, params: Params) -> TrainState:
        """The state that `start` would make, as ShapeDtypeStructs on the mesh."""
        self._lay_out(params)
        return sharding.abstract(jax.eval_shape(self._start, params), self._layout)

    def lower_start(self, params: Params) -> jax.stages.Lowered:
        """The program of `start` for ShapeDtypeStructs, not yet compiled."""
        self._lay_out(params)
        return self._start.lower(params)

    def lower_step(
        self, params: Params, batch: Any, base: Params | None = None, count: int = 1
    ) -> jax.stages.Lowered:
        """The program of `step`, or that of `count` lanes, for ShapeDtypeStructs, not yet compiled."""
        arguments = (
            self.state_shapes(params),
            batch,
            *(() if base is None else (base,)),
        )
        if count > 1:
            return self._step_of(count).lower(*((leaf,) * count for leaf in arguments))
        assert self._step is not None
        return self._step.lower(*arguments)

    def _lay_out(self, params: Params) -> None:
        """Decides where the state lives: known once the parameters' shapes are."""
        with self._laying_out:
            if self._layout is not None:
                return
            state = jax.eval_shape(self._start, params)
            mesh, rules = self._ground.mesh, self._ground.rules
            layout = sharding.shardings(mesh, state, rules)
            self._start = jax.jit(self._start, out_shardings=layout)
            self._step = sharding.jit_step(self._plain_step, mesh, layout)
            self._layout = layout

    def _plain_step(self, state: TrainState, batch: Any, *base: Params):
        logps_fn = self._ground.group_logps_fn(self.group_size)
        if base:
            # Bound while tracing, so that gradients, moments and norms are the adapters' alone.
            logps_fn = of_params(
                logps_fn, lambda adapters: lora.adapted(base[0], adapters)
            )
        return self._make_step(logps_fn)(state, batch)

    def step(
        self, state: TrainState, batch: Any, base: Params | None = None
    ) -> tuple[TrainState, Metrics]:
        """One update of a batch that lies on the mesh."""
        if self._step is None:
            raise ValueError("make the state with start(params) first")
        # What another program made (rollouts, advantages) may lie otherwise; where it lies right, nothing moves.
        self._latest.batch = batch = jax.tree.map(self._place, batch)
        frozen = () if base is None else (base,)
        several = lanes.current()
        if several is None:
            state, metrics = self._step(state, batch, *frozen)
        else:
            state, metrics = several.meet(self._of_lanes, (state, batch, *frozen))
        return state, dict(metrics)

    def _of_lanes(self, calls: lanes.Calls) -> list[tuple[TrainState, Metrics]]:
        """The step of each lane, all by one program."""
        made: Any = self._step_of(len(calls))(*zip(*calls))
        return list(zip(*made))

    def _step_of(self, count: int) -> sharding.ShardedStep:
        if count not in self._steps_of_lanes:
            self._steps_of_lanes[count] = sharding.jit_step(
                self._plain_step_of_lanes, self._ground.mesh, (self._layout,) * count
            )
        return self._steps_of_lanes[count]

    def _plain_step_of_lanes(self, *arguments):
        states, metrics = zip(*lanes.over(self._plain_step)(tuple(zip(*arguments))))
        return states, metrics

    def _place(self, leaf: jax.Array) -> jax.Array:
        split = sharding.batch_sharding(self._ground.mesh)
        if jnp.ndim(leaf) == 0:
            split = NamedSharding(self._ground.mesh, P())
        return leaf if leaf.sharding == split else jax.device_put(leaf, split)

    @property
    def programs(self) -> tuple[jax.stages.Compiled, ...]:
        """The compiled step, one program for every shape of batch seen so far."""
        return () if self._step is None else self._step.programs

    def trained_on(self) -> Any:
        """The batch of the latest update that this thread made."""
        return getattr(self._latest, "batch", None)


def make_optimizer(
    section: config.OptimizerSection, updates: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The configured AdamW and its learning rate, for a run of so many updates."""
    schedule = optim.make_schedule(
        section.learning_rate,
        schedule=section.schedule,
        steps=updates,
        warmup_steps=section.warmup_steps,
    )
    tx = optim.make_adamw(
        schedule,
        b1=section.b1,
        b2=section.b2,
        eps=section.eps,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
    )
    return tx, schedule


def task_of(section: config.AnyTask, seed: int) -> Task:
    """The task instance of one seed; a dataset is the same for all of them.

    Raises:
      ConfigError: there is no such task or file, or it does not take an option.
    """
    if isinstance(section, config.DatasetSection):
        # Reading rows brings in libraries that take a second to import.
        from gvjax.recipes import reading

        return reading.dataset_of(section)
    options: dict[str, Any] = {"seed": seed, **section.options}
    try:
        return tasks.load(section.name, **options)
    except (ValueError, TypeError) as error:
        raise config.ConfigError(f"task: {error}") from None


def ground_of(
    task: Task,
    model: dict[str, Any],
    mesh: config.MeshSection,
    adapters: config.LoraSection | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Ground:
    """The ground for a task.

    Args:
      task: gives the vocabulary and the lengths.
      model: fields of ModelConfig without vocab_size, those of a network of `models.shapes` by its `shape`; or
        `checkpoint` and the fields that say how it is run.
      mesh: sizes of the mesh axes.
      adapters: what is trained in place of the whole policy.
      devices: of the mesh; all there are by default. Those of a topology description can be compiled for, not run on.

    Raises:
      ConfigError: a model field is unknown or impossible, the checkpoint is not one, or does not fit the task, or the
        mesh does not fit the devices or the network.
    """
    shape = (
        _shape_of_checkpoint(task, model)
        if "checkpoint" in model
        else _shape_of_fields(task, model)
    )
    with config.refusing("mesh"):
        placed = sharding.make_mesh(
            data=mesh.data, fsdp=mesh.fsdp, tensor=mesh.tensor, devices=devices
        )
        for name in ("num_heads", "kv_heads"):
            sharding.check_tensor_size(placed, getattr(shape, name), f"model.{name}")
        if mesh.share_prompts and shape.sliding_window is not None:
            raise ValueError(
                f"share_prompts is true and the model has a sliding window of {shape.sliding_window}, whose edge would lie"
                " elsewhere in every completion; leave it null"
            )
        ground = Ground(
            model=shape,
            mesh=placed,
            eos_id=task.eos_id,
            pad_id=task.pad_id,
            prompt_length=task.max_prompt_length,
            completion_length=task.max_completion_length,
            checkpoint=model.get("checkpoint"),
            rows_per_call=mesh.rows_per_call,
            gather_for_sampling=mesh.gather_for_sampling,
            compact_sampling=mesh.compact_sampling,
            share_prompts=mesh.share_prompts,
            shortest_prompt=getattr(task, "min_prompt_length", 0),
        )
        ground.policy_shapes()
    if adapters is None:
        return ground
    with config.refusing("lora"):
        chosen = LoraConfig(adapters.rank, adapters.alpha, adapters.targets)
        ground = dataclasses.replace(ground, lora=chosen)
        ground.trained_shapes()
    return ground


def _shape_of_checkpoint(task: Task, model: dict[str, Any]) -> ModelConfig:
    runtime = {name: value for name, value in model.items() if name != "checkpoint"}
    for name in runtime:
        if name not in families.RUNTIME:
            raise config.ConfigError(
                f"model.{name} is given beside model.checkpoint, whose config.json says what the network is; only"
                f" {', '.join(families.RUNTIME)} may be"
            )
    with config.refusing("model.checkpoint"):
        written = hf.read_config(hf.resolve(model["checkpoint"]))
        shape = families.model_config(written)
    fields = {
        each.name: getattr(shape, each.name) for each in dataclasses.fields(shape)
    }
    shape = config.dataclass_from(ModelConfig, {**fields, **runtime}, "model")
    if task.vocab_size > shape.vocab_size:
        raise config.ConfigError(
            f"the task's tokenizer has {task.vocab_size} tokens, but the model in {model['checkpoint']} only"
            f" {shape.vocab_size}; use the model's own tokenizer"
        )
    longest = written.get("max_position_embeddings")
    length = task.max_prompt_length + task.max_completion_length
    if longest is not None and length > longest:
        raise config.ConfigError(
            f"task.max_prompt and task.max_completion make {length} tokens, but the model in {model['checkpoint']} was"
            f" made for {longest}; lower them"
        )
    return shape


def _shape_of_fields(task: Task, model: dict[str, Any]) -> ModelConfig:
    if "vocab_size" in model:
        raise config.ConfigError(
            f"model.vocab_size is given, but the task has {task.vocab_size} tokens; take it out of the config"
        )
    if "shape" in model:
        model = {**_named_shape(model["shape"]), **model}
        del model["shape"]
    shape = config.dataclass_from(
        ModelConfig, {**model, "vocab_size": task.vocab_size}, "model"
    )
    length = task.max_prompt_length + task.max_completion_length
    if shape.learned_positions is not None and shape.learned_positions < length:
        raise config.ConfigError(
            f"model.learned_positions is {shape.learned_positions}, but prompt and completion have up to {length}"
            f" tokens; use at least {length}"
        )
    return shape


def _named_shape(name: Any) -> dict[str, Any]:
    """The fields of a named network that differ from a ModelConfig's own."""
    found = shapes.SHAPES[config.known(name, shapes.SHAPES, "model.shape")]
    return {
        field.name: getattr(found, field.name)
        for field in dataclasses.fields(found)
        if field.name != "vocab_size" and getattr(found, field.name) != field.default
    }


def cached(build: Callable[..., Built]) -> Callable[..., Built]:
    """Builds a program once for each (ground, settings), so that seeds and sweeps share compiled code.

    Everything a program depends on must be in its arguments: hashable values, or config sections. Lanes that ask at once
    get the same one.
    """
    built: dict[Any, Built] = {}
    building = threading.RLock()

    @functools.wraps(build)
    def lookup(*arguments):
        key = tuple(
            argument.model_dump_json()
            if isinstance(argument, config.Section)
            else argument
            for argument in arguments
        )
        with building:
            if key not in built:
                built[key] = build(*arguments)
            return built[key]

    return lookup
