"""Stored models: the checkpoints of a run, exports, and how both are loaded."""
