"""A continuation of a prompt, one token at a time. The whole text is read again for each: for a glance, not for
serving.
"""

import torch

from src.train.setup import Training


def sample(training: Training, prompt: list[int], count: int, temperature: float, seed: int) -> list[int]:
    """Collective, with the same arguments on all ranks: `count` token ids after `prompt`; temperature 0 is greedy.

    Lengths are padded to what the layout can cut: attention is causal, so what stands behind a token changes nothing.
    """
    network, degrees = training.network, training.mesh.degrees
    multiple = 2 * degrees.context * degrees.tensor
    generator = torch.Generator().manual_seed(seed)  # on the CPU: equal draws on every rank
    tokens, most = list(prompt), network.parts[0].config.max_seq_len
    with network.inference():
        for _ in range(count):
            window = tokens[-most // multiple * multiple :]
            row = torch.tensor([window + [0] * (-len(window) % multiple)], device=training.ranks.device)
            logits = network.logits(row, len(window) - 1).float().cpu()
            tokens.append(_draw(logits, temperature, generator))
    return tokens[len(prompt) :]


def _draw(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
