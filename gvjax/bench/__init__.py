"""`gvjax bench`: how fast this machine runs every part of the library, and how far that is from what it could do."""

from gvjax.bench.command import main

__all__ = ["main"]
