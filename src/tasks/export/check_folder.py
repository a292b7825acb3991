"""Compares logits of an exported folder in transformers with ours, on the CPU, in a process of low priority.

python -m src.tasks.export.check_folder <folder> <class of the model's config> <its keys as JSON>
"""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from src.data.tokenizer_files import read_codec
from src.errors import CheckpointError
from src.hugging_face.load import load
from src.models.base import ModelConfig
from src.models.hugging_face import stored
from src.tasks.export.self_check import Finding, Logits, compare, obstacle, places_of

TEXT = "The first rays of the sun fell on the old harbour, where the fishermen were already mending their nets."
LEAST_PRIORITY = 19


def check_apart(folder: Path, model: ModelConfig) -> list[str]:
    """Run `check` in a subprocess, on one rank. Returns its report; CheckpointError when the folder must not be
    used.
    """
    kind = f"{type(model).__module__}:{type(model).__name__}"
    command = [sys.executable, "-m", "src.tasks.export.check_folder", str(folder), kind, model.model_dump_json()]
    told = subprocess.run(command, capture_output=True, text=True)
    if told.returncode != 0:
        raise CheckpointError(f"{folder}: cannot be checked: {told.stderr.strip().rpartition(chr(10))[2]}")
    finding = Finding(**json.loads(told.stdout.splitlines()[-1]))
    if finding.problems:
        raise CheckpointError(finding.problems)
    return finding.lines


def check(folder: Path, model: ModelConfig) -> Finding:
    """Compare both models, one after the other, so that the host holds one at a time."""
    if (why_not := obstacle(folder)) is not None:
        return Finding([f"not compared: {why_not}"])
    finding = Finding()
    ids = read_codec(folder).encode([TEXT])[0].tolist()[: model.max_seq_len]
    compare(folder, TEXT, ids, _native(folder, model, ids), "float32", finding, gpu=False)
    return finding


def _native(folder: Path, model: ModelConfig, ids: list[int]) -> Logits:
    module, names = model.build().eval(), {each.name for each in stored(model)}
    load(folder, {name: tensor for name, tensor in module.state_dict().items() if name in names}, model)
    with torch.no_grad():
        logits = module(torch.tensor([ids]))[0]
    return {place: logits[place] for place in places_of(ids)}


def main() -> None:
    folder, kind, keys = sys.argv[1:]
    os.nice(LEAST_PRIORITY)
    module, _, name = kind.partition(":")
    model = getattr(importlib.import_module(module), name)(**json.loads(keys))
    plain = model.model_copy(update={"attention": "sdpa", "mask": "causal"})
    print(json.dumps(asdict(check(Path(folder), plain))))


if __name__ == "__main__":
    main()
