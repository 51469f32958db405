"""Seeds: the same on every machine and version, and as many independent ones as there are purposes."""

from hashlib import blake2b

import numpy as np


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed that depends on every part; the same on every machine and version."""
    text = ":".join(str(part) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def random_keys(count: int, *parts: object) -> np.ndarray:
    """Return uint64 keys whose order is a random permutation.

    Raw Philox bits: NumPy promises their stability, which it does not for `permutation`.
    """
    return np.random.Philox(key=derive_seed(*parts)).random_raw(count)
