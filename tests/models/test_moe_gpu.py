"""Experts and latent attention on a GPU: no wait for the host, the fast kernels, the same numbers."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from src.models.attention.cores import CausalAttention
from src.models.moe.experts import Experts
from src.models.moe.moe import MoE
from tests.models.shapes import tiny_moe

pytestmark = pytest.mark.gpu


def made(**changes: object) -> MoE:
    torch.manual_seed(0)
    moe = MoE(128, tiny_moe(hidden_dim=64, **changes), balanced=True).bfloat16()
    moe.reset_buffers()
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.1)
    return moe.cuda()


def test_nothing_waits_for_the_device() -> None:
    moe = made()
    moe.expert_bias[2] -= 10.0  # an expert without a row
    x = torch.randn(2, 64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    moe(x)[0].sum().item()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe(x)[0].square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert moe.experts.w1.grad is not None


def test_an_expert_without_rows_has_no_gradient_and_spoils_none() -> None:
    """The memory of a segment of no rows must be written too, with zeros."""
    experts = Experts(4, 128, 64)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    rows, counts, weights = torch.randn(300, 128), torch.tensor([170, 0, 130, 0]), torch.rand(300)
    probe = torch.randn(300, 128)
    wanted = torch.autograd.grad((experts(rows, counts, weights) * probe).sum(), list(experts.parameters()))
    on_gpu = Experts(4, 128, 64).cuda().bfloat16()
    on_gpu.load_state_dict(experts.state_dict())
    filth = [torch.full_like(parameter, float("nan")) for parameter in on_gpu.parameters()]
    del filth  # what the allocator hands out next is not zero
    out = on_gpu(rows.cuda().bfloat16(), counts.cuda(), weights.cuda())
    for got, exact in zip(
        torch.autograd.grad((out * probe.cuda()).sum(), list(on_gpu.parameters())), wanted, strict=True
    ):
        assert float((got.cpu().float() - exact).norm() / exact.norm()) < 0.02
        assert float(got[1].abs().max()) == float(got[3].abs().max()) == 0.0


def test_the_same_bits_at_every_run() -> None:
    moe = made(score_func="sigmoid", route_norm=True)
    x = torch.randn(2, 512, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    inputs = [x, *moe.parameters()]
    runs = [torch.autograd.grad(moe(x)[0].square().sum(), inputs) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_latent_attention_has_a_fused_kernel() -> None:
    """Queries of 192 and values of 128 features: cuDNN takes them, and the core is as right as with plain matrices."""
    q, k = (torch.randn(1, 4, 512, 192, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    v = torch.randn(1, 512, 4, 256, device="cuda", dtype=torch.bfloat16)[..., 128:].transpose(1, 2)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        fast = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.1)
    core = CausalAttention()(q, k, v, scale=0.1)
    assert torch.equal(core, fast)
    exact = nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, scale=0.1)
    assert float((core.double() - exact).norm() / exact.norm()) < 0.01
