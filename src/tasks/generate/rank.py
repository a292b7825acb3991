"""What each rank of task=generate does: build the layout, fill it, go on from every prompt."""

import json
from pathlib import Path

from rich.console import Console
from rich.text import Text

from src.checkpoint.config import FOREIGN
from src.distributed.mesh import Mesh
from src.hugging_face.origin import ends_of, origin_of
from src.run import Run
from src.storage.atomic_write import atomic_write
from src.tasks.generate.config import Generate
from src.tasks.generate.decoding import generate
from src.tasks.generate.sampling import SamplingParams
from src.tasks.source import load
from src.train.setup import build_uninitialized, join_ranks

TEXTS_FILE = "generated.jsonl"


def write(task: Generate, run: Run, folder: Path) -> bool:
    """Continue every prompt and write the texts. Collective. Always True: a task that was stopped is started again."""
    ranks = join_ranks(run, folder)
    run = task.computed(run)
    network = build_uninitialized(run, ranks, Mesh(run.parallel, ranks.device.type))
    origin = load(task, run, network, folder, rounds=True)
    tokenizer, texts = run.tokenizer.open(run.cache, run.data), task.texts()
    written = generate(
        network,
        [tokenizer.prompt(text) for text in texts],
        count=task.max_tokens,
        rule=SamplingParams(task.temperature, task.top_k, task.top_p),
        seed=run.seed,
        ends=ends_of(tokenizer, origin_of(folder if task.source.startswith(FOREIGN) else Path(task.source))),
        batch=task.batch,
    )
    if ranks.rank == 0:
        answers = [tokenizer.decode(ids) for ids in written]
        lines = (
            {"prompt": text, "text": answer, "tokens": len(ids), "ended": len(ids) < task.max_tokens}
            for text, answer, ids in zip(texts, answers, written, strict=True)
        )
        atomic_write(folder / TEXTS_FILE, "".join(json.dumps(line) + "\n" for line in lines))
        _tell(origin, list(zip(texts, answers, strict=True)), folder)
    ranks.leave()
    return True


def _tell(origin: Path, texts: list[tuple[str, str]], folder: Path) -> None:
    """Prompts in bold, where there is a terminal; a blank line between two texts."""
    terminal = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    terminal.print(f"weights: {origin}")
    for prompt, text in texts:
        terminal.print(Text.assemble("\n", (prompt, "bold"), text))
    terminal.print(f"\ntexts: {folder / TEXTS_FILE}")
