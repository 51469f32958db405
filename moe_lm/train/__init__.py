"""Batches to a trained model: what is minimised, an update, and the loop around it."""
