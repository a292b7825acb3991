"""Attention cores: softmax(q k^T * scale + mask) v, as modules of their own so that a layout can hook them.

All take q (batch, heads, length, width), k and v (batch, kv heads, length, width) and return (batch, heads, length,
v width); query head j reads kv head j * kv_heads // heads.
"""

from collections.abc import Callable
from functools import cache
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

from src.models.attention import flash_attention

MaskKind = Literal["causal", "block_causal"]
Mask = BlockMask | Tensor  # or the starts of documents, where a model was told to make those: `Decoder.by_starts`

# On Hopper at 8192 tokens cuDNN runs 555 / 484 TFLOP/s forward / backward and flash v2 299 / 258 (benchmarks/).
# With queries of 192 and values of 128 features it runs 523 / 395, memory-efficient attention 141 / 38, flash refuses.
CUDA_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class CausalAttention(nn.Module):
    """Scaled dot product attention, causal, with the fastest kernel of the device: flash-attn-4's where it is
    installed, or torch's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flash = flash_attention.here()  # asked here, once: within a compiled block it cannot be

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: None = None, scale: float | None = None) -> Tensor:
        assert mask is None, "a mask other than causal is for FlexAttention"
        if not q.is_cuda:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        if self.flash and flash_attention.takes(q, k, v):
            return flash_attention.attention(q, k, v, scale)
        with sdpa_kernel(CUDA_BACKENDS, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


class FlexAttention(nn.Module):
    """torch's FlexAttention with the block mask of this batch (arXiv 2412.05496); compiled on CUDA. Documents alone:
    flash-attn-4's kernel where it is installed.

    On the CPU, where it has no backward, the same predicate becomes a dense mask: slow, but it trains.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None = None) -> Tensor:
        if isinstance(mask, Tensor):
            return flash_attention.within_documents(q, k, v, mask, scale)
        if not q.is_cuda:
            batch, _, queries, keys = mask.shape
            dense = create_mask(mask.mask_mod, batch, 1, queries, keys, device=q.device)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=dense, scale=scale, enable_gqa=True)
        # Within a block that is compiled already it is traced as it stands.
        attend = cast(Callable[..., Tensor], flex_attention) if torch.compiler.is_compiling() else _compiled_flex()
        return attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(flex_attention)
    return compiled


@cache
def _compiled_mask() -> Callable[..., BlockMask]:
    compiled: Callable[..., BlockMask] = torch.compile(create_block_mask)
    return compiled


def block_mask(
    kind: MaskKind, documents: Tensor | None, fixed_block: int | None, batch: int, length: int, device: torch.device
) -> BlockMask:
    """Which key each query may see; predicates are joined on absolute positions.

    causal: k <= q. block_causal: also the same document (`documents`: (batch, length), see src/data/batches.py).
    fixed_block: also floor(q / c) == floor(k / c). Shared by all heads; by all rows too unless documents differ.
    """
    if kind == "block_causal":
        assert documents is not None, "the plan asks data.document_masks of a block_causal model"

    def allowed(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = q >= k
        if kind == "block_causal":
            assert documents is not None
            seen = seen & (documents[b, q] == documents[b, k])
        if fixed_block is not None:
            seen = seen & (q // fixed_block == k // fixed_block)
        return seen

    rows = batch if kind == "block_causal" else None
    # Compiled, the dense mask of all positions is never there: 64 MiB a row at 8192 tokens.
    make = _compiled_mask() if device.type == "cuda" else create_block_mask
    return make(allowed, rows, None, length, length, device=device)
