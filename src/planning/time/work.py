"""What one rank computes of a micro-batch, in seconds: each product of each layer by its shape, attention, kernels that
move bytes, the head and its loss.

A product is 2 x rows x columns x inner flops, and each of its two gradients as much again; attention is
length x (width of a key + width of a value) flops a token and head, since the mask leaves a half, and 2.5 times that
backwards, where kernels compute the scores again (arXiv 2205.14135).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol, Self, TypeVar

from src.distributed.parallel_dims import ParallelDims
from src.distributed.precision.config import BYTES
from src.distributed.precision.float8 import Float8
from src.models.accounting import Slice, Weight, head_chunk_rows
from src.models.base import ModelConfig
from src.planning.memory import Load
from src.planning.time.devices import Gpu

# Bytes that the memory-bound kernels of a block move, for each byte that the block keeps for its backward: 46 ms of
# one_gpu.json (8B, 16 layers, 16,384 tokens) without the loss; a third of them in the forward.
PASSES_FORWARD, PASSES_BACKWARD = 1.4, 2.8
EAGER_PASSES = 2.6  # of kernels that nobody fuses; 124 M eager beside compiled
# The same for each byte of a routed row, both ways through the experts and back: 10.4 ms of 8 layers of 16B.
PERMUTES_FORWARD, PERMUTES_BACKWARD = 5.0, 8.0
LOGIT_BYTES = 8  # read for the maximum and the sum, read again, and written as the gradient, in bf16
ATTENTION_BACKWARD = 2.5  # forwards
SHORT_SEQUENCE = 900  # tokens at which attention reaches half of its speed: 1,024 tokens of 64 against 8,192
# Of plain products, what selective recompute computes again: every second one. 36 % of 8B's flops.
SELECTIVE_PRODUCTS = 0.36
# Kernels of a block's forward and backward beside its products (three each, and a float8 one has its inputs rounded
# before them): four of attention, and those of norms, rotary, activations, sums and gradients. Counted by hand: 45 of a
# compiled block of Llama 3.
ATTENTION_KERNELS = 4
FUSED_KERNELS, UNFUSED_KERNELS = 20, 92  # of a compiled block, and of one that nobody fuses
ROUTED_KERNELS = 40  # more of a block with routed experts: scores, a sort, permutes, grouped products
ROUNDING_KERNELS = 6  # more of a float8 product: scale and cast of its input, its weight and its gradient
# Imbalance of routed experts on the busiest rank, divided by the root of the experts that it has: unequal experts cost
# 1.0 % of 16B's step on fsdp2_ep2, where each rank has 32.
IMBALANCE = 0.17
SHARED = ".shared_experts."  # in a weight's name


@dataclass(frozen=True)
class Work:
    """Seconds of one micro-batch in some layers, one direction."""

    products: float = 0.0
    experts: float = 0.0  # grouped products of routed experts
    attention: float = 0.0
    memory: float = 0.0  # kernels that move bytes: norms, activations, rotary, permutes
    gaps: float = 0.0  # from the end of each kernel to the start of the next
    loss: float = 0.0  # the head's products, all three, and the cross entropy
    recompute: float = 0.0
    tensor: float = 0.0  # collectives that nothing hides: of tensor ranks,
    context: float = 0.0  # of context ranks,
    travel: float = 0.0  # and of rows that go to experts

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, name) + getattr(other, name) for name in PARTS))

    def __mul__(self, times: float) -> "Work":
        return Work(*(getattr(self, name) * times for name in PARTS))

    @property
    def total(self) -> float:
        return float(sum(getattr(self, name) for name in PARTS))

    @property
    def computed(self) -> float:
        """Without collectives."""
        return self.total - self.tensor - self.context - self.travel

    @property
    def matrices(self) -> float:
        """What slows down beside a collective."""
        return self.products + self.experts + self.loss + self.recompute


PARTS = tuple(each.name for each in fields(Work))


class Product(NamedTuple):
    """A matrix that multiplies, whole."""

    columns: int
    inner: int
    tensor_dim: int | None
    times: float  # in one forward
    name: str


class ProductTime(NamedTuple):
    """A product of a block as one rank holds it: (rows x inner) by (inner x columns), for one micro-batch."""

    name: str
    rows: float  # a mean where rows are routed
    columns: int
    inner: int
    times: float
    forward: float  # seconds of one
    backward: float  # of both gradients

    def often(self, times: float) -> "ProductTime":
        return self._replace(times=times * self.times)

    @property
    def seconds(self) -> float:
        return self.times * (self.forward + self.backward)

    @property
    def flops_per_second(self) -> float:
        return 6.0 * self.rows * self.columns * self.inner / (self.forward + self.backward)


class Counted(Protocol):
    """What happens so many times."""

    @property
    def times(self) -> float: ...
    def often(self, times: float) -> Self: ...


Term = TypeVar("Term", bound=Counted)


def together(found: Sequence[Term]) -> tuple[Term, ...]:
    """Terms that differ in nothing but how often they happen, as one."""
    times: dict[Term, float] = {}
    for each in found:
        if each.times:
            one = each.often(1.0 / each.times)
            times[one] = times.get(one, 0.0) + each.times
    return tuple(one.often(count) for one, count in times.items())


class BlockKind(NamedTuple):
    """What the blocks of one kind multiply with."""

    products: tuple[Product, ...]
    experts: tuple[Product, ...]  # of one expert


@dataclass(frozen=True)
class Shape:
    """A model, with blocks that are alike counted together."""

    model: ModelConfig
    kinds: tuple[BlockKind, ...]
    of_block: tuple[int, ...]  # number of the kind of each block; those of multi-token prediction come last
    dense: tuple[int, ...]  # elements of each block that every rank of a tensor group shares the cut of
    routed: tuple[int, ...]  # elements of its routed experts
    embedding: int
    head: int  # with what follows the last block; 0 where the embedding is the head

    @cached_property
    def vocabulary(self) -> int:
        return self.model.vocab_size


@lru_cache(maxsize=8)
def shape_of(model: ModelConfig) -> Shape:
    """Of a model as its config says; kept, since a search asks thousands of times."""
    blocks: dict[int, list[Weight]] = {}
    embedding = head = 0
    for weight in model.weights():
        number = model.block_number(weight.name)
        if number is not None:
            blocks.setdefault(number, []).append(weight)
        elif weight.embedding:
            embedding += weight.elements
        else:
            head += weight.elements
    kinds = dict.fromkeys(_kind(blocks[number]) for number in sorted(blocks))
    numbers = {kind: number for number, kind in enumerate(kinds)}
    return Shape(
        model=model,
        kinds=tuple(kinds),
        of_block=tuple(numbers[_kind(blocks[number])] for number in sorted(blocks)),
        dense=tuple(sum(each.elements for each in blocks[number] if not each.experts) for number in sorted(blocks)),
        routed=tuple(sum(each.elements for each in blocks[number] if each.experts) for number in sorted(blocks)),
        embedding=embedding,
        head=head,
    )


def _kind(weights: Iterable[Weight]) -> BlockKind:
    products, experts = list[Product](), list[Product]()
    for weight in weights:
        if len(weight.shape) < 2 or not weight.multiplications:
            continue
        columns, inner = weight.shape[-2:]
        found = Product(columns, inner, weight.tensor_dim, weight.multiplications, weight.name.split(".", 2)[-1])
        (experts if weight.experts else products).append(found)
    return BlockKind(tuple(products), tuple(experts))


@dataclass(frozen=True)
class Worker:
    """Seconds of the layers of a model on one rank of a layout."""

    load: Load
    gpu: Gpu
    flash: bool  # whether flash-attn-4's kernels are there

    @cached_property
    def degrees(self) -> ParallelDims:
        return self.load.degrees

    @cached_property
    def tokens(self) -> int:
        """Of one micro-batch on this rank, which tensor ranks share."""
        return self.load.micro_batch * self.load.seq_len // self.load.degrees.context

    def block(self, kind: BlockKind) -> tuple[Work, Work]:
        """One block's forward and backward, without what is computed again."""
        products = self._plain(kind)
        plain = sum(each.times * each.forward for each in products)
        again = sum(each.times * each.backward for each in products)
        grouped, grouped_back = self._grouped(kind)
        attention, attention_back = self._attention()
        memory, memory_back = self._memory(kind)
        gaps = self.kernels(kind) * self.gpu.kernel_gap / 3.0  # a third of the kernels are the forward's
        return (
            Work(products=plain, experts=grouped, attention=attention, memory=memory, gaps=gaps),
            Work(products=again, experts=grouped_back, attention=attention_back, memory=memory_back, gaps=2.0 * gaps),
        )

    def kernels(self, kind: BlockKind) -> int:
        """That a block's forward and backward launch, without what is computed again."""
        each = 3 + (ROUNDING_KERNELS if self._float8 is not None else 0)
        fused = FUSED_KERNELS if self.load.compiled_blocks else UNFUSED_KERNELS
        return each * len(kind.products) + ATTENTION_KERNELS + fused + (ROUTED_KERNELS if kind.experts else 0)

    @cached_property
    def _float8(self) -> Float8 | None:
        """None where products are as wide as all else."""
        found = self.load.precision.float8
        return None if found is None or found.emulate or self.gpu.float8 is None else found

    def shared(self, kind: BlockKind) -> tuple[float, float]:
        """Of the experts that all tokens meet: their forward, and both gradients."""
        mine = [each for each in self._plain(kind) if SHARED in each.name]
        return sum(each.times * each.forward for each in mine), sum(each.times * each.backward for each in mine)

    def recomputed(self, forward: Work) -> float:
        """Seconds that a block's backward spends on its forward again, on the average of all blocks."""
        mode = self.load.recompute.mode
        if mode == "full":
            return forward.total
        if mode == "every":
            return forward.total / (self.load.recompute.every or 1)
        if mode == "selective":
            return SELECTIVE_PRODUCTS * forward.products + forward.memory
        if mode == "budget":
            return (1.0 - (self.load.recompute.budget or 0.0)) * forward.total
        return 0.0

    def head(self, vocabulary: int) -> float:
        """The head's product and both gradients, chunk by chunk, and the loss: all of it in the forward."""
        columns, dim = vocabulary // self.degrees.tensor, self.load.model.dim
        rows = min(self.tokens, head_chunk_rows(vocabulary))
        chunk = sum(self._three(rows, columns, dim))
        passes = LOGIT_BYTES * (1.0 if self.load.compiled_loss else EAGER_PASSES)
        return self.tokens / rows * (chunk + self.gpu.moved_seconds(rows * columns * passes))

    def _three(self, rows: int, columns: int, inner: int) -> tuple[float, float, float]:
        """A product and its gradients of inputs and of weights."""
        slower = self._slower
        return (
            slower * self.gpu.product_seconds(rows, columns, inner),
            slower * self.gpu.product_seconds(rows, inner, columns),
            slower * self.gpu.product_seconds(columns, inner, rows),
        )

    @property
    def _slower(self) -> float:
        """Than bf16: TF32 is off, and fp32 has no tensor cores."""
        return 1.0 if self.load.precision.compute == "bfloat16" else self.gpu.bf16 / self.gpu.float32

    def product_times(self, kind: BlockKind) -> list[ProductTime]:
        """Every product of a block; those of routed experts as the one grouped product that they are."""
        found = list(self._plain(kind))
        forward, backward = self._grouped(kind)
        total = sum(each.columns * each.inner for each in kind.experts)
        for each in kind.experts:
            share = each.columns * each.inner / total
            columns, inner = self._cut(each, self.degrees.expert_tensor)
            found.append(
                ProductTime(each.name, self.routed_rows, columns, inner, 1.0, share * forward, share * backward)
            )
        return found

    @cached_property
    def _known(self) -> dict[BlockKind, list[ProductTime]]:
        return {}

    def _plain(self, kind: BlockKind) -> list[ProductTime]:
        """Products that all tokens meet; kept, since three questions ask for them."""
        if kind not in self._known:
            self._known[kind] = self._plain_products(kind)
        return self._known[kind]

    def _plain_products(self, kind: BlockKind) -> list[ProductTime]:
        found = list[ProductTime]()
        cuts = [self._cut(product, self.degrees.tensor) for product in kind.products]
        for product, (columns, inner) in zip(kind.products, cuts, strict=True):
            if self._float8 is not None and self._float8.converts(product.name, columns, inner):
                readers = sum(other for other, width in cuts if width == inner)
                times = self._float8_seconds(self._float8, columns, inner, columns / readers)
            else:
                first, *gradients = self._three(self.tokens, columns, inner)
                times = first, sum(gradients)
            found.append(ProductTime(product.name, self.tokens, columns, inner, product.times, *times))
        return found

    def _float8_seconds(self, float8: Float8, columns: int, inner: int, share: float) -> tuple[float, float]:
        """A product and both gradients. `share`: of the rounding of an input that products of its width share."""
        wide = self.gpu.product_seconds(columns, inner, self.tokens) if float8.recipe == "rowwise_with_gw_hp" else None
        return self.gpu.float8_seconds(self.tokens, columns, inner, share, sent=float8.all_gather, last=wide)

    def _cut(self, product: Product, degree: int) -> tuple[int, int]:
        columns, inner = product.columns, product.inner
        if product.tensor_dim is None or degree == 1:
            return columns, inner
        return (columns // degree, inner) if product.tensor_dim % 2 == 0 else (columns, inner // degree)

    @cached_property
    def routed_rows(self) -> float:
        """Rows that reach the experts of this rank, of one micro-batch, if all ranks have as many."""
        mixture = self.load.model.mixture
        if mixture is None:
            return 0.0
        divided = self.degrees.tensor if self.degrees.divides_tokens else 1
        return self.tokens * mixture.top_k / divided

    def _grouped(self, kind: BlockKind) -> tuple[float, float]:
        mixture = self.load.model.mixture
        if not kind.experts or mixture is None:
            return 0.0, 0.0
        flops = sum(2.0 * each.columns * each.inner for each in kind.experts) / self.degrees.expert_tensor
        shares = self.gpu.shares
        narrow = self._float8 is not None and self._float8.experts
        rate = self.gpu.bf16 * (shares.grouped_float8 if narrow else shares.grouped) / self._slower
        each = mixture.num_experts / self.degrees.expert
        uneven = 1.0 if self.degrees.expert == 1 or mixture.force_load_balance else 1.0 + IMBALANCE / each**0.5
        rows = self.routed_rows * uneven
        # Weights must be read once, however few rows there are.
        read = self.gpu.moved_seconds(2.0 * each * sum(one.columns * one.inner for one in kind.experts))
        forward = max(rows * flops / rate, read / self.degrees.expert_tensor)
        return forward, 2.0 * forward

    def _attention(self) -> tuple[float, float]:
        model, shares = self.load.model, self.gpu.shares
        key, value = model.head_widths
        length = self.load.seq_len
        share = shares.attention_narrow if key <= 64 else shares.attention if key <= 128 else shares.attention_wide
        if model.attention == "flex" and not (self.flash and model.within_documents):
            share *= shares.flex * (shares.cudnn if self.flash else 1.0)
        elif not self.flash:
            share *= shares.cudnn if key <= 128 else shares.cudnn_wide
        if self.degrees.context > 1:
            share *= shares.context
        share *= length / (length + SHORT_SEQUENCE) * (8192 + SHORT_SEQUENCE) / 8192
        seen = min(length, model.fixed_block or length)
        flops = self.tokens * seen * (key + value) * model.n_heads / self.degrees.tensor  # 2, halved by the mask
        seconds = flops / (self.gpu.bf16 * share)
        seconds *= self._slower
        return seconds, ATTENTION_BACKWARD * seconds

    def _memory(self, kind: BlockKind) -> tuple[float, float]:
        cut = Slice(
            tokens=self.tokens,
            tensor=self.degrees.tensor,
            element_bytes=BYTES[self.load.precision.compute],
            compiled=self.load.compiled_blocks,
            expert=self.degrees.expert,
            expert_tensor=self.degrees.expert_tensor,
        )
        kept = float(self.load.model.saved_by_block(cut).whole)
        rows = 0.0
        if kind.experts:
            rows = self.routed_rows * self.load.model.dim * cut.element_bytes
        slower = 1.0 if self.load.compiled_blocks else EAGER_PASSES
        forward = slower * PASSES_FORWARD * kept + PERMUTES_FORWARD * rows
        backward = slower * PASSES_BACKWARD * kept + PERMUTES_BACKWARD * rows
        return self.gpu.moved_seconds(forward), self.gpu.moved_seconds(backward)
