"""Batch arithmetic: global_batch = micro_batch * data ranks * passes (gradient accumulation steps), in sequences."""

from math import gcd, lcm

from src.distributed.pipeline import stages
from src.errors import divisors
from src.run import Run

MOST = 4  # sequences of a pass, where the config leaves their number to the plan


def micro_batch(run: Run) -> int:
    """Sequences per rank and pass: task.micro_batch; of null the most, up to MOST, that divide a rank's share of the
    step into passes enough for the pipeline and for every replica group.
    """
    if run.task.micro_batch is not None:
        return run.task.micro_batch
    share, copies = max(1, run.task.global_batch // run.parallel.data_ranks), run.fault_tolerance.copies
    sizes = [size for size in range(MOST, 0, -1) if share % size == 0 and share // size >= copies]
    fine = (size for size in sizes if not stages.problems(run.parallel, run.model.n_layers, share // size))
    return next(fine, 1)


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
