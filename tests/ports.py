"""A port for processes that bind it seconds later."""

import contextlib
import random
import socket


def free_port() -> int:
    """One that nobody holds, below those (from 32768 on) that the kernel gives to connections meanwhile."""
    chance = random.SystemRandom()  # tests that run side by side may be seeded alike
    while True:
        port = chance.randrange(20000, 32768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
