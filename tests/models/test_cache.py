"""A model that remembers says what it says when it reads the whole text again."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.models.base import ModelConfig
from src.models.cache import Cache, CachedAttention, attending
from tests.models.shapes import STRETCHED, tiny_deepseek, tiny_llama
from tests.models.shapes import randomised as random_llama
from tests.models.test_deepseek import SIGMOID
from tests.models.test_deepseek import randomised as random_deepseek

MODELS: dict[str, ModelConfig] = {
    "llama": tiny_llama(),
    "tied": tiny_llama(tie_word_embeddings=True, head_dim=16),
    "flex": tiny_llama(attention="flex"),
    "documents": tiny_llama(attention="flex", mask="block_causal"),
    "blocks": tiny_llama(attention="flex", fixed_block=5),
    "deepseek": tiny_deepseek(moe=SIGMOID, q_lora_rank=16, rope_scaling=STRETCHED),
}


def made(config: ModelConfig) -> Any:
    model = (random_llama if config.family == "llama3" else random_deepseek)(config)  # type: ignore[arg-type]
    return model.eval()


def whole(model: Any, tokens: Tensor) -> Tensor:
    """Logits of one row, all of it at once."""
    documents = torch.zeros(1, len(tokens), dtype=torch.int32)
    result: Tensor = model(tokens[None], mask=model.attention_mask(documents, 1, len(tokens)))[0]
    return result


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_pieces_give_the_logits_of_the_whole(name: str) -> None:
    """Two rows of different length, left-padded with a word that means something, in passes of 7, 1, 1, 4 columns."""
    model = made(MODELS[name])
    texts = [torch.randint(96, (13,)), torch.randint(96, (9,))]
    rows = torch.stack([texts[0], torch.cat([torch.full((4,), 50), texts[1]])])
    cache, found = Cache(model.config, [0, 4], 16, torch.device("cpu")), []
    with attending(model, cache):
        for piece in rows.split([7, 1, 1, 4], dim=1):
            length = piece.shape[1]
            found.append(model(piece, positions=cache.positions(length), mask=cache.mask(length)))
            cache.filled += length
    logits = torch.cat(found, dim=1)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[0], whole(model, texts[0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1, 4:], whole(model, texts[1]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_columns_that_were_not_kept_are_written_over() -> None:
    """A pass may carry more columns than the text has, to please a layout: they leave no trace."""
    model, tokens = made(MODELS["llama"]), torch.randint(96, (10,))
    cache = Cache(model.config, [0], 16, torch.device("cpu"))
    with attending(model, cache):
        for start in range(10):
            piece = torch.cat([tokens[start : start + 1], torch.randint(96, (3,))])[None]
            logits = model(piece, positions=cache.positions(4), mask=cache.mask(4))[0, 0]
            cache.filled += 1
    torch.testing.assert_close(logits, whole(model, tokens)[-1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_model_is_the_old_one_afterwards() -> None:
    model, tokens = made(MODELS["deepseek"]), torch.randint(96, (8,))
    names, before = [name for name, _ in model.named_modules()], whole(model, tokens)
    with attending(model, Cache(model.config, [0], 8, torch.device("cpu"))):
        assert sum(isinstance(module, CachedAttention) for module in model.modules()) == 3
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(whole(model, tokens), before)


@torch.no_grad()
def test_a_cache_holds_the_heads_that_are_here() -> None:
    core = CachedAttention(Cache(tiny_llama(), [0, 0], 8, torch.device("cpu")))
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 6)
    causal = torch.ones(3, 3, dtype=torch.bool).tril()
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True)
    torch.testing.assert_close(core(q, k, v, core.cache.mask(3)), expected)
    assert core.keys is not None
    assert core.values is not None
    assert core.keys.shape == (2, 2, 8, 8)
    assert core.values.shape == (2, 2, 8, 6)
    core.cache.filled = 3
    q, more, last = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 6)
    k, v = torch.cat([k, more], dim=2), torch.cat([v, last], dim=2)
    seen = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]], dtype=torch.bool).view(2, 1, 1, 4)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(core(q, more, last, seen), expected)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.3)])
def test_pieces_give_the_logits_of_the_whole_on_a_gpu(dtype: torch.dtype, tolerance: float) -> None:
    """Kernels that know masks and grouped queries; the plain forward has others."""
    model, tokens = made(MODELS["llama"]).to("cuda", dtype), torch.randint(96, (40,), device="cuda")
    model.reset_buffers()
    cache, found = Cache(model.config, [0], 48, torch.device("cuda")), []
    with attending(model, cache):
        for piece in tokens[None].split([32, 1, 7], dim=1):
            length = piece.shape[1]
            found.append(model(piece, positions=cache.positions(length), mask=cache.mask(length)))
            cache.filled += length
    expected = model(tokens[None])
    torch.testing.assert_close(torch.cat(found, dim=1).float(), expected.float(), rtol=0, atol=tolerance)
