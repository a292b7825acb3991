"""Multi-token prediction against equations 21 to 25 of arXiv 2412.19437, written once more in plain torch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.models.accounting import Slice
from src.models.cross_entropy import IGNORED
from src.models.deepseek_v3.config import DeepseekV3Config
from src.models.mtp.config import MultiTokenPrediction, saved_outside
from src.models.mtp.module import look_ahead
from src.planning.plan import plan
from tests.models.shapes import NO_MTP, randomised, tiny_deepseek
from tests.models.test_accounting import kept_bytes
from tests.models.test_family_contract import FusedNorm
from tests.train.runs import changed, make_run, section

Weights = dict[str, Tensor]
DEPTHS, HEADS, NOPE, ROPE, VALUE, LATENT, TOP_K = 2, 4, 8, 8, 16, 24, 3
MOE = {"score_func": "sigmoid", "route_norm": True, "route_scale": 2.5, "num_shared_experts": 1}


def predicting(depths: int = DEPTHS, **changes: Any) -> DeepseekV3Config:
    return tiny_deepseek(mtp=NO_MTP | {"depths": depths}, moe=MOE, **changes)


def sample() -> tuple[Tensor, Tensor]:
    """Two rows of twelve tokens: one with the border of a document, one whose last labels do not count."""
    window = torch.randint(96, (2, 13), generator=torch.Generator().manual_seed(1))
    tokens, labels = window[:, :-1].clone(), window[:, 1:].clone()
    labels[0, 4] = IGNORED
    labels[1, 9:] = IGNORED
    return tokens, labels


# ---- the equations, a row at a time


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x: Tensor) -> Tensor:
    """x (length, width): neighbours are a complex number, turned by position * base^(-2i / width)."""
    length, width = x.shape
    angles = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(0, width, 2) / width))
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def attention(x: Tensor, w: Weights) -> Tensor:
    down = x @ w["attention.wkv_a.weight"].T
    key_position = turned(down[:, LATENT:])
    up = rms(down[:, :LATENT], w["attention.kv_norm.weight"]) @ w["attention.wkv_b.weight"].T
    queries, heads = x @ w["attention.wq.weight"].T, []
    for head in range(HEADS):
        query, keys_values = queries.chunk(HEADS, -1)[head], up.chunk(HEADS, -1)[head]
        query = torch.cat([query[:, :NOPE], turned(query[:, NOPE:])], -1)
        key = torch.cat([keys_values[:, :NOPE], key_position], -1)
        scores = query @ key.T / (NOPE + ROPE) ** 0.5
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        heads.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ keys_values[:, NOPE:])
    return torch.cat(heads, -1) @ w["attention.wo.weight"].T


def swiglu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    gate = x @ w1.T
    return (gate * gate.sigmoid() * (x @ w3.T)) @ w2.T


def experts(x: Tensor, w: Weights) -> Tensor:
    scores, rows = (x @ w["moe.router.gate.weight"].T).sigmoid(), []
    for token, row in zip(x, scores, strict=True):
        best = row.topk(TOP_K).indices
        share = 2.5 * row[best] / row[best].sum()
        results = [swiglu(token, *(w[f"moe.experts.{name}"][e] for name in ("w1", "w2", "w3"))) for e in best]
        rows.append((share.unsqueeze(-1) * torch.stack(results)).sum(0))
    return torch.stack(rows) + swiglu(x, *(w[f"moe.shared_experts.{name}.weight"] for name in ("w1", "w2", "w3")))


def block(x: Tensor, weights: Weights, name: str) -> Tensor:
    w = {key.removeprefix(f"{name}."): each for key, each in weights.items() if key.startswith(f"{name}.")}
    x = x + attention(rms(x, w["attention_norm.weight"]), w)
    normed = rms(x, w["ffn_norm.weight"])
    if "moe.experts.w1" in w:
        return x + experts(normed, w)
    return x + swiglu(normed, *(w[f"feed_forward.{matrix}.weight"] for matrix in ("w1", "w2", "w3")))


def losses(weights: Weights, tokens: Tensor, labels: Tensor, layers: int) -> list[Tensor]:
    """The main loss of a row and that of each depth, summed. `tokens` are t_1 to t_T, and label i is t_(i+1)."""
    embedding, head, length = weights["tok_embeddings.weight"], weights["output.weight"], len(tokens)
    hidden = embedding[tokens]
    for layer in range(layers):
        hidden = block(hidden, weights, f"layers.{layer}")
    found = [nats(rms(hidden, weights["norm.weight"]) @ head.T, labels, 0)]
    for k in range(1, DEPTHS + 1):
        w = {name: weights[f"mtp.{k - 1}.{name}.weight"] for name in ("embedding_norm", "hidden_norm", "norm")}
        by_embedding, by_state = weights[f"mtp.{k - 1}.projection.weight"].chunk(2, -1)
        m = torch.cat([by_state, by_embedding], -1)  # M_k, as the paper orders its columns
        state, ahead = rms(hidden[: length - k], w["hidden_norm"]), rms(embedding[tokens[k:]], w["embedding_norm"])
        hidden = block(torch.cat([state, ahead], -1) @ m.T, weights, f"mtp.{k - 1}.block")
        found.append(nats(rms(hidden, w["norm"]) @ head.T, labels, k))
    return found


def nats(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Of the tokens k behind the next ones; a position counts whose labels up to that one all do."""
    total = logits.new_zeros(())
    for place, row in enumerate(logits):
        if (labels[place : place + k + 1] != IGNORED).all():
            total = total - row.log_softmax(-1)[labels[place + k]]
    return total


# ---- and the model


@pytest.fixture(scope="module")
def both() -> tuple[nn.Module, Weights, list[Tensor]]:
    """A model after a backward, and the reference's gradients and losses."""
    model, (tokens, labels) = randomised(predicting()), sample()
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    rows = [losses(weights, *row, layers=3) for row in zip(tokens, labels, strict=True)]
    main, *further = (torch.stack(parts).sum() for parts in zip(*rows, strict=True))
    (main + 0.3 / DEPTHS * torch.stack(further).sum()).backward()
    model(tokens, labels, ahead=model.look_ahead(tokens, labels)).backward()
    return model, weights, [main, *further]


def test_losses_are_those_of_the_equations(both: tuple[nn.Module, Weights, list[Tensor]]) -> None:
    model, _, (main, *further) = both
    tokens, labels = sample()
    model.mtp.nats.zero_()
    loss = model(tokens, labels, ahead=model.look_ahead(tokens, labels))
    assert loss.item() == model(tokens, labels).item(), "what is reported is the main loss"
    assert loss.item() == pytest.approx(main.item(), rel=1e-5)
    assert model.mtp.nats.item() == pytest.approx(torch.stack(further).mean().item(), rel=1e-5)


def test_gradients_are_those_of_the_equations(both: tuple[nn.Module, Weights, list[Tensor]]) -> None:
    model, weights, _ = both
    for name, parameter in model.named_parameters():
        expected = weights[name].grad
        scale = expected.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=2e-5 * scale, msg=name)


def test_what_a_depth_reads_and_predicts() -> None:
    """Of two documents 1 2 3 and 4 5 6, where a border's label does not count; 0 stands for what nobody looks at."""
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    labels = torch.tensor([[2, 3, IGNORED, 5, 6]])
    ahead = look_ahead(tokens, labels, 2)
    assert ahead.tokens.tolist() == [[2, 3, 4, 5, 0], [3, 4, 5, 0, 0]]
    none = IGNORED
    assert ahead.labels.tolist() == [[3, none, none, 6, none], [none] * 5]


def test_validation_and_sampling_use_the_main_head_alone() -> None:
    model, (tokens, labels) = randomised(predicting()).eval(), sample()
    assert model.look_ahead(tokens, labels) is None
    plain = randomised(predicting(depths=0)).eval()
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if not name.startswith("mtp.")})
    assert torch.equal(model(tokens), plain(tokens))
    assert model.mtp.nats.item() == 0


def test_the_weight_follows_the_steps() -> None:
    config = MultiTokenPrediction(depths=1, weight=0.3, later_weight=0.1, later_from=0.676)
    assert [config.weight_at(step, 1000) for step in (0, 675, 676, 999)] == [0.3, 0.3, 0.1, 0.1]
    assert changed(config, later_from=1.0).weight_at(999, 1000) == 0.3
    model = randomised(predicting(depths=1))
    model.before_step(9, 10)
    assert model.mtp.weight.item() == pytest.approx(0.1)


@pytest.mark.parametrize("depths", [0, 1, 2])
def test_every_parameter_is_counted(depths: int) -> None:
    config = predicting(depths)
    built = {name: tuple(parameter.shape) for name, parameter in config.build().named_parameters()}
    assert {weight.name: weight.shape for weight in config.weights()} == built
    assert set(config.build().initializers()) == set(built)
    assert config.without_role() == []


def test_the_published_count() -> None:
    """README_WEIGHTS of the release: 11.5 B parameters, which are those of the block; and the projection of 0.1 B."""
    main = section("model", "deepseek_v3_671b")
    more = changed(main, mtp=changed(main.mtp, depths=1))
    counts, before = more.counts(4096), main.counts(4096)
    outside = 2 * main.dim**2 + 3 * main.dim
    assert round((counts.parameters - before.parameters - outside) / 1e9, 1) == 11.5
    head, attention = main.vocab_size * main.dim, 6 * 4096 * main.n_heads * sum(main.head_widths)
    added = counts.active - before.active
    assert counts.flops_per_token - before.flops_per_token == 6 * (added + head) + attention


def test_a_module_keeps_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of its block, with norms that keep what a GPU's kernel keeps."""
    monkeypatch.setattr(nn.RMSNorm, "forward", lambda norm, x: FusedNorm.apply(x, norm.weight, norm.eps))
    model = randomised(predicting(depths=1)).bfloat16()
    module, cut = model.mtp[0], Slice(tokens=2 * 96, tensor=1, element_bytes=2, compiled=False)
    monkeypatch.setattr(module.block, "forward", lambda x, _rotary, _mask: (x, None))
    hidden, embedding = (torch.randn(2, 96, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    kept = kept_bytes(module, hidden, model.rotary, lambda x, *more: module(x, embedding, *more)[1])
    assert kept == saved_outside(64, cut)


def test_the_plan_counts_it_where_the_head_is() -> None:
    with_it, without = (plan(make_run({"seq_len": 64}, model=predicting(depths), parallel="pp2")) for depths in (2, 0))
    own = sum(weight.elements for weight in predicting().weights() if weight.name.startswith("mtp."))
    assert [now - before for now, before in zip(with_it.stages, without.stages, strict=True)] == [0, own]
    assert with_it.parameters == without.parameters + own
    assert with_it.memory.activations > without.memory.activations
    assert with_it.memory.loss > without.memory.loss
