"""A profile by hand, and names as profiles of GPUs hold them."""

import pytest

from src.metrics.kernels import KernelTime, breakdown, covered, kind, markdown


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nvjet_hsh_192x192_64x4_1x2_h_bz_coopB_NTN", "gemm"),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "gemm"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "gemm"),
        (
            "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel::"
            "GemmUniversal<cutlass::gemm::GroupProblemShape<cute::tuple<int, int, int> >",
            "grouped gemm",
        ),
        ("void at::cuda::detail::prepare_grouped_gemm_data<cutlass::bfloat16_t>", "grouped gemm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x64x192_4x1x1", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 64>", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k65536_sm80(PyTorchMemEffAttention", "attention"),
        ("triton_tem_fused_flex_attention_backward_0", "attention"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, "
            "at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4, ADAM_MODE::ADAMW, false>",
            "optimizer",
        ),
        ("void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>", "routing"),
        ("void cub::DeviceRadixSortOnesweepKernel<long>", "routing"),
        ("void at_cuda_detail::cub::DeviceScanKernel<int>", "routing"),
        ("triton_poi_fused_floor_divide_index_3", "permute"),
        ("void at::native::vectorized_gather_kernel<16, long>", "permute"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("void at::native::split_with_sizes_copy_out_contiguous_no_cast_kernel", "copy"),
        ("void chunk_cat_cuda_kernel<float, c10::BFloat16>", "copy"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_1", "fused and pointwise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor>", "fused and pointwise"),
        ("aten::mm", "gemm"),
        ("fsdp::all_gather_copy_in", "copy"),
        ("aten::_grouped_mm", "grouped gemm"),
        ("aten::mul", "fused and pointwise"),
        ("a kernel of somebody else", "other"),
    ],
)
def test_kinds_of_real_names(name: str, expected: str) -> None:
    assert kind(name) == expected


TWO_STEPS = [
    KernelTime("nvjet_a", 0, 4000),
    KernelTime("ncclDevKernel_AllGather", 2000, 5000),  # 1000 of it alone
    KernelTime("nvjet_a", 6000, 9000),  # 1000 idle before it
    KernelTime("triton_poi_fused_add_0", 8500, 10000),
]


def test_a_profile_by_hand() -> None:
    parts = breakdown(TWO_STEPS, steps=2)
    assert parts["step_ms"] == 5.0
    assert parts["idle_ms"] == 0.5
    assert parts["exposed_communication_ms"] == 0.5
    assert parts["kinds_ms"] == {"gemm": 3.5, "communication": 1.5, "fused and pointwise": 0.75}
    assert list(parts["kinds_ms"]) == ["gemm", "communication", "fused and pointwise"]
    assert parts["top"][0] == {"name": "nvjet_a", "kind": "gemm", "ms": 3.5, "calls": 1.0}
    assert covered(TWO_STEPS[:2]) == 5000


def test_tables_for_a_record() -> None:
    lines = markdown(breakdown([*TWO_STEPS, KernelTime("x|" * 80, 9000, 9100)], steps=2)).splitlines()
    assert "| gemm | 3.50 | 70.0 % |" in lines
    assert "| of communication, exposed | 0.50 | 10.0 % |" in lines
    assert "| idle | 0.50 | 10.0 % |" in lines
    assert "| `nvjet_a` | gemm | 3.50 | 1 |" in lines
    assert all(line.count("|") in (0, 4, 5) for line in lines)
