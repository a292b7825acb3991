"""Breakdown of a step's time by kind of work, from the kernels of a profile."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

# The first match counts. Names are those of NCCL, cuDNN, cuBLAS, CUTLASS, torch's own kernels and its compiler's, and
# of torch's operators on the CPU.
KINDS: tuple[tuple[str, str], ...] = (
    ("copy", r"^fsdp::"),  # what it copies before and after it communicates
    # The compiler's names hold every operator that was fused, so those before and after a product are in them too.
    ("attention", r"^triton_tem.*flex"),
    ("grouped gemm", r"^triton_tem.*grouped"),
    ("gemm", r"^triton_tem.*mm"),
    ("permute", r"^triton.*_(index|gather|scatter|sort|cumsum)(_|$)(?!.*all_gather)"),
    ("fused and pointwise", r"^triton"),
    ("communication", r"nccl|gloo|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|multimem|c10d"),
    ("attention", r"cudnn|flash|fmha|sdpa|flex_attention|scaled_dot_product"),
    ("grouped gemm", r"groupproblemshape|grouped"),
    ("gemm", r"gemm|gemv|nvjet|cutlass|cublas|splitk|router::product|aten::(add|b|_scaled_)?mm$|aten::linear"),
    ("optimizer", r"fusedoptimizer|lpnorm|foreach_norm|foreach_mul_"),
    ("routing", r"topk|radix|sort|scan|cumsum|scatter|bincount"),
    ("permute", r"index|gather|embedding"),
    ("copy", r"memcpy|memset|copy|chunk_cat|catarray|aten::(cat|fill_|zero_)"),
    ("float8", r"fp8|float8"),
    ("fused and pointwise", r"elementwise|reduce|norm|softmax|aten::"),
)
OTHER = "other"
TOP = 25  # kernels that are told one by one
LONGEST_NAME = 100


class KernelTime(NamedTuple):
    """One execution of a kernel: start and end in microseconds of the device's clock."""

    name: str
    start: float  # microseconds
    end: float


def kind(name: str) -> str:
    """The kind of work of a kernel (gemm, attention, communication ...), guessed from its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def breakdown(kernels: Sequence[KernelTime], steps: int) -> dict[str, Any]:
    """Milliseconds of a step. Kernels may run side by side, so the kinds may add up to more than the step.

    idle: no kernel ran. exposed_communication: nothing else ran.
    """
    assert kernels, "a profile without a kernel"
    by_kind: dict[str, float] = defaultdict(float)
    by_name: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        by_kind[kind(kernel.name)] += kernel.end - kernel.start
        by_name[kernel.name].append(kernel.end - kernel.start)
    per_step = 1e-3 / steps
    span = max(kernel.end for kernel in kernels) - min(kernel.start for kernel in kernels)
    busy = covered(kernels)
    computing = covered(kernel for kernel in kernels if kind(kernel.name) != "communication")
    top = sorted(by_name.items(), key=lambda entry: -sum(entry[1]))[:TOP]
    return {
        "steps": steps,
        "step_ms": span * per_step,
        "idle_ms": (span - busy) * per_step,
        "exposed_communication_ms": (busy - computing) * per_step,
        "kinds_ms": {kind: by_kind[kind] * per_step for kind in sorted(by_kind, key=lambda kind: -by_kind[kind])},
        "top": [
            {"name": name, "kind": kind(name), "ms": sum(times) * per_step, "calls": len(times) / steps}
            for name, times in top
        ],
    }


def covered(kernels: Iterable[KernelTime]) -> float:
    """Microseconds in which at least one of these kernels ran: the length of the union of their intervals."""
    total, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        total += max(0.0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    return total


def markdown(parts: dict[str, Any]) -> str:
    """`breakdown` as two tables."""
    step = parts["step_ms"]
    rows = [*parts["kinds_ms"].items(), ("of communication, exposed", parts["exposed_communication_ms"])]
    rows += [("idle", parts["idle_ms"]), ("step", step)]
    lines = ["| work | ms per step | share |", "|---|---:|---:|"]
    lines += [f"| {name} | {spent:.2f} | {100 * spent / step:.1f} % |" for name, spent in rows]
    lines += ["", "| kernel | work | ms per step | calls per step |", "|---|---|---:|---:|"]
    lines += [
        f"| `{_short(one['name'])}` | {one['kind']} | {one['ms']:.2f} | {one['calls']:g} |" for one in parts["top"]
    ]
    return "\n".join(lines) + "\n"


def _short(name: str) -> str:
    plain = name.replace("|", "/").replace("`", "'")
    return plain if len(plain) <= LONGEST_NAME else f"{plain[: LONGEST_NAME - 3]}..."
