"""Weights on the disk: the checkpoints of a training, and exports."""
