"""Starts a gvjax job anywhere: here, on TPU VMs, on GKE, under Slurm, SkyPilot or XPK.

    python -m launch --help

Needs the standard library and PyYAML and imports nothing of gvjax, so a laptop without JAX can start a pod. A job is
one frozen `JobSpec`; a backend is a pure function from it to a `Plan` (files and ordered commands); one runner
executes plans, and `--dry-run` prints the very plan that would run.
"""
