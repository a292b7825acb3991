"""float8 in the blocks: close to bfloat16 in every layout, names and checkpoints as before, applied or refused."""

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks.support_matrix import DENSE, measured
from src.distributed.fsdp.shard import shard
from src.distributed.init_weights import initialise, materialise
from src.distributed.mesh import Mesh
from src.distributed.precision.config import Precision
from src.distributed.precision.float8 import Float8
from src.distributed.tensor.tensor_parallel import split_tensor
from src.errors import PlanError
from src.metrics.throughput import peak_flops
from src.models.llama3.config import Llama3Config
from src.optim.state import optimizer_state
from src.train.step.stepper import Stepper
from tests.distributed.layouts import adamw, degrees, parallel_network, rows, share
from tests.models.shapes import tiny_llama
from tests.ranks import RankPool
from tests.train.runs import changed, section

STEPS = 2
RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]


def precision(recipe: str | None, *, gather: bool = False, exclude: tuple[str, ...] = ()) -> Precision:
    """bf16, or what conf/precision/fp8*.yaml say, emulated."""
    float8 = None
    if recipe is not None:
        float8 = Float8(recipe=recipe, exclude=exclude, experts=False, all_gather=gather, emulate=True)  # type: ignore[arg-type]
    return Precision(storage="float32", compute="bfloat16", reduce="float32", float8=float8)


def trained(layout: str, recipe: str | None, gather: bool) -> dict[str, Any]:
    config, chosen = tiny_llama(), precision(recipe, gather=gather)
    network = parallel_network(config, degrees(layout), chosen)
    (model,) = network.stages
    optimizer = adamw(model)
    after_update = [] if chosen.float8 is None else [lambda: chosen.float8.after_update(model)]
    stepper = Stepper(network, optimizer, max_norm=1.0, skips=0, after_update=after_update)
    outcomes = []
    for step in range(STEPS):
        batch = share(rows(8, 16, config.vocab_size, seed=step), network.mesh, micro_batches=1)
        outcomes.append(stepper(batch, stop=False))
    saved = network.tensors() | {
        f"{name}.{key}": value
        for name, state in optimizer_state(optimizer, network.named_parameters()).items()
        for key, value in state.items()
    }
    return {
        "losses": [outcome["loss"].item() for outcome in outcomes],
        "norms": [outcome["grad_norm"].item() for outcome in outcomes],
        "names": {name: tuple(tensor.shape) for name, tensor in saved.items()},
        "kinds": {(type(_local(tensor)).__name__, str(tensor.dtype)) for tensor in saved.values()},
        "converted": [name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"],
        "scales": [_scale(module) for module in model.modules() if type(module).__name__ == "Float8Linear"],
    }


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _scale(module: nn.Module) -> tuple[float, float]:
    """Of a weight, as computed after the last update; and as its largest value gives it. (0, 0) without."""
    held = module.weight._local_tensor if isinstance(module.weight, DTensor) else module.weight
    scale = getattr(held, "_precomputed_scale", None)
    if scale is None:
        return 0.0, 0.0
    whole = DTensor.from_local(held._tensor, module.weight.device_mesh, module.weight.placements).full_tensor()
    return scale.item(), 448.0 / whole.abs().max().item()


@pytest.mark.parametrize("schedule", ["ZBVZeroBubble", "DualPipeV", "InterleavedZeroBubble"])
def test_schedules_that_split_the_backward(ranks: RankPool, schedule: str) -> None:
    """They ask a float8 product for the gradient of its input first, and for that of its weight later."""
    overrides = ("parallel=pp2", f"parallel.pipeline_schedule={schedule}", "precision=fp8")
    cell = measured(ranks, (*overrides, *DENSE, "precision.float8.emulate=true"))
    if torch.__version__ < "2.13":
        assert "needs torch 2.13" in cell["refused"][0], cell
        return
    assert cell["loss"] < 1e-4, cell
    assert cell["gradient"] < 0.01, cell


@pytest.fixture(scope="module")
def bf16(ranks: RankPool) -> dict[str, Any]:
    return ranks(1, trained, "single", None, False)[0]


@pytest.mark.parametrize(
    ("layout", "recipe", "gather"),
    [
        *(("single", recipe, False) for recipe in RECIPES),
        ("fsdp2", "tensorwise", False),
        ("fsdp2", "tensorwise", True),
        ("fsdp2", "rowwise_with_gw_hp", False),
        ("tp2", "tensorwise", False),
        ("tp2", "rowwise", False),
        pytest.param("tp2_fsdp2", "tensorwise", True, marks=pytest.mark.slow),
        pytest.param("tp2_fsdp2", "rowwise", False, marks=pytest.mark.slow),
    ],
)
def test_losses_are_close_to_those_of_bfloat16(
    ranks: RankPool, bf16: dict[str, Any], layout: str, recipe: str, gather: bool
) -> None:
    """e4m3 keeps 4 bits: a matrix product is off by about 2 %, the loss of a fresh model by far less."""
    for result in ranks(degrees(layout).world, trained, layout, recipe, gather):
        assert len(result["converted"]) == 3 * 7
        assert result["losses"] == pytest.approx(bf16["losses"], rel=3e-3)
        assert result["norms"] == pytest.approx(bf16["norms"], rel=0.1)
        assert result["losses"] != bf16["losses"]  # it did something
        # What a checkpoint holds: the same names and shapes, wide, and no class of another library.
        assert result["names"] == bf16["names"]
        assert result["kinds"] == {("Tensor", "torch.float32")}
        for scale, expected in result["scales"]:
            assert (scale > 0) == gather
            assert scale == pytest.approx(expected, rel=1e-6)


def loaded_and_updated() -> bool:
    """What a load writes into the state's tensors is in the weights; our own optimizer updates them too."""
    network = parallel_network(tiny_llama(), degrees("tp2_fsdp2"), precision("tensorwise", gather=True))
    (model,) = network.stages
    for tensor in network.tensors().values():
        _local(tensor).fill_(0.25)
    weights = [_local(parameter) for parameter in model.parameters()]
    loaded = all(bool((getattr(weight, "_tensor", weight) == 0.25).all()) for weight in weights)
    config = changed(section("optim", "adamw_bf16"), lr=1.0, weight_decay=0.0)
    optimizer = config.build(model.named_parameters(), torch.device("cpu"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    updated = all(torch.allclose(_local(tensor), torch.tensor(-0.75)) for tensor in network.tensors().values())
    return loaded and updated


def test_the_state_is_the_weights(ranks: RankPool) -> None:
    assert all(ranks(4, loaded_and_updated))


def exchanged(layout: str) -> list[float]:
    """Losses where tensor parallel ranks send each other float8; gloo has bytes alone, so they travel as bytes."""
    from torchao.float8.float8_ops import FLOAT8_OPS_TABLE
    from torchao.float8.float8_training_tensor import Float8TrainingTensor

    sent: list[torch.dtype] = []

    def gather(operator: Any, args: Any, kwargs: Any = None) -> Float8TrainingTensor:
        x = args[0]
        sent.append(x._data.dtype)
        data = operator(x._data.contiguous().view(torch.uint8), *args[1:], **(kwargs or {})).view(x._data.dtype)
        return Float8TrainingTensor(data, x._scale, x._orig_dtype, x._linear_mm_config, x._gemm_input_role)

    operator = torch.ops._c10d_functional.all_gather_into_tensor.default
    before, FLOAT8_OPS_TABLE[operator] = FLOAT8_OPS_TABLE[operator], gather
    try:
        losses = _losses_by_hand(layout, exchange=True)
    finally:
        FLOAT8_OPS_TABLE[operator] = before
    # Of each block: the inputs of attention and feed forward, and in the backward the gradients of wo and w2.
    assert len(sent) == STEPS * 3 * 4
    assert set(sent) == {torch.float8_e4m3fn, torch.float8_e5m2}
    assert losses == _losses_by_hand(layout, exchange=False)
    return losses


def _losses_by_hand(layout: str, *, exchange: bool) -> list[float]:
    config, chosen = tiny_llama(), precision("tensorwise")
    model, mesh = config.build().to("meta"), Mesh(degrees(layout), "cpu")
    assert chosen.float8 is not None
    chosen.float8.convert(model, mesh.degrees.tensor, "cpu")
    split_tensor(model, mesh.tensor, float8=exchange)
    shard(model, mesh, chosen)
    materialise(model, torch.device("cpu"))
    initialise(model, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for step in range(STEPS):
        (batch,) = share(rows(4, 16, config.vocab_size, seed=step), mesh, micro_batches=1)
        loss = model(batch.tokens, labels=batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("layout", ["tp2", pytest.param("tp2_fsdp2", marks=pytest.mark.slow)])
def test_ranks_may_send_float8(ranks: RankPool, layout: str) -> None:
    """Casting before the gather or after it is the same number."""
    ranks(degrees(layout).world, exchanged, layout)


def problems(
    float8: Float8, layout: str = "fsdp2", *, compiled: bool = False, gpu: bool = True, **changes: Any
) -> list[str]:
    return float8.problems(tiny_llama().weights(), degrees(layout, **changes), compiled=compiled, gpu=gpu)


def config(**changes: Any) -> Float8:
    return Float8(
        **({"recipe": "tensorwise", "exclude": (), "experts": False, "all_gather": False, "emulate": False} | changes)
    )


MATRICES = (
    "layers.*.attention.wk, layers.*.attention.wo, layers.*.attention.wq, layers.*.attention.wv, "
    "layers.*.feed_forward.w1, layers.*.feed_forward.w2, layers.*.feed_forward.w3"
)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (problems(config()), []),
        (problems(config(emulate=True), gpu=False), []),
        (problems(config(exclude=("wo", "attention.wq", "layers.1", "feed_forward"))), []),
        *(
            (
                problems(config(exclude=(entry,))),
                [f"precision.float8.exclude: no matrix of a block has {entry} in its name; there are {MATRICES}"],
            )
            for entry in ("output", "layers.3", "w", "attention.w1")
        ),
        (
            problems(config(all_gather=True), "tp2"),
            [
                "precision.float8.all_gather=true gathers nothing: parallel.shard=1; "
                "pass precision.float8.all_gather=false, or a layout with shards"
            ],
        ),
        (problems(config(all_gather=True), "fsdp4"), []),
        (
            problems(config(all_gather=True), shard=3),  # 64 rows of wq, 32 of wk, 192 of w1
            [
                "precision.float8.all_gather=true sends shards of equal size, and parallel.shard=3 does not divide the "
                "rows of layers.*.attention.wk, layers.*.attention.wo, layers.*.attention.wq, layers.*.attention.wv, "
                "layers.*.feed_forward.w2 (1, 2, 4, 8, 16 or 32 do); or pass precision.float8.all_gather=false"
            ],
        ),
        (
            problems(config(all_gather=True), "tp2_cp2", shard=6),  # wq and w1 cut by tensor ranks, wo and w2 whole
            [
                "precision.float8.all_gather=true sends shards of equal size, and parallel.shard=6 * "
                "parallel.context=2 does not divide the rows of layers.*.attention.wk, layers.*.attention.wo, "
                "layers.*.attention.wq, layers.*.attention.wv, layers.*.feed_forward.w2 (1, 2, 4, 8 or 16 do); "
                "or pass precision.float8.all_gather=false"
            ],
        ),
        (
            problems(config(emulate=True), compiled=True),
            ["precision.float8.emulate=true is eager only; pass compile=off"],
        ),
        (
            problems(config(), gpu=False),
            ["precision.float8: the CPU has no float8 products; pass precision.float8.emulate=true, or precision=bf16"],
        ),
        (
            problems(config(), "tp8"),  # 64 / 8 columns
            ["precision.float8: no matrix is left to convert; each side must be a multiple of 16 on a rank"],
        ),
    ],
)
def test_refused_with_a_reason(found: list[str], said: list[str]) -> None:
    assert found == said


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_tokens_must_be_a_multiple_of_is_what_kernels_ask(recipe: str) -> None:
    """torch checks the shapes of a GPU's product on the meta device, in the backward pass too."""
    multiple = config(recipe=recipe).token_multiple
    with torch.device("meta"):
        model = tiny_llama(n_layers=1).build().bfloat16()
        with patch("src.distributed.precision.float8._require"):
            config(recipe=recipe).convert(model, 1, "meta")
        for tokens in (8, 16, 24, 32):
            x = torch.randn(1, tokens, model.config.dim, dtype=torch.bfloat16, requires_grad=True)
            ok = tokens % multiple == 0
            with nullcontext() if ok else pytest.raises(RuntimeError, match="divisible by 16"):
                model.layers["0"].feed_forward(x).sum().backward()


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.distributed.precision.float8.find_spec", {}.get)
    assert problems(config()) == [
        "precision.float8 needs the package torchao; pip install torchao==0.17.0, or precision=bf16"
    ]


def test_the_torch_that_cannot_split_a_float8_backward_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.distributed.precision.float8.version", {"torch": "2.11.0+cu130"}.get)
    assert problems(config(), "pp2") == []
    assert problems(config(), "pp2", pipeline_schedule="DualPipeV") == [
        "precision.float8 with parallel.pipeline_schedule=DualPipeV needs torch 2.13, and this is 2.11.0+cu130; "
        "pass precision=bf16 or parallel.pipeline_schedule=Interleaved1F1B"
    ]
    monkeypatch.setattr("src.distributed.precision.float8.version", {"torch": "2.13.0"}.get)
    assert problems(config(), "pp2", pipeline_schedule="DualPipeV") == []


def test_odd_matrices_stay_wide_and_are_named() -> None:
    """24 features a kv head, 96 kv features in all: on two ranks 48, on four 24."""
    shape = {"n_heads": 8, "n_kv_heads": 4, "head_dim": 24}
    odd = tiny_llama(**shape)
    assert config().left_out(odd.weights(), 2) == []
    assert config().left_out(odd.weights(), 4) == [
        "precision.float8 leaves layers.*.attention.wk as it is: 24 x 64 on a rank, not multiples of 16",
        "precision.float8 leaves layers.*.attention.wv as it is: 24 x 64 on a rank, not multiples of 16",
    ]
    model = odd.build()
    config(exclude=("layers.0", "w2"), emulate=True).convert(model, 4, "cpu")
    assert _kinds(model) == {"attention.wq", "attention.wo", "feed_forward.w1", "feed_forward.w3"}


def _kinds(model: nn.Module) -> set[str]:
    names = [name.split(".", 2) for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"]
    assert {layer for _, layer, _ in names} == {"1", "2"}
    return {kind for _, _, kind in names}


def test_a_router_is_no_matrix_of_float8() -> None:
    class Gate:
        name, shape, tensor_dim = "layers.1.moe.router.gate.weight", (64, 64), None

    assert config().left_out([Gate], 1) == []
    found = config(exclude=("router",)).problems([Gate], degrees("fsdp2"), compiled=False, gpu=True)
    assert found == ["precision.float8.exclude: no matrix of a block has router in its name; there are "]


def test_only_blocks_are_converted_and_names_stay() -> None:
    plain_model, model = tiny_llama().build(), tiny_llama().build()
    config(emulate=True).convert(model, 1, "cpu")
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain_model.named_parameters()]
    assert model.output is not None
    assert type(model.output) is type(plain_model.output)


def test_a_cpu_is_refused_by_the_rank_too() -> None:
    with pytest.raises(PlanError, match="the CPU has no float8 products"):
        config().convert(tiny_llama().build(), 1, "cpu")


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(ValidationError, match="all_gather=true with recipe=rowwise; only recipe=tensorwise"):
        config(recipe="rowwise", all_gather=True)
    with pytest.raises(ValidationError, match="compute=float32 with float8; its kernels make compute=bfloat16"):
        Precision(storage="float32", compute="float32", reduce="float32", float8=config())


def test_an_mfu_says_that_the_work_was_float8() -> None:
    peak = peak_flops("NVIDIA H200", precision("rowwise").arithmetic)
    assert peak is not None
    assert peak.label == "float8 rowwise work against 989 TFLOP/s bfloat16 dense, NVIDIA H200"
    assert precision(None).arithmetic == "bfloat16"


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_kernels_are_close_to_their_emulation(recipe: str) -> None:
    def result(emulate: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        model = Llama3Config(**(dict(tiny_llama()) | {"dim": 256, "n_layers": 1, "multiple_of": 256})).build()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.05)
        config(recipe=recipe, emulate=emulate).convert(model, 1, "cuda")
        block = model.layers["0"].to("cuda", torch.bfloat16)
        x = torch.randn(2, 96, 256, device="cuda", dtype=torch.bfloat16)
        y, _ = block(x, model.rotary.cuda(), None)
        y.float().square().mean().backward()
        return y.float(), block.feed_forward.w2.weight.grad.float()

    for real, imitated in zip(result(emulate=False), result(emulate=True), strict=True):
        assert (real - imitated).norm() < 0.02 * imitated.norm()
