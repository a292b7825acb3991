"""Batch arithmetic: global_batch = micro_batch * data ranks * passes (gradient accumulation steps), in sequences."""

from collections.abc import Iterator
from math import ceil, gcd, lcm

from src.distributed.pipeline import stages
from src.errors import divisors
from src.planning.memory import Load, estimate
from src.planning.recompute_choice import cheapest
from src.run import Run

MOST = 4  # sequences of a pass, where the config leaves their number to the plan and no GPU is known
# Tokens of a pass on a GPU: Python needs 1.6 to 1.8 ms for a block's forward and backward, which an H200 fills with
# 32 K tokens of a model of 20 M parameters. With 4 sequences of 512 it computed for a twentieth of the time:
# benchmarks/records/presets_h200.json.
GPU_TOKENS = 2**15
# Of a GPU's memory, that passes of more than MOST sequences may fill: they are no need, and a display or another
# process may have the rest.
ROOM = 0.8


def micro_batch(run: Run) -> int:
    """Sequences per rank and pass: task.micro_batch; of null the most, up to MOST, that divide a rank's share of the
    step into passes enough for the pipeline and for every replica group.
    """
    return run.task.micro_batch or next(_sizes(run, MOST), 1)


def passes(run: Run, size: int) -> int:
    """Forwards of one rank per optimizer step, `size` sequences each."""
    return max(1, ceil(run.task.global_batch / (size * run.parallel.data_ranks)))


def fitted(run: Run, load: Load, limit_bytes: int | None) -> Load:
    """`load` with the passes that suit a GPU of `limit_bytes`, where task.micro_batch is null: GPU_TOKENS long, as far
    as ROOM and no more recomputation than of MOST sequences let them be; smaller ones where not even those fit. Without
    a limit, and where nothing fits, as it was. The step is the same samples, summed in another order.

    Pipelines and replica groups share passes between them, so theirs stay small and many.
    """
    if run.task.micro_batch is not None or limit_bytes is None:
        return load
    shared = run.parallel.pipeline > 1 or run.fault_tolerance.copies > 1
    most = MOST if shared else max(MOST, GPU_TOKENS * run.parallel.context // run.task.seq_len)
    kept = cheapest(load, limit_bytes) if run.recompute.mode == "auto" else load.recompute
    for size in _sizes(run, most):
        sized = load.changed(micro_batch=size, micro_batches=passes(run, size))
        room = limit_bytes if size <= MOST else ROOM * limit_bytes
        if size > MOST and float8_problems(run, size):
            continue
        if estimate(sized.changed(recompute=kept)).peak <= room:
            return sized
    return load


def _sizes(run: Run, most: int) -> Iterator[int]:
    """Sequences of a pass that divide a rank's share of the step into legal numbers of passes; the largest first."""
    share, copies = max(1, run.task.global_batch // run.parallel.data_ranks), run.fault_tolerance.copies
    whole = (size for size in range(min(most, share), 0, -1) if share % size == 0 and share // size >= copies)
    return (size for size in whole if not stages.problems(run.parallel, run.model.n_layers, share // size))


def problems(run: Run) -> list[str]:
    """Key, values, the nearest legal ones."""
    task, data_ranks = run.task, run.parallel.data_ranks
    together = (task.micro_batch or 1) * data_ranks
    if task.global_batch % together == 0:
        return []
    size = "" if task.micro_batch is None else f"task.micro_batch={task.micro_batch} * "
    line = f"task.global_batch={task.global_batch} is no multiple of {size}{data_ranks} data ranks "
    line += f"({_multiples(task.global_batch, together)}"
    if task.micro_batch is not None and task.global_batch % data_ranks == 0:
        line += f"; or task.micro_batch: {divisors(task.global_batch // data_ranks, task.micro_batch)}"
    return [line + ")"]


def length_problems(run: Run) -> list[str]:
    """Why the model or the layout cannot take sequences of this length."""
    seq_len, degrees, found = run.task.seq_len, run.parallel, []
    if seq_len > run.model.max_seq_len:
        found.append(
            f"task.seq_len={seq_len} is beyond model.max_seq_len={run.model.max_seq_len}; "
            f"at most {run.model.max_seq_len} tokens"
        )
    parts = degrees.sequence_parts
    if seq_len % parts:
        keys = f"parallel.tensor={degrees.tensor}"
        if degrees.context > 1:
            keys += f" * 2 * parallel.context={degrees.context}"
        found.append(f"task.seq_len={seq_len} is no multiple of {keys} ({_multiples(seq_len, parts)})")
    return found


def float8_problems(run: Run, micro_batch: int) -> list[str]:
    """Why a float8 product cannot sum over the tokens of a forward of `micro_batch` sequences, as the gradient of a
    weight does. Also where it is emulated: what is rehearsed on a CPU is to run on a GPU.
    """
    float8, seq_len, context = run.precision.float8, run.task.seq_len, run.parallel.context
    if float8 is None or micro_batch * seq_len // context % float8.token_multiple == 0:
        return []
    fits = lcm(run.parallel.sequence_parts, context * float8.token_multiple // gcd(micro_batch, float8.token_multiple))
    over = f" / parallel.context={context}" if context > 1 else ""
    return [
        f"precision.float8.recipe={float8.recipe}: task.micro_batch={micro_batch} * task.seq_len={seq_len}{over} "
        f"tokens are no multiple of {float8.token_multiple}, over which the gradients of weights are summed "
        f"(task.seq_len: {_multiples(seq_len, fits)}; or precision.float8.recipe=rowwise_with_gw_hp)"
    ]


def _multiples(value: int, of: int) -> str:
    lower = value // of * of
    return f"{lower} or {lower + of} would do" if lower else f"{of} would do"
