"""What operations are called, and what they make."""

from collections import Counter

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Made(TorchDispatchMode):
    """Counts the operations within and notes the memory behind every tensor that they make."""

    def __init__(self):
        super().__init__()
        self.calls, self._bytes = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                storage = tensor.untyped_storage()
                self._bytes.append((StorageWeakRef(storage), storage.nbytes()))
        return result

    def largest(self):
        """The most bytes that any had."""
        return max(self.sizes())

    def sizes(self):
        """The bytes that each had."""
        return [nbytes for _, nbytes in self._bytes]

    def alive(self):
        """The bytes of those that are still there."""
        return sum(nbytes for storage, nbytes in self._bytes if not storage.expired())
