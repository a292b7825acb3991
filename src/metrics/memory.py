"""Peak memory of this rank since the last report."""

import logging
import resource
import sys

import torch

logger = logging.getLogger(__name__)

GIB = 2**30


def memory(device: torch.device, captured_bytes: int = 0) -> dict[str, float]:
    """Peak memory of this rank in GiB: on CUDA since the last call, on the CPU the resident peak of the process.

    `captured_bytes`: what CUDA graphs use while they are replayed, of which torch's allocator then counts nothing.
    """
    if device.type != "cuda":
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
        return {"peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
    values = report(torch.cuda.memory_stats(device))
    values["peak_allocated_gib"] += captured_bytes / GIB
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.reset_accumulated_memory_stats(device)
    return values


def report(statistics: dict[str, int]) -> dict[str, float]:
    """The caching allocator's statistics (empty before the first allocation) in our names; a warning at the wall."""
    retries, failures = statistics.get("num_alloc_retries", 0), statistics.get("num_ooms", 0)
    if retries or failures:
        logger.warning(
            "the GPU's memory ran full: %d allocations retried, %d failed; training slows down. "
            "A smaller task.micro_batch, more recompute or more shards help",
            retries,
            failures,
        )
    return {
        "peak_allocated_gib": statistics.get("allocated_bytes.all.peak", 0) / GIB,
        "peak_reserved_gib": statistics.get("reserved_bytes.all.peak", 0) / GIB,
        "allocation_retries": float(retries),
        "out_of_memory": float(failures),
    }
