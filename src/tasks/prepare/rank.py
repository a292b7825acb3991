"""What task=prepare does: its share of the pieces, and lines on how fast that goes."""

import json
import time
from dataclasses import asdict
from pathlib import Path

from src.data.prepare import PreparationStoppedError, prepare
from src.data.preparing.progress import ProgressLines, told_bytes
from src.run import Run
from src.storage.atomic_write import atomic_write
from src.tasks.prepare.config import PREPARE_FILE, Prepare
from src.train.stop import Stop


def prepare_data(task: Prepare, run: Run, folder: Path) -> bool:
    """Returns when every piece is done, by whomever; False soon after a signal. Writes prepare.json."""
    began = time.monotonic()
    lines = ProgressLines(lambda line: print(line, flush=True), task.log_seconds)
    with Stop() as stop:
        try:
            corpus = prepare(run.data, run.tokenizer, run.cache, progress=lines, stopped=lambda: stop.seen is not None)
        except PreparationStoppedError:
            print(f"stopped by {stop.seen}: pieces that are done stay, and the same command goes on", flush=True)
            return False
        notes = [] if task.pack_seq_len is None else corpus.notes(task.pack_seq_len)
        if task.pack_seq_len is not None:
            corpus.windows("validation", task.pack_seq_len)
    seconds = time.monotonic() - began
    facts = {
        "seconds": round(seconds, 3),
        "documents": corpus.preparation.documents,
        "tokens": corpus.preparation.tokens,
        "text_bytes": corpus.preparation.text_bytes,
        "tokenised_here_and_elsewhere": {name: asdict(each) for name, each in lines.sources.items()},
        "fingerprint": corpus.fingerprint,
        **({"commits": commits} if (commits := corpus.commits()) else {}),
    }
    atomic_write(folder / PREPARE_FILE, json.dumps(facts, indent=2) + "\n")
    print(*corpus.preparation.lines(), *notes, sep="\n", flush=True)
    shards = sum(each.shard_bytes for each in lines.sources.values())
    made = f"{told_bytes(shards)} of shards" if shards else "nothing was missing"
    print(f"ready in {seconds:.1f} s: {made} in {run.cache / 'tokens'}", flush=True)
    return True
