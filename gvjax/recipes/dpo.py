"""The offline road: the policy learns from the pairs themselves."""

import functools
import inspect

import jax.numpy as jnp

from gvjax import config, losses, steps
from gvjax.data.ahead import Ahead
from gvjax.losses.contract import try_out
from gvjax.recipes import checks, loop, packed
from gvjax.recipes.evaluation import evaluate_margins
from gvjax.recipes.ground import Ground, cached, make_optimizer
from gvjax.recipes.inputs import Inputs
from gvjax.recipes.pairs import implicit_margins
from gvjax.recipes.rows import rows_at


def train(
    settings: config.DpoSection,
    inputs: Inputs,
    run: loop.Run,
    *,
    select: loop.Select = "best",
) -> loop.Trained:
    """Trains a policy on preference pairs.

    Args:
      settings: the loss and how to minimise it.
      inputs: the pairs, the starting policy and what checkpoints are chosen by.
      run: where it is kept.
      select: `best` keeps the checkpoint with the highest gold reward on validation prompts, `last` the last.
    """
    ground, pairs = inputs.ground, inputs.required_pairs()
    batch_of = pairs.batches(ground.pad_id)
    compiled, schedule = program(ground, settings)
    state = compiled.start(inputs.trained)

    def batch_at(round_: int):
        rows = rows_at(
            inputs.seed, "pair order", len(pairs), settings.batch_size, round_
        )
        return batch_of(rows)

    feed = Ahead(batch_at, stop=settings.steps)
    if settings.packed_length is not None or settings.length_buckets is not None:
        rows = packed.pairs(pairs, ground, settings, inputs.seed, "packed pairs")
        feed = Ahead(rows.batch_at, stop=settings.steps)

    def advance(state, round_):
        with run.clock.part("data"):
            batch = ground.put(feed(round_))
        state, metrics = compiled.step(state, batch, inputs.base)
        if round_ == 0 and (expected := first_loss(settings)) is not None:
            checks.check_first_loss(
                float(metrics["loss"]),
                expected,
                settings.loss,
                tolerance=checks.TOLERANCE[ground.model.dtype],
            )
        return state, metrics

    first = batch_at(0)
    checks.check_same_everywhere(first)
    checks.check_masks(first.chosen)
    for side in (first.chosen, first.rejected):
        checks.check_endings(ground, side)
    checks.check_reference(ground, inputs.policy, first)
    return loop.train(
        run,
        state,
        advance,
        rounds=settings.steps,
        evaluate=functools.partial(evaluate, inputs),
        evaluate_every=settings.evaluate_every,
        select=select,
        shown=("loss", "rewards/accuracies", "gold", "kl"),
        learning_rate=schedule,
        trained_on=compiled.trained_on,
        policy_of=inputs.policy_of,
    )


def evaluate(inputs: Inputs, params) -> dict[str, float]:
    """The policy on validation prompts, and its implicit reward as a scorer of held-out pairs at its best β."""
    numbers = inputs.evaluate(params)
    if inputs.heldout is not None:
        heldout = inputs.heldout
        found = evaluate_margins(
            implicit_margins(inputs.ground, params, heldout),
            heldout.chosen_gold - heldout.rejected_gold,
            fit_scale=True,
        )
        numbers["implicit_log_likelihood"] = found.log_likelihood
        numbers["implicit_accuracy"] = found.accuracy
        if found.gold_accuracy is not None:
            numbers["implicit_gold_accuracy"] = found.gold_accuracy
    return numbers


def make_loss(settings: config.DpoSection) -> losses.Loss:
    """The configured loss, with β and other options bound, plus the weighted likelihood of the chosen completion.

    Raises:
      ValueError: the loss is unknown, needs another kind of data, does not take an option, or not that value of it.
    """
    loss = _named(settings.loss)
    parameters = inspect.signature(loss).parameters.values()
    options = [each.name for each in parameters if each.default is not each.empty]
    bound: dict[str, float | int] = dict(settings.loss_options)
    if settings.beta is not None:
        bound["beta"] = settings.beta
    for name in bound:
        if name not in options:
            raise ValueError(
                f"the loss {settings.loss} takes no {name}; it takes {', '.join(options) or 'no options'}"
            )
    loss = functools.partial(loss, **bound)
    try_out(loss, losses.arguments(loss))
    if settings.nll_weight:
        loss = losses.weighted_sum((1.0, loss), (settings.nll_weight, losses.nll_loss))
    return loss


def _named(name: str) -> losses.Loss:
    """A loss by TRL's name, or by import path."""
    if ":" in name:
        return config.import_object(name)
    return losses.TRL_NAMES[config.known(name, losses.TRL_NAMES, "settings.loss")]


def first_loss(settings: config.DpoSection) -> float | None:
    """The loss of a policy that equals its reference, where the loss looks at log-ratios only; else None."""
    loss = make_loss(settings)
    of_ratios = (
        "chosen_logps",
        "rejected_logps",
        "ref_chosen_logps",
        "ref_rejected_logps",
    )
    if set(losses.arguments(loss)) != set(of_ratios):
        return None
    zero = jnp.zeros(2)
    return float(loss(**dict.fromkeys(of_ratios, zero))[0])


@cached
def program(ground: Ground, settings: config.DpoSection):
    """The compiled step and its learning rate."""
    tx, schedule = make_optimizer(settings.optimizer, settings.steps)
    make_step = functools.partial(
        steps.make_preference_step,
        tx=tx,
        loss=make_loss(settings),
        beta=settings.beta,
        num_microbatches=settings.num_microbatches,
    )
    # In packed rows the two sides of a pair do not stand side by side, and a prompt is run with each.
    together = 2 if settings.packed_length is None else 1
    return ground.compiler(make_step, tx, group_size=together), schedule
