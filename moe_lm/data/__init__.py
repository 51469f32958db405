"""Text to token ids on disk, and these to batches."""
