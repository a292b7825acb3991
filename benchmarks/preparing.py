"""Memory and speed of tokenising, by amount of text: one process, which is what each worker of a preparation is.

    python -m benchmarks.preparing [--gigabytes 0.3 1 10] [--tokenizer bytes|bpe] [--record benchmarks/records/x.json]

The text is made in a temporary folder (TMPDIR) that takes three times its bytes, and is removed: files of 100 MB of
JSON lines, documents of 20 words to 4,000. `peak_mib` is the largest resident memory of the process (VmHWM), with
the interpreter and its libraries. BPE is trained first, by a process of its own, on a part of the text
(conf/tokenizer/bpe.yaml); its sizes want to be smaller. The record has a line for each size.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from src.storage.atomic_write import atomic_write

ROOT = Path(__file__).resolve().parent.parent
FILE_BYTES = 100_000_000


def write_text(folder: Path, size: int) -> int:
    """About so many bytes of JSON lines; how many they are. Each file is the same rows from another one on."""
    chance = random.Random(0)
    words = ["".join(chance.choices("etaoinshrdlucmfwyp", k=chance.randint(1, 11))) for _ in range(20_000)]
    rows = list[str]()
    while sum(map(len, rows)) < min(size, FILE_BYTES):
        count = round(20 * 200 ** chance.random())
        rows += [json.dumps({"text": " ".join(chance.choices(words, k=count))}) + "\n" for _ in range(100)]
    written = 0
    while written < size:
        first = chance.randrange(len(rows))
        text = "".join(rows[first:] + rows[:first])[: min(FILE_BYTES, size - written)]
        whole = text[: text.rindex("\n") + 1]
        (folder / f"part_{written // FILE_BYTES:05d}.jsonl").write_text(whole)
        written += len(text)
    return sum(path.stat().st_size for path in folder.iterdir())


def measure(folder: Path, tokenizer: str, *, train: bool) -> dict[str, float]:
    """In this process: tokenise the text of a folder, or only train the tokenizer on it."""
    from src.config.presets import section_of
    from src.data.prepare import prepare
    from src.data.tokenizer import Bpe, Bytes
    from tests.data.corpora import text

    data = text(folder / "text", validation_fraction=0.01)
    facts = {key: value for key, value in section_of("tokenizer", "bpe").items() if key != "_target_"}
    options = Bytes() if tokenizer == "bytes" else Bpe.model_validate(facts)
    began, spent = time.monotonic(), time.process_time()
    found = dict[str, float]()
    if train:
        options.open(folder / "cache", data)
    else:
        made = prepare(data, options, folder / "cache", progress=False).preparation
        found = {"text_bytes": made.text_bytes, "tokens": made.tokens, "documents": made.documents}
    return found | {
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - spent,
        "peak_mib": peak_mib(),
    }


def peak_mib() -> float:
    """Of this process. getrusage would count what the process that started it held when it did."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "Linux"
    return int(found[1]) / 1024


def row(gigabytes: float, tokenizer: str) -> dict[str, object]:
    """One size, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="preparing_") as name:
        folder = Path(name)
        (folder / "text").mkdir()
        size = write_text(folder / "text", round(gigabytes * 1e9))
        trained = {} if tokenizer == "bytes" else _measured(name, tokenizer, "--train")
        facts = _measured(name, tokenizer)
    speed = {"megabytes_per_second": round(facts["text_bytes"] / 1e6 / facts["seconds"], 1)}
    training = {f"training_{key}": value for key, value in trained.items()}
    rounded = {key: round(value, 1) for key, value in (facts | training).items()}
    return {"tokenizer": tokenizer, "file_bytes": size} | speed | rounded


def _measured(folder: str, *words: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.preparing", "--measure", folder, "--tokenizer", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    facts: dict[str, float] = json.loads(done.stdout)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.3, 1.0, 10.0], help="sizes of text")
    parser.add_argument("--tokenizer", choices=["bytes", "bpe"], default="bytes", help="what it becomes")
    parser.add_argument("--record", type=Path, help="file to which the rows are added")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not None:
        print(json.dumps(measure(given.measure, given.tokenizer, train=given.train)))
        return
    for size in given.gigabytes:
        found = row(size, given.tokenizer)
        print(json.dumps(found), flush=True)
        if given.record is not None:
            before = json.loads(given.record.read_text()) if given.record.exists() else []
            atomic_write(given.record, json.dumps([*before, found], indent=1) + "\n")


if __name__ == "__main__":
    main()
