"""LSTM language models with a sparsely-gated mixture-of-experts layer (arXiv 1701.06538)."""

__version__ = "0.1.0"


def load(folder, checkpoint="last", device="cpu"):
    """Return the `moe_lm.inference.Trained` of a run's or an export's folder, to read text with it.

    `checkpoint` is `last`, `best` or a step, `device` what torch takes for one. Raises `moe_lm.errors.Mistake`.
    """
    # Imported when it is called: `import moe_lm` and `moe-lm --version` stay light.
    import torch

    from moe_lm.inference import load as load_trained

    return load_trained(folder, str(checkpoint), torch.device(device))
