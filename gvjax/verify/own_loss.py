"""The battery for a preference loss that gvjax did not write: what it must do, and facts worth knowing about it."""

import importlib
import inspect
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from gvjax import tabular
from gvjax.losses import contract
from gvjax.tabular import bradley_terry
from gvjax.verify.check import Row, distance, minimise

Arrays = dict[str, jax.Array]
POLICY = ("chosen_logps", "rejected_logps")


def load(path: str) -> Callable[..., jax.Array]:
    """The loss named by an import path, `package.module:function`.

    Raises:
      ValueError: if there is nothing to call at that path, naming the part of the path that is wrong.
    """
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(
            f"--loss {path!r} is not an import path; write package.module:function, as in my_losses:my_loss"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--loss {path!r}: no module named {error.name!r} can be imported from here; "
            "run from the directory that holds it, or put that directory in PYTHONPATH"
        ) from error
    found = getattr(module, attribute, None)
    if found is None:
        functions = [name for name, _ in inspect.getmembers(module, inspect.isfunction)]
        raise ValueError(
            f"--loss {path!r}: module {module_name} has no {attribute!r}; its functions are "
            f"{', '.join(functions) or 'none'}"
        )
    if not callable(found):
        raise ValueError(
            f"--loss {path!r} is a {type(found).__name__}, which cannot be called; name a function"
        )
    return found


def battery(
    loss: Callable[..., jax.Array], seed: int
) -> list[tuple[str, Callable[[], Row]]]:
    """The rows as (name, thing to run); to be run in 64-bit floats.

    Args:
      loss: takes arrays [B] by the names of `gvjax.losses.VOCABULARY`; every other parameter has a default.
      seed: of the random log-probabilities.

    Raises:
      ValueError: if it asks for arrays that no batch has, or for none that is a policy's.
    """
    names = contract.arguments(loss)
    if not set(names) & set(POLICY):
        raise ValueError(
            f"the loss asks for {', '.join(names) or 'no arrays'}, so it cannot train a policy; name its parameters, "
            f"among them chosen_logps or rejected_logps, from {', '.join(contract.VOCABULARY)}"
        )

    def pairs() -> Arrays:
        return _random_pairs(np.random.default_rng(seed), names)

    return [
        (test.__name__.replace("_", " "), lambda test=test: test(loss, pairs()))  # type: ignore[misc]
        for test in (
            one_loss_per_pair,
            finite_at_extremes,
            rows_are_independent,
            gradient_is_the_derivative,
            prefers_the_chosen_completion,
            value_at_the_reference,
            slope_at_the_reference,
            monotone_within_30_nats,
            chosen_and_rejected_swapped,
            only_the_gap_counts,
            tabular_optimum,
        )
    ]


def _random_pairs(rng: np.random.Generator, names: Sequence[str]) -> Arrays:
    rows = 8
    drawn = {
        "chosen_lengths": rng.integers(1, 6, rows),
        "rejected_lengths": rng.integers(1, 6, rows),
        "chosen_probability": rng.uniform(0.6, 0.95, rows),
        "margin": rng.uniform(0.1, 1.0, rows),
    }
    for name in contract.VOCABULARY[:4]:
        drawn[name] = -rng.uniform(1.0, 6.0, rows)
    return {name: jnp.asarray(drawn[name]) for name in names}


def _gradients(loss: Callable[..., jax.Array], arrays: Arrays) -> Arrays:
    """Derivative of the summed loss by chosen and rejected log-probabilities, 0 for one not asked for."""
    policy = {name: arrays[name] for name in POLICY if name in arrays}
    found = jax.grad(lambda policy: jnp.sum(loss(**{**arrays, **policy})))(policy)
    zeros = jnp.zeros(len(next(iter(arrays.values()))))
    return {name: found.get(name, zeros) for name in POLICY}


def _at_reference(arrays: Arrays) -> Arrays:
    """The same pairs, the policy being the reference; unchanged where the loss knows no reference."""
    moved = dict(arrays)
    for name in POLICY:
        reference = f"ref_{name}"
        if name in moved and reference in moved:
            moved[name] = moved[reference]
    return moved


def _swapped(arrays: Arrays) -> Arrays:
    moved = dict(arrays)
    for name in arrays:
        other = (
            name.replace("chosen", "rejected")
            if "chosen" in name
            else name.replace("rejected", "chosen")
        )
        if other != name and other in arrays:
            moved[other] = arrays[name]
    if "chosen_probability" in arrays:
        moved["chosen_probability"] = 1 - arrays["chosen_probability"]
    if "margin" in arrays:
        moved["margin"] = -arrays["margin"]
    return moved


def one_loss_per_pair(loss: Callable[..., jax.Array], arrays: Arrays) -> Row:
    value = jnp.asarray(loss(**arrays))
    wanted = np.shape(next(iter(arrays.values())))
    floating = jnp.issubdtype(value.dtype, jnp.floating)
    return Row(
        "one loss per pair",
        f"shape {wanted}, floating; found {value.shape}, {value.dtype}",
        0.0 if value.shape == wanted and floating else np.inf,
        0.0,
    )


def finite_at_extremes(loss: Callable[..., jax.Array], arrays: Arrays) -> Row:
    """In float32, where losses are computed: completions of thousands of nats on either side, and certain ones."""
    worst = 0
    for chosen, rejected in ((-5e3, -1.0), (-1.0, -5e3), (-5e3, -5e3), (0.0, 0.0)):
        extreme = {
            name: array.astype(jnp.float32)
            if jnp.issubdtype(array.dtype, jnp.floating)
            else array
            for name, array in arrays.items()
        }
        for name, value in zip(POLICY, (chosen, rejected)):
            if name in extreme:
                extreme[name] = jnp.full_like(extreme[name], value)
        results = [loss(**extreme), *_gradients(loss, extreme).values()]
        worst += sum(int(jnp.sum(~jnp.isfinite(result))) for result in results)
    return Row(
        "finite at extremes",
        "values and gradients at log-probabilities 0 and −5000: how many are not",
        float(worst),
        0.0,
    )


def rows_are_independent(loss: Callable[..., jax.Array], arrays: Arrays) -> Row:
    together = jnp.asarray(loss(**arrays))
    alone = [
        jnp.ravel(
            loss(**{name: array[row : row + 1] for name, array in arrays.items()})
        )
        for row in range(len(next(iter(arrays.values()))))
    ]
    joined = jnp.concatenate(alone)
    error = distance(together, joined) if together.shape == joined.shape else np.inf
    return Row(
        "rows are independent", "a pair alone = the pair in a batch", error, 1e-9
    )


def gradient_is_the_derivative(loss: Callable[..., jax.Array], arrays: Arrays) -> Row:
    step, errors = 1e-5, [0.0]
    gradients = _gradients(loss, arrays)
    for name in POLICY:
        if name not in arrays:
            continue
        up, down = (
            loss(**{**arrays, name: arrays[name] + sign * step}) for sign in (1, -1)
        )
        # Nudging all rows at once is enough where rows are independent, and sums are compared where they are not.
        numeric = jnp.sum(up - down) / (2 * step)
        errors.append(distance(jnp.sum(gradients[name]) / numeric.size, numeric))
    return Row(
        "gradient is the derivative",
        "jax.grad = (loss(x + h) − loss(x − h)) / 2h",
        max(errors),
        1e-5 * (1 + float(jnp.abs(jnp.sum(gradients[POLICY[0]])))),
    )


def prefers_the_chosen_completion(
    loss: Callable[..., jax.Array], arrays: Arrays
) -> Row:
    """The one direction that every preference loss has.

    More is not required: APO-down is not monotone in the chosen completion, DiscoPOP not even in the gap, and losses
    that aim at a finite margin rise beyond it.
    """
    costs = []
    for nats in (15.0, -15.0):
        moved = _at_reference(arrays)
        for name, sign in zip(POLICY, (1, -1)):
            if name in moved:
                moved[name] = moved[name] + sign * nats
        costs.append(loss(**moved))
    difference = costs[0] - costs[1]
    return Row(
        "prefers the chosen completion",
        "loss 15 nats towards chosen less loss 15 nats away < 0; largest",
        float(jnp.max(jnp.where(jnp.isnan(difference), jnp.inf, difference))),
        -1e-12,
    )


def slope_at_the_reference(loss: Callable[..., jax.Array], arrays: Arrays) -> Row:
    gradients = _gradients(loss, _at_reference(arrays))
    slopes = [f"{float(jnp.mean(gradients[name])):.3g}" for name in POLICY]
    return Row(
        "slope at the reference",
        "mean ∂/∂chosen, ∂/∂rejected; DPO: −β/2, β/2",
        ", ".join(slopes),
    )


def value_at_the_reference(loss: Callable[..., jax.Array], arrays: Arrays) -> Row:
    values = np.asarray(loss(**_at_reference(arrays)))
    spread = f"{values.min():.4f}" + (
        "" if np.ptp(values) < 1e-9 else f" to {values.max():.4f}"
    )
    return Row("value at the reference", "DPO: ln 2 = 0.6931", spread)


def monotone_within_30_nats(loss: Callable[..., jax.Array], arrays: Arrays) -> Row:
    signs = {name: set[bool]() for name in POLICY}
    for shift in np.linspace(-30, 30, 25):
        moved = _at_reference(arrays)
        if "chosen_logps" in moved:
            moved["chosen_logps"] = moved["chosen_logps"] + shift
        gradients = _gradients(loss, moved)
        signs["chosen_logps"].add(bool(jnp.all(gradients["chosen_logps"] <= 0)))
        signs["rejected_logps"].add(bool(jnp.all(gradients["rejected_logps"] >= 0)))
    words = [
        word if signs[name] == {True} else "not monotone"
        for name, word in zip(POLICY, ("falls", "rises"))
    ]
    return Row(
        "monotone within 30 nats",
        "in chosen, in rejected",
        f"{words[0]}, {words[1]}",
    )


def chosen_and_rejected_swapped(loss: Callable[..., jax.Array], arrays: Arrays) -> Row:
    once, twice = loss(**arrays), loss(**_swapped(arrays))
    same, opposite = distance(once, twice), distance(once, -twice)
    words = (
        "unchanged" if same < 1e-9 else "negated" if opposite < 1e-9 else "different"
    )
    return Row(
        "chosen and rejected swapped",
        "with label and margin turned: the loss is",
        words,
    )


def only_the_gap_counts(loss: Callable[..., jax.Array], arrays: Arrays) -> Row:
    moved = {
        name: array + 0.7 if name in POLICY else array for name, array in arrays.items()
    }
    same = distance(loss(**arrays), loss(**moved)) < 1e-9
    return Row(
        "only the gap counts",
        "0.7 nats added to both completions",
        "unchanged" if same else "changed",
    )


def tabular_optimum(loss: Callable[..., jax.Array], arrays: Arrays) -> Row:
    """Population loss on three completions, minimised over all policies, beside the nearest Gibbs policy."""
    rewards, ref = np.array([1.0, 0.0, -0.5]), np.log([0.2, 0.5, 0.3])
    lengths = np.array([1, 2, 2])
    pairs = bradley_terry.population(rewards, np.full(3, -np.log(3)))
    formula = "distance of the best policy from π_ref exp(r/β)/Z, β free"

    def objective(logits: jax.Array) -> jax.Array:
        logps = jax.nn.log_softmax(logits)
        total = jnp.zeros(())
        for chosen, rejected, weight in (
            (pairs.first, pairs.second, pairs.wins),
            (pairs.second, pairs.first, pairs.losses),
        ):
            given = {
                "chosen_logps": logps[chosen],
                "rejected_logps": logps[rejected],
                "ref_chosen_logps": jnp.asarray(ref)[chosen],
                "ref_rejected_logps": jnp.asarray(ref)[rejected],
                "chosen_lengths": jnp.asarray(lengths)[chosen],
                "rejected_lengths": jnp.asarray(lengths)[rejected],
                "chosen_probability": jnp.ones(3),
                "margin": jnp.asarray(rewards[chosen] - rewards[rejected]),
            }
            total += jnp.sum(weight * loss(**{name: given[name] for name in arrays}))
        return total

    best = minimise(objective, ref)
    gradient = np.asarray(jax.grad(objective)(jnp.asarray(best)))
    if (
        not np.all(np.isfinite(best))
        or np.abs(gradient).max() > 1e-6
        or np.ptp(best) > 50
    ):
        return Row("tabular optimum", formula, "none found: it diverges or has kinks")
    policy = np.asarray(jax.nn.log_softmax(best))

    def gap(log_beta: float) -> float:
        tilted = tabular.gibbs(ref, rewards, float(np.exp(log_beta)))
        return float(tabular.total_variation(policy, tilted))

    found = optimize.minimize_scalar(gap, bounds=(-7.0, 7.0), method="bounded")
    return Row(
        "tabular optimum", formula, f"TV {found.fun:.1e} at β = {np.exp(found.x):.3g}"
    )
