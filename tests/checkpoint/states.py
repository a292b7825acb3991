"""A state of every kind of tensor, known from its seed."""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from src.checkpoint.store import Store
from tests.checkpoint.options import options

VALUES = {
    "step": 10,
    "tokens": 2**62 + 1,
    "schedule": {"peak": 0.1 + 0.2, "floor": -math.inf},
    "digest": "5f",
    "rng": {"seeds": [1, 2], "none": None, "on": True},
}


def tensors(seed: int) -> dict[str, Tensor]:
    """Every kind of tensor that a state has, full, different by seed."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 6, generator=generator)
    return {
        "weight": weight,
        "moment": torch.randn(8, 6, generator=generator).bfloat16(),
        "count": torch.randint(-(2**62), 2**62, (8,), generator=generator),
        "odd": torch.tensor([math.nan, math.inf, -0.0, 1e-45, float(seed), 0, 0, 0]),
        "step": torch.tensor(float(seed)),
        "bytes": torch.randint(0, 255, (33,), generator=generator, dtype=torch.uint8),
    }


def state(seed: int, **changes: Any) -> dict[str, Any]:
    """Shards over all ranks where the first dimension is 8, else plain tensors."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    full = tensors(seed)
    shared = {name: distribute_tensor(t, mesh, [Shard(0)]) if t.shape[:1] == (8,) else t for name, t in full.items()}
    model = {"a.weight": shared["weight"], "a.odd": shared["odd"]}
    optimizer = {"a.weight": {name: shared[name] for name in ("moment", "count", "step")}}
    return {"model": model, "optimizer": optimizer, "rng_state": shared["bytes"], **deepcopy(VALUES), **changes}


def bits(tensor: Tensor) -> bytes:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def equals(tree: dict[str, Any], seed: int) -> bool:
    """The tensors of a state, bit for bit, against those made anew from the seed."""
    full = tensors(seed)
    moments = tree["optimizer"]["a.weight"]
    found = {"weight": tree["model"]["a.weight"], "odd": tree["model"]["a.odd"], "bytes": tree["rng_state"], **moments}
    return all([bits(found[name]) == bits(full[name]) for name in full])  # noqa: C419  (all ranks gather each)


def blank() -> dict[str, Any]:
    tree = state(0)
    return {**tree, "step": 0, "tokens": 0, "schedule": {"peak": 0.0, "floor": 0.0}, "digest": ""}


def two_saves(folder: Path) -> None:
    store = Store(folder, options())
    store.save(10, state(1), {})
    store.save(20, state(2), {}, wait=True)
