"""Counts against published numbers, against the modules themselves, and against autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from src.errors import divisors
from src.models.accounting import Slice, head_chunk_rows
from src.models.llama3.config import Llama3Config
from tests.distributed.layouts import degrees
from tests.models.shapes import tiny_llama
from tests.train.runs import section

PRESETS = ("llama3_debug", "llama3_1b", "llama3_8b", "llama3_70b", "llama3_405b")


@pytest.mark.parametrize(
    ("preset", "seq_len", "head_width", "ffn_dim", "parameters", "flops"),
    [
        ("llama3_debug", 2048, 16, 768, 6_163_712, 71_585_280),
        ("llama3_8b", 8192, 128, 14336, 8_030_261_248, 57_914_449_920),
        ("llama3_70b", 8192, 128, 28672, 70_553_706_496, 481_442_709_504),
        ("llama3_405b", 8192, 128, 53248, 405_853_388_800, 2_625_449_459_712),
    ],
)
def test_published_counts(
    preset: str, seq_len: int, head_width: int, ffn_dim: int, parameters: int, flops: int
) -> None:
    config: Llama3Config = section("model", preset)
    counts = config.counts(seq_len)
    assert (config.head_width, config.ffn_dim) == (head_width, ffn_dim)
    assert (counts.parameters, counts.active, counts.flops_per_token) == (parameters, parameters, flops)
    assert counts.embedding == config.vocab_size * config.dim
    assert counts.flops_per_token == (
        6 * (parameters - counts.embedding) + 12 * config.n_layers * config.n_heads * head_width * seq_len
    )
    half = 6 * config.n_layers * config.n_heads * head_width * seq_len
    assert counts.flops_per_token - counts.flops_per_token_causal == half


@pytest.mark.parametrize(
    ("preset", "parameters", "active", "billions", "without_embeddings"),
    [
        ("qwen3_0_6b", 596_049_920, 596_049_920, 0.6, 0.44),
        ("qwen3_8b", 8_190_735_360, 8_190_735_360, 8.2, 6.95),
        ("qwen3_30b_a3b", 30_532_122_624, 3_353_032_704, 30.5, 29.9),
    ],
)
def test_published_counts_of_qwen3(
    preset: str, parameters: int, active: int, billions: float, without_embeddings: float
) -> None:
    """The last two are the model cards': all, and all but embedding and head."""
    config = section("model", preset)
    counts = config.counts(32768)
    assert (counts.parameters, counts.active) == (parameters, active)
    assert parameters / 1e9 == pytest.approx(billions, rel=0.01)
    outside = counts.embedding * (1 if config.tied else 2)
    assert (parameters - outside) / 1e9 == pytest.approx(without_embeddings, rel=0.005)
    attention = 12 * config.n_layers * config.n_heads * config.head_dim * 32768
    used = active - (0 if config.tied else counts.embedding)
    assert counts.flops_per_token == 6 * used + attention


def test_a_tied_matrix_counts_once_and_multiplies_once() -> None:
    config: Llama3Config = section("model", "llama3_1b")
    counts = config.counts(4096)
    assert counts.parameters == 1_235_814_400  # the released Llama 3.2 1B
    head = config.vocab_size * config.dim
    untied = tiny_like(config, tie_word_embeddings=False).counts(4096)
    assert untied.parameters == counts.parameters + head
    assert untied.flops_per_token == counts.flops_per_token


def tiny_like(config: Llama3Config, **changes: object) -> Llama3Config:
    return Llama3Config(**(dict(config) | changes))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_built_model_has_these_weights(preset: str) -> None:
    config: Llama3Config = section("model", preset)
    with torch.device("meta"):
        built = {name: tuple(parameter.shape) for name, parameter in config.build().named_parameters()}
    assert {weight.name: weight.shape for weight in config.weights()} == built


@pytest.mark.parametrize("changes", [{"head_dim": 32}, {"tie_word_embeddings": True}, {"n_kv_heads": 1}])
def test_unusual_shapes_are_built_as_counted(changes: dict[str, object]) -> None:
    config = tiny_llama(**changes)
    with torch.device("meta"):
        built = {name: tuple(parameter.shape) for name, parameter in config.build().named_parameters()}
    assert {weight.name: weight.shape for weight in config.weights()} == built
    assert config.counts(64).parameters == sum(torch.Size(shape).numel() for shape in built.values())


def kept_bytes(block: nn.Module, x: Tensor, rotary: Tensor, forward: Callable[..., Tensor]) -> int:
    """What autograd saves for the backward of a block's forward, weights, tables and the two signs of a rotation
    aside; each storage once.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), rotary)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() > 2:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(x, rotary, None)
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 1}, {"head_dim": 32}, {"multiple_of": 256}])
def test_a_block_keeps_what_autograd_keeps(dtype: torch.dtype, changes: dict[str, object]) -> None:
    config = tiny_llama(**changes)
    model = config.build()
    block, rotary = model.layers["0"].to(dtype), model.rotary
    # Without norms a block's input is also the input of its matrices: kept once, where a fused norm's would be twice.
    block.attention_norm, block.ffn_norm = nn.Identity(), nn.Identity()
    x = torch.randn(2, 96, config.dim, dtype=dtype, requires_grad=True)
    cut = Slice(tokens=2 * 96, tensor=1, element_bytes=dtype.itemsize, compiled=False)
    norms = 2 * cut.tokens * (config.dim * cut.element_bytes + 4)
    assert kept_bytes(block, x, rotary, block) == config.saved_by_block(cut).whole - norms


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 1, "head_dim": 32, "multiple_of": 256}])
def test_a_compiled_block_keeps_what_the_partitioner_keeps(changes: dict[str, object]) -> None:
    """The same cut into forward and backward as inductor's, run eagerly."""
    config = tiny_llama(**changes)
    model = config.build()
    block = model.layers["0"].to(torch.bfloat16)
    x = torch.randn(2, 96, config.dim, dtype=torch.bfloat16, requires_grad=True)
    cut = Slice(tokens=2 * 96, tensor=1, element_bytes=2, compiled=True)
    forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager_decomp_partition")
    measured = kept_bytes(block, x, model.rotary, forward)
    assert measured == pytest.approx(config.saved_by_block(cut).whole, rel=0.01)


def test_what_a_cut_and_a_compiler_save() -> None:
    config = tiny_llama()
    whole = config.saved_by_block(Slice(tokens=128, tensor=1, element_bytes=2, compiled=False))
    compiled = config.saved_by_block(Slice(tokens=128, tensor=1, element_bytes=2, compiled=True))
    split = config.saved_by_block(Slice(tokens=128, tensor=4, element_bytes=2, compiled=False))
    gathered = 2 * 128 * config.dim * 2
    assert whole.whole - compiled.whole == 128 * config.ffn_dim * 2
    assert split.whole - gathered == (whole.whole - gathered) / 4
    assert split.input == whole.input / 4 == 128 * config.dim * 2 / 4


@pytest.mark.parametrize(
    ("words", "rows"), [(128256, 4096), (151936, 4096), (10**9, 4096), (65536, 8192), (32000, 16384)]
)
def test_chunks_of_the_head_hold_a_gibibyte_of_logits(words: int, rows: int) -> None:
    assert head_chunk_rows(words) == rows
    assert rows == 4096 or 2 * rows * words <= 2**30


def test_a_share_is_rounded_up() -> None:
    rows = next(weight for weight in tiny_llama().weights() if weight.name == "layers.0.attention.wk.weight")
    assert rows.shape == (32, 64)
    assert rows.local_elements(degrees("fsdp5")) == 7 * 64
    assert rows.local_elements(degrees("tp2_fsdp3")) == 6 * 64


@pytest.mark.parametrize(
    ("value", "asked", "said"),
    [
        (8, 3, "1, 2, 4 or 8 do"),
        (1, 2, "1 does"),
        (7, 2, "1 or 7 do"),
        (128256, 16, "8, 12, 16 or 24 do"),
    ],
)
def test_divisors_are_the_nearest_when_many(value: int, asked: int, said: str) -> None:
    assert divisors(value, asked) == said


@pytest.mark.parametrize(
    ("changes", "key", "said"),
    [
        ({"n_kv_heads": 3}, "n_kv_heads", "3 does not divide n_heads=8 (1, 2, 4 or 8 do)"),
        ({"head_dim": 15}, "head_dim", "15 is odd"),
        ({"dim": 72, "n_heads": 8}, "head_dim", "dim=72 is not an even multiple of n_heads=8"),
        ({"mask": "block_causal"}, "mask", "attention=flex does it"),
        ({"fixed_block": 16}, "fixed_block", "attention=flex does it"),
    ],
)
def test_impossible_shapes_are_refused_by_key(changes: dict[str, object], key: str, said: str) -> None:
    with pytest.raises(ValueError, match="1 validation error") as caught:
        tiny_llama(**changes)
    (error,) = caught.value.errors()  # type: ignore[attr-defined]
    assert error["loc"] == (key,)
    assert said in error["msg"]


def test_a_layout_is_judged_by_every_shape_it_cuts() -> None:
    layout = section("parallel", "tp2").model_copy(update={"tensor": 3, "pipeline": 2})
    problems = tiny_llama(tie_word_embeddings=True, vocab_size=97).problems(layout)
    assert problems[0] == "parallel.tensor=3 does not divide model.n_heads=8 (1, 2, 4 or 8 do)"
    assert problems[1] == "parallel.tensor=3 does not divide model.n_kv_heads=4 (1, 2 or 4 do)"
    assert problems[2] == "parallel.tensor=3 does not divide model.vocab_size=97 (1 or 97 do)"
    assert any("tie_word_embeddings" in problem for problem in problems)
