"""No dead knobs: every field of every recipe changes the traced program, or is read by what runs around it."""

import ast
import inspect
import re
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvjax import config, losses, steps
from gvjax.config import reading
from gvjax.recipes import (
    best_of_n,
    dpo,
    hypo,
    loop,
    online_dpo,
    policy_gradient,
    ppo,
    rebel,
    rejection,
    reward,
    sft,
    single,
)
from gvjax.types import ActorCriticBatch, PreferenceBatch, Rollouts, SequenceBatch

B, T = 8, 6
MODULES = {
    config.SftSection: sft,
    config.RewardSection: reward,
    config.DpoSection: dpo,
    config.HypoSection: hypo,
    config.OnlineDpoSection: online_dpo,
    config.PolicyGradientSection: policy_gradient,
    config.PpoSection: ppo,
    config.RebelSection: rebel,
    config.BestOfNSection: best_of_n,
    config.RejectionSection: rejection,
}

OPTIMIZER = {
    "learning_rate": 0.5,
    "schedule": "linear",
    "warmup_steps": 3,
    "b1": 0.5,
    "b2": 0.5,
    "eps": 0.5,
    "weight_decay": 0.5,
    "max_grad_norm": 0.5,
}
COSINE = {"learning_rate": 0.1, "schedule": "cosine"}
COMMON = {"steps": 11, "num_microbatches": 2}
ROUND = {**COMMON, "epochs": 3}
CLIPPED = {"algorithm": "grpo"}

# Section -> field -> (what else is set on both sides, the other value). These change the traced program.
TRACED = {
    config.SftSection: COMMON,
    config.RewardSection: {
        **COMMON,
        "pooling": "mean",
        "label_smoothing": 0.1,
        "centering": 0.1,
    },
    config.DpoSection: {
        **COMMON,
        "loss": "ipo",
        "loss_options": {"label_smoothing": 0.1},
        "beta": 0.7,
        "nll_weight": 0.5,
    },
    config.HypoSection: {**COMMON, "beta": 0.7, "kl_coef": 0.7},
    config.OnlineDpoSection: {
        **ROUND,
        "samples_per_prompt": 2,
        "labels": "soft",
        "beta": 0.7,
    },
    config.PolicyGradientSection: {
        **ROUND,
        "algorithm": "grpo",
        "samples_per_prompt": 2,
        "kl_coef": 0.7,
        "kl_in": ({"kl_estimator": "k1", "kl_coef": 0.0}, None),
        "kl_estimator": ({"kl_in": "loss", "kl_estimator": "k2"}, "k3"),
        "epsilon": (CLIPPED, 0.7),
        "epsilon_high": (CLIPPED, 0.7),
    },
    config.PpoSection: {
        **ROUND,
        "samples_per_prompt": 2,
        "kl_coef": 0.7,
        "gamma": 0.7,
        "lam": 0.7,
        "epsilon": 0.7,
        "value_epsilon": 0.7,
        "value_coef": 0.7,
        "whiten_advantages": False,
    },
    config.RebelSection: {**ROUND, "eta": 0.7, "kl_coef": 0.7},
    config.BestOfNSection: {},
    config.RejectionSection: COMMON,
}
# `kl_in` cannot be flipped alone: its estimator must fit.
del TRACED[config.PolicyGradientSection]["kl_in"]

# Fields of what runs around the program: how much is drawn, when it is judged, what it starts from.
AROUND = {
    "batch_size",
    "packed_length",
    "length_buckets",
    "evaluate_every",
    "early_stop",
    "zero_head",
    "on_policy_prompts",
    "prompts_per_step",
    "generation",
    "rewards",
    "missing_eos_penalty",
    "n",
}


def logps_fn(params, tokens):
    return params["w"] * jnp.sin(tokens.astype(jnp.float32) * params["w"])


def rewards_fn(pooling):
    scale = {"sum": 1.0, "mean": 2.0, "last": 3.0}[pooling]

    def rewards(params, tokens, mask):
        return scale * jnp.sum(logps_fn(params, tokens) * mask, axis=1)

    return rewards


def values_fn(params, tokens):
    return logps_fn(params, tokens) + 1.0


@pytest.fixture(autouse=True)
def a_small_critic(monkeypatch):
    monkeypatch.setattr(ppo.heads, "values_fn", lambda model, mesh: values_fn)


GROUND = types.SimpleNamespace(
    logps_fn=logps_fn,
    group_logps_fn=lambda group_size: logps_fn,
    reward_fn=rewards_fn,
    completion_length=4,
    eos_id=None,
    model=None,
    mesh=None,
    compiler=lambda make_step, tx, group_size=1: (make_step(logps_fn), tx),
)


def batches():
    tokens = jnp.arange(B * T).reshape(B, T) % 7
    mask = jnp.broadcast_to(jnp.arange(T) >= 2, (B, T))
    sequences = SequenceBatch(tokens, mask)
    ones, rows = jnp.ones((B, T)), jnp.arange(B, dtype=jnp.float32)
    pairs = PreferenceBatch(
        chosen=sequences,
        rejected=sequences,
        ref_chosen_logps=rows,
        ref_rejected_logps=rows,
        margin=rows,
        weight=None,
    )
    rollouts = Rollouts(tokens, mask, ones, rewards=rows)
    return sequences, pairs, rollouts


def traced(settings) -> str:
    """The programs of a recipe over a model of one number, as text."""
    module = MODULES[type(settings)]
    program = module.program.__wrapped__(GROUND, settings)
    (step, tx), *others = program
    sequences, pairs, rollouts = batches()
    params = {"w": jnp.asarray(0.5)}
    ref_logps, texts = jnp.zeros((B, T)), []

    def text(function, *arguments):
        texts.append(str(jax.make_jaxpr(function)(*arguments)))
        return jax.eval_shape(function, *arguments)

    batch = sequences
    if module in (reward, dpo):
        batch = pairs
    if module is hypo:
        batch = (pairs, sequences, jnp.zeros(B))
    if module is online_dpo:
        batch = text(others[1], rollouts)
        batch = jax.eval_shape(others[2], params, batch)
    if module in (policy_gradient, rebel):
        batch, _ = text(others[1], rollouts, ref_logps)
    if module is ppo:
        batch, _ = text(others[1], params, rollouts, ref_logps)
        assert isinstance(batch, ActorCriticBatch)
        params = {"policy": params, "value": params}
    state = jax.eval_shape(lambda p: steps.init_train_state(p, tx), params)
    text(step, state, batch)
    return re.sub(r"0x[0-9a-f]+", "", "\n".join(texts))


def made(kind, **fields):
    sizes = {
        "steps": 20,
        "batch_size": B,
        "prompts_per_step": 2,
        "samples_per_prompt": 4,
        "on_policy_prompts": B,
        "optimizer": COSINE,
    }
    known = {name: value for name, value in sizes.items() if name in kind.model_fields}
    return reading.validate(kind, {**known, **fields}, "test")


CASES = [
    (kind, field, value)
    for kind, fields in TRACED.items()
    for field, value in fields.items()
]


@pytest.mark.parametrize(
    "kind, field, value", CASES, ids=[f"{k.__name__}.{f}" for k, f, _ in CASES]
)
def test_a_field_changes_the_program(kind, field, value):
    base, other = value if isinstance(value, tuple) else ({}, value)
    before = traced(made(kind, **base))
    assert before == traced(made(kind, **base))
    assert traced(made(kind, **{**base, field: other})) != before


@pytest.mark.parametrize("field", OPTIMIZER)
def test_a_field_of_the_optimizer_changes_the_program(field):
    def with_optimizer(**fields):
        return traced(made(config.SftSection, optimizer={**COSINE, **fields}))

    assert with_optimizer() == with_optimizer()
    assert with_optimizer(**{field: OPTIMIZER[field]}) != with_optimizer()
    assert set(OPTIMIZER) == set(config.OptimizerSection.model_fields)


@pytest.mark.parametrize("algorithm", ["reinforce", "dr_grpo", "dapo", "gspo", "cispo"])
def test_every_algorithm_is_a_program_of_its_own(algorithm):
    def of(name):
        return traced(made(config.PolicyGradientSection, algorithm=name))

    assert of(algorithm) not in (of("rloo"), of("grpo"))


def test_gspos_clip_is_that_of_its_loss():
    settings = made(config.PolicyGradientSection, algorithm="gspo")
    loss, _ = policy_gradient.make_policy_loss(GROUND, settings)
    assert loss.keywords == {
        name: inspect.signature(losses.gspo_loss).parameters[name].default
        for name in ("epsilon", "epsilon_high")
    }


def test_the_kl_goes_where_it_is_put():
    kind = config.PolicyGradientSection
    in_loss = traced(made(kind, kl_in="loss", kl_estimator="k2"))
    assert in_loss != traced(made(kind))


def attributes_read(module) -> set[str]:
    """Names `settings.x` and `section.x` that a module's code reads."""
    tree = ast.parse(inspect.getsource(module))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("settings", "section")
    }


class Stopped(Exception):
    """A recipe has asked for all that it asks for before its first update."""


def asked(settings, monkeypatch) -> list[str]:
    """What a recipe asks of everything around its program: draws, batches, first parameters, evaluations, selection."""
    module, said = MODULES[type(settings)], []

    def say(*words):
        said.append(" ".join(str(word) for word in words))

    def batch_shapes(batch):
        return [leaf.shape for leaf in jax.tree.leaves(batch)]

    class Training:
        def start(self, params):
            say("start", params if isinstance(params, str | dict) else "of its own")
            return types.SimpleNamespace(
                params={"policy": "current", "value": "critic"}
            )

        def step(self, state, batch, *others):
            say("batch", batch_shapes(batch))
            raise Stopped

        trained_on = None

    class FakeSampler:
        def __init__(self, inputs, sources, plan, clock):
            say("samples", plan, "rewarded by", sources)

        def __call__(self, params, round_):
            say(
                "drawn from", "the start" if params == "start" else "the current policy"
            )
            return batches()[2], {}

    def train(run, state, advance, **options):
        shown = ("rounds", "evaluate_every", "select")
        say("trains", {name: options.get(name) for name in shown})
        advance(state, 1)

    def packed(batch):
        say("packed", settings.packed_length, "rows", settings.batch_size)
        say("in buckets", getattr(settings, "length_buckets", None))
        return types.SimpleNamespace(batch_at=lambda step: batch)

    def winners(inputs, sources, prompts, *, n, role):
        say("best of", n, "by", sources)
        rollouts = batches()[2]
        return Rollouts(*(jax.tree.map(np.asarray, leaf) for leaf in (
            rollouts.tokens, rollouts.completion_mask, rollouts.logps, rollouts.rewards
        )))  # fmt: skip

    def draw(inputs, plan, params, round_):
        say("samples", plan)
        return batches()[2], None

    sequences, pairs, _ = batches()
    ground = mock.MagicMock(eos_id=None, completion_length=4, put=lambda batch: batch)
    ground.init_policy = lambda key: "start"
    ground.init_reward_model = lambda *_, zero_head: f"head of zeros: {zero_head}"
    task = mock.MagicMock(max_prompt_length=2)
    task.prompts = lambda rng, count, split: say("prompts", count) or mock.MagicMock()
    inputs = mock.MagicMock(
        ground=ground,
        task=task,
        seed=0,
        policy="start",
        trained="start",
        reference="start",
        heldout=None,
    )
    inputs.policy_of = lambda params: params
    inputs.prompts.__len__.return_value = B
    every_pair = inputs.required_pairs.return_value
    every_pair.__len__.return_value = B
    every_pair.batches = lambda pad_id: lambda rows: say("pairs", len(rows)) or pairs
    prepared = {
        online_dpo: (lambda *_: pairs, lambda *_: pairs),
        **dict.fromkeys((policy_gradient, ppo, rebel), (lambda *_: (pairs, {}),)),
    }.get(module, ())
    fakes = {
        "program": lambda *_: (Training(), None, *prepared),
        # In this thread: what is asked for must not depend on how far another one got.
        "Ahead": lambda make, stop: make,
        "packed": types.SimpleNamespace(
            demonstrations=lambda task, ground, settings, seed: packed(sequences),
            pairs=lambda rows, ground, settings, seed, role: packed(pairs),
        ),
        "Sampler": FakeSampler,
        "winners": winners,
        "draw": draw,
        "scorer": lambda ground, *group: lambda *_: jnp.zeros((B, T)),
        "sequences": lambda *_: sequences,
        "checks": mock.MagicMock(),
        "heads": mock.MagicMock(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(module, name, fake, raising=False)
    monkeypatch.setattr(loop, "train", train)
    run = mock.MagicMock()
    with pytest.raises(Stopped):
        if module is sft:
            sft.train(settings, ground, task, 0, run)
        elif module is best_of_n:
            best_of_n.evaluate(settings, inputs, inputs.prompts)
            raise Stopped
        else:
            module.train(settings, inputs, run)
    return said


# Another value of every field that acts around the program.
OTHER = {
    "batch_size": 4,
    "packed_length": 32,
    "length_buckets": (16, 32),
    "evaluate_every": 7,
    "early_stop": True,
    "zero_head": False,
    "on_policy_prompts": 4,
    "prompts_per_step": 3,
    "generation": "once",
    "rewards": {"reward_model": 0.5},
    "missing_eos_penalty": 0.5,
    "n": 3,
}
ASKED = [
    (kind, field)
    for kind, module in MODULES.items()
    for field in sorted(set(kind.model_fields) & AROUND - set(TRACED[kind]))
]


@pytest.mark.parametrize(
    "kind, field", ASKED, ids=[f"{k.__name__}.{f}" for k, f in ASKED]
)
def test_a_field_around_the_program_changes_what_is_asked_for(kind, field, monkeypatch):
    before = asked(made(kind), monkeypatch)
    assert before == asked(made(kind), monkeypatch)
    assert asked(made(kind, **{field: OTHER[field]}), monkeypatch) != before


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_every_other_field_is_read_around_it(kind):
    special = {"recipe", "optimizer"} | (
        {"kl_in"} if kind is config.PolicyGradientSection else set()
    )
    left = set(kind.model_fields) - set(TRACED[kind]) - special
    assert left <= AROUND
    assert left <= attributes_read(MODULES[kind])
    if kind is not config.BestOfNSection:
        assert "optimizer" in attributes_read(MODULES[kind])


def test_every_field_of_a_run_is_read():
    assert set(config.RunConfig.model_fields) - {"reward_model", "start"} <= (
        attributes_read(single)
    )
