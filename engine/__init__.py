"""What any training needs: checkpoints, options, processes, logs, signals."""

VERSION = "0.2.0"
