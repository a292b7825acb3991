"""Parameters, flops per token and bytes kept for the backward, from shapes alone.

Nothing here imports torch: the 405B is counted in milliseconds, and a test compares each name and shape with the module
that `build` makes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Protocol

# src/models/cross_entropy.py works through the head in chunks of at least so many rows, of as many as have so many
# logits (1 GiB in bf16): where there are few words, products are larger and sums fewer.
HEAD_CHUNK_ROWS = 4096
HEAD_CHUNK_LOGITS = 2**29
# Of a token, in fp32: one log sum exp for a head of attention, and 1/rms for each norm.
STATISTIC_BYTES = 4


class RankGrid(Protocol):
    """Over how many ranks a weight is cut; `src.distributed.parallel_dims.ParallelDims` is one."""

    @property
    def tensor(self) -> int: ...
    @property
    def fsdp(self) -> int: ...
    @property
    def expert(self) -> int: ...
    @property
    def expert_tensor(self) -> int: ...
    @property
    def expert_shard(self) -> int: ...
    def cuts_inside(self, num_experts: int) -> bool: ...


@dataclass(frozen=True)
class Weight:
    """One parameter. `unit` is the FSDP unit that owns it; `tensor_dim` the dimension that tensor parallelism cuts."""

    name: str
    shape: tuple[int, ...]
    unit: str
    tensor_dim: int | None = None  # None: whole on each tensor rank (norms)
    embedding: bool = False  # looked up, not multiplied: no flops
    multiplications: int = 1  # uses as a matrix in one forward; 0 for a lookup alone
    active: float = 1.0  # share of it that one token meets (routed experts: k / num_experts)
    experts: bool = False  # dimension 0 counts routed experts, which have axes of their own

    @property
    def elements(self) -> int:
        return prod(self.shape)

    def gathered_shape(self, grid: RankGrid) -> tuple[int, ...]:
        """Shape on the fullest rank while it computes: cut by tensor and expert parallelism, gathered over FSDP."""
        shape = list(self.shape)
        if self.experts:
            shape[0] = ceil(shape[0] / grid.expert)
        if self.tensor_dim is not None:
            tensor = grid.expert_tensor if self.experts else grid.tensor
            shape[self.tensor_dim] = ceil(shape[self.tensor_dim] / tensor)
        return tuple(shape)

    def local_elements(self, grid: RankGrid) -> int:
        """Elements at rest on the fullest rank: FSDP cuts last, and rounds up."""
        shape = list(self.gathered_shape(grid))
        inside = self.experts and grid.cuts_inside(self.shape[0])
        shape[inside] = ceil(shape[inside] / (grid.expert_shard if self.experts else grid.fsdp))
        return prod(shape)


@dataclass(frozen=True)
class Slice:
    """The part of a micro-batch that one rank computes."""

    tokens: int  # of one micro-batch, after the context cut
    tensor: int  # degree of tensor parallelism, with sequence parallelism between the blocks
    element_bytes: int  # of the compute dtype
    compiled: bool
    expert: int = 1  # degree of expert parallelism; tokens are expected to spread evenly
    expert_tensor: int = 1  # ranks that cut each routed expert: 1, or all of `tensor`
    float8_inputs: bool = False  # whether products keep their inputs in float8 alone, one byte an element

    @property
    def mixtures(self) -> int:
        """Ranks that divide the tokens of a sequence before routed experts meet them."""
        return self.tensor // self.expert_tensor


@dataclass(frozen=True)
class SavedActivations:
    """Bytes of one block on one rank."""

    whole: int  # all that its backward needs
    input: int  # its input alone: what full recompute keeps
    selective: int  # what selective recompute keeps: input, attention, communication, every second matmul
    working: int  # made by its backward while that runs


@dataclass(frozen=True)
class Counts:
    """Parameters and flops of the whole model. Flops of training (forward + backward = 3 forwards), without
    recompute.
    """

    parameters: int
    active: int  # parameters that one token meets; equal to `parameters` in a dense model
    embedding: int
    flops_per_token: int  # full attention: 6 (N - N_embedding) + 6 S * sum of heads * (d_qk + d_v)
    flops_per_token_causal: int  # the masked half of the attention is not counted


def count(weights: Iterable[Weight], attention_width: int, seq_len: int) -> Counts:
    """A shared matrix stands once in `weights`: counted once as a parameter, and as often as it multiplies in flops."""
    weights = tuple(weights)
    matmul = sum(round(weight.elements * weight.active) * weight.multiplications for weight in weights)
    attention = 6 * seq_len * attention_width
    return Counts(
        parameters=sum(weight.elements for weight in weights),
        active=sum(round(weight.elements * weight.active) for weight in weights),
        embedding=sum(weight.elements for weight in weights if weight.embedding),
        flops_per_token=6 * matmul + attention,
        flops_per_token_causal=6 * matmul + attention // 2,
    )


def head_chunk_rows(vocab_size: int) -> int:
    """Rows of logits that exist at a time: a multiple of HEAD_CHUNK_ROWS."""
    return HEAD_CHUNK_ROWS * max(1, HEAD_CHUNK_LOGITS // vocab_size // HEAD_CHUNK_ROWS)


def around_blocks(vocab_size: int, dim: int, *, tied: bool) -> tuple[Weight, tuple[Weight, ...]]:
    """The embedding, and what follows the last block: its norm, and the head unless it is the embedding (`tied`)."""
    embedding = Weight(
        "tok_embeddings.weight",
        (vocab_size, dim),
        unit="embedding",
        tensor_dim=0,
        embedding=True,
        multiplications=1 if tied else 0,  # tied: the same matrix is also the head
    )
    last = "embedding" if tied else "head"  # one unit owns a shared matrix and all that uses it
    norm, head = Weight("norm.weight", (dim,), last), Weight("output.weight", (vocab_size, dim), last, tensor_dim=0)
    return embedding, (norm,) if tied else (norm, head)


def swiglu(unit: str, name: str, dim: int, hidden: int) -> tuple[Weight, ...]:
    """Matrices of the FeedForward `name` in block `unit`."""
    return (
        Weight(f"{unit}.{name}.w1.weight", (hidden, dim), unit, tensor_dim=0),
        Weight(f"{unit}.{name}.w2.weight", (dim, hidden), unit, tensor_dim=1),
        Weight(f"{unit}.{name}.w3.weight", (hidden, dim), unit, tensor_dim=0),
    )


def norm_bytes(dim: int, cut: Slice) -> float:
    """Bytes a token that an RMSNorm saves: its input, cut by sequence over tensor ranks, and 1/rms."""
    return (cut.element_bytes * dim + STATISTIC_BYTES) / cut.tensor


def swiglu_bytes(hidden: float, cut: Slice) -> float:
    """Bytes a token that a SwiGLU saves: w1 x, w3 x, their product, and in eager mode silu(w1 x), which a compiler
    recomputes.
    """
    return cut.element_bytes * (3 if cut.compiled else 4) * hidden


def core_bytes(heads: int, width: int, cut: Slice) -> float:
    """Bytes a token of attention that selective recompute saves: its result, and the log sum exp of each head."""
    return heads * (cut.element_bytes * width + STATISTIC_BYTES) / cut.tensor


def product_bytes(widths: Sequence[float], last: float | None, cut: Slice) -> float:
    """Of a token, what selective recompute keeps of a block's plain matrix products: every second, from the first on.

    `widths`: elements of each result, in the order of the forward; `last`: of one more, which no backward reads: a
    compiler drops it.
    """
    kept = sum(widths[::2])
    if last is not None and len(widths) % 2 == 0 and not cut.compiled:
        kept += last
    return cut.element_bytes * kept
