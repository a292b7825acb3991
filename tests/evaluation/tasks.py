"""Task files of each kind, and a model that answers by a rule."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ROWS: dict[str, list[dict[str, Any]]] = {
    "multiple_choice": [
        {"q": f"number {each}", "options": [f"is {each}", f"was never {each + 1}", "none"], "right": each % 3}
        for each in range(7)
    ],
    "loglikelihood": [{"q": f"after {each}", "then": f"comes {each + 1}"} for each in range(5)],
    "loglikelihood_rolling": [{"text": "one word " * (each + 1)} for each in range(4)],
    "generate_until": [{"q": f"say {'ABC'[each % 3]}", "then": "ABC"[each % 2]} for each in range(6)],
}
TEMPLATES: dict[str, dict[str, Any]] = {
    "multiple_choice": {"doc_to_text": "Q: {{q}}\nA:", "doc_to_choice": "options", "doc_to_target": "right"},
    "loglikelihood": {"doc_to_text": "{{q}}", "doc_to_target": "{{then}}"},
    "loglikelihood_rolling": {"doc_to_text": "", "doc_to_target": "{{text}}"},
    "generate_until": {"doc_to_text": "q", "doc_to_target": "then", "generation_kwargs": {"until": ["."]}},
}
AGGREGATIONS = {
    "multiple_choice": {"acc": "mean", "acc_norm": "mean", "acc_bytes": "mean"},
    "loglikelihood": {"perplexity": "perplexity", "acc": "mean"},
    "loglikelihood_rolling": {
        "word_perplexity": "weighted_perplexity",
        "byte_perplexity": "weighted_perplexity",
        "bits_per_byte": "bits_per_byte",
    },
    "generate_until": {"exact_match": "mean"},
}


def write_task(folder: Path, kind: str, **changes: Any) -> Path:
    """The file of a task with its rows beside it; None in `changes` leaves a key out."""
    rows = folder / f"{kind}.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
    metrics = [{"metric": name, "aggregation": how} for name, how in AGGREGATIONS[kind].items()]
    facts = {
        "task": f"my_{kind}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": kind,
        **TEMPLATES[kind],
        "metric_list": metrics,
        **changes,
    }
    file = folder / f"{kind}.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in facts.items() if value is not None}))
    return file


class Oracle:
    """Likelihoods by a checksum of the text; it remembers what it was asked."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        self.read += [context for context, _ in pairs]
        return [-0.01 * (zlib.crc32(f"{context}|{follows}".encode()) % 997) for context, follows in pairs]

    def greedy(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        return [zlib.crc32(follows.encode()) % 2 == 0 for _, follows in pairs]

    def whole(self, texts: Sequence[str]) -> list[float]:
        return [-0.7 * len(text) for text in texts]

    def written(self, prompts: Sequence[str], until: Sequence[str], most: int) -> list[str]:
        self.read += prompts
        return [prompt.rpartition(" ")[2] for prompt in prompts]
