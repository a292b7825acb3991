"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), interleaved convention, tables in fp32."""

import math

import torch
from torch import Tensor


def inverse_frequencies(width: int, theta: float) -> Tensor:
    """theta^(-2i/width) for i in [0, width/2), fp32: radians per token of each rotated pair."""
    return 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)


def scale_llama3(frequencies: Tensor, *, factor: float, low: float, high: float, original: int) -> Tensor:
    """Llama 3.1's stretch of the context: long wavelengths are slowed by `factor`, short ones kept, the rest blended.

    A wavelength is short below original/high tokens and long above original/low (Llama 3 report, section 3.4.2).
    """
    wavelength = 2 * math.pi / frequencies
    blend = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * frequencies / factor + blend * frequencies


def scale_yarn(
    frequencies: Tensor, *, theta: float, factor: float, original: int, beta_fast: float, beta_slow: float
) -> Tensor:
    """YaRN's stretch of the context (arXiv 2309.00071): pairs that turn often are kept, slow ones slowed by `factor`.

    Within `original` tokens pair i turns more than `beta_fast` times below the ramp, less than `beta_slow` above it.
    """
    width = 2 * len(frequencies)

    def pair(turns: float) -> float:
        return width * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = max(math.floor(pair(beta_fast)), 0), min(math.ceil(pair(beta_slow)), width - 1)
    places = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
    ramp = ((places - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    return frequencies / factor * ramp + frequencies * (1 - ramp)


def rotary_table(frequencies: Tensor, length: int) -> Tensor:
    """(length, width/2, 2) fp32: cosine and sine of position * frequency."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=frequencies.device), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair (x[2i], x[2i+1]) by its angle.

    x: (batch, length, heads, width); table: (>= length, width/2, 2), or (batch, length, width/2, 2) when rows were
    gathered by position. Computed in fp32 and cast back, under torch.compile too: bf16 angles lose whole tokens of
    position beyond 256.
    """
    table = table[: x.shape[1]].unsqueeze(0) if table.dim() == 3 else table
    one_token = x.shape[1] == 1 or not x.is_cuda
    if one_token and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        # Three kernels for eight, on a CPU with the same bits: of a token that is generated, launches are the price.
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * torch.view_as_complex(table.contiguous()).unsqueeze(2)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    cosine, sine = table.unsqueeze(2).unbind(-1)  # (1 or batch, length, 1, width/2)
    pairs = x.float().unflatten(-1, (-1, 2))
    # (even, odd) cos + (-odd, even) sin: the bits of the product of complex numbers, and a compiled kernel reads and
    # writes whole lines; one that stacks even and odd results takes 1.4 times as long on an H200.
    signs = torch.arange(-1.0, 2.0, 2.0, device=x.device)
    rotated: Tensor = pairs * cosine.unsqueeze(-1) + pairs.flip(-1) * signs * sine.unsqueeze(-1)
    return rotated.flatten(-2).to(x.dtype)
