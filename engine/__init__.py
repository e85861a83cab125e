"""Checkpoints, devices, processes and runs: knows nothing of diffusion or of any network."""

VERSION = "0.2.0"  # the only place: pyproject.toml reads it, checkpoints record it
