"""The kernels of a DeepSeek-V3 layer one by one, on one GPU: which is the fastest, and how far from the hardware.

python -m benchmarks.kernels                     everything, at the 16B's shape: 4 sequences of 4096 tokens
python -m benchmarks.kernels --only products     one part: products, swiglu, attention, router, sorting, moving, experts
python -m benchmarks.kernels --cpu               tiny shapes on the CPU: does it run

Each line is the median of --repeats runs on random data, in milliseconds; TFLOP/s count the causal half of attention,
GB/s what must be read and written at least. All are kept in records/kernels.json beside this file (of another device
than an H200 in a file of its own). The products of Llama 3 8B also go into src/planning/time/products.json, from where
plans take the speed of the device.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from src.cluster.local.config import LocalDevices
from src.distributed.precision.float8_experts import emulated, kernels
from src.models.attention.cores import CausalAttention, block_mask
from src.models.block import FeedForward
from src.models.kernels.fused_swiglu import fused_swiglu
from src.models.moe.experts import Experts, Product, grouped_product
from src.models.moe.moe import combine, dispatch, sorting
from src.models.moe.router import precise_product
from src.planning.time.devices import PRODUCTS_FILE, REFERENCE, measured_products
from src.planning.time.site import recognised

RECORDS = Path(__file__).parent / "records"
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
    rows: int = 8192  # of products
    feed_forwards: tuple[tuple[int, int, int], ...] = ((32768, 768, 2048), (16384, 2048, 8192), (16384, 4096, 14336))
    part: int = 1  # of both sides of their weights

    @property
    def tokens(self) -> int:
        return self.batch * self.length


TINY = Shape(batch=2, length=64, dim=32, heads=2, query=24, value=16, experts=8, top_k=3, hidden=16, rows=16,
             feed_forwards=((64, 32, 48),), part=256)  # fmt: skip


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


def products(shape: Shape, device: torch.device) -> Iterator[Work]:
    """Plain ones, in the shapes of the planner's table: rows of `inner` numbers by a weight of `columns` rows."""
    for columns, inner in measured_products()[REFERENCE]:
        width, depth = columns // shape.part, inner // shape.part
        x, weight = (
            torch.randn(rows, depth, device=device, dtype=torch.bfloat16).requires_grad_()
            for rows in (shape.rows, width)
        )
        forward = partial(F.linear, x, weight)
        yield Work(f"{columns}x{inner}", forward, (x, weight), 2.0 * shape.rows * width * depth)


def swiglu(shape: Shape, device: torch.device) -> Iterator[Work]:
    """Feed forwards of rows x dim x hidden: w1, w3 and w2 with the SwiGLU between them, or inside of them."""
    for rows, dim, hidden in shape.feed_forwards:
        x = torch.randn(rows, dim, device=device, dtype=torch.bfloat16).requires_grad_()
        made = FeedForward(dim, hidden).to(device, torch.bfloat16)
        w13 = torch.cat([each.detach() for each in made.gates()]).requires_grad_()
        w2, flops = made.w2.weight, 6.0 * rows * dim * hidden
        torch._dynamo.reset()
        name = f"{rows}x{dim}x{hidden}"
        yield Work(f"{name}, compiled", partial(torch.compile(made), x), (x, *made.parameters()), flops)
        yield Work(f"{name}, fused", partial(fused_swiglu, x, w13, w2), (x, w13, w2), flops)


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
    w13, w2 = torch.cat([each.detach() for each in made.gates()], dim=-2).requires_grad_(), made.w2
    yield Work("all of it, fused", lambda: fused_swiglu(rows, w13, w2, ends, weights), (rows, w13, w2), 3 * one)


PARTS = {
    "products": products,
    "swiglu": swiglu,
    "attention": attention,
    "router": router,
    "sorting": choosing,
    "moving": moving,
    "experts": experts,
}


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


def rates(lines: Mapping[str, Any]) -> dict[str, float]:
    """TFLOP/s of each product with both of its gradients, by its shape."""
    found = {}
    for name, line in lines.items():
        part, _, work = name.partition(": ")
        if part == "products" and "backward_ms" in line:
            flops = line["forward_tflops"] * line["forward_ms"]
            found[work] = round(3.0 * flops / (line["forward_ms"] + line["backward_ms"]), 1)
    return found


def tell_planner(name: str, lines: Mapping[str, Any], file: Path = PRODUCTS_FILE) -> None:
    """Put the products of a device, by its name in src/planning/time/devices.py, into the planner's table."""
    tables = json.loads(file.read_text(encoding="utf-8"))
    tables[name] = {key: lines[key] for key in ("device", "torch")} | {"rows": Shape().rows, "tflops": rates(lines)}
    file.write_text(json.dumps(dict(sorted(tables.items())), indent=1) + "\n", encoding="utf-8")


def keep(lines: dict[str, Any], folder: Path = RECORDS) -> Path:
    """The record of a device with these lines in the place of older ones; only an H200's has no name of its own."""
    device = str(lines["device"])
    own = "" if REFERENCE in device else "_" + "_".join(device.lower().split())
    file = folder / f"kernels{own}.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(known | lines, indent=2) + "\n", encoding="utf-8")
    return file


def measure(only: str | None, shape: Shape, device: torch.device, name: str, repeats: int) -> dict[str, Any]:
    """A line for each kernel, printed as it is measured; those of one part of PARTS, or all."""
    torch._functorch.config.donated_buffer = False  # a backward is run again and again
    lines: dict[str, Any] = {"device": name, "torch": torch.__version__, "shape": asdict(shape)}
    for part, works in PARTS.items():
        for work in works(shape, device) if only in (None, part) else ():
            line = measured(work, repeats, device)
            lines[f"{part}: {work.name}"] = line
            words = (
                f"{key} {value:9.3f}" if isinstance(value, float) else f"{key}: {value}" for key, value in line.items()
            )
            print(f"{part + ': ' + work.name:45}", *words, flush=True)
    return lines


def tell_of(device: torch.device, lines: Mapping[str, Any]) -> None:
    """The planner, where products were measured and it knows the device."""
    if not rates(lines):
        return
    seen = torch.cuda.get_device_properties(device)
    here = LocalDevices("cuda", 1, seen.total_memory / 2**30, seen.name, (seen.major, seen.minor))
    name = recognised(here)
    if name is None:
        print("the planner knows no such device: add its datasheet to GPUS in src/planning/time/devices.py and to "
              "RECOGNISED in src/planning/time/site.py, then the same command")  # fmt: skip
        return
    tell_planner(name, lines)
    print(f"plans take the products of {name} from {PRODUCTS_FILE}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()
    device, shape = (torch.device("cpu"), TINY) if given.cpu else (torch.device("cuda"), Shape())
    name = "CPU" if given.cpu else torch.cuda.get_device_name()
    lines = measure(given.only, shape, device, name, given.repeats)
    if not given.cpu:
        print(f"kept in {keep(lines)}")
        tell_of(device, lines)


if __name__ == "__main__":
    main()
