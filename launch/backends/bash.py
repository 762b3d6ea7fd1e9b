"""Shell text that several backends write: exports, and the loop that restarts a program as its exit code says."""

import shlex
from collections.abc import Mapping

from launch import spec as spec_lib

PAUSE = 5
"""Seconds before a program is started again."""


def exports(env: Mapping[str, str]) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in env.items()]


def ended(code: str) -> str:
    """A test whether this exit code is one after which nothing is started again."""
    codes = (spec_lib.DONE, *spec_lib.HOPELESS)
    return " || ".join(f"{code} -eq {each}" for each in codes)


def supervise(retries: int) -> list[str]:
    """A function `supervise PROGRAM ARGS...` that returns the program's last exit code, and sets `stopping`.

    The program stays a direct child, and SIGTERM is passed on to it: a shell would otherwise die of the signal, or
    sit on it, while the program never hears that it should checkpoint. After SIGTERM nothing is started again: the
    host is going away, or somebody said stop.
    """
    return f"""\
pass_on() {{
  # Once: a second SIGTERM means "without a checkpoint".
  if [[ $child -ne 0 && $told -eq 0 ]]; then
    told=1
    kill -TERM "$child" 2>/dev/null
  fi
}}
supervise() {{
  local child=0 told=0 code=0 failures=0
  stopping=0
  trap 'stopping=1; pass_on' TERM INT
  while [[ $stopping -eq 0 ]]; do
    "$@" &
    child=$!
    # The signal may have come before the child's number was known.
    [[ $stopping -eq 0 ]] || pass_on
    wait "$child"
    code=$?
    if [[ $stopping -eq 1 ]]; then
      # The signal ended `wait` early, with the program still writing its checkpoint: wait for its own exit code.
      while kill -0 "$child" 2>/dev/null; do
        wait "$child"
      done
      wait "$child"
      code=$?
    fi
    child=0
    if [[ $stopping -eq 1 || {ended("$code")} ]]; then
      break
    fi
    if [[ $code -ne {spec_lib.PREEMPTED} ]]; then
      failures=$((failures + 1))
      if [[ $failures -gt {retries} ]]; then
        echo "launch: exit code $code; no restarts left of {retries}"
        break
      fi
    fi
    echo "launch: exit code $code; starting again (failures: $failures of {retries})"
    sleep {PAUSE}
  done
  trap - TERM INT
  return "$code"
}}""".splitlines()


def script(*lines: str) -> str:
    return "\n".join(("#!/usr/bin/env bash", *lines)) + "\n"
