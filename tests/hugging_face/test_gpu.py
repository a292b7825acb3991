"""To and from a GPU's memory: the same bits as to and from the host's."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from src.hugging_face.load import load
from src.hugging_face.save import Form, save
from src.hugging_face.write import held
from tests.hugging_face.foreign import config_of, saved
from tests.hugging_face.test_import import imported, tensors
from tests.hugging_face.test_round_trips import contents

T = TypeVar("T")


class Alone:
    """One rank, which agrees with itself."""

    def each(self, action: Callable[[], T]) -> list[T]:
        return [action()]

    def first(self, action: Callable[[], T]) -> T:
        return action()


def same(tensor: Tensor) -> Tensor:
    return tensor


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("name", ["llama", "deepseek-v3"])
def test_a_gpu_reads_and_writes_the_same_bits(name: str, fp8: bool, tmp_path: Path) -> None:
    saved(name, tmp_path / "theirs", torch.bfloat16)
    config = config_of(tmp_path / "theirs")
    on_host = imported(tmp_path / "theirs", config)
    on_gpu = config.build().cuda()
    load(tmp_path / "theirs", tensors(on_gpu), config)
    host, gpu = tensors(on_host), tensors(on_gpu)
    assert [key for key in host if not torch.equal(host[key], gpu[key].cpu())] == []
    form = Form("bfloat16", fp8=fp8, biases=True, shard_bytes=100_000)
    for where, parts, device in (("host", host, "cpu"), ("gpu", gpu, "cuda")):
        save(Alone(), tmp_path / where, held(parts), config, form, {}, same, torch.device(device))
    first, second = contents(tmp_path / "host.partial"), contents(tmp_path / "gpu.partial")
    assert [key for key in first if not torch.equal(first[key].view(torch.uint8), second[key].view(torch.uint8))] == []
