"""Next token from logits: temperature, top-k and top-p."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy. Else the `top_k` likeliest tokens, and of these the smallest set with probability
    `top_p`. None: no such limit.
    """

    temperature: float
    top_k: int | None = None
    top_p: float | None = None


def sample(logits: Tensor, rule: SamplingParams, uniforms: Tensor) -> Tensor:
    """logits (rows, vocabulary), uniforms (rows) in [0, 1) -> ids (rows).

    By the inverse of the cumulated probabilities, in float64 and from the likeliest token down: a uniform number picks
    the same token wherever the logits are the same to their last digits.
    """
    if rule.temperature == 0:
        return logits.argmax(-1)
    ranked, ids = (logits.double() / rule.temperature).sort(dim=-1, descending=True, stable=True)
    if rule.top_k is not None:
        ranked, ids = ranked[:, : rule.top_k], ids[:, : rule.top_k]
    probability = ranked.softmax(-1)
    mass = probability.cumsum(-1)
    if rule.top_p is not None:
        probability = probability * (mass - probability < rule.top_p)  # what stands before a token does not hold it yet
        mass = probability.cumsum(-1)
    places = (mass <= uniforms.unsqueeze(-1) * mass[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(-1, places).squeeze(-1)
