"""What a GPU computes and moves per second: its datasheet, and the share of it that a training step reaches.

Shares of the H200 come from records of one and two GPUs in benchmarks/records (torch 2.11.0+cu130, 700 W); each says
which. They are of kernels inside of long steps, where the board's power limit and its neighbours slow them: the same
products alone are 6 % faster, attention 18 %. Of other devices nothing was measured here: they take the H200's shares,
which is stated beside every prediction (`measured`). Matrix products alone on a device are in products.json, where
`python -m benchmarks.kernels --only products` puts those of another one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import ceil, log2
from pathlib import Path

TFLOP = 1e12
GB = 1e9

# Rows and columns of the part of a result that one multiprocessor computes at a time: the kernels of the profiles.
TILE_ROWS, TILE_COLUMNS = 128, 256
LEAST_INNER = 1024  # of a tile's share of the inner dimension
# Bytes that float8 moves for each number: scale (read) and cast (read, written) of inputs and gradients, the cast alone
# of weights; and the gradients of weights want both of their sides turned (read, written). Counted by hand.
ROUNDING_BYTES, CAST_BYTES, TURNING_BYTES = 5.0, 3.0, 2.0

PRODUCTS_FILE = Path(__file__).with_name("products.json")
REFERENCE = "H200"  # whose products, in proportion to the bf16 peak, stand for those of a device without any
Products = Mapping[tuple[int, int], float]


@cache
def measured_products() -> Mapping[str, Products]:
    """Of each device in products.json: (columns of the result, inner dimension) of a bf16 product over 8192 tokens ->
    TFLOP/s, the mean of forward and both gradients, alone on the device; the shapes of Llama 3 8B.
    """
    tables = json.loads(PRODUCTS_FILE.read_text(encoding="utf-8"))
    return {
        name: {_shape(text): float(rate) for text, rate in table["tflops"].items()} for name, table in tables.items()
    }


def _shape(text: str) -> tuple[int, int]:
    columns, inner = text.split("x")
    return int(columns), int(inner)


@dataclass(frozen=True)
class Shares:
    """Shares of a datasheet's numbers, 0 to 1, unless a comment says otherwise."""

    products: float = 0.945  # of products alone, inside of a step: one_gpu.json, 8B, 570 ms for 394.7 TFLOP
    grouped: float = 0.608  # of the bf16 peak, of products of routed experts: 9 layers of 16B, 67.8 ms for 40.8 TFLOP
    grouped_float8: float = 0.25  # the same with float8 in experts: as deep, fp8_experts beside bf16 on two GPUs
    float8: float = 0.61  # of the float8 peak, beside what rounds numbers: one_gpu.json, 8B fp8 beside bf16
    attention: float = 0.561  # of the bf16 peak, over the causal half: flash-attn-4, heads of 128
    attention_wide: float = 0.49  # the same of heads beyond 128 (192 and 128): 9 layers of 16B, 24.6 ms at 4,096 tokens
    attention_narrow: float = 0.47  # the same of heads of up to 64
    cudnn: float = 0.81  # speed of cuDNN's attention beside flash-attn-4's: 8B, 137 and 111 ms
    cudnn_wide: float = 0.94  # the same of heads beyond 128: 26.25 and 24.6 ms
    flex: float = 0.66  # of FlexAttention's, without flash-attn-4's kernels of documents: 338 and 325 of 555 and 484
    context: float = 0.69  # of the speed of attention when its sequence is cut: llama3_8b_2xh200_cp2.json
    memory: float = 0.83  # of the bandwidth, of kernels that read and write in order: a copy moves 4.0 TB/s in a step
    casts: float = 0.46  # the same of FSDP's casts and of what joins gradients: 2.2 TB/s of 16B's profiles
    update: float = 0.72  # the same of optimizers: 72.8 GB in 21.1 ms
    nvlink: float = 0.465  # of NVLink's one direction: 209 GB/s of both gathers and reductions, 16B on 2 GPUs
    network: float = 0.85  # of a link between nodes; stated, not measured
    contention: float = 0.33  # seconds that products lose for each second beside a collective: 32 of 97 ms, the same


@dataclass(frozen=True)
class Gpu:
    """Datasheet of a device, dense numbers, one direction of its links."""

    name: str
    bf16: float  # FLOP/s
    float8: float | None  # FLOP/s; None: has none
    float32: float  # FLOP/s, without TF32
    gib: float  # memory that torch sees
    memory: float  # bytes/s
    nvlink: float  # bytes/s
    watts: float  # board power
    multiprocessors: int
    # Seconds between two kernels that follow each other: what CUDA graphs of 20M to 342M took longer than their kernels
    # (presets_h200.json, one_gpu.json: 1.1 to 3.1 us a kernel, 2.1 in the middle).
    kernel_gap: float = 2e-6
    measured: bool = False
    shares: Shares = Shares()

    def product_seconds(self, rows: int, columns: int, inner: int) -> float:
        """One bf16 product (rows x inner) by (inner x columns), or what its bytes take where it is narrow."""
        if min(rows, columns, inner) == 0:
            return 0.0
        flops = 2.0 * rows * columns * inner
        known = self.name if self.name in measured_products() else REFERENCE
        rate = _bare(known, columns, inner) * self.bf16 / GPUS[known].bf16 * TFLOP * self.shares.products
        used = self._filled(rows, columns, inner) / self._filled(8192, max(columns, TILE_COLUMNS), inner)
        moved = 2.0 * (rows * inner + inner * columns + rows * columns) / (self.memory * self.shares.memory)
        return max(flops / (rate * min(1.0, used)), moved)

    def _filled(self, rows: int, columns: int, inner: int) -> float:
        """Share of the multiprocessors' time that tiles fill: the last round of a product leaves some idle, unless the
        inner dimension is long enough to be divided as well (split-K).
        """
        tiles = rows / TILE_ROWS * max(1.0, columns / TILE_COLUMNS) * max(1, inner // LEAST_INNER)
        return tiles / (self.multiprocessors * ceil(tiles / self.multiprocessors))

    def float8_seconds(
        self, rows: int, columns: int, inner: int, share: float, *, sent: bool, last: float | None
    ) -> tuple[float, float]:
        """A float8 product and both gradients, with what rounds their numbers. `share`: of the rounding of its inputs;
        `sent`: whether weights arrive rounded, as FSDP sends them; `last`: seconds of the gradient of the weights where
        that is wide.
        """
        product = 2.0 * rows * columns * inner / ((self.float8 or 0.0) * self.shares.float8)
        inputs, gradients = rows * inner * share, float(rows * columns)
        weights = 0.0 if sent else float(columns * inner)
        turned = TURNING_BYTES * (inputs + gradients) if last is None else 0.0
        return (
            product + self.moved_seconds(ROUNDING_BYTES * inputs + CAST_BYTES * weights),
            product + (product if last is None else last) + self.moved_seconds(ROUNDING_BYTES * gradients + turned),
        )

    def moved_seconds(self, size: float) -> float:
        """Kernels that read and write `size` bytes in order."""
        return size / (self.memory * self.shares.memory)


@lru_cache(maxsize=4096)  # a search asks tens of thousands of times for a few shapes
def _bare(name: str, columns: int, inner: int) -> float:
    """TFLOP/s between the shapes of a device's table: weighted by the inverse square of the distance in powers of
    two.
    """
    weights, table = {}, measured_products()[name]
    for (width, depth), rate in table.items():
        distance = (log2(columns) - log2(width)) ** 2 + (log2(inner) - log2(depth)) ** 2
        if distance < 1e-9:
            return rate
        weights[width, depth] = 1.0 / distance
    return sum(table[shape] * weight for shape, weight in weights.items()) / sum(weights.values())


# Datasheets of NVIDIA: H100 and H200 SXM, A100 SXM 80 GB, B200 (HGX, of one GPU).
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200", 989 * TFLOP, 1979 * TFLOP, 67 * TFLOP, 139.8, 4800 * GB, 450 * GB, 700.0, 132, measured=True),
        Gpu("H100", 989 * TFLOP, 1979 * TFLOP, 67 * TFLOP, 79.2, 3350 * GB, 450 * GB, 700.0, 132),
        Gpu("A100", 312 * TFLOP, None, 19.5 * TFLOP, 79.2, 2039 * GB, 300 * GB, 400.0, 108),
        Gpu("B200", 2250 * TFLOP, 4500 * TFLOP, 75 * TFLOP, 178.4, 8000 * GB, 900 * GB, 1000.0, 148),
    )
}


def scaled(gpu: Gpu, factors: dict[str, float]) -> Gpu:
    """`gpu` with some shares multiplied, as a site's own runs say: `python -m src.planning calibrate`."""
    shares = replace(gpu.shares, **{name: getattr(gpu.shares, name) * factor for name, factor in factors.items()})
    return replace(gpu, shares=shares)
