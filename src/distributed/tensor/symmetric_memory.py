"""Symmetric memory for async tensor parallelism: GPUs of one group access each other's memory directly.

Matrix products that overlap with their all-gather or reduce-scatter (parallel.async_tensor) move shards through it.
They copy between neighbours; NVLink multicast, which some machines switch off, only makes small products faster.
"""

import warnings

import torch
from torch.distributed import _symmetric_memory as symmetric
from torch.distributed.device_mesh import DeviceMesh

from src.errors import PlanError


def share_memory(mesh: DeviceMesh) -> None:
    """Set up symmetric memory between the ranks of `mesh`. PlanError where they cannot. Collective."""
    group = mesh.get_group()
    try:
        if mesh.device_type != "cuda":
            raise RuntimeError(f"ranks on {mesh.device_type} have none")
        with warnings.catch_warnings():
            # Called unnecessary since torch 2.11, whose compiler still skips every group without it, as does 2.13's.
            warnings.simplefilter("ignore", FutureWarning)
            symmetric.enable_symm_mem_for_group(group.group_name)
        symmetric.rendezvous(symmetric.empty(1, device=torch.device("cuda", torch.cuda.current_device())), group)
    except RuntimeError as error:
        raise PlanError(
            f"parallel.async_tensor=true needs GPUs that reach each other's memory: {error}; "
            "pass parallel.async_tensor=false"
        ) from error
