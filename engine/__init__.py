"""Serves any training: checkpoints, options, processes, logs, signals."""

VERSION = "0.2.0"
