"""`gvjax verify`: the proof, on your own machine, that losses, estimators and theorems agree."""

from gvjax.verify.command import checks, main

__all__ = ["checks", "main"]
