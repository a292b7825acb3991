"""What this machine offers to a plan."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Devices:
    """Accelerators of one kind of use: as many ranks, each with this much memory."""

    count: int
    memory_bytes: int  # of the smallest

    @classmethod
    def here(cls, at_most: int | None = None) -> "Devices | None":
        """The GPUs of this machine, `at_most` of them; None: the ranks would run on the CPU. Imports torch."""
        import torch

        there = torch.cuda.device_count()
        count = there if at_most is None else min(there, at_most)
        if count == 0:
            return None
        return cls(count, min(torch.cuda.get_device_properties(index).total_memory for index in range(count)))
