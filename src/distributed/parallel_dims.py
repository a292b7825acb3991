"""Parallel degrees and pipeline schedule of a layout (config section `parallel`), with their legality rules.

Arithmetic only: the launcher checks a layout before any process group exists.
"""

from math import prod
from typing import Annotated, Literal

from pydantic import Strict, model_validator

from src.config.base import Config, Names
from src.config.bounds import CountFromZero, Layers, Ranks

ScheduleName = Literal[
    "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
]

MOST_RANKS = 2**20  # ten times the largest machines
SPLITTING: tuple[ScheduleName, ...] = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


class ParallelDims(Config):
    """The layout of a run. The world is the product of the degrees; nothing is inferred from the machine."""

    replicate: Ranks
    """Copies of the sharded model, each on its own data (DDP, HSDP)."""
    shard: Ranks
    """Ranks that each hold a slice of every parameter, on their own data (FSDP)."""
    context: Ranks
    """Ranks that cut the sequence (context parallelism)."""
    tensor: Ranks
    """Ranks that cut every matrix (tensor parallelism)."""
    expert: Ranks
    """Ranks that divide the routed experts and send each other tokens; taken out of shard, context and tensor."""
    expert_tensor: Ranks
    """Ranks that cut every matrix of a routed expert; 1: tensor ranks divide tokens; else as many as tensor."""
    pipeline: Ranks
    """Stages that divide the layers (pipeline parallelism)."""
    reshard: Literal["default", "always", "never"]
    """Gather weights again in the backward pass; default: not for the last block, nor in a pipeline."""
    rotate: Literal["allgather", "alltoall"]
    """How keys and values of a cut sequence arrive; allgather: all at once; alltoall: one rank's at a time, less
    memory.
    """
    async_tensor: bool
    """True: tensor overlaps each transfer with its matrix product; needs CUDA and compile=blocks."""
    sync_each_micro_batch: bool
    """True: each micro-batch reduces gradients, less memory; false: only the last of a step."""
    prefetch: Layers
    """Blocks whose weights FSDP gathers ahead; more costs memory, and pays where networks are slow."""
    cpu_offload: bool
    """True: weights, gradients and optimizer state rest in host memory, where the optimizer runs: slow."""
    pipeline_schedule: ScheduleName
    """Order of forward and backward passes; GPipe and 1F1B have one stage a rank, ZBVZeroBubble and DualPipeV two, the
    others two or more.
    """
    layers_per_stage: Layers | None
    """Layers of a stage, so that more stages are cut; null: one a rank, or two where the schedule takes several."""
    first_stage_less: CountFromZero
    """Layers that the first stage has less than the others, for the embedding."""
    last_stage_less: CountFromZero
    """Layers that the last stage has less than the others, for the head."""
    stages: Annotated[tuple[Names, ...], Strict(strict=False)] | None
    """Modules of each stage, such as [[tok_embeddings, layers.0], [layers.1, norm, output]]; null: layers dealt evenly.
    """

    @model_validator(mode="after")
    def _a_world_that_exists(self) -> "ParallelDims":
        if self.world > MOST_RANKS:
            raise ValueError(f"{self.product} are {self.world} ranks; at most {MOST_RANKS}")
        return self

    @property
    def axes(self) -> dict[str, int]:
        """Degrees from the outermost axis to the innermost, whose ranks are neighbours in the machine."""
        return {
            "pipeline": self.pipeline,
            "replicate": self.replicate,
            "shard": self.shard,
            "context": self.context,
            "tensor": self.tensor,
        }

    @property
    def product(self) -> str:
        """Degrees above 1, as a product: "pipeline=2 * shard=4"."""
        return " * ".join(f"{axis}={degree}" for axis, degree in self.axes.items() if degree > 1)

    def told(self, micro_batch: int | None, recompute: object) -> str:
        """In the words of the command line, without what is so by default: what a search of layouts decides."""
        words = [f"{axis}={degree}" for axis, degree in self.axes.items() if degree > 1]
        words += [f"expert={self.expert}"] if self.expert > 1 else []
        words += [self.pipeline_schedule] if self.pipeline > 1 else []
        words += [f"layers_per_stage={self.layers_per_stage}"] if self.layers_per_stage else []
        words += [f"reshard={self.reshard}"] if self.reshard != "default" else []
        words += ["sync_each_micro_batch"] if self.sync_each_micro_batch else []
        return " ".join([*words, f"micro_batch={micro_batch}", f"recompute={recompute}"])

    @property
    def world(self) -> int:
        """Ranks of the run. Experts live on ranks that the other axes already count."""
        return prod(self.axes.values())

    @property
    def on_one_device(self) -> bool:
        """Whether nothing is cut, gathered or reduced; weights that rest in the host's memory are gathered."""
        return self.world == 1 and not self.cpu_offload

    @property
    def data_ranks(self) -> int:
        """Ranks that read different samples."""
        return self.replicate * self.shard

    @property
    def sequence_parts(self) -> int:
        """Into how many equal parts a sequence is cut: sequence parallelism cuts once, and a balanced context cut takes
        two pieces per rank.
        """
        return self.tensor * (2 * self.context if self.context > 1 else 1)

    @property
    def fsdp(self) -> int:
        """Ranks over which FSDP cuts one parameter; context ranks take part."""
        return self.shard * self.context

    @property
    def experts_apart(self) -> bool:
        """Whether routed experts have a mesh of their own."""
        return self.expert > 1 or self.expert_tensor != self.tensor

    @property
    def divides_tokens(self) -> bool:
        """Whether the ranks of `tensor` send different tokens to whole experts, instead of cutting each expert."""
        return self.tensor > 1 and self.expert_tensor == 1

    @property
    def expert_shard(self) -> int:
        """Ranks over which FSDP cuts one routed expert: what its other axes leave of a model's ranks, if legal."""
        return max(1, self.fsdp * self.tensor // (self.expert * self.expert_tensor))

    @property
    def expert_axes(self) -> dict[str, int]:
        """Degrees above 1 of the mesh of routed experts; empty where experts are cut like all other weights."""
        names = ("replicate", "expert_shard", "expert", "expert_tensor") if self.experts_apart else ()
        return {name: degree for name in names if (degree := getattr(self, name)) > 1}

    def cuts_inside(self, num_experts: int) -> bool:
        """Whether FSDP must cut each expert's matrices, because a rank's experts cannot be dealt out whole."""
        return num_experts % (self.expert * self.expert_shard) > 0

    def problems(self, *, flex: bool, compiled_blocks: bool, gpu: bool) -> list[str]:
        """Conflicts with other sections: key, value, rule, remedy. `flex`: attention is FlexAttention; `gpu`: ranks
        have one, as far as known.
        """
        found = []
        if self.rotate == "alltoall" and self.context == 1:
            found.append("parallel.rotate=alltoall moves nothing: parallel.context=1; pass parallel.rotate=allgather")
        elif self.rotate == "alltoall" and flex:
            found.append(
                "parallel.rotate=alltoall joins parts of causal attention, and model.attention=flex has a mask; "
                "pass parallel.rotate=allgather or model.attention=sdpa"
            )
        ranks = self.fsdp * self.tensor
        if self.expert_tensor not in (1, self.tensor):
            found.append(
                f"parallel.expert_tensor={self.expert_tensor} is neither 1 nor parallel.tensor={self.tensor}; "
                "pass one of the two"
            )
        elif ranks % (self.expert * self.expert_tensor):
            most = ranks // self.expert_tensor
            fits = max(degree for degree in range(1, min(most, self.expert) + 1) if most % degree == 0)
            found.append(
                f"parallel.expert={self.expert} * parallel.expert_tensor={self.expert_tensor} does not divide the "
                f"{ranks} ranks of shard * context * tensor; parallel.expert={fits} does"
            )
        if self.async_tensor and self.tensor == 1:
            found.append(
                "parallel.async_tensor=true overlaps nothing: parallel.tensor=1; pass parallel.async_tensor=false"
            )
        if self.async_tensor and not compiled_blocks:
            found.append("parallel.async_tensor=true is the compiler's work; pass compile=blocks")
        if self.async_tensor and not gpu:
            found.append("parallel.async_tensor=true needs GPUs; pass parallel.async_tensor=false")
        return found

    @property
    def reshards_after_forward(self) -> bool:
        """Whether FSDP lets go of gathered weights after the forward pass.

        By default not in a pipeline, where every micro-batch would gather them twice.
        """
        return self.reshard == "always" or (self.reshard == "default" and self.pipeline == 1)

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of inputs are asked for first and those of weights later, to fill bubbles."""
        return self.pipeline > 1 and self.pipeline_schedule in SPLITTING
