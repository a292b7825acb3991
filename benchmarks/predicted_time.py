"""Predicted seconds beside measured ones: docs/predicted_time.md, written from here.

python -m benchmarks.predicted_time           the table
python -m benchmarks.predicted_time --write   the table into docs/predicted_time.md

What the model of src/planning/time was calibrated on are records of one and two GPUs; records of four are predicted.
Other people's figures are of other code on other machines: what is predicted is this repository in their layout.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from math import comb
from pathlib import Path
from typing import Any, Literal

from src.config.build import build
from src.config.composition.requests import asked
from src.distributed.pipeline.stages import even
from src.planning.batch import GPU_TOKENS
from src.planning.memory import Load
from src.planning.plan import load_of
from src.planning.time.collectives import Fabric, Reached
from src.planning.time.devices import GPUS, Gpu
from src.planning.time.step import Question, StepTime, step_time
from src.run import Run

HOME = Path(__file__).resolve().parents[1]
RECORDS = HOME / "benchmarks" / "records"
PAGE = HOME / "docs" / "predicted_time.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"

CARD = 400e9 / 8  # bytes/s of a 400 Gb/s card
# H100 SXM with 96 GB of HBM2e at 2.4 TB/s and 500 W. The power limit takes nearly as much speed as power: stated.
GRAND_TETON = replace(
    GPUS["H100"],
    name="H100, 500 W",
    memory=2.4e12,
    watts=500.0,
    shares=replace(GPUS["H100"].shares, products=0.945 * 0.75, grouped=0.608 * 0.75, float8=0.61 * 0.75),
)


@dataclass(frozen=True)
class Row:
    """One measured figure and the command line's choices that stand for it."""

    name: str
    kind: str  # calibrated, predicted, or published
    measured: float  # tokens per second of one GPU
    presets: tuple[str, ...]
    degrees: Mapping[str, Any]
    batch: tuple[int, int, int]  # tokens of a sequence, sequences of a micro-batch, of a step
    model: Mapping[str, Any] = field(default_factory=dict)  # changes to the preset
    gpu: Gpu = GPUS["H200"]
    flash: bool = False  # flash-attn-4
    graph: bool = False
    once: Literal["by router", "in turn"] | None = None  # how experts are chosen, where tokens go to each rank once
    balanced: bool = False  # whether all experts get as many rows
    source: str = ""

    def question(self) -> Question:
        run = _run(self.presets)
        length, micro_batch, global_batch = self.batch
        single = run.parallel.model_copy(update=dict(self.degrees))
        task = run.task.model_copy(  # type: ignore[attr-defined]  # Bench, a Config
            update={"seq_len": length, "micro_batch": micro_batch, "global_batch": global_batch}
        )
        fields: dict[str, Any] = dict(run.model) | dict(self.model)
        if self.balanced:
            fields["moe"] = fields["moe"].model_copy(update={"force_load_balance": True})
        load = load_of(replace(run, parallel=single, task=task, model=type(run.model)(**fields)))
        gpu = self.gpu
        network = CARD * gpu.shares.network
        fabric = Fabric(gpu.nvlink * gpu.shares.nvlink, network)
        reached = None if self.once is None else _reached(load, fabric.per_node, in_turn=self.once == "in turn")
        return Question(load, gpu, fabric, self.flash, self.graph, reached)

    def step(self) -> StepTime:
        return step_time(self.question())

    @property
    def predicted(self) -> float:
        """Tokens per second of one GPU."""
        load = self.question().load
        return self.batch[0] * self.batch[2] / self.step().seconds / load.degrees.world


def _reached(load: Load, per_node: int, *, in_turn: bool) -> Reached:
    """Expected ranks and nodes of a token's experts, which are all as likely, or are neighbours that take turns."""
    mixture, ranks = load.model.mixture, load.degrees.expert
    assert mixture is not None
    kept = mixture.num_limited_groups / mixture.num_expert_groups
    count, chosen = round(mixture.num_experts * kept), mixture.top_k

    def parts(whole: int) -> float:
        if in_turn:
            return max(1.0, chosen * whole / mixture.num_experts)
        left = count - mixture.num_experts // whole
        return whole * kept * (1.0 - comb(left, chosen) / comb(count, chosen))

    return Reached(parts(ranks), parts(max(1, ranks // per_node)))


@cache
def _run(presets: tuple[str, ...]) -> Run:
    (tree,) = asked(["task=bench", "compile=blocks", *presets]).trees
    return Run.from_sections(build(tree))


LLAMA, EXPERTS = ("model=llama3_8b",), ("model=deepseek_v3_16b",)
BF16, GATHER, FP8 = "precision=bf16", "precision=fp8_gather", "precision=fp8"
SELECTIVE = "recompute=selective"
LEAN = ("optim=adamw_bf16", "precision=bf16_reduce16")
INTERLEAVED = {"pipeline_schedule": "Interleaved1F1B"}
SMALL = {
    "tie_word_embeddings": False,
    "dim": 768,
    "n_layers": 12,
    "n_heads": 12,
    "n_kv_heads": 12,
    "vocab_size": 32000,
    "ffn_dim_multiplier": 1.0,
    "rope_scaling": None,
}


def rows() -> tuple[Row, ...]:
    """All of them, in the order of the page."""
    return (*_one_gpu(), *_presets(), *_two_gpus(), *_four_gpus(), *_published())


def _one_gpu() -> Iterator[Row]:
    found = {each["row"]: each["measured"]["ours"] for each in json.loads((RECORDS / "one_gpu.json").read_text())}

    def speed(row: str) -> float:
        return float(found[row]["tokens_per_second"])

    eight = {"n_layers": 16}
    calibrated = {"kind": "calibrated", "degrees": {}, "flash": True, "source": "one_gpu.json"}
    yield Row("8B, 16 layers, graph", measured=speed("8b_bf16"), presets=(*LLAMA, BF16), batch=(8192, 2, 2),
              model=eight, graph=True, **calibrated)  # fmt: skip
    yield Row("8B, 16 layers, fp8", measured=speed("8b_fp8"), presets=(*LLAMA, FP8), batch=(8192, 2, 2), model=eight,
              **calibrated)  # fmt: skip
    for row, sequences in (("small_32", 32), ("small_4", 4)):
        yield Row(f"124M, {sequences} sequences, graph", measured=speed(row), presets=("model=llama3_1b", BF16),
                  batch=(1024, sequences, sequences), model=SMALL, graph=True, **calibrated)  # fmt: skip
    yield Row("1B, graph", measured=speed("1b"), presets=("model=llama3_1b", BF16), batch=(8192, 2, 2),
              model={"tie_word_embeddings": False}, graph=True, **calibrated)  # fmt: skip
    yield Row("16B, 9 layers", measured=speed("16b"), presets=(*EXPERTS, BF16), batch=(4096, 4, 4),
              model={"n_layers": 9}, **calibrated)  # fmt: skip


def _presets() -> Iterator[Row]:
    """The small presets, as their recipes say (passes of 32,768 tokens) and as one graph."""
    for each in json.loads((RECORDS / "presets_h200.json").read_text()):
        words = dict(word.split("=") for word in each["words"])
        length, batch = int(words["task.seq_len"]), int(words["task.global_batch"])
        graph, preset = words["compile"] == "graph", each["preset"]
        size = int(words.get("task.micro_batch", min(batch, GPU_TOKENS // length)))
        name = f"{preset.removeprefix('llama3_').upper()}, {size} x {length:,} tokens" + ", graph" * graph
        yield Row(name, "calibrated", each["measured"]["tokens_per_second"], (f"model={preset}", BF16), {},
                  (length, size, batch), flash=True, graph=graph, source="presets_h200.json")  # fmt: skip


def _record(name: str, kind: str, presets: tuple[str, ...], degrees: Mapping[str, Any], batch: tuple[int, int, int],
            **more: Any) -> Row:  # fmt: skip
    file = f"{name}.json"
    measured = json.loads((RECORDS / file).read_text())["tokens_per_second"]
    short = name.replace("llama3_8b_", "8B ").replace("deepseek_v3_16b_", "16B ").replace("9layers_", "9 layers ")
    return Row(short, kind, measured, presets, degrees, batch, source=file, **more)


def _two_gpus() -> Iterator[Row]:
    one, two = (8192, 1, 4), (8192, 2, 4)
    eight = (*LLAMA, BF16)
    for name, presets, degrees, batch in (
        ("fsdp2", eight, {"shard": 2, "sync_each_micro_batch": True}, one),
        ("tp2", eight, {"tensor": 2}, one),
        ("cp2", eight, {"context": 2}, one),
        ("pp2", eight, {"pipeline": 2}, one),
        ("pp2i", eight, {"pipeline": 2, **INTERLEAVED}, one),
        ("sel", (*eight, SELECTIVE), {"shard": 2}, two),
        ("fsdp2_fp8_gather", (*LLAMA, GATHER), {"shard": 2}, (8192, 1, 2)),
        ("fsdp2_fp8_gather_mb2_selective", (*LLAMA, GATHER, SELECTIVE), {"shard": 2}, two),
    ):
        yield _record(f"llama3_8b_2xh200_{name}", "calibrated", presets, degrees, batch)
    gathered, apart = {"shard": 2, "reshard": "never"}, {"shard": 2, "expert": 2}
    for name, presets, degrees in (
        ("fsdp2", (*EXPERTS, BF16), {"shard": 2}),
        ("fsdp2_gathered", (*EXPERTS, BF16), gathered),
        ("fsdp2_lean", (*EXPERTS, *LEAN), gathered),
        ("fsdp2_fp8_experts", (*EXPERTS, "precision=fp8_experts"), {"shard": 2}),
        ("fsdp2_ep2_graphs", (*EXPERTS, BF16), apart),
        ("fsdp2_ep2_lean", (*EXPERTS, *LEAN), {**apart, "reshard": "never"}),
    ):
        full = f"deepseek_v3_16b_9layers_2xh200_{name}"
        yield _record(full, "calibrated", presets, degrees, (4096, 4, 8), model={"n_layers": 9})


def _four_gpus() -> Iterator[Row]:
    one, eight = (8192, 1, 4), (*LLAMA, BF16)
    for name, degrees in (
        ("fsdp4", {"shard": 4}),
        ("hsdp2x2", {"replicate": 2, "shard": 2}),
        ("tp2_fsdp2", {"shard": 2, "tensor": 2}),
        ("cp2_fsdp2", {"shard": 2, "context": 2}),
        ("pp2_fsdp2i", {"shard": 2, "pipeline": 2, **INTERLEAVED}),
        ("tp4", {"tensor": 4}),
        ("pp2_fsdp2", {"shard": 2, "pipeline": 2}),
    ):
        yield _record(f"llama3_8b_4xh200_{name}", "predicted", eight, degrees, one)
    yield _record("llama3_8b_fsdp4_bf16_mb2", "predicted", eight, {"shard": 4, "reshard": "never"}, (8192, 2, 8))
    float8 = (*LLAMA, GATHER, SELECTIVE)
    yield _record("llama3_8b_4xh200_fsdp4_fp8_gather_mb2_selective", "predicted", float8, {"shard": 4}, (8192, 2, 8))
    sixteen = (*EXPERTS, BF16)
    yield _record("deepseek_v3_16b_4xh200_fsdp4", "predicted", sixteen, {"shard": 4}, (4096, 4, 16))
    yield Row("16B 4xh200_fsdp4_ep4", "predicted", 19_851.0, sixteen, {"shard": 4, "expert": 4}, (4096, 4, 16),
              source="benchmarks/README.md")  # fmt: skip


def _published() -> Iterator[Row]:
    h100, h200 = GPUS["H100"], GPUS["H200"]
    never = {"reshard": "never"}
    eight, nemo, bridge = (*LLAMA, BF16), "NVIDIA dgxc-benchmarking 25.04.01", "Megatron-Bridge performance summary"
    titan = "torchtitan, llama3_h100_202412"
    context = {"context": 2, **never}
    full, third = "recompute=full", "recompute=selective"
    small, old, bad = {"vocab_size": 163840}, "Megatron-Bridge PR 5021", GRAND_TETON
    trainy, asynchronous = "torchtitan, Trainy", "torchtitan, async TP"
    automodel = "NeMo Automodel performance summary"
    thirty, giant = "model=qwen3_30b_a3b", "model=deepseek_v3_671b"
    seventy, largest = ("model=llama3_70b", FP8, full), ("model=llama3_405b", FP8, full)
    deep = {"tensor": 8, "pipeline": 8, "shard": 8, "async_tensor": True}
    bridge_moe = {"tensor": 2, "pipeline": 8, "shard": 64, "expert": 64, "layers_per_stage": 2, **INTERLEAVED}
    # 61 layers by 2 and by 4, rounded down to stages for all ranks; its table says VP 8 of both, its files these.
    four = {"pipeline": 4, "expert": 64, **INTERLEAVED}
    seven, fewer = {**four, "stages": even(28, 61, 0, 0)}, {**four, "stages": even(16, 61, 0, 0)}
    # HybridEP and DeepEP; Automodel's gate is a fake one, and its attention cuDNN's.
    router, forced = {"once": "by router"}, {"once": "by router", "balanced": True}
    turns = {"once": "in turn", "balanced": True, "flash": False}
    for name, measured, presets, degrees, batch, gpu, source, more in (
        ("8B bf16 8 GPUs, CP2", 10_682, eight, {"shard": 4, **context}, (8192, 1, 128), h100, nemo, {}),
        ("8B bf16 128 GPUs, CP2", 10_630, eight, {"shard": 64, **context}, (8192, 1, 2048), h100, nemo, {}),
        ("8B fp8 8 GPUs, CP2", 14_049, (*LLAMA, FP8), {"shard": 4, **context}, (8192, 1, 128), h100, nemo, {}),
        ("8B fp8 128 GPUs, CP2", 13_739, (*LLAMA, FP8), {"shard": 64, **context}, (8192, 1, 2048), h100, nemo, {}),
        ("8B fp8 8 GPUs, FSDP", 14_451, (*LLAMA, GATHER), {"shard": 8, **never}, (8192, 1, 128), h100, bridge, {}),
        ("8B fp8 32 GPUs", 10_938, (*LLAMA, GATHER, third), {"shard": 32}, (8192, 2, 64), h200, trainy, {}),
        ("8B fp8 64 GPUs", 10_753, (*LLAMA, GATHER, third), {"shard": 64}, (8192, 2, 128), h200, trainy, {}),
        ("8B bf16 8 GPUs", 6_667, (*eight, third), {"shard": 8}, (8192, 2, 16), bad, titan, {}),
        ("8B bf16 128 GPUs", 6_514, (*eight, third), {"shard": 128}, (8192, 2, 256), bad, titan, {}),
        ("8B fp8 8 GPUs", 8_532, (*LLAMA, GATHER, third), {"shard": 8}, (8192, 2, 16), bad, titan, {}),
        ("8B fp8 128 GPUs", 8_380, (*LLAMA, GATHER, third), {"shard": 128}, (8192, 2, 256), bad, titan, {}),
        ("8B bf16 64 GPUs, TP8", 4_378, eight, {"shard": 8, "tensor": 8}, (8192, 1, 8), bad, asynchronous, {}),
        ("70B fp8 256 GPUs, TP8", 829, seventy, {"shard": 32, "tensor": 8}, (8192, 16, 512), bad, titan, {}),
        ("405B fp8 512 GPUs, 1F1B", 100, largest, deep, (8192, 4, 256), bad, titan, {}),
        ("405B fp8 512 GPUs, interleaved", 128, largest, {**deep, **INTERLEAVED}, (8192, 4, 256), bad, titan, {}),
        ("16B bf16 16 GPUs, EP8", 22_528, (*EXPERTS, *LEAN), {"shard": 16, "expert": 8, **never}, (4096, 2, 1024), h100,
         old, {"model": small, **router}),
        ("16B bf16 16 GPUs, EP16", 10_670, (*EXPERTS, BF16, third), {"shard": 16, "expert": 16}, (4096, 1, 1024), h100,
         old, {"model": small}),
        ("30B bf16 8 GPUs, EP8", 12_040, (thirty, BF16, full), {"shard": 8, "expert": 8}, (4096, 4, 512), h100,
         automodel, turns),
        ("671B bf16 1,024 GPUs, TP2 PP8 EP64", 1_061, (giant, BF16, third), bridge_moe, (4096, 1, 8192), h100, bridge,
         forced),
        ("671B fp8 1,024 GPUs, TP2 PP8 EP64", 1_297, (giant, FP8, third), bridge_moe, (4096, 1, 8192), h100, bridge,
         forced),
        ("671B bf16 256 GPUs, PP4 EP64", 1_002, (giant, BF16, full), {"shard": 64, **seven}, (4096, 1, 512), h100,
         automodel, turns),
        ("671B bf16 1,024 GPUs, PP4 EP64", 865, (giant, BF16, full), {"shard": 256, **fewer}, (4096, 1, 2048), h100,
         automodel, turns),
    ):  # fmt: skip
        yield Row(
            name, "published", measured, presets, degrees, batch, gpu=gpu, source=source, **{"flash": True} | more
        )


def table() -> str:
    """Markdown: a table for each kind, measured and predicted side by side."""
    titles = {
        "calibrated": "Calibrated on: records of one and two H200",
        "predicted": "Predicted: records of four H200",
        "published": "Other people's figures, none of them fitted to",
    }
    found = rows()
    lines = []
    for kind, title in titles.items():
        chosen = [row for row in found if row.kind == kind]
        errors = [row.predicted / row.measured - 1.0 for row in chosen]
        near = sum(abs(error) <= 0.25 for error in errors)
        lines += [f"### {title}", ""]
        mean = sum(map(abs, errors)) / len(errors)
        summary = f"{len(chosen)} rows, {100 * mean:.1f} % off in the mean, {100 * max(map(abs, errors)):.1f} % at most"
        lines += [f"{summary}; {near} within 25 %.", ""]
        lines += ["| what | device | measured tokens/s/GPU | predicted | off | most of the rest | source |"]
        lines += ["|---|---|---:|---:|---:|---|---|"]
        for row, error in zip(chosen, errors, strict=True):
            lines.append(
                f"| {row.name} | {row.gpu.name} | {row.measured:,.0f} | {row.predicted:,.0f} | {100 * error:+.1f} % | "
                f"{row.step().limit} | {row.source} |"
            )
        lines.append("")
    return "\n".join(lines)


def page(text: str) -> str:
    """`text` of docs/predicted_time.md with a new table."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/predicted_time.md")
    if parser.parse_args().write:
        PAGE.write_text(page(PAGE.read_text()))
    else:
        print(table())


if __name__ == "__main__":
    main()
