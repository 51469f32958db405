"""Random seeds that are the same on every machine and with every version."""

from hashlib import blake2b

import numpy as np


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed that depends on every part; different parts give independent seeds."""
    text = ":".join(str(part) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def random_keys(count: int, *parts: object) -> np.ndarray:
    """Return uint64 keys seeded from `parts`; their order is a random permutation.

    NumPy promises that raw Philox bits stay the same in later versions, but not the results of `permutation`.
    """
    return np.random.Philox(key=derive_seed(*parts)).random_raw(count)
