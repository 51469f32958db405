"""From batches to a trained model: the training step, the loop around it, and metrics."""
