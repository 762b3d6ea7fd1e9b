"""Ground truth: token trees small enough that every distribution, gradient and optimum is exact, in float64."""

from gvjax.tabular import bradley_terry
from gvjax.tabular.optima import best_of_n, gibbs, regularised_value, soft_bellman
from gvjax.tabular.policies import (
    action_values,
    along_paths,
    completion_logps,
    conditionals,
    entropy,
    expectation,
    kl,
    policy_gradient,
    random_policy,
    state_logps,
    total_variation,
)
from gvjax.tabular.tree import Tree, token_tree

__all__ = [
    "Tree",
    "action_values",
    "along_paths",
    "best_of_n",
    "bradley_terry",
    "completion_logps",
    "conditionals",
    "entropy",
    "expectation",
    "gibbs",
    "kl",
    "policy_gradient",
    "random_policy",
    "regularised_value",
    "soft_bellman",
    "state_logps",
    "token_tree",
    "total_variation",
]
