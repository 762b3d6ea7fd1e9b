"""Every loss the package exports, against its formula: a flipped sign shows.

Values and gradients are compared on random rows, in float64. A new loss without a formula is a failing row.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gvjax import losses, tabular
from gvjax.verify.check import Check, distance
from gvjax.verify.formulas import FORMULAS, Array, Formula


def exported() -> list[str]:
    """Names in `gvjax.losses` that are losses by their ending, or have a formula here."""
    return [
        name
        for name in losses.__all__
        if name.endswith(("_loss", "_penalty")) or name in FORMULAS
    ]


def arrays(seed: int, per_token: bool) -> dict[str, Array]:
    """Random arguments by name: eight rows; token losses get [8, 5] with ragged masks.

    No two are alike and none is 0, and log-ratios reach to both sides of every clip.
    """
    rng = np.random.default_rng(seed)
    rows, tokens = 8, 5
    shape = (rows, tokens) if per_token else (rows,)
    lengths = np.array([1, 2, 3, 4, 5, 3, 2, 5])
    logps = -rng.uniform(1.0, 3.0, shape)
    drawn: dict[str, Array] = {
        "logps": logps,
        "old_logps": logps + rng.uniform(-0.6, 0.6, shape),
        "ref_logps": -rng.uniform(1.0, 3.0, shape),
        "advantages": rng.uniform(0.3, 1.5, shape)
        * rng.choice([-1.0, 1.0], (rows, 1)[: len(shape)]),
        "mask": np.arange(tokens) < lengths[:, None],
        "desirable": np.arange(rows) % 2 == 0,
        "chosen_from_reference": np.arange(rows) % 3 == 0,
        "kl": np.array(0.375),
        "log_ratios": rng.uniform(-1.5, 1.5, rows),
        "log_collisions": -rng.uniform(1.0, 3.0, shape),
        "shared_lengths": np.minimum(lengths, lengths[::-1]),
        "chosen_lengths": lengths,
        "rejected_lengths": lengths[::-1].copy(),
        "chosen_probability": rng.uniform(0.1, 0.9, rows),
        "margin": rng.uniform(-1.0, 1.0, rows),
        "rewards": rng.standard_normal(rows),
        "optimal_values": rng.standard_normal(rows),
        "chosen_rewards": rng.standard_normal(rows),
        "rejected_rewards": rng.standard_normal(rows),
        "values": rng.standard_normal(shape),
    }
    drawn["ref_kl_logps"] = -rng.uniform(1.0, 3.0, rows)
    drawn["kl_logps"] = drawn["ref_kl_logps"] + rng.uniform(-0.3, 0.7, rows)
    drawn["old_values"] = drawn["values"] + rng.uniform(-0.5, 0.5, shape)
    drawn["returns"] = drawn["values"] + rng.uniform(-0.7, 0.7, shape)
    for name in (
        "chosen_logps",
        "rejected_logps",
        "ref_chosen_logps",
        "ref_rejected_logps",
    ):
        drawn[name] = -rng.uniform(1.0, 5.0, rows)
    return drawn


def error(loss: Callable[..., jax.Array], formula: Formula, seed: int) -> float:
    """Largest difference between a loss and its formula, in value and in gradient."""
    known = arrays(seed, per_token="mask" in inspect.signature(loss).parameters)
    asked = [name for name in inspect.signature(loss).parameters if name in known]
    given = {name: known[name] for name in asked}
    on_device = {name: jnp.asarray(array) for name, array in given.items()}
    value = loss(**on_device, **formula.settings)
    expected = formula.value(**given, **formula.settings)
    if value.shape != expected.shape:
        return np.inf
    errors = [distance(value, expected)]
    for name in asked:
        if not jnp.issubdtype(on_device[name].dtype, jnp.floating):
            continue
        # Constants by contract: the reference is data, advantages and targets are fixed for the step.
        if name not in formula.wrt and name not in CONSTANTS:
            continue

        def total(array, name=name):
            return jnp.sum(loss(**{**on_device, name: array}, **formula.settings))

        found = np.asarray(jax.grad(total)(on_device[name]))
        if name in CONSTANTS:
            errors.append(distance(found, 0.0))
        elif formula.gradient is not None:
            errors.append(
                distance(found, formula.gradient(**given, **formula.settings))
            )
        else:
            errors.append(distance(found, _slopes(formula, given, name)))
    return max(errors)


CONSTANTS = ("advantages", "old_logps", "old_values", "returns", "kl")


def _slopes(formula: Formula, given: Mapping[str, Array], name: str) -> Array:
    """Derivative of the formula's sum by each entry of one array, by central differences (error about 1e-9)."""
    step = 1e-6
    result = np.zeros(given[name].shape)
    for index in np.ndindex(*result.shape):
        totals = []
        for sign in (1, -1):
            moved = given[name].copy()
            moved[index] += sign * step
            totals.append(
                formula.value(**{**given, name: moved}, **formula.settings).sum()
            )
        result[index] = (totals[0] - totals[1]) / (2 * step)
    return result


def rebel_reaches_gibbs(seed: int) -> float:
    """REBEL with exact rewards is 0 at π ∝ π_t exp(η r), for every pair."""
    rng = np.random.default_rng(seed)
    tree = tabular.token_tree(vocabulary=3, horizon=2, eos=0)
    old = tabular.completion_logps(tree, tabular.random_policy(rng, tree))
    rewards, eta = rng.standard_normal(len(old)), 0.7
    policy = tabular.gibbs(old, rewards, 1 / eta)
    first, second = tabular.bradley_terry.all_pairs(len(old))
    found = losses.rebel_loss(
        chosen_logps=jnp.asarray(policy[first]),
        rejected_logps=jnp.asarray(policy[second]),
        ref_chosen_logps=jnp.asarray(old[first]),
        ref_rejected_logps=jnp.asarray(old[second]),
        margin=jnp.asarray(rewards[first] - rewards[second]),
        eta=eta,
    )
    return distance(found, 0.0)


def alphapo_limit(seed: int) -> float:
    known = arrays(seed, per_token=False)
    pair: dict[str, Any] = {
        name: jnp.asarray(known[name])
        for name in (
            "chosen_logps",
            "rejected_logps",
            "chosen_lengths",
            "rejected_lengths",
        )
    }
    return distance(
        losses.alphapo_loss(**pair, beta=0.7, gamma=0.4, alpha=0.0),
        losses.simpo_loss(**pair, beta=0.7, gamma=0.4),
    )


def alpha_divergence_limit(seed: int) -> float:
    log_ratios = jnp.asarray(arrays(seed, per_token=False)["log_ratios"])
    return distance(losses.alpha_divergence(log_ratios, alpha=1.0), log_ratios)


def checks() -> tuple[Check, ...]:
    """One row per exported loss, and the special cases that papers name."""
    rows = []
    for name in exported():
        formula = FORMULAS.get(name)
        if formula is None:
            text = (
                "no formula in gvjax/verify/formulas.py: write it there, from the paper"
            )
            rows.append(Check(name, text, 0.0, lambda seed: np.inf))
            continue

        def error_of(seed, name=name, formula=formula):
            return error(getattr(losses, name), formula, seed)

        rows.append(Check(name, formula.text, 1e-7, error_of))
    rows += [
        Check(
            "rebel_loss at its optimum",
            "0 at π_t exp(ηr)/Z, for every pair",
            1e-12,
            rebel_reaches_gibbs,
        ),
        Check("alphapo_loss at α = 0", "SimPO", 1e-12, alphapo_limit),
        Check("alpha_divergence at α = 1", "ρ", 1e-12, alpha_divergence_limit),
    ]
    return tuple(rows)
