"""Layouts by their preset's name, and small models under them; runs on the gloo workers."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from src.distributed.compile import Compile
from src.distributed.init_weights import initialise, materialise
from src.distributed.mesh import Mesh
from src.distributed.model_stages import ModelStages
from src.distributed.parallel_dims import ParallelDims
from src.distributed.parallelize import parallelize
from src.distributed.pipeline.pipeline_parallel import build, connect
from src.distributed.precision.config import Precision
from src.distributed.recompute import Recompute
from src.models.llama3.config import Llama3Config
from src.optim.adamw import AdamW

SINGLE = Path(__file__).parents[2] / "conf" / "parallel" / "single.yaml"
FP32 = Precision(storage="float32", compute="float32", reduce="float32", float8=None)
PLAIN = Compile(blocks=False, loss=False, graph=False, mode="default")


def degrees(name: str, **changes: Any) -> ParallelDims:
    """`tp2_fsdp2`, `hsdp2x2`, ... as its file in conf/parallel says."""
    values = yaml.safe_load(SINGLE.read_text())
    del values["_target_"]
    axis = {"ddp": "replicate", "fsdp": "shard", "tp": "tensor", "cp": "context", "pp": "pipeline"}
    axis |= {"ep": "expert", "etp": "expert_tensor"}
    for part in [] if name == "single" else name.split("_"):
        if match := re.fullmatch(r"hsdp(\d)x(\d)", part):
            values |= {"replicate": int(match[1]), "shard": int(match[2])}
        elif match := re.fullmatch(r"([a-z]+)(\d+)", part):
            values[axis[match[1]]] = int(match[2])
    return ParallelDims(**values | changes)


def adamw(network: ModelStages | nn.Module) -> torch.optim.Optimizer:
    """As optim=adamw builds it on a CPU, with torch's own decay factors and decay, and a large step."""
    chosen = AdamW(
        lr=1e-2,
        weight_decay=0.01,
        decay_norms_and_embeddings=True,
        max_norm=None,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        moments="float32",
        fused=True,
    )
    return chosen.build(network.named_parameters(), torch.device("cpu"))


def recomputed(option: str) -> Recompute:
    """As its file in conf/recompute says, with any number: every3, budget0.5."""
    mode, number = re.fullmatch(r"([a-z]+)([\d.]*)", option).groups()  # type: ignore[union-attr]
    every, budget = (int(number) if mode == "every" else None), (float(number) if mode == "budget" else None)
    return Recompute(mode=mode, every=every, budget=budget)  # type: ignore[arg-type]


def parallel_network(
    config: Llama3Config,
    layout: ParallelDims,
    precision: Precision = FP32,
    recompute: str = "none",
    compile: Compile = PLAIN,
    seed: int = 0,
) -> ModelStages:
    """The model, or this rank's stages of it, with its name-seeded weights."""
    mesh, device = Mesh(layout, "cpu"), torch.device("cpu")
    parts = build(config.build, config.n_layers, layout, mesh.pipeline.get_local_rank())
    for part in parts.values():
        part.to(getattr(torch, precision.storage))
        parallelize(part, mesh, precision, recomputed(recompute), compile)
        materialise(part, device, offload=layout.cpu_offload)
        initialise(part, seed)
    return connect(parts, mesh, device, precision)


def parallel_model(*args: Any, **options: Any) -> tuple[nn.Module, Mesh]:
    """The same, where no pipeline cuts the model."""
    network = parallel_network(*args, **options)
    (model,) = network.stages
    return model, network.mesh


@dataclass
class Rows:
    """A batch made by a test; stands for src.data.batches.Batch."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor | None = None
    documents: Tensor | None = None
    checksum: int = 0


def rows(count: int, length: int, words: int, seed: int = 0) -> Rows:
    """Random tokens; each row ignores another number of labels."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(words, (count, length), generator=generator)
    labels = torch.randint(words, (count, length), generator=generator)
    for row in range(count):
        labels[row, : 3 * row] = -100
    return Rows(tokens, labels)


def share(batch: Rows, mesh: Mesh, micro_batches: int) -> list[Rows]:
    """This data rank's micro-batches of a global batch, in the order of the contract."""
    size = len(batch.tokens) // (mesh.data_ranks * micro_batches)
    starts = [(index * mesh.data_ranks + mesh.data_rank) * size for index in range(micro_batches)]
    return [Rows(batch.tokens[start : start + size], batch.labels[start : start + size]) for start in starts]
