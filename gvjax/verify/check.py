"""What a check is, and the optimiser that several share."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from scipy import optimize


@dataclasses.dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
      name: what is checked.
      formula: what must hold.
      tolerance: largest error that passes.
      error: from a seed to the error found; called with 64-bit floats enabled.
    """

    name: str
    formula: str
    tolerance: float
    error: Callable[[int], float]


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found, as printed.

    Attributes:
      check, formula: as in `Check`.
      error: the error found; or text, for a fact that nothing is required of.
      tolerance: largest error that passes; None for a fact.
      seconds: time it took.
    """

    check: str
    formula: str
    error: float | str
    tolerance: float | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool | None:
        """Whether the error is within tolerance; None for a fact."""
        if self.tolerance is None:
            return None
        return isinstance(self.error, float) and self.error <= self.tolerance


def distance(left: ArrayLike, right: ArrayLike) -> float:
    """Largest absolute difference; NaN counts as infinite, or it would pass as no difference."""
    largest = np.max(np.abs(np.asarray(left) - np.asarray(right)))
    return float(np.inf if np.isnan(largest) else largest)


def minimise(
    objective: Callable[[jax.Array], jax.Array], start: np.ndarray
) -> np.ndarray:
    """f64[D]: where a smooth objective is least, by a trust region and then Newton steps, with jax's derivatives.

    Args:
      objective: from f64[D] to f64[].
      start: f64[D].
    """
    value_and_gradient = jax.jit(jax.value_and_grad(objective))
    hessian = jax.jit(jax.hessian(objective))

    def on_host(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = value_and_gradient(jnp.asarray(x))
        return float(value), np.asarray(gradient)

    found = optimize.minimize(
        on_host,
        start,
        jac=True,
        hess=lambda x: np.asarray(hessian(jnp.asarray(x))),
        method="trust-exact",
        options={"gtol": 1e-11, "maxiter": 200},
    )
    # A trust region stops where the objective's own rounding hides further progress; the gradient still sees it.
    x, gradient = found.x, on_host(found.x)[1]
    for _ in range(10):
        step = np.linalg.lstsq(np.asarray(hessian(x)), gradient, rcond=1e-11)[0]
        following = on_host(x - step)[1]
        if not np.abs(following).max() < np.abs(gradient).max():
            break
        x, gradient = x - step, following
    return x


def descend(
    objective: Callable[[jax.Array], jax.Array], start: np.ndarray, steps: int
) -> optimize.OptimizeResult:
    """At most so many L-BFGS steps: for many parameters, where a Hessian is dear, or no minimum to be found.

    Args:
      objective: from f64[D] to f64[].
      start: f64[D].
      steps: > 0.
    """
    value_and_gradient = jax.jit(jax.value_and_grad(objective))

    def on_host(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = value_and_gradient(jnp.asarray(x))
        return float(value), np.asarray(gradient)

    return optimize.minimize(
        on_host,
        start,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": steps, "maxfun": 10 * steps, "ftol": 0, "gtol": 1e-12},
    )
