"""From text to token ids on disk, and from token ids to batches."""
