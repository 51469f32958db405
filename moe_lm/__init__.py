"""LSTM language models with a sparsely-gated mixture-of-experts layer (arXiv 1701.06538)."""

__version__ = "0.1.0"
