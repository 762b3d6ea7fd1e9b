"""Tasks: where prompts, demonstrations and gold rewards come from, one file each.

`load` finds a task by the name that stands in a config: `tour` for gvjax/tasks/tour.py, or the import path of anybody's
own, `my_package.my_tasks:MyTask`.
"""

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from gvjax.tasks.task import Task
from gvjax.tasks.text import TextTask

_NOT_TASKS = {"bytes", "task", "text"}
_CONTRACT = (
    "name",
    "vocab_size",
    "pad_id",
    "eos_id",
    "max_prompt_length",
    "max_completion_length",
    "reward_range",
    "prompts",
    "demonstrations",
    "reward",
    "optimum",
    "decode",
)


def names() -> list[str]:
    """The short names of the tasks that come with the library."""
    return sorted(
        module.name
        for module in pkgutil.iter_modules(__path__)
        if module.name not in _NOT_TASKS
    )


def load(path: str, *, seed: int | None = None, **options: Any) -> Task:
    """The task that a config names.

    Args:
      path: a short name (`hidden_goals`), a module (`my_task`, `my_package.my_task`) or a module and a name in it
        (`gvjax.tasks.tour:Tour`). A module with `examples` and `reward` is a text task; of any other the class in
        CamelCase of the module's name is taken.
      seed: which instance of the task; tasks whose constructor (or `examples`) takes no seed have one instance only,
        which is then the same for every seed. None keeps the default.
      **options: for the constructor; for a text task `completion_limit` and the keyword arguments of `examples`.

    Raises:
      ValueError: nothing is found there, an option is unknown, or what is made is no task.
    """
    module_path, _, attribute = path.partition(":")
    if module_path in names() and not attribute:
        module_path = f"{__name__}.{module_path}"
    elif path.isidentifier() and importlib.util.find_spec(path) is None:
        raise ValueError(
            f"there is no task {path!r}{_near(path, names())}; use one of "
            f"{', '.join(names())}, or an import path such as my_package.my_task:MyTask"
        )
    module = _import(module_path)
    short_name = module_path.rpartition(".")[2]
    found: Any = module
    if attribute or not _is_text_file(module):
        attribute = attribute or "".join(map(str.capitalize, short_name.split("_")))
        if not hasattr(module, attribute):
            raise ValueError(
                f"module {module_path} has no {attribute!r}"
                f"{_near(attribute, vars(module))}; name what it defines after a colon"
            )
        found = getattr(module, attribute)
        if inspect.isclass(found) and _is_text_file(found):
            found = found()
    text = _is_text_file(found)
    accepted = _options(found.examples)[1:] if text else _options(found)
    if seed is not None and "seed" in accepted:
        options["seed"] = seed
    own = ["completion_limit"] if text else []
    for option in options:
        if option not in accepted + own:
            raise ValueError(
                f"task {path} has no option {option!r}{_near(option, accepted + own)}; "
                f"it takes {', '.join(accepted + own) or 'none'}"
            )
    if text:
        limit = options.pop("completion_limit", None)
        name = attribute or short_name
        return TextTask(found, name, options, completion_limit=limit)
    task = found(**options)
    missing = [name for name in _CONTRACT if not hasattr(task, name)]
    if missing:
        raise ValueError(
            f"{path} makes no task: it lacks {', '.join(missing)}; see gvjax.tasks.task.Task"
        )
    return task


def _import(module_path: str) -> ModuleType:
    if not all(map(str.isidentifier, module_path.split("."))):
        raise ValueError(
            f"{module_path!r} is no import path; write one as my_package.my_task:MyTask"
        )
    try:
        return importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        # A module that exists but lacks one of its own imports has another fault, shown as it is.
        if not f"{module_path}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"module {module_path!r} cannot be found; check its spelling, or put its "
            "folder on PYTHONPATH"
        ) from error


def _is_text_file(found: Any) -> bool:
    return hasattr(found, "examples") and hasattr(found, "reward")


def _options(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def _near(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, [w for w in words if w[0] != "_"], n=1)
    return f", did you mean {near[0]!r}?" if near else ""
