"""LSTM language models with a sparsely-gated mixture-of-experts layer (arXiv 1701.06538)."""

__version__ = "0.1.0"


def load(folder, checkpoint="last", device="cpu"):
    """Return the model in a run's or an export's folder as a `moe_lm.inference.LoadedModel`.

    `checkpoint` is `last`, `best` or a step; `device` is a torch device. Raises `moe_lm.errors.UserError`.
    """
    # Imported here so that `import moe_lm` and `moe-lm --version` stay fast.
    import torch

    from moe_lm.inference import load as load_model

    return load_model(folder, str(checkpoint), torch.device(device))
