"""Out-of-memory advice: which setting frees how many bytes, each estimated by planning/memory.py."""

from collections.abc import Iterator

from src.distributed.pipeline import stages
from src.planning.memory import GIB, MIB, Load, Memory, estimate
from src.planning.recompute_choice import FULL, SELECTIVE

PARTS = {
    "activations": "activations",
    "optimizer": "optimizer state",
    "parameters": "parameters",
    "cache": "keys and values of texts",
    "average": "average of the weights",
    "outer": "outer weights and momentum",
    "gradients": "gradients",
    "gathered": "gathered weights",
    "loss": "loss",
    "working": "one block's backward",
    "reducing": "gradients under way",
}

MOST_TURNS = 12  # doublings of shard and tensor count one each


def told(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"


def problem(load: Load, limit_bytes: int) -> str | None:
    """One line when `load` needs more than `limit_bytes` on a GPU: the largest parts and what would free memory."""
    memory = estimate(load)
    if memory.peak <= limit_bytes:
        return None
    sizes = sorted(((getattr(memory, part), words) for part, words in PARTS.items()), reverse=True)
    largest = ", ".join(f"{words} {told(size)}" for size, words in sizes[:3])
    return f"does not fit: {told(memory.peak)} a GPU, there are {told(limit_bytes)}. Largest: {largest}. " + _advice(
        load, memory, limit_bytes
    )


def _advice(load: Load, memory: Memory, limit_bytes: int) -> str:
    """The most freeing knobs first."""
    freed = [(memory.peak - estimate(other).peak, words) for words, other in memory_savings(load)]
    worthwhile = sorted((pair for pair in freed if pair[0] > 0.01 * memory.peak), reverse=True)
    if not worthwhile:
        return "No single knob frees 1 %; take a larger layout"
    needed = memory.peak - limit_bytes
    lines = [f"{words} frees {told(size)}" + (" and fits" if size >= needed else "") for size, words in worthwhile]
    if worthwhile[0][0] < needed and (together := _together(load, limit_bytes)) is not None:
        lines.append(f"together {together} fit" if " " in together else f"{together} fits")
    return "; ".join(lines)


def _together(load: Load, limit_bytes: int) -> str | None:
    """Knobs turned one after the other, the most freeing first, until the load fits."""
    turned: dict[str, str] = {}
    for _ in range(MOST_TURNS):
        options = [(estimate(other).peak, words, other) for words, other in memory_savings(load)]
        if not options:
            return None
        peak, words, load = min(options, key=lambda option: option[0])
        turned[words.split("=")[0]] = words
        if peak <= limit_bytes:
            return " ".join(turned.values())
    return None


def memory_savings(load: Load) -> Iterator[tuple[str, Load]]:
    """Single changes that can free memory, in the words of the command line; none that makes a pipeline impossible."""
    already = _impossible(load)
    return ((words, other) for words, other in _turns(load) if already or not _impossible(other))


def _impossible(load: Load) -> bool:
    return bool(stages.problems(load.degrees, load.model.n_layers, load.micro_batches))


def _turns(load: Load) -> Iterator[tuple[str, Load]]:
    degrees = load.degrees
    if load.recompute.mode == "none" and not degrees.splits_backward:
        yield "recompute=selective", load.changed(recompute=SELECTIVE)
    if load.recompute.mode != "full" and not degrees.splits_backward:
        yield "recompute=full", load.changed(recompute=FULL)
    if not load.compiled_blocks and not degrees.splits_backward:
        yield "compile=blocks", load.changed(compiled_blocks=True, compiled_loss=True)
    if load.micro_batch % 2 == 0:
        batch = load.micro_batch // 2
        halved = load.changed(micro_batch=batch, micro_batches=2 * load.micro_batches, texts=min(load.texts, batch))
        yield f"task.{'batch' if load.texts else 'micro_batch'}={batch}", halved
    shard = 2 * degrees.shard
    wider = degrees.model_copy(update={"shard": shard})
    yield f"parallel.shard={shard}", load.changed(degrees=wider, micro_batches=max(1, load.micro_batches // 2))
    tensor = degrees.model_copy(update={"tensor": 2 * degrees.tensor})
    if not load.model.problems(tensor):
        yield f"parallel.tensor={2 * degrees.tensor}", load.changed(degrees=tensor)
    if not degrees.reshards_after_forward and not degrees.splits_backward:
        policy = "always" if degrees.pipeline > 1 or load.texts else "default"
        again = degrees.model_copy(update={"reshard": policy})
        yield f"parallel.reshard={policy}", load.changed(degrees=again)
    if load.micro_batches > 1 and not degrees.sync_each_micro_batch:
        synchronised = degrees.model_copy(update={"sync_each_micro_batch": True})
        yield "parallel.sync_each_micro_batch=true", load.changed(degrees=synchronised)
    if load.outer_bytes:
        yield "fault_tolerance.copy_on=cpu", load.changed(outer_bytes=0)
    if (smaller := load.optim.smaller_state()) is not None:
        words, optim = smaller
        yield words, load.changed(optim=optim)
    if load.precision.compute == "float32":
        half = load.precision.model_copy(update={"compute": "bfloat16"})
        yield "precision=bf16", load.changed(precision=half)
