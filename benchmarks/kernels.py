"""The kernels of a DeepSeek-V3 layer one by one, on one GPU: which is the fastest, and how far from the hardware.

python -m benchmarks.kernels                     everything, at the 16B's shape: 4 sequences of 4096 tokens
python -m benchmarks.kernels --only attention    one part of it: attention, router, sorting, moving, experts
python -m benchmarks.kernels --cpu               tiny shapes on the CPU: does it run

Each line is the median of --repeats runs on random data, in milliseconds; TFLOP/s count the causal half of attention,
GB/s what must be read and written at least. All are kept in records/kernels.json beside this file.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from src.distributed.precision.float8_experts import emulated, kernels
from src.models.attention.cores import CausalAttention, block_mask
from src.models.moe.experts import Experts, Product, grouped_product
from src.models.moe.moe import combine, dispatch, sorting
from src.models.moe.router import precise_product

RECORD = Path(__file__).parent / "records" / "kernels.json"
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Shape:
    """Of deepseek_v3_16b, as one rank computes it."""

    batch: int = 4
    length: int = 4096
    dim: int = 2048
    heads: int = 16
    query: int = 192
    value: int = 128
    experts: int = 64
    top_k: int = 6
    hidden: int = 1408

    @property
    def tokens(self) -> int:
        return self.batch * self.length


TINY = Shape(batch=2, length=64, dim=32, heads=2, query=24, value=16, experts=8, top_k=3, hidden=16)


@dataclass(frozen=True)
class Work:
    """What one run does: `flops` of matrix products or `moved` bytes, forward; a backward does twice the flops."""

    name: str
    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...] = ()  # get gradients; without, there is no backward
    flops: float = 0.0
    moved: float = 0.0


def attention(shape: Shape, device: torch.device) -> Iterator[Work]:
    """Queries wider than values, as the model hands them over: heads inside, values a slice of what holds keys too."""

    def heads(width: int) -> Tensor:
        made = torch.randn(shape.batch, shape.length, shape.heads, width, device=device, dtype=torch.bfloat16)
        return made.requires_grad_()

    query, key, both = heads(shape.query), heads(shape.query), heads(2 * shape.value)
    inputs = (query, key, both)
    flops = shape.batch * shape.heads * shape.length**2 * (shape.query + shape.value)

    def seen() -> tuple[Tensor, Tensor, Tensor]:
        return query.transpose(1, 2), key.transpose(1, 2), both[..., shape.value :].transpose(1, 2)

    def one(backend: SDPBackend, *, widened: bool = False) -> Tensor:
        q, k, v = seen()
        v = F.pad(v, (0, shape.query - shape.value)) if widened else v
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)[..., : shape.value]

    yield Work("the model's choice", lambda: CausalAttention()(*seen()), inputs, flops)
    for name, backend in BACKENDS.items():
        yield Work(name, lambda backend=backend: one(backend), inputs, flops)
    yield Work("flash, values filled up to 192", lambda: one(SDPBackend.FLASH_ATTENTION, widened=True), inputs, flops)
    if device.type == "cuda":
        mask = block_mask("causal", None, None, shape.batch, shape.length, device)
        flex: Callable[..., Tensor] = torch.compile(flex_attention)
        yield Work("flex", lambda: flex(*seen(), block_mask=mask), inputs, flops)


def router(shape: Shape, device: torch.device) -> Iterator[Work]:
    """The logits of all tokens, in fp32."""
    x = torch.randn(shape.tokens, shape.dim, device=device, dtype=torch.bfloat16)
    weight = torch.randn(shape.experts, shape.dim, device=device, dtype=torch.bfloat16)
    moved = 2.0 * x.numel() + 4.0 * shape.tokens * shape.experts
    yield Work("product of bf16 into fp32", lambda: precise_product(x, weight.T), moved=moved)
    yield Work("both cast to fp32 first", lambda: F.linear(x.float(), weight.float()), moved=moved)


def _chosen(shape: Shape, device: torch.device) -> Tensor:
    return torch.rand(shape.tokens, shape.experts, device=device).topk(shape.top_k).indices


def choosing(shape: Shape, device: torch.device) -> Iterator[Work]:
    """Which slot goes where; compiled and not."""
    chosen, scores = _chosen(shape, device), torch.rand(shape.tokens, shape.experts, device=device)

    def by_keys() -> Tensor:
        return sorting(chosen)[0]

    def by_counting() -> Tensor:
        flags = torch.zeros(shape.tokens, shape.experts, dtype=torch.bool, device=device)
        before = flags.scatter(-1, chosen, value=True).T.flatten().cumsum(0, dtype=torch.int32)
        places = before.view(shape.experts, -1).T.gather(-1, chosen).flatten().long() - 1
        return torch.empty_like(places).scatter(0, places, torch.arange(len(places), device=device))

    yield Work("topk", lambda: scores.topk(shape.top_k, dim=-1, sorted=False).values)
    yield Work("the model's choice, a stable argsort", by_keys)
    yield Work("counting", by_counting)
    yield Work("the same, compiled", torch.compile(by_keys))
    yield Work("counting, compiled", torch.compile(by_counting))


def moving(shape: Shape, device: torch.device) -> Iterator[Work]:
    """Rows to their experts and back, compiled as in a model."""
    x = torch.randn(shape.tokens, shape.dim, device=device, dtype=torch.bfloat16).requires_grad_()
    order, places = sorting(_chosen(shape, device))
    rows = dispatch(x.detach(), order, places).requires_grad_()
    moved = 2.0 * shape.tokens * shape.dim * (shape.top_k + 1)
    go, back = torch.compile(dispatch), torch.compile(combine)
    yield Work("copy as many bytes", lambda: rows.detach()[: len(rows) // 2].repeat(2, 1), moved=3.0 * rows.numel())
    yield Work("dispatch", lambda: dispatch(x, order, places), (x,), moved=moved)
    yield Work("dispatch, compiled", lambda: go(x, order, places), (x,), moved=moved)
    yield Work("combine", lambda: combine(rows, order, places), (rows,), moved=moved)
    yield Work("combine, compiled", lambda: back(rows, order, places), (rows,), moved=moved)


def experts(shape: Shape, device: torch.device) -> Iterator[Work]:
    """Grouped products alone, then all of the experts, in bf16 and float8."""
    made = Experts(shape.experts, shape.dim, shape.hidden).to(device, torch.bfloat16)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.02)
    order, places = sorting(_chosen(shape, device))
    x = torch.randn(shape.tokens, shape.dim, device=device, dtype=torch.bfloat16)
    rows = dispatch(x, order, places).requires_grad_()
    counts = torch.full((shape.experts,), len(rows) // shape.experts, device=device)
    ends = counts.cumsum(0, dtype=torch.int32)
    weights = torch.rand(len(rows), device=device)
    one = 2.0 * len(rows) * shape.dim * shape.hidden
    float8: Product = kernels() if device.type == "cuda" else emulated
    for name, product in (("bf16", grouped_product), ("float8", float8)):
        yield Work(
            f"one product, {name}", lambda product=product: product(rows, made.w1.mT, ends), (rows, made.w1), one
        )
    for name, product, multiple in (("bf16", grouped_product, 1), ("float8", float8, 16)):

        def run(product: Product = product, multiple: int = multiple) -> Tensor:
            made.product, made.multiple = product, multiple
            return made(rows, counts, weights)

        inputs = (rows, *made.parameters())
        yield Work(f"all of it, {name}", run, inputs, 3 * one)
        if device.type == "cuda":
            torch._dynamo.reset()
            yield Work(f"all of it, {name}, compiled", torch.compile(run), inputs, 3 * one)


PARTS = {"attention": attention, "router": router, "sorting": choosing, "moving": moving, "experts": experts}


def milliseconds(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Median, with a cache that holds none of it: the GPU's is overwritten before each run."""
    times = []
    filth = torch.empty(2**28 if device.type == "cuda" else 1, dtype=torch.int8, device=device)
    for repeat in range(repeats + 3):
        filth.zero_()
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            spent = start.elapsed_time(end)
        else:
            began = time.perf_counter()
            run()
            spent = 1e3 * (time.perf_counter() - began)
        times += [spent] if repeat >= 3 else []
    return statistics.median(times)


def measured(work: Work, repeats: int, device: torch.device) -> dict[str, float | str]:
    """Of one kernel; one that refuses says so."""
    try:
        forward = milliseconds(work.forward, repeats, device)
        line: dict[str, float | str] = {"forward_ms": forward}
        if work.flops:
            line["forward_tflops"] = work.flops / forward / 1e9
        if work.moved:
            line["forward_gb_per_second"] = work.moved / forward / 1e6
        if work.inputs:
            result = work.forward()
            grad = torch.randn_like(result)
            backward = milliseconds(
                lambda: torch.autograd.grad(result, work.inputs, grad, retain_graph=True), repeats, device
            )
            line["backward_ms"] = backward
            if work.flops:
                line["backward_tflops"] = 2 * work.flops / backward / 1e9
    except (RuntimeError, ValueError) as error:
        return {"refused": str(error).splitlines()[0][:100]}
    return line


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()
    device, shape = (torch.device("cpu"), TINY) if given.cpu else (torch.device("cuda"), Shape())
    name = "CPU" if given.cpu else torch.cuda.get_device_name()
    torch._functorch.config.donated_buffer = False  # a backward is run again and again
    lines: dict[str, Any] = {"device": name, "torch": torch.__version__, "shape": asdict(shape)}
    for part, works in PARTS.items():
        for work in works(shape, device) if given.only in (None, part) else ():
            line = measured(work, given.repeats, device)
            lines[f"{part}: {work.name}"] = line
            words = (
                f"{key} {value:9.3f}" if isinstance(value, float) else f"{key}: {value}" for key, value in line.items()
            )
            print(f"{part + ': ' + work.name:45}", *words, flush=True)
    if not given.cpu:
        RECORD.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main()
