"""How a command ends, and what it says where its own line is wrong."""

import argparse
import enum
import sys
from typing import NoReturn


class ExitCode(enum.IntEnum):
    """What the end of a process means, to people and to what restarts programs."""

    DONE = 0
    CHECK_FAILED = 1
    """`verify`, `gap --calibrate`."""
    DOES_NOT_FIT = 3
    """`plan`."""
    USER_ERROR = 64
    """A wrong config or command line: starting again changes nothing."""
    CRASH = 70
    HANG = 71
    """Steps stopped coming."""
    PREEMPTED = 85
    """Stopped before its end; the same command goes on."""
    INTERRUPTED = 130
    """Ctrl-C."""


class Parser(argparse.ArgumentParser):
    """argparse's, which leaves with `USER_ERROR` where its own code, 2, says nothing; parsers of its verbs do too."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(ExitCode.USER_ERROR, f"{self.prog}: error: {message}\n")
