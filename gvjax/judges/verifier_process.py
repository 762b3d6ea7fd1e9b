"""The other end of `gvjax.judges.verifier`: a script that calls one function, again and again, and answers in JSON lines.

It is run by its path and imports the standard library only, so that starting it costs milliseconds and no accelerator
is touched. The first line read says what to import; the first line written says how that went; after that one line is
written for each line read.
"""

import importlib
import json
import os
import sys
import threading
import time


def main() -> None:
    """Serves until the input ends."""
    requests, answers = _private_pipes()
    threading.Thread(target=_die_with_parent, daemon=True).start()

    def answer(**fields) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    first = json.loads(requests.readline())
    sys.path[:] = first["sys_path"]
    try:
        function = _imported(first["path"])
    except BaseException as error:
        answer(problem=_said(error))
        return
    answer()
    for line in requests:
        request = json.loads(line)
        try:
            value = function(request["prompt"], request["completion"])
        except BaseException as error:
            answer(kind="raised", message=_said(error))
            continue
        answer(**_number(value))


def _private_pipes():
    """Standard input and output under other numbers, so that what the function prints or reads cannot disturb us."""
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return requests, answers


def _die_with_parent() -> None:
    """Ends this process, even in the middle of a call, when the one that started it is gone."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _imported(path: str):
    module, _, name = path.partition(":")
    function = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    if not callable(function):
        raise TypeError(
            f"{path} is of type {type(function).__name__}, which cannot be called"
        )
    return function


def _number(value) -> dict:
    """The value as a float, where it is one; text that looks like a number is not."""
    try:
        if hasattr(type(value), "__float__"):
            return {"value": float(value)}
    except OverflowError:
        return {"value": float("inf")}
    except Exception as error:
        return {
            "kind": "not a number",
            "message": f"{type(value).__name__}: {_said(error)}",
        }
    return {
        "kind": "not a number",
        "message": f"returned {type(value).__name__} {_short(value)}",
    }


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {_short(error, str)}"


def _short(value, show=repr, most: int = 200) -> str:
    try:
        text = show(value)
    except Exception:
        return "(cannot be shown)"
    return text if len(text) <= most else text[:most] + "..."


if __name__ == "__main__":
    main()
