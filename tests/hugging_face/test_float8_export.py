"""float8 exports in DeepSeek's form: read back by numpy alone, by our import and by transformers."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from src.data.tokenizer import Bytes, ByteTokenizer
from src.hugging_face.check import E8M0, SCALE
from src.hugging_face.companions import Sources, companions
from src.hugging_face.load import load
from src.hugging_face.save import Form, save
from src.hugging_face.write import held
from src.models.hugging_face import stored
from src.tasks.export.config import Export
from src.tasks.export.self_check import Finding, compare
from tests.hugging_face.foreign import config_of
from tests.hugging_face.test_float8 import multiplied, odd
from tests.hugging_face.test_import import imported, tensors
from tests.hugging_face.test_round_trips import contents
from tests.train.runs import changed, section

T = TypeVar("T")
TEXT = "kära hav"
FLOAT32 = NDArray[np.float32]


class Alone:
    """The agreements of a single rank."""

    def on_all(self, action: Callable[[], T]) -> T:
        return action()

    def any(self, action: Callable[[], bool]) -> bool:
        return action()

    def on_rank_zero(self, action: Callable[[], T]) -> T:
        return action()


def deepseek() -> Any:
    """Every matrix has another number of rows or columns than a multiple of 128, such as 576 rows of wkv_a."""
    whole = section("model", "deepseek_v3_debug")
    moe = changed(whole.moe, score_func="sigmoid", hidden_dim=72, num_experts=4, top_k=2)
    sizes = {"dim": 160, "n_heads": 3, "n_layers": 2, "vocab_size": 258, "ffn_dim": 200, "q_lora_rank": 136}
    return changed(whole, **sizes, max_seq_len=64, moe=moe)


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    model = config.build()
    for name, tensor in tensors(model).items():
        if tensor.dim() > 1:
            torch.nn.init.normal_(tensor, std=0.05)
            tensor[: tensor.shape[0] // 2] *= 8  # blocks of other magnitudes
        elif "norm" in name:
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
    return model.eval()


def exported(folder: Path, model: Any, config: Any, form: Form) -> Path:
    """The draft, with all that transformers needs beside the weights."""
    beside = companions(config, ByteTokenizer(), Bytes(), form, Sources(None, ()))
    parts = held(tensors(model))
    return save(Alone(), folder, parts, config, form, beside, lambda tensor: tensor, torch.device("cpu"))


def by_numpy(folder: Path) -> dict[str, tuple[str, FLOAT32]]:
    """Dtype and values of every tensor, by the words of the format and of the number formats alone."""
    byte = np.arange(256)
    exponent, fraction = byte >> 3 & 15, byte & 7
    e4m3 = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    e4m3[exponent * 8 + fraction == 127] = np.nan
    e4m3 *= np.where(byte >> 7, -1, 1)
    decode: dict[str, Callable[[bytes], FLOAT32]] = {
        "F32": lambda raw: np.frombuffer(raw, np.float32),
        "BF16": lambda raw: (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32),
        "F8_E4M3": lambda raw: e4m3[np.frombuffer(raw, np.uint8)].astype(np.float32),
        "F8_E8M0": lambda raw: (2.0 ** (np.frombuffer(raw, np.uint8) - 127.0)).astype(np.float32),
    }
    found = {}
    for file in folder.glob("*.safetensors"):
        raw = file.read_bytes()
        (length,) = struct.unpack_from("<Q", raw)
        header = json.loads(raw[8 : 8 + length])
        for key, facts in header.items():
            if key != "__metadata__":
                start, end = (8 + length + offset for offset in facts["data_offsets"])
                found[key] = facts["dtype"], decode[facts["dtype"]](raw[start:end]).reshape(facts["shape"])
    return found


@pytest.mark.parametrize("scales", ["float32", E8M0])
def test_numpy_and_an_import_read_the_same_numbers(tmp_path: Path, scales: str) -> None:
    config = deepseek()
    model = model_of(config)
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    draft = exported(
        tmp_path / "x", model, config, Form("bfloat16", fp8=True, biases=False, shard_bytes=100_000, scales=scales)
    )
    found, quantised = by_numpy(draft), 0
    assert len(list(draft.glob("*.safetensors"))) > 3
    for tensor in tensors(model).values():
        tensor.fill_(float("nan"))
    load(draft, tensors(model), config)
    back = tensors(model)
    for each in stored(config):
        for place, key in enumerate(each.keys):
            if each.optional and key not in found:
                continue
            meant = (before[each.name][place] if each.stacked else before[each.name]).numpy()
            read = (back[each.name][place] if each.stacked else back[each.name]).numpy()
            dtype, values = found[key]
            if dtype == "F8_E4M3":
                quantised += 1
                kind, scale = found[f"{key}{SCALE}"]
                assert kind == ("F32" if scales == "float32" else "F8_E8M0")
                assert scale.shape == tuple(-(-size // 128) for size in values.shape)
                factor = np.kron(scale, np.ones((128, 128), np.float32))[: values.shape[0], : values.shape[1]]
                values = values * factor
                # Three bits behind the point, and steps of 2^-9 below 2^-6.
                assert np.all(np.abs(values - meant) <= np.maximum(np.abs(meant) / 16, factor * 2.0**-10) * 1.001), key
            else:
                assert dtype == ("F32" if each.precise else "BF16"), key
                assert np.all(np.abs(values - meant) <= np.abs(meant) * 2.0**-8), key
            assert np.array_equal(read, values), key
    assert quantised == 2 * 5 + 3 + 3 + 4 * 3  # attention, dense, shared, experts


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_transformers_computes_the_same_of_it(tmp_path: Path, storage: str) -> None:
    """Multiplied out by our own formula, and rounded as the run's weights rest, else bfloat16 alone would differ."""
    config = deepseek()
    model = model_of(config)
    draft = exported(
        tmp_path / "x", model, config, Form("bfloat16", fp8=True, biases=False, shard_bytes=10**9, scales=E8M0)
    )
    load(draft, tensors(model), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, storage)))
        ids = [256, *TEXT.encode()]
        logits = model(torch.tensor([ids]))[0]
    finding = Finding()
    compare(draft, TEXT, ids, {place: logits[place] for place in (0, 5, len(ids) - 1)}, storage, finding, gpu=False)
    assert finding.problems == []
    assert finding.lines[0].startswith("transformers' logits differ by at most ")


def test_a_folder_that_transformers_cannot_load_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    finding = Finding()
    compare(tmp_path, TEXT, [1], {0: torch.zeros(1)}, "float32", finding, gpu=False)
    (told,) = finding.problems
    assert told.startswith(f"{tmp_path}: transformers cannot use it: ValueError: ")
    assert "\n" not in told


def test_a_head_in_float8_is_read_as_any_matrix(tmp_path: Path) -> None:
    odd(tmp_path)
    values: dict[str, Tensor] = contents(tmp_path)
    head, scale = values["lm_head.weight"].to(torch.float8_e4m3fn), torch.tensor([[0.25]])
    values |= {"lm_head.weight": head, f"lm_head.weight{SCALE}": scale}
    save_file(values, tmp_path / "model.safetensors")
    model = imported(tmp_path, config_of(tmp_path))
    assert torch.equal(tensors(model)["output.weight"], multiplied(head.float(), scale))


def test_scales_without_float8_are_refused(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"step": None, "to": "x", "dtype": None, "biases": "refuse", "shard_gb": 1.0, "check": True}
    task = Export(run="hf:x", ema=False, fp8=False, fp8_scales="e8m0", text="a", push=None, send=False, **keys)
    run: Any = SimpleNamespace(model=deepseek(), tokenizer=Bytes(), cache=tmp_path, data=None)
    assert task.problems(run) == ["task.fp8_scales=e8m0: no weight is float8; pass fp8=true, or leave it out"]
