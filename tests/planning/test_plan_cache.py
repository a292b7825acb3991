"""Keys and values of task=generate in the plan: the bytes that the attention cores of the fullest rank really keep."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from rich.console import Console

from src.distributed.precision.config import Precision
from src.models import cache
from src.models.cache import Cache, CachedAttention
from src.planning.memory import Memory, estimate
from src.planning.plan import load_of, plan
from src.planning.table import render
from src.run import Run
from src.tasks.generate.config import Generate
from src.tasks.generate.decoding import generate
from src.tasks.generate.sampling import SamplingParams
from tests.checkpoint.options import problems
from tests.distributed.layouts import degrees, parallel_network
from tests.models.shapes import tiny_deepseek, tiny_llama
from tests.models.test_deepseek import SIGMOID
from tests.ranks import RankPool
from tests.train.runs import Here, make_run

PROMPTS = ["of lengths", "three", "prompts"]
LONGEST = 1 + len(PROMPTS[0])  # a token for each byte, and the one that begins a document
COUNT = 7
PARAMETERS = 8_030_261_248
MODELS: dict[str, Any] = {
    "llama3": tiny_llama(vocab_size=258),
    "deepseek_v3": tiny_deepseek(vocab_size=258, moe=SIGMOID),
}


def asked(folder: Path, *, batch: int = 2, prompts: int = 3, **choices: Any) -> Run:
    """A run of task=generate with the first PROMPTS in a file."""
    file = folder / "prompts.txt"
    file.write_text("\n".join(PROMPTS[:prompts]))
    keys: dict[str, Any] = {"run": "runs/x", "step": None, "ema": False, "prompt": None, "prompts": file}
    task = Generate(**keys, max_tokens=COUNT, temperature=0.0, top_k=None, top_p=None, batch=batch)
    return replace(make_run(**choices), task=task)


def memory(*args: Any, **options: Any) -> Memory:
    return estimate(load_of(asked(*args, **options)))


def kept(name: str, layout: str, compute: Any) -> int:
    """Bytes that this rank's attention cores make room for in the first batch."""
    cores: list[CachedAttention] = []

    def core(text: Cache) -> CachedAttention:
        cores.append(CachedAttention(text))
        return cores[-1]

    precision = Precision(storage="float32", compute=compute, reduce="float32", float8=None)
    network = parallel_network(MODELS[name], degrees(layout), precision)
    prompts = [[256, *text.encode()] for text in PROMPTS[: 2 * network.mesh.data_ranks]]
    with patch.object(cache, "CachedAttention", core):
        generate(network, prompts, count=COUNT, rule=SamplingParams(0.0), seed=0, ends=(), batch=2)
    tensors = [tensor for each in cores for tensor in (each.keys, each.values)]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["single", "tp2", "fsdp2", "cp2", "pp2"])
def test_planned_is_what_the_cores_keep(name: str, layout: str, ranks: RankPool, tmp_path: Path) -> None:
    """On the fullest rank: three texts on two data ranks are two and one, three layers on two stages as well."""
    world = degrees(layout).world
    found = max(ranks(world, kept, name, layout, "bfloat16" if layout == "tp2" else "float32"))
    precision = {"precision": "bf16"} if layout == "tp2" else {}
    assert memory(tmp_path, model=MODELS[name], parallel=layout, **precision).cache == found > 0


def test_the_formula_by_hand(tmp_path: Path) -> None:
    """Llama 3 8B: 8 heads of 128 + 128; DeepSeek-V3 671B: 128 heads of 192 + 128, 5 MB a token in bf16."""
    columns = LONGEST + COUNT + 1  # a pass brings one where no rank of context or tensor wants more
    llama = memory(tmp_path, model="llama3_8b", precision="bf16")
    assert llama.cache == 32 * 2 * columns * 8 * 256 * 2
    assert memory(tmp_path, model="llama3_8b", precision="bf16", prompts=1).cache == llama.cache // 2
    assert memory(tmp_path, model="llama3_8b", precision="bf16", batch=8).cache == llama.cache // 2 * 3
    latent = memory(tmp_path, model="deepseek_v3_671b", precision="bf16", prompts=1)
    assert latent.cache == 61 * columns * 128 * 320 * 2
    assert latent.cache / columns == pytest.approx(5e6, rel=0.01)


def test_it_is_in_the_peak_and_in_the_table(tmp_path: Path) -> None:
    long = asked(tmp_path, model="llama3_8b", precision="bf16", batch=2)
    long = replace(long, task=long.task.model_copy(update={"max_tokens": 8000}))  # type: ignore[attr-defined]
    short, planned = memory(tmp_path, model="llama3_8b", precision="bf16"), plan(long)
    grown = planned.memory.cache - short.cache
    assert grown == 32 * 2 * (8000 - COUNT) * 8 * 256 * 2
    assert planned.memory.allocated == short.allocated + grown
    assert "keys and values of texts" in shown(long)
    assert "keys and values of texts" not in shown(make_run()), "a task that writes no text has no such row"


def shown(run: Run) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render(plan(run)))
    return capture.get()


def test_weights_are_held_once_in_the_compute_dtype(tmp_path: Path) -> None:
    """precision=bf16 trains float32 weights; text needs 32 blocks, an embedding and a head in bf16, and no copy."""
    single = memory(tmp_path, model="llama3_8b", precision="bf16")
    assert (single.parameters, single.gathered) == (2 * PARAMETERS, 0)
    assert single == memory(tmp_path, model="llama3_8b", precision="bf16_full")
    assert memory(tmp_path, model="llama3_8b", precision="bf16", parallel="fsdp2").gathered < 2 * PARAMETERS / 4


def test_texts_that_do_not_fit_name_the_key_of_this_task(tmp_path: Path) -> None:
    run = asked(tmp_path, model="llama3_8b", precision="bf16", cluster=Here(gpu_memory_gib=17.0))
    run = replace(run, task=run.task.model_copy(update={"max_tokens": 8000}))  # type: ignore[attr-defined]
    (told,) = problems(plan, run)
    assert told.startswith("does not fit: ")
    assert "task.batch=1 frees 1022 MiB" in told
    assert "parallel.reshard" not in told, "one device holds them in the compute dtype whatever is gathered"
    assert "task.micro_batch" not in told


def test_prompts_that_are_refused_need_no_room(tmp_path: Path) -> None:
    run = asked(tmp_path, model="llama3_8b")
    missing = replace(run, task=run.task.model_copy(update={"prompts": tmp_path / "none"}))  # type: ignore[attr-defined]
    assert estimate(load_of(missing)).cache == 0
