"""Shards hold exactly the documents, are made once, survive a kill, and vouch for themselves."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from src.data.config import Data
from src.data.corpus import Corpus, reopen
from src.data.fingerprint import fingerprint, hash_files
from src.data.prepare import prepare
from src.data.shards import TokenShards
from src.data.tokenizer import Bpe, Bytes
from src.errors import DataError
from tests.data.corpora import corpus, mixture, stream, synthetic, text, texts_of

PIECES = synthetic(documents=9000, words=2)  # three


@pytest.fixture(scope="module")
def in_pieces(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """PIECES, prepared by one process that nothing disturbed; to be read only."""
    return corpus(PIECES, tmp_path_factory.mktemp("pieces"))


def shards(made: Corpus) -> TokenShards:
    (part,) = made.parts
    return part.shards


def content(made: Corpus, split: str) -> list[int]:
    read: list[int] = shards(made).read(split, 0, made.tokens(split)).tolist()
    return read


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_is_its_documents_one_after_the_other(in_pieces: Corpus, split: str) -> None:
    assert len(list(shards(in_pieces).folder.glob(f"*.{split}.bin"))) == 3
    assert content(in_pieces, split) == stream(texts_of(PIECES), split, 0.1)
    assert in_pieces.documents(split) == content(in_pieces, split).count(257)


def test_reading_anywhere_equals_slicing(in_pieces: Corpus) -> None:
    made, whole = in_pieces, content(in_pieces, "train")
    border = shards(made)._ends["train"][1]
    for start, count in [(0, 1), (border - 3, 7), (border, 5), (1, len(whole)), (len(whole) - 2, 9), (len(whole), 4)]:
        assert shards(made).read("train", int(start), count).tolist() == whole[start : start + count]


def test_several_processes_make_the_same_shards(tmp_path: Path, in_pieces: Corpus) -> None:
    two = corpus(synthetic(documents=9000, words=2, processes=2), tmp_path)
    assert two.fingerprint == in_pieces.fingerprint
    assert content(two, "train") == content(in_pieces, "train")


def test_the_second_time_nothing_is_done(tmp_path: Path) -> None:
    first = corpus(synthetic(), tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in shards(first).folder.iterdir()}
    again = corpus(synthetic(), tmp_path)
    assert (first.preparation.cached, again.preparation.cached) == (False, True)
    assert stamps == {path: path.stat().st_mtime_ns for path in shards(first).folder.iterdir()}
    assert again.preparation.documents == 300
    assert again.preparation.tokens == again.preparation.text_bytes + 2 * 300


def test_content_names_the_cache_and_not_the_place(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("some text of one document")
    here = corpus(text(tmp_path / "here/*.txt", validation_fraction=0.0), tmp_path / "cache")
    there = corpus(text(tmp_path / "there/*.txt", validation_fraction=0.0), tmp_path / "cache")
    assert there.preparation.cached
    (tmp_path / "there/a.txt").write_text("some text of one documenT")  # same size
    changed = corpus(text(tmp_path / "there/*.txt", validation_fraction=0.0), tmp_path / "cache")
    assert not changed.preparation.cached
    assert here.fingerprint == there.fingerprint != changed.fingerprint


def test_hashes_are_remembered_until_a_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    os.utime(path, (1_000_000_000, 1_000_000_000))
    (first,) = hash_files([path], tmp_path)
    memory = tmp_path / "file_hashes.json"
    memory.write_text(memory.read_text().replace(first, "from memory"))
    assert hash_files([path], tmp_path) == ["from memory"]
    path.write_text("two")
    os.utime(path, (1_000_000_001, 1_000_000_001))
    assert hash_files([path], tmp_path)[0] not in (first, "from memory")
    path.write_text("one")
    now = path.stat().st_mtime_ns
    assert hash_files([path], tmp_path) == [first]
    path.write_text("six")  # the same size within one tick of the clock: a fresh file is not remembered
    os.utime(path, ns=(now, now))
    assert hash_files([path], tmp_path) != [first]


KILLED = """
import os, signal, sys
from pathlib import Path
from src.data import prepare
from tests.data.corpora import corpus, synthetic

written = prepare.write_record

def write_and_die(folder, *arguments):
    written(folder, *arguments)
    if len(list(Path(folder).glob("[0-9]*.json"))) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

prepare.write_record = write_and_die
corpus(synthetic(documents=9000, words=2), Path(sys.argv[1]))
"""


def test_a_kill_loses_no_finished_shard(tmp_path: Path, in_pieces: Corpus) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed")], check=False)
    assert killed.returncode == -9
    (folder,) = (tmp_path / "killed/tokens").iterdir()
    assert not (folder / "index.json").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("[0-9]*")}
    assert len(finished) == 2 * 3  # a record and two splits each
    resumed = corpus(PIECES, tmp_path / "killed")
    assert {name: (folder / name).stat().st_mtime_ns for name in finished} == finished
    assert resumed.fingerprint == in_pieces.fingerprint
    assert content(resumed, "train") == content(in_pieces, "train")


def test_a_half_written_shard_is_made_again(tmp_path: Path, in_pieces: Corpus) -> None:
    there = shards(in_pieces).folder
    shutil.copytree(there, tmp_path / there.parent.name / there.name)
    made, whole = corpus(PIECES, tmp_path), content(in_pieces, "train")
    assert made.preparation.cached
    (shards(made).folder / "index.json").unlink()
    broken = shards(made).folder / "00001.train.bin"
    broken.write_bytes(broken.read_bytes()[:-4])
    assert content(corpus(PIECES, tmp_path), "train") == whole


def test_two_preparers_at_once_agree(tmp_path: Path, in_pieces: Corpus) -> None:
    command = "import sys; from pathlib import Path; from tests.data.corpora import corpus, synthetic; "
    command += "print(corpus(synthetic(documents=9000, words=2), Path(sys.argv[1])).fingerprint)"

    def run(_: int) -> str:
        return subprocess.check_output([sys.executable, "-c", command, str(tmp_path / "shared")], text=True).strip()

    with ThreadPoolExecutor(2) as pool:
        found = set(pool.map(run, range(2)))
    assert found == {in_pieces.fingerprint}


def test_a_truncated_shard_is_named_by_the_launcher_and_where_a_rank_first_reads_it(tmp_path: Path) -> None:
    made = corpus(synthetic(), tmp_path)
    path = shards(made).folder / "00000.train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    on_rank = reopen(made.recipe(), tmp_path)  # looks at no file of tokens: thousands of ranks open it
    for reader in (lambda: corpus(synthetic(), tmp_path), lambda: shards(on_rank).read("train", 0, 4)):
        with pytest.raises(DataError, match=r"00000\.train\.bin: truncated or grown .* delete"):
            reader()
    path.unlink()
    for reader in (lambda: corpus(synthetic(), tmp_path), lambda: shards(on_rank).read("train", 0, 4)):
        with pytest.raises(DataError, match=r"00000\.train\.bin: missing"):
            reader()


def test_a_flipped_bit_is_named_by_its_checksum(tmp_path: Path) -> None:
    made = corpus(synthetic(), tmp_path)
    path = shards(made).folder / "00000.validation.bin"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"00000\.validation\.bin: corrupted \(crc32 differs\)") as caught:
        corpus(synthetic(), tmp_path)
    assert len(caught.value.problems) == 1
    with pytest.raises(DataError, match="crc32"):
        reopen(made.recipe(), tmp_path).verify()


def test_a_shard_that_was_found_right_is_read_again_only_when_written(tmp_path: Path) -> None:
    made = corpus(synthetic(), tmp_path)
    path = shards(made).folder / "00000.train.bin"
    os.utime(path, (1_000_000_000, 1_000_000_000))
    made.verify()
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match="crc32"):
        made.verify()
    os.utime(path, (1_000_000_000, 1_000_000_000))
    made.verify()  # nothing says that it was written: not read


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("a file where the folder of tokens belongs")
    with pytest.raises(DataError, match=r"tokens/[0-9a-f]{16}: cannot be written: "):
        corpus(synthetic(), tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "edit", "flip", "cut off", "remove"])
def test_a_damaged_index_is_named(tmp_path: Path, damage: str) -> None:
    folder = shards(corpus(synthetic(), tmp_path)).folder
    path, table = folder / "index.json", folder / "pieces.npy"
    content = bytearray(table.read_bytes())
    if damage == "truncate":
        path.write_text(path.read_text()[:-20])
    elif damage == "edit":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pieces": 2}))
    elif damage == "flip":
        content[-100] ^= 1
        table.write_bytes(content)
    elif damage == "cut off":
        table.write_bytes(content[:-100])
    else:
        table.unlink()
    with pytest.raises(
        DataError,
        match=r"(index\.json: (corrupted|not a readable JSON file)|pieces\.npy: (corrupted|missing or cut off))"
        r".*; delete .* makes it again",
    ):
        corpus(synthetic(), tmp_path)


def test_an_index_of_an_older_version_is_read(tmp_path: Path) -> None:
    """It had the records of all pieces in itself; tokens and the name of the samples are the same."""
    made = corpus(synthetic(), tmp_path)
    folder = shards(made).folder
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9]*.json"))]
    body = {"format": 1, "dtype": "uint16", "pieces": records}
    (folder / "index.json").write_text(json.dumps(body | {"checksum": fingerprint(body)}))
    (folder / "pieces.npy").unlink()
    again = reopen(made.recipe(), tmp_path)
    assert again.fingerprint == made.fingerprint
    assert content(again, "train") == content(made, "train")
    again.verify()


def test_copies_of_a_document_stay_on_one_side(tmp_path: Path) -> None:
    """Each text stands three times, in other files and places; no text may be in both splits."""
    texts = [f"document number {number}" for number in range(200)]
    for copy in range(3):
        lines = [json.dumps({"text": text}) for text in (texts if copy % 2 else reversed(texts))]
        (tmp_path / f"{copy}.jsonl").write_text("\n".join(lines))
    made = corpus(text(tmp_path / "*.jsonl", validation_fraction=0.3), tmp_path / "cache")
    sides = {}
    for split in ("train", "validation"):
        found = made.tokenizer.decode([10 if token == 257 else token for token in content(made, split)]).split("\n")
        sides[split] = sorted(found[:-1])
    assert set(sides["train"]).isdisjoint(sides["validation"])
    assert sorted(sides["train"] + sides["validation"]) == sorted(3 * texts)
    assert 20 < len(sides["validation"]) / 3 < 100


def test_sources_of_a_mixture_share_the_cache_with_themselves(tmp_path: Path) -> None:
    corpus(synthetic(documents=200, words=20), tmp_path)
    made = corpus(mixture({"a": 1.0, "b": 3.0}), tmp_path)
    assert len(list((tmp_path / "tokens").iterdir())) == 2
    assert list(made.source_tokens()) == ["a", "b"]
    assert sum(made.source_tokens().values()) == made.tokens("train")


def test_empty_documents_are_counted_and_empty_corpora_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "word"}\n')
    assert corpus(text(tmp_path / "a.jsonl"), tmp_path / "cache").preparation.empty_documents == 1
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "b.txt").write_text("")
    for name in ("a.jsonl", "b.txt"):
        with pytest.raises(DataError, match="text: no document with text in it"):
            corpus(text(tmp_path / name), tmp_path / "cache")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_fault_in_a_worker_reaches_the_user_whole(tmp_path: Path, processes: int) -> None:
    for number in range(2):
        lines = ['{"text": "' + "x" * 1000 + '"}'] * 3000
        (tmp_path / f"{number}.jsonl").write_text("\n".join([*lines, '{"wrong": 1}', *lines]))
    with pytest.raises(DataError, match=r"\d\.jsonl, line 3001: no field 'text'"):
        corpus(text(tmp_path / "*.jsonl", processes=processes), tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from src.data import tokenizer

    monkeypatch.setattr(tokenizer.ByteTokenizer, "vocab_size", 65537)
    monkeypatch.setattr(tokenizer.ByteTokenizer, "eos_id", 65536)
    made = corpus(synthetic(), tmp_path)
    expected = [65536 if token == 257 else token for token in stream(texts_of(synthetic()), "train", 0.1)]
    assert content(made, "train") == expected


@pytest.mark.parametrize("data", [synthetic(), mixture({"a": 1.0, "b": 2.0})], ids=["one", "mixture"])
def test_ranks_reopen_exactly_the_prepared_tokens(tmp_path: Path, data: Data) -> None:
    for tokenizer in (Bytes(), Bpe(vocab_size=300, sample_bytes=10_000)):
        made = prepare(data, tokenizer, tmp_path, progress=False)
        again = reopen(json.loads(json.dumps(made.recipe())), tmp_path)
        assert (again.fingerprint, again.vocab_size) == (made.fingerprint, made.vocab_size)
        assert again.source_tokens() == made.source_tokens()
