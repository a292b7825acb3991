"""What travels between the ranks that share every matrix."""

import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from src.distributed.compile import Compile
from src.distributed.mesh import Mesh
from src.distributed.tensor.symmetric_memory import share_memory
from src.errors import PlanError
from tests.distributed.layouts import degrees, parallel_model, rows
from tests.models.shapes import tiny_llama
from tests.ranks import RankPool

HOME = Path(__file__).parents[2]

# 2 rows of 16 tokens; no two of these numbers of elements are alike.
STREAM = 2 * 16 * 64  # the hidden state of all tokens
WEIGHT = 64  # a norm's
ROWS = 2 * 16  # one number for each token


class Traffic(TorchDispatchMode):
    """Counts collectives by what they do and by the elements of the whole that they make or take apart."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func).split(".")[1]
        if func.namespace == "_c10d_functional" and name.split("_")[0] in ("all", "reduce"):
            self.seen[name, max(args[0].numel(), result.numel())] += 1
        return result


def traffic(dtype: torch.dtype, tied: bool) -> dict[str, Counter[tuple[str, int]]]:
    config = tiny_llama(tie_word_embeddings=tied)
    model, _ = parallel_model(config, degrees("tp2"))
    model.to(dtype)
    batch = rows(2, 16, config.vocab_size)
    with Traffic() as forward:
        loss = model(batch.tokens, labels=batch.labels)
    with Traffic() as backward:
        loss.backward()
    return {"forward": forward.seen, "backward": backward.seen}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_nothing_travels_that_need_not(ranks: RankPool, dtype: torch.dtype, tied: bool) -> None:
    """The hidden state into and out of each of 6 block halves, the head and the embedding; the words of a row never."""
    for seen in ranks(2, traffic, dtype, tied):
        sequence = {("all_gather_into_tensor", STREAM): 7, ("reduce_scatter_tensor", STREAM): 7}
        assert seen["forward"] == sequence | {("all_reduce", ROWS): 3}  # largest logit, sum of exp, the label's logit
        assert seen["backward"] == sequence | {("all_reduce", WEIGHT): 7}  # norms, whose tokens are spread


def complaints(layout: str) -> list[str]:
    """What a forward and a backward pass warn of."""
    config = tiny_llama()
    model, _ = parallel_model(config, degrees(layout))
    batch = rows(2, 16, config.vocab_size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(batch.tokens, labels=batch.labels).backward()
    return [str(warning.message) for warning in caught]


def test_a_pass_warns_of_nothing(ranks: RankPool) -> None:
    assert ranks(4, complaints, "tp2_fsdp2") == [[]] * 4


def shared(layout: str) -> str:
    """What asking ranks of the CPU for shared memory says."""
    mesh = Mesh(degrees(layout), "cpu").tensor
    assert mesh is not None
    with pytest.raises(PlanError) as caught:
        share_memory(mesh)
    return str(caught.value)


def test_ranks_that_share_no_memory_are_told(ranks: RankPool) -> None:
    for said in ranks(2, shared, "tp2"):
        assert "parallel.async_tensor=true needs GPUs" in said
        assert "pass parallel.async_tensor=false" in said


@pytest.mark.parametrize("wanted", [False, True])
def test_blocks_alone_are_compiled_with_pipelined_products(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    asked: list[Any] = []

    def compiler(function: Any, **how: Any) -> Any:
        asked.append(how.get("options", {}).get("_micro_pipeline_tp"))
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    model = tiny_llama().build()
    Compile(blocks=True, loss=True, graph=False, mode="default").apply(model, pipeline_products=wanted)
    assert asked == [wanted] * 3 + [None] * 2  # three blocks, and the two kernels of the loss


if torch.cuda.device_count() != 1:  # without any it is left out, with one alone there is nothing to overlap

    @pytest.mark.gpu
    def test_overlapped_products_are_used_and_train_alike(tmp_path: Path) -> None:
        """Through the command line, so that every process is fresh; NVLink multicast may be off."""
        layout = ["parallel=tp2", "parallel.async_tensor=true", "compile=blocks", "precision=bf16", f"root={tmp_path}"]
        verified = subprocess.run([sys.executable, "launch.py", "task=verify", "task.seq_len=256", *layout], cwd=HOME)
        assert verified.returncode == 0
        benched = subprocess.run(
            [sys.executable, "launch.py", "task=bench", "task.profile=true", "task.seq_len=2048", *layout], cwd=HOME
        )
        assert benched.returncode == 0
        (profile,) = tmp_path.glob("*/profile.txt")
        assert "symm_mem" in profile.read_text()
