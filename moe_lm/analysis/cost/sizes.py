"""The sizes of one update, from which memory and bytes sent are counted before anything runs."""

import math
from dataclasses import dataclass

from moe_lm.errors import UserError
from moe_lm.parallel.context import expert_processes

FLOAT32, BFLOAT16, INT64, FLOAT64 = 4, 2, 8, 8


@dataclass(frozen=True)
class Step:
    """The sizes of one update; raises `UserError` for ones that cannot be."""

    words: int
    """Of the global batch."""
    micro_words: int
    """That pass through the model together, in each process."""
    num_processes: int = 1
    recompute: bool = False
    """Whether experts' hidden activations are made anew in the backward pass."""
    bfloat16: bool = False
    """Whether products run in bfloat16; else everything is float32."""
    expert_processes: int | None = None
    """Processes that divide the experts; None: as many as find an expert each."""
    divide_vocabulary: bool = False
    """Whether each process holds a part of embedding and softmax."""

    def __post_init__(self):
        if not 1 <= self.micro_words <= self.words:
            raise UserError(
                f"batch.words={self.words} batch.micro_words={self.micro_words}: need 1 <= micro_words <= words"
            )
        if self.num_processes < 1:
            raise UserError(f"num_processes={self.num_processes}: must be at least 1")
        if self.num_processes > self.words:
            raise UserError(f"num_processes={self.num_processes}: more processes than batch.words={self.words}")
        several = self.expert_processes
        if several is not None and (several < 1 or self.num_processes % several):
            raise UserError(
                f"machine.expert_processes={several}: must divide the number of processes, {self.num_processes}"
            )

    @property
    def tokens(self) -> int:
        """Tokens of a process in a step."""
        return math.ceil(self.words / self.num_processes)

    @property
    def micro_tokens(self) -> int:
        """Tokens of a process that pass through the model together."""
        return min(self.micro_words, self.tokens)

    @property
    def turns(self) -> int:
        """Micro-batches of a process in a step."""
        return math.ceil(self.tokens / self.micro_tokens)

    def expert_processes_of(self, num_experts: int) -> int:
        """Return how many processes divide so many experts."""
        return expert_processes(self.num_processes, num_experts, self.expert_processes)
