"""Llama 3 against an independent implementation: transformers, fp32 on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.models.cross_entropy import IGNORED, Output
from src.models.llama3.config import Llama3Config
from src.models.parametrization.init import Constant, Normal
from src.models.rope import inverse_frequencies, rotary_table, rotate, scale_llama3
from tests.models.shapes import SCALED, randomised, tiny_llama


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of interleaved rotary pairs in Hugging Face's order: all first halves, then all second halves."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def as_transformers(model: nn.Module, config: Llama3Config) -> nn.Module:
    """transformers' Llama with the same weights."""
    transformers = pytest.importorskip("transformers")
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original,
        }
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.head_width,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )
    names = {
        "attention.wo": "self_attn.o_proj",
        "attention.wv": "self_attn.v_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    ours = model.state_dict()
    weights = {"model.embed_tokens.weight": ours["tok_embeddings.weight"], "model.norm.weight": ours["norm.weight"]}
    weights["lm_head.weight"] = ours["output.weight"]
    for layer in range(config.n_layers):
        for here, there in names.items():
            weights[f"model.layers.{layer}.{there}.weight"] = ours[f"layers.{layer}.{here}.weight"]
        for here, there, heads in (("wq", "q_proj", config.n_heads), ("wk", "k_proj", config.n_kv_heads)):
            weight = half_split(ours[f"layers.{layer}.attention.{here}.weight"], heads)
            weights[f"model.layers.{layer}.self_attn.{there}.weight"] = weight
    theirs.load_state_dict(weights)
    return theirs.eval()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="grouped-query"),
        pytest.param({"n_kv_heads": 8, "head_dim": 16}, id="explicit-head"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
        pytest.param({"rope_scaling": SCALED}, id="rope-scaled"),
    ],
)
def test_logits_equal_transformers(changes: dict[str, Any]) -> None:
    config = tiny_llama(**changes)
    model = randomised(config)
    tokens = torch.randint(config.vocab_size, (2, 100))
    with torch.no_grad():
        ours, theirs = model(tokens), as_transformers(model, config)(tokens).logits
    assert theirs.abs().max() > 1, "the comparison needs logits that say something"
    assert (ours - theirs).abs().max() < 1e-4  # fp32, sums in another order


def test_wrong_rotary_order_is_seen() -> None:
    """The tolerance above tells permuted weights from unpermuted ones."""
    config = tiny_llama()
    model = randomised(config)
    theirs = as_transformers(model, config)
    tokens = torch.randint(config.vocab_size, (1, 50))
    theirs.model.layers[0].self_attn.q_proj.weight.data = model.state_dict()["layers.0.attention.wq.weight"]
    with torch.no_grad():
        assert (model(tokens) - theirs(tokens).logits).abs().max() > 1e-2


def test_rope_scaling_ranges() -> None:
    """Llama 3.1, width 128: pairs 0-28 unchanged, 29-34 blended, 35-63 slowed eightfold."""
    plain = inverse_frequencies(128, 500000.0)
    ratio = scale_llama3(plain, factor=8.0, low=1.0, high=4.0, original=8192) / plain
    assert torch.equal(ratio[:29], torch.ones(29))
    assert torch.all((ratio[29:35] < 1) & (ratio[29:35] > 0.126))
    torch.testing.assert_close(ratio[35:], torch.full((29,), 0.125))


def test_rotation_is_complex_multiplication() -> None:
    x = torch.randn(2, 9, 3, 8)
    frequencies = inverse_frequencies(8, 100.0)
    angles = torch.outer(torch.arange(9.0), frequencies)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(rotate(x, rotary_table(frequencies, 16)), torch.view_as_real(turned).flatten(-2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_has_the_same_bits_without_gradients(dtype: torch.dtype) -> None:
    x, table = torch.randn(3, 40, 5, 16, dtype=dtype), rotary_table(inverse_frequencies(16, 1e4), 64)
    rows = table[torch.randint(64, (3, 40))]
    for known in (table, rows):
        trained = rotate(x, known)
        with torch.no_grad():
            assert torch.equal(rotate(x, known), trained)


def test_positions_gather_rows_of_the_rotary_table() -> None:
    """A second document whose positions restart gives the logits it gives alone."""
    config = tiny_llama(attention="flex", mask="block_causal")
    model = randomised(config)
    tokens = torch.randint(config.vocab_size, (2, 24))
    documents = torch.tensor([[0] * 10 + [1] * 14, [0] * 3 + [1] * 21], dtype=torch.int32)
    positions = torch.cat([torch.arange(10), torch.arange(14), torch.arange(3), torch.arange(21)]).view(2, 24)
    with torch.no_grad():
        packed = model(tokens, positions=positions, mask=model.attention_mask(documents, 2, 24))
        for row, start in ((0, 10), (1, 3)):
            alone = model(
                tokens[row : row + 1, start:],
                mask=model.attention_mask(torch.zeros(1, 24 - start, dtype=torch.int32), 1, 24 - start),
            )
            torch.testing.assert_close(packed[row, start:], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("mask", "fixed_block"), [("causal", None), ("causal", 5), ("block_causal", None), ("block_causal", 7)]
)
def test_flex_masks_equal_written_out_predicates(mask: str, fixed_block: int | None) -> None:
    config = tiny_llama(attention="flex", mask=mask, fixed_block=fixed_block, n_layers=1)
    core = config.build().layers["0"].attention.core
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2] * 2, [0] * 9 + [1] * 7]).sort(dim=-1).values.int()
    q, k, v = torch.randn(2, 8, 16, 8), torch.randn(2, 4, 16, 8), torch.randn(2, 4, 16, 8)
    allowed = torch.zeros(2, 16, 16, dtype=torch.bool)
    for row in range(2):
        for query in range(16):
            for key in range(query + 1):
                same = mask == "causal" or documents[row, query] == documents[row, key]
                allowed[row, query, key] = same and (fixed_block is None or query // fixed_block == key // fixed_block)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None], enable_gqa=True)
    torch.testing.assert_close(core(q, k, v, config.build().attention_mask(documents, 2, 16)), expected)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("rows", [7, 4096 + 3])
def test_chunked_cross_entropy_equals_torch(rows: int, z_loss: float) -> None:
    """Loss and both gradients, with ignored labels, over one chunk and over a ragged second one. z-loss is in gradients
    alone.
    """
    torch.manual_seed(1)
    head = Output(16, 50)
    head.z_loss, head.rows = z_loss, 4096
    hidden = torch.randn(1, rows, 16, requires_grad=True)
    labels = torch.randint(50, (1, rows))
    labels[0, ::3] = IGNORED
    expected = nn.functional.cross_entropy(head(hidden)[0], labels[0], ignore_index=IGNORED, reduction="sum")
    squares = head(hidden)[0].logsumexp(-1)[labels[0] != IGNORED].square().sum()
    expected_gradients = torch.autograd.grad((expected + z_loss * squares) * 0.5, [hidden, head.weight])
    loss = head(hidden, labels=labels)
    gradients = torch.autograd.grad(loss * 0.5, [hidden, head.weight])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for ours, torchs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)


def test_initializers_name_every_parameter_and_scale_with_depth() -> None:
    config = tiny_llama()
    plan = config.build().initializers()
    assert set(plan) == {name for name, _ in config.build().named_parameters()}
    assert plan["layers.2.attention.wo.weight"] == Normal(0.02 / 6**0.5)
    assert plan["layers.2.feed_forward.w3.weight"] == plan["layers.2.feed_forward.w2.weight"]
    assert plan["layers.2.feed_forward.w1.weight"] == Normal(0.02)
    assert plan["norm.weight"] == Constant(1.0)
    assert plan["output.weight"] == Normal(0.125, cut=3.0)
    flat = tiny_llama(depth_init=False).build().initializers()
    assert flat["layers.0.attention.wo.weight"] == Normal(0.02 / 6**0.5)


def test_normal_has_no_spike_at_its_bounds() -> None:
    weight = torch.empty(1 << 22)
    Normal(0.02).fill(weight, torch.Generator().manual_seed(0))
    assert weight.abs().max() < 0.02 * 6.5
    assert abs(weight.std().item() - 0.02) < 1e-4
    Normal(0.02, cut=3.0).fill(weight, torch.Generator().manual_seed(0))
    assert weight.abs().max() <= 0.06
