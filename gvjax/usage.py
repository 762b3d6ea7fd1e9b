"""What a command says, and how it ends, where its own line is wrong."""

import argparse
import sys
from typing import NoReturn

USER_ERROR = 64
"""The exit code of a wrong config or command line: starting again changes nothing. argparse's own is 2, which says nothing
to whatever restarts programs."""


class Parser(argparse.ArgumentParser):
    """argparse's, which leaves with `USER_ERROR`; parsers of its verbs do too."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USER_ERROR, f"{self.prog}: error: {message}\n")
