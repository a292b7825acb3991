"""Memory estimate of the fullest GPU in bytes, from shapes: weights, gradients, optimizer state, activations.

Every coefficient that is a judgement and not arithmetic is a named constant here or a commented term of a model's
`saved_by_block`. benchmarks/ holds measured peaks to compare with.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, prod

from src.distributed.parallel_dims import ParallelDims
from src.distributed.pipeline.stages import PREDICTION, StageShare, module_of, shares
from src.distributed.precision.config import BYTES, Precision
from src.distributed.recompute import Recompute
from src.models.accounting import SavedActivations, Slice, Weight, head_chunk_rows
from src.models.base import ModelConfig
from src.models.mtp.config import saved_outside
from src.optim.base import STATE_BYTES, Optimizer

GIB = 2**30
MIB = 2**20

# The block at work and the one that FSDP fetches ahead.
BLOCKS_GATHERED = 2
# CUDA context 0.5 GiB, NCCL buffers, cuBLAS and cuDNN workspaces: taken from the GPU, outside of torch's allocator.
RUNTIME_BYTES = int(1.5 * GIB)
# Of torch's allocator: freed pieces that fit no later request.
FRAGMENTATION = 0.02


@dataclass(frozen=True)
class Load:
    """Everything that the memory estimate depends on."""

    model: ModelConfig
    degrees: ParallelDims
    precision: Precision
    optim: Optimizer
    recompute: Recompute  # never `auto`
    compiled_blocks: bool
    compiled_loss: bool
    seq_len: int
    micro_batch: int
    micro_batches: int
    forward_only: bool
    texts: int  # whose keys and values are kept while they grow, at once on this rank; 0: of a task that writes none
    columns: int  # of the longest of them
    ema_bytes: int  # of each weight's average on the device, 0 without
    layer_norms: bool  # of some steps, which need the weights as they were
    outer_bytes: int  # of each weight, that groups which train apart keep beside it on its device

    def changed(self, **changes: object) -> "Load":
        return replace(self, **changes)  # type: ignore[arg-type]  # names and types are those of the fields above


@dataclass(frozen=True)
class Memory:
    """Bytes. The parts are not all there at once: `peak` is the largest of three moments of a step."""

    parameters: int  # this rank's share, in the storage dtype
    gradients: int  # this rank's share, or the whole accumulated gradient between synchronisations
    optimizer: int
    cache: int  # keys and values of texts that are gone on with
    average: int  # moving, of the weights
    outer: int  # what groups that train apart agree on: src/fault_tolerance/outer.py
    gathered: int  # weights gathered for use, in the compute dtype
    reducing: int  # the gradient of the largest unit while ranks add it up
    activations: int  # kept for the backward, all blocks and micro-batches in flight
    working: int  # of one block's backward, beyond what was kept: its gradients, and what it computes again
    loss: int  # a chunk of logits or their gradient, and both gradients of the head
    at_loss: int
    at_backward: int
    at_update: int
    updating: int  # of the update while it runs, such as whole matrices
    runtime: int
    fragmentation: int

    @property
    def peak(self) -> int:
        """Bytes that a GPU must have."""
        return self.allocated + self.fragmentation + self.runtime

    @property
    def allocated(self) -> int:
        """Live tensors at the worst moment: compare with torch.cuda.max_memory_allocated."""
        return max(self.at_loss, self.at_backward, self.at_update)


def estimate(load: Load) -> Memory:
    """Tensors of the fullest rank; legal or not, so that a refusal can say what a change would free."""
    parts = _local_weights(load.model, load.degrees, load.optim)
    degrees = load.degrees
    ranks = shares(degrees, load.model.n_layers, load.micro_batches)
    return max((_of_rank(load, share, _Weights(parts, share)) for share in ranks), key=lambda memory: memory.peak)


@lru_cache(maxsize=8)
def _local_weights(model: ModelConfig, degrees: ParallelDims, optim: Optimizer) -> "dict[str, list[_LocalWeight]]":
    """All weights on the fullest rank, by module. Blocks repeat: each kind of weight is counted once."""
    counted: dict[tuple[object, ...], tuple[int, int, int]] = {}
    found: dict[str, list[_LocalWeight]] = {}
    for weight in model.weights():
        kind = (weight.name.partition(".")[0], weight.name.split(".", 2)[-1], weight.shape)
        if kind not in counted:
            gathered = prod(weight.gathered_shape(degrees))
            state = local_state_bytes(optim, weight, degrees)
            counted[kind] = weight.local_elements(degrees), gathered, state
        found.setdefault(module_of(weight.name), []).append(_LocalWeight(weight, *counted[kind]))
    return found


def local_state_bytes(optim: Optimizer, weight: Weight, degrees: ParallelDims) -> int:
    """Bytes that an optimizer keeps for a weight on the fullest rank; its state is cut as the weight is."""
    kept = optim.state(weight.name, weight.shape).values()
    return sum(replace(weight, shape=each.shape).local_elements(degrees) * STATE_BYTES[each.dtype] for each in kept)


def _of_rank(load: Load, share: StageShare, weights: "_Weights") -> Memory:
    parameters = weights.local * BYTES[load.precision.storage]
    optimizer = weights.state
    outer, average = weights.local * load.outer_bytes, weights.local * load.ema_bytes
    gradients, accumulated = _gradients(load, weights)
    if load.degrees.cpu_offload:  # what rests, rests in the host
        parameters = optimizer = outer = average = gradients = 0
    # While a validation reads the average, these are held beside it; a merge reads its own when it is done.
    lent = parameters if average and not load.forward_only else 0
    gathered, reducing = _traffic(load, weights)
    activations, working = _activations(load, share)
    activations += _travelling(load, share) + _waiting_heads(load, share, weights) + _looking_ahead(load, share)
    if load.forward_only:  # one block at a time, and nothing is kept for a backward
        optimizer = gradients = accumulated = reducing = activations = 0
    loss = _loss(load, weights) if share.has_head else 0
    cache = _cache(load, share)
    resident = parameters + optimizer + cache + outer + average
    held = _held(load, share, activations, accumulated)
    at_loss = resident + gathered + max(held, lent) + loss
    at_backward = resident + gathered + held + reducing + working
    updating = 0 if load.forward_only else _updating(load, weights)
    at_update = resident + gradients + updating
    return Memory(
        parameters=parameters,
        gradients=max(gradients, accumulated),
        optimizer=optimizer,
        cache=cache,
        average=average,
        outer=outer,
        gathered=gathered,
        reducing=reducing,
        activations=activations,
        working=working,
        loss=loss,
        at_loss=at_loss,
        at_backward=at_backward,
        at_update=at_update,
        updating=updating,
        runtime=RUNTIME_BYTES,
        fragmentation=int(FRAGMENTATION * max(at_loss, at_backward, at_update)),
    )


@dataclass(frozen=True)
class _LocalWeight:
    """A weight on the fullest rank."""

    weight: Weight
    local: int  # elements at rest
    gathered: int  # elements while it computes
    state: int  # bytes of the optimizer


class _Weights:
    """Elements on one rank: its share, and each FSDP unit when gathered."""

    def __init__(self, parts: "dict[str, list[_LocalWeight]]", share: StageShare) -> None:
        here = [each for module in parts if module in share.modules for each in parts[module]]
        self.local, self.state = sum(each.local for each in here), sum(each.state for each in here)
        self.shapes = {each.weight.name: each.weight.shape for each in here}
        self.units: dict[str, int] = {}
        for each in here:
            self.units[each.weight.unit] = self.units.get(each.weight.unit, 0) + each.gathered
        blocks = [elements for unit, elements in self.units.items() if unit.startswith(("layers.", f"{PREDICTION}."))]
        self.largest_block = max(blocks, default=0)
        self.largest = max(self.units.values())
        self.blocks = sum(blocks)
        self.whole = sum(self.units.values())
        self.head = self.units.get("head", self.units.get("embedding", 0)) if share.has_head else 0  # tied: one unit


def _updating(load: Load, weights: _Weights) -> int:
    degrees = load.degrees
    before = weights.local * BYTES[load.precision.storage] if load.layer_norms and not degrees.cpu_offload else 0
    return before + load.optim.working_bytes(
        weights.shapes, ranks=degrees.world // degrees.pipeline, copies=degrees.replicate
    )


def _gradients(load: Load, weights: _Weights) -> tuple[int, int]:
    """Bytes at the update, and bytes already there when the last micro-batch runs."""
    if load.degrees.on_one_device:  # several add up as soon as each is whole: src/distributed/fsdp/one_device.py
        dtype = load.precision.compute if load.micro_batches == 1 else load.precision.reduce
        return weights.local * BYTES[dtype], 0 if load.micro_batches == 1 else weights.local * BYTES[dtype]
    at_update = weights.local * BYTES[load.precision.storage]  # FSDP hands them over in the parameters' dtype
    if load.micro_batches == 1 and load.degrees.pipeline == 1:
        return at_update, 0
    if load.degrees.sync_each_micro_batch:
        return at_update, at_update
    # Not reduced in between: each rank adds up the gradient of all that its tensor rank owns, in the reduce dtype.
    return at_update, weights.whole * BYTES[load.precision.reduce]


def _held(load: Load, share: StageShare, activations: int, accumulated: int) -> int:
    """Bytes of activations and of gradients added up so far, when they are most together.

    Once the last forward is done, each backward lets go of activations, and the first of a stage makes its gradient.
    """
    waiting = round(share.in_flight * share.stages)
    before = load.micro_batches * share.stages - waiting  # backwards by then; in rounds of as many as there are ranks
    moments = (
        activations * (waiting - done) // waiting
        + accumulated * min(share.stages, ceil((before + done) / load.degrees.pipeline)) // share.stages
        for done in range(waiting)
    )
    return max(moments)


def _traffic(load: Load, weights: _Weights) -> tuple[int, int]:
    """Bytes of gathered weights, and of the gradients under way."""
    compute, reduce = BYTES[load.precision.compute], BYTES[load.precision.reduce]
    if load.degrees.on_one_device:  # all weights in the compute dtype, beside those that rest in another
        copied = load.precision.compute != load.precision.storage
        looked_up = 0 if load.model.tied else weights.units.get("embedding", 0)  # rows of it are cast as they are read
        return (weights.whole - looked_up) * compute if copied else 0, weights.largest * compute
    # The head is not resharded before its backward: it is needed again at once.
    if not load.degrees.reshards_after_forward:
        blocks, others = weights.blocks, weights.whole - weights.blocks
    else:
        ahead = BLOCKS_GATHERED - 1 + load.degrees.prefetch
        blocks, others = min(weights.blocks, ahead * weights.largest_block), weights.head
    float8 = load.precision.float8
    block_bytes = 1 if float8 is not None and float8.all_gather else compute
    # The gradient twice: as autograd made it, and the copy that is sent.
    return blocks * block_bytes + others * compute, weights.largest * (compute + reduce)


def _slice(load: Load) -> Slice:
    return Slice(
        tokens=load.micro_batch * load.seq_len // load.degrees.context,
        tensor=load.degrees.tensor,
        element_bytes=BYTES[load.precision.compute],
        compiled=load.compiled_blocks,
        expert=load.degrees.expert,
        expert_tensor=load.degrees.expert_tensor,
        float8_inputs=load.precision.float8 is not None and load.compiled_blocks and load.precision.float8.keeps_float8,
    )


def _activations(load: Load, share: StageShare) -> tuple[int, int]:
    """Bytes that blocks keep, of all micro-batches in flight, and those of one block's backward."""
    saved: SavedActivations = load.model.saved_by_block(_slice(load))
    layers, recompute = _numbers(load, share), load.recompute
    if recompute.mode == "every":
        every = recompute.every
        assert every is not None
        again = sum((layer + 1) % every == 0 for layer in layers)
        kept_by_all = (len(layers) - again) * saved.whole + again * saved.input
        return int(share.in_flight * kept_by_all), saved.whole - saved.input + saved.working
    kept = {"none": saved.whole, "full": saved.input, "selective": saved.selective}.get(recompute.mode)
    if kept is None:
        assert recompute.budget is not None, "auto is settled before"
        kept = saved.input + int(recompute.budget * (saved.whole - saved.input))
    return int(share.in_flight * len(layers) * kept), max(0, saved.whole - kept) + saved.working


def _numbers(load: Load, share: StageShare) -> list[int]:
    """Of the blocks of a rank; those of multi-token prediction follow the last layer."""
    first, depths = load.model.n_layers, load.model.prediction_depths if share.has_head else 0
    return [*share.layers, *range(first, first + depths)]


def _looking_ahead(load: Load, share: StageShare) -> int:
    """What multi-token prediction keeps outside of its blocks, and the embeddings that reach it through all stages."""
    cut, depths = _slice(load), load.model.prediction_depths
    passing = 0 if share.stages == 1 and share.borders == 0 else depths * _hidden(load, cut)
    own = depths * saved_outside(load.model.dim, cut) if share.has_head else 0
    return int(share.in_flight * share.stages * passing + max(1, share.heads_in_flight) * own)


def _hidden(load: Load, cut: Slice) -> int:
    """Bytes of a hidden state between two blocks."""
    return int(cut.tokens * load.model.dim / cut.tensor * cut.element_bytes)


def _cache(load: Load, share: StageShare) -> int:
    """Bytes that the attention cores of this rank remember in the compute dtype: src/models/cache.py."""
    heads = load.model.kv_heads // load.degrees.tensor
    elements = load.texts * load.columns * heads * sum(load.model.head_widths)
    return len(share.layers) * elements * BYTES[load.precision.compute]


def _travelling(load: Load, share: StageShare) -> int:
    """torch's stages keep a buffer for what each micro-batch brings: a hidden state or its gradient."""
    states = 1 + load.model.prediction_depths  # with the embeddings of tokens ahead
    return share.borders * load.micro_batches * states * _hidden(load, _slice(load))


def _waiting_heads(load: Load, share: StageShare, weights: _Weights) -> int:
    """Gradients of the head and of its input, made in the forward, of micro-batches whose backward comes later."""
    cut = _slice(load)
    each = weights.head + int(cut.tokens * load.model.dim * (1 + 1 / cut.tensor))
    each *= 1 + load.model.prediction_depths
    return max(0, share.heads_in_flight - 1) * each * cut.element_bytes


def _loss(load: Load, weights: _Weights) -> int:
    cut = _slice(load)
    words = load.model.vocab_size / cut.tensor
    # Logits, then their gradient in the same place; eager arithmetic makes three fp32 copies on its way.
    logit_bytes = cut.element_bytes + (0 if load.compiled_loss else 3 * 4)
    chunk = min(cut.tokens, head_chunk_rows(load.model.vocab_size)) * words * logit_bytes
    # The final norm's input, its output, and the gradient of that; the head's own gradient is made in the forward.
    hidden = cut.tokens * load.model.dim * (2 + 1 / cut.tensor) * cut.element_bytes
    # Each depth of multi-token prediction has a hidden state and a gradient of the head of its own.
    times = 1 if load.forward_only else 1 + load.model.prediction_depths
    return int(chunk + times * (hidden + weights.head * cut.element_bytes))
