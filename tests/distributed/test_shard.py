"""FSDP's options and the dtypes of a run: what they change, and that they change nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from src.distributed.collectives import world_sum
from src.distributed.fsdp.gradient_norm import Gradients
from src.distributed.init_weights import materialise
from src.distributed.precision.config import Precision
from src.optim.adamw import AdamW
from src.train.step.stepper import Stepper
from tests.distributed.layouts import FP32, degrees, parallel_network, rows, share
from tests.distributed.test_layouts import trained
from tests.models.shapes import tiny_llama
from tests.ranks import RankPool

BF16 = Precision(storage="float32", compute="bfloat16", reduce="float32", float8=None)
REDUCE16 = Precision(storage="float32", compute="bfloat16", reduce="bfloat16", float8=None)
FULL16 = Precision(storage="bfloat16", compute="bfloat16", reduce="float32", float8=None)


def adamw(**changes: Any) -> AdamW:
    values = {
        "lr": 1e-2,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "decay_norms_and_embeddings": True,
        "max_norm": 1.0,
        "moments": "float32",
        "fused": True,
    }
    return AdamW(**(values | changes))


def stepped(layout: str, precision: Precision, optim: AdamW) -> dict[str, Any]:
    """Three steps; dtypes of what stays, and of what was multiplied and added up over ranks."""
    config = tiny_llama()
    network = parallel_network(config, degrees(layout), precision)
    optimizer = optim.build(network.named_parameters(), torch.device("cpu"))
    stepper = Stepper(network, optimizer, max_norm=1.0, skips=0)
    seen: set[torch.dtype] = set()
    (model,) = network.stages
    for block in model.blocks():
        block.register_forward_hook(lambda *called: seen.add(called[-1][0].dtype))
    outcomes = [
        stepper(share(rows(8, 16, config.vocab_size, seed=step), network.mesh, 1), stop=False) for step in range(3)
    ]
    return {
        "losses": [outcome["loss"].item() for outcome in outcomes],
        "norms": [outcome["grad_norm"].item() for outcome in outcomes],
        "activations": seen,
        "parameters": {parameter.dtype for _, parameter in network.named_parameters()},
        "moments": {state["exp_avg"].dtype for state in optimizer.state.values()},
        "rotary": model.rotary.dtype,
    }


@pytest.fixture(scope="module")
def fp32(ranks: RankPool) -> dict[str, Any]:
    return ranks(2, stepped, "fsdp2", FP32, adamw())[0]


PLAIN_BF16 = adamw(fused=False, moments="bfloat16")


@pytest.mark.parametrize(
    ("precision", "optim", "storage", "moments"),
    [
        pytest.param(BF16, adamw(), torch.float32, torch.float32, id="bf16"),
        pytest.param(REDUCE16, adamw(), torch.float32, torch.float32, id="bf16_reduce16"),
        pytest.param(FULL16, PLAIN_BF16, torch.bfloat16, torch.bfloat16, id="bf16_full"),
        pytest.param(FULL16, adamw(fused=False), torch.bfloat16, torch.float32, id="bf16_full-wide-moments"),
    ],
)
def test_precision_is_what_it_says(
    ranks: RankPool,
    fp32: dict[str, Any],
    precision: Precision,
    optim: AdamW,
    storage: torch.dtype,
    moments: torch.dtype,
) -> None:
    """bfloat16 keeps 8 bits: a loss of 4.6 nats moves by less than 0.3 %, a gradient norm by less than 3 %."""
    assert fp32["activations"] == fp32["parameters"] == fp32["moments"] == {torch.float32}
    for result in ranks(2, stepped, "fsdp2", precision, optim):
        assert result["activations"] == {torch.bfloat16}
        assert result["parameters"] == {storage}
        assert result["moments"] == {moments}
        assert result["rotary"] == torch.float32
        assert result["losses"] == pytest.approx(fp32["losses"], rel=3e-3)
        assert result["norms"] == pytest.approx(fp32["norms"], rel=3e-2)
        assert result["losses"] != fp32["losses"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        pytest.param("fsdp2", {"cpu_offload": True}, id="offload"),
        pytest.param("tp2_fsdp2", {"cpu_offload": True}, id="offload-tp"),
        pytest.param("fsdp2", {"prefetch": 2}, id="prefetch"),
        pytest.param("fsdp2", {"prefetch": 8, "reshard": "always"}, id="prefetch-all"),
    ],
)
def test_options_change_no_number(ranks: RankPool, layout: str, changes: dict[str, Any]) -> None:
    plain, optioned = (
        ranks(degrees(layout).world, trained, layout, {"micro_batches": 1, "degrees": options}, {})[0]
        for options in ({}, changes)
    )
    assert optioned["losses"] == plain["losses"]
    assert optioned["norms"] == plain["norms"]
    for name, weight in plain["end"].items():
        assert torch.equal(optioned["end"][name], weight), name


def gathered_by_then(ahead: int) -> tuple[list[set[str]], list[set[str]]]:
    """Units whose weights were asked for when each block begins to work: forward, and backward."""
    config = tiny_llama()
    (model,) = parallel_network(config, degrees("fsdp2", prefetch=ahead)).stages
    asked: list[str] = []
    for name in ("tok_embeddings", *(f"layers.{layer}" for layer in model.layers), "norm"):
        _spy(model.get_submodule(name)._get_fsdp_state()._fsdp_param_group, name, asked)
    seen: list[set[str]] = []
    for block in model.blocks():
        block.attention_norm.register_forward_pre_hook(lambda *_: seen.append(set(asked)))
        block.feed_forward.w2.register_full_backward_pre_hook(lambda *_: seen.append(set(asked)))
    batch = rows(2, 16, config.vocab_size)
    loss = model(batch.tokens, labels=batch.labels)
    forward, seen[:], asked[:] = list(seen), [], []
    loss.backward()
    return forward, list(seen)


def _spy(group: Any, name: str, asked: list[str]) -> None:
    unshard: Callable[..., Any] = group.unshard

    def spied(*args: Any, **kwargs: Any) -> Any:
        asked.append(name)
        return unshard(*args, **kwargs)

    group.unshard = spied


def test_prefetch_gathers_ahead(ranks: RankPool) -> None:
    """FSDP itself asks for one block ahead in the backward, and in the forward for none: the host runs ahead there."""
    one, two = (ranks(2, gathered_by_then, ahead)[0] for ahead in (1, 2))
    embedding, first, second, third, head = "tok_embeddings", "layers.0", "layers.1", "layers.2", "norm"
    assert one[0] == [{embedding, first}, {embedding, first, second}, {embedding, first, second, third}]
    assert two[0] == [{embedding, first, second, third}, {embedding, first, second, third, head}, {*two[0][1]}]
    assert one[1] == [{head, third, second}, {head, third, second, first}, {*one[1][1], embedding}]
    assert two[1] == [{head, third, second, first}, {*two[1][0], embedding}, {*two[1][0], embedding}]


def test_offloaded_weights_rest_in_the_host() -> None:
    model = tiny_llama().build().to("meta")
    materialise(model, torch.device("cpu"), offload=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert torch.equal(model.rotary, tiny_llama().build().rotary)


def mixed() -> tuple[float, float, list[float], list[float]]:
    """Of parameters on four kinds of mesh, norm and gradients after clipping; then the same of the whole tensors."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    torch.manual_seed(0)
    given = [torch.randn(6, 4), torch.randn(5, 3), torch.randn(7), torch.randn(4, 6), torch.randn(3)]
    wholes = [tensor.clone() for tensor in given]
    placed = [
        distribute_tensor(given[0], grid, [Shard(0), Shard(1)]),
        distribute_tensor(given[1], grid, [Shard(0), Replicate()]),  # 5 rows on 2 ranks
        distribute_tensor(given[2], grid["shard"], [Shard(0)]),
        distribute_tensor(given[3], grid["tensor"], [Replicate()]),
        given[4],
    ]
    parameters = [nn.Parameter(torch.zeros_like(tensor)) for tensor in placed]
    for parameter, gradient in zip(parameters, placed, strict=True):
        parameter.grad = gradient
    gradients = Gradients(parameters, torch.distributed.get_world_size())
    norm = world_sum(gradients.squares()).sqrt()
    for shard in gradients.local():
        shard.div_(gradients.excess(norm, 1.0))
    plain = [nn.Parameter(torch.zeros_like(tensor)) for tensor in wholes]
    for parameter, gradient in zip(plain, wholes, strict=True):
        parameter.grad = gradient
    expected = torch.nn.utils.clip_grad_norm_(plain, 1.0)
    return norm.item(), expected.item(), _flat(parameters), _flat(plain)


def _flat(parameters: list[nn.Parameter]) -> list[float]:
    gradients = [parameter.grad for parameter in parameters]
    wholes = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in gradients]
    flat: Tensor = torch.cat([whole.flatten() for whole in wholes if whole is not None])
    values: list[float] = flat.tolist()
    return values


def test_one_norm_over_mixed_meshes(ranks: RankPool) -> None:
    for norm, expected, clipped, expected_clipped in ranks(4, mixed):
        assert norm == pytest.approx(expected, rel=1e-6)
        assert clipped == pytest.approx(expected_clipped, rel=1e-6)


@pytest.mark.gpu
def test_weights_rest_in_the_host_and_compute_on_the_gpu() -> None:
    """One rank; the same losses with and without."""
    import torch.distributed as dist

    from src.distributed.fsdp.shard import shard
    from src.distributed.init_weights import initialise
    from src.distributed.mesh import Mesh
    from src.distributed.model_stages import SingleStage

    torch.cuda.set_device(0)
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("cuda:nccl,cpu:gloo", store=store, rank=0, world_size=1)
    try:
        runs = []
        for offload in (False, True):
            layout, config = degrees("single", cpu_offload=offload), tiny_llama()
            mesh, model = Mesh(layout, "cuda"), config.build().to("meta")
            shard(model, mesh, BF16)
            materialise(model, torch.device("cuda"), offload=offload)
            initialise(model, 0)
            assert {parameter.device.type for parameter in model.parameters()} == {"cpu" if offload else "cuda"}
            optimizer = adamw().build(model.named_parameters(), torch.device("cuda"))
            stepper = Stepper(SingleStage([model], mesh, torch.device("cuda")), optimizer, max_norm=1.0, skips=0)
            runs.append([stepper([rows(4, 16, config.vocab_size)], stop=False)["loss"].item() for _ in range(3)])
        assert runs[0] == pytest.approx(runs[1], rel=1e-4)
    finally:
        dist.destroy_process_group()
