"""Bad rows are refused by file and line, or skipped: the tokens are then those of the corpus without them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.config.upgrades import without_neutral
from src.data import sources
from src.data.config import Mixture, Text
from src.data.corpus import Corpus, read_recipe
from src.data.fingerprint import fingerprint, hash_files
from src.data.mapped.piece_table import SPLITS
from src.data.prepare import prepare
from src.data.tokenizer import Bpe
from src.errors import DataError
from src.launch.start import record
from tests.data.corpora import KEYS, corpus, text, texts_of

GOOD = [f"story {number} of some length" for number in range(40)]
# What stands in line -> why it is skipped.
BAD_LINES = {
    b'{"text": null}': "field 'text' (data.field) holds NoneType, not text",
    b'{"text": 7}': "field 'text' (data.field) holds int, not text",
    b'{"body": "a"}': "no field 'text' (data.field); the row has 'body'",
    b"{}": "no field 'text' (data.field); the row has none",
    b"[1]": "a row is list, not an object with the field 'text'",
    b'{"text": "a': "not JSON (Unterminated string",
    b'{"text": "\xff"}': "not UTF-8 text (byte 10 of its line): invalid start byte",
    b'{"text": "a\\ud800"}': "half a surrogate pair, which is no text",
}
LONG_LINES = {
    b"[" * 100_000: "not JSON that can be read (nested too deeply)",
    b'{"text": %s}' % (b"1" * 5000): "not JSON (Exceeds the limit",
}
BAD = list(BAD_LINES)


def lines(path: Path, bad: Sequence[bytes]) -> None:
    """A bad row after every third good one, while there are any."""
    left, rows = list(bad), []
    for number, story in enumerate(GOOD):
        rows.append(json.dumps({"text": story}).encode())
        rows += [left.pop(0)] if number % 3 == 2 and left else []
    path.with_suffix(".jsonl").write_bytes(b"\n".join(rows))


def parquet(path: Path, bad: Sequence[bytes | None]) -> None:
    rows: list[bytes | None] = [story.encode() for story in GOOD]
    for place, row in enumerate(bad):
        rows.insert(3 + 5 * place, row)
    column = pa.array(rows, pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": column}), path.with_suffix(".parquet"), row_group_size=4)


def parts(path: Path, bad: Sequence[bytes]) -> None:
    path.with_suffix(".txt").write_bytes(b"\n--\n".join([*map(str.encode, GOOD[:5]), *bad, *map(str.encode, GOOD[5:])]))


def whole(path: Path, bad: Sequence[bytes]) -> None:
    """A document in each file."""
    for number, content in enumerate([*map(str.encode, GOOD), *bad]):
        (path.parent / f"{path.name}-{number:02d}.md").write_bytes(content)


KINDS: dict[str, tuple[Callable[[Path, list[bytes]], None], list[bytes]]] = {
    "jsonl": (lines, BAD),
    "parquet": (parquet, [None, b"ok \xff", None]),  # type: ignore[list-item]
    "separator": (parts, [b"two\nlines \xff", b"\xc3"]),
    "files": (whole, [b"\xff"]),
}


def tokens(made: Corpus) -> list[list[int]]:
    return [made.parts[0].shards.read(split, 0, made.tokens(split)).tolist() for split in SPLITS]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several even of a few lines, so that files and places are cut."""
    monkeypatch.setattr(sources, "piece_bytes", lambda _total: 500)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("kind", "processes"), [*((kind, 1) for kind in KINDS), ("jsonl", 2)])
def test_skipping_gives_the_tokens_of_the_corpus_without_the_rows(tmp_path: Path, kind: str, processes: int) -> None:
    write, bad = KINDS[kind]
    for name, rows in (("bad", bad), ("good", [])):
        write(tmp_path / name, rows)
    separator = "\n--\n" if kind == "separator" else None
    skipping = text(tmp_path / "bad*", separator=separator, bad_rows="skip", processes=processes)
    found = corpus(skipping, tmp_path / "one")
    clean = corpus(text(tmp_path / "good*", separator=separator), tmp_path / "two")
    assert len(list(found.parts[0].shards.folder.glob("*.train.bin"))) > 1 or kind == "separator"
    assert tokens(found) == tokens(clean)
    assert found.preparation.skipped_rows == len(bad)
    assert (clean.preparation.skipped_rows, clean.preparation.lines()[1:]) == (0, [])


def of_lines(path: Path, *, bad_rows: str = "skip") -> Text:
    lines(path / "rows", BAD)
    return text(path / "rows.jsonl", bad_rows=bad_rows)


@pytest.mark.usefixtures("small_pieces")
def test_count_and_first_places_are_told_and_recorded_each_time(tmp_path: Path) -> None:
    data = of_lines(tmp_path)
    data = data.model_copy(update={"files": (*data.files, str(tmp_path / "more.jsonl"))})
    (tmp_path / "more.jsonl").write_text('[]\n{"text": "good"}\n{}\n[]\n')
    for cached in (False, True):
        made = corpus(data, tmp_path / "cache")
        assert made.preparation.cached == cached
        first, second, *places = made.preparation.lines()
        assert first.startswith("data: 41 documents, ")
        assert second == "warning: 11 bad rows were skipped, the first of them:"
        assert len(places) == 10
        for number, (place, reason) in enumerate(zip(places[:8], BAD_LINES.values(), strict=True)):
            assert place.startswith(f"  {tmp_path}/rows.jsonl, line {4 * number + 4}: {reason}")
        assert [place.partition(": ")[0] for place in places[8:]] == [
            f"  {tmp_path}/more.jsonl, line {line}" for line in (1, 3)
        ]
    record(made, tmp_path)
    assert read_recipe(tmp_path)["skipped"] == {"text": {"rows": 11, "places": [place[2:] for place in places]}}


@pytest.mark.usefixtures("small_pieces")
def test_an_interrupted_preparation_counts_them_once(tmp_path: Path) -> None:
    made = corpus(of_lines(tmp_path), tmp_path / "cache")
    folder = made.parts[0].shards.folder
    (folder / "index.json").unlink()
    for record_file in sorted(folder.glob("0*.json"))[1::2]:
        record_file.unlink()
    again = corpus(of_lines(tmp_path), tmp_path / "cache")
    assert again.preparation.skipped_places == made.preparation.skipped_places
    assert (again.preparation.skipped_rows, again.fingerprint) == (len(BAD), made.fingerprint)


def test_the_first_bad_row_is_refused_with_its_place_and_a_way_out(tmp_path: Path) -> None:
    for line, reason in (BAD_LINES | LONG_LINES).items():
        if reason.startswith("half"):  # read with ? in its place, as ever
            continue
        (tmp_path / "rows.jsonl").write_bytes(b'{"text": "good"}\n\n' + line)
        with pytest.raises(DataError) as caught:
            texts_of(text(tmp_path / "rows.jsonl"))
        (problem,) = caught.value.problems
        assert problem.startswith(f"{tmp_path}/rows.jsonl, line 3: {reason}")
        assert len(problem) < 600
        assert "; bad_rows=skip leaves such rows out" in problem
    parquet(tmp_path / "rows", KINDS["parquet"][1])
    parts(tmp_path / "rows", KINDS["separator"][1])
    with pytest.raises(DataError, match=r"rows\.parquet, row 3: .* holds NoneType, not text; bad_rows=skip"):
        texts_of(text(tmp_path / "rows.parquet"))
    with pytest.raises(DataError, match=r"rows\.txt, line 12: not UTF-8 text .*; bad_rows=skip"):
        texts_of(text(tmp_path / "rows.txt", separator="\n--\n"))


def test_bytes_in_parquet_that_are_no_utf8_are_a_bad_row(tmp_path: Path) -> None:
    parquet(tmp_path / "rows", [b"ok \xff"])
    with pytest.raises(DataError, match=r"rows\.parquet, row 3: not UTF-8 text \(byte 3 of its field\)"):
        texts_of(text(tmp_path / "rows.parquet"))


def test_a_corpus_of_bad_rows_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("[]\n{}\n")
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"text: no document .*rows\.jsonl\); 2 bad rows were skipped, the first: .*, line 1: a row"
        ):
            corpus(text(tmp_path / "rows.jsonl", bad_rows="skip"), tmp_path / "cache")
    with pytest.raises(DataError, match=r"no training document to learn from \(.*rows\.jsonl\)"):
        prepare(
            text(tmp_path / "rows.jsonl", bad_rows="skip"),
            Bpe(vocab_size=300, sample_bytes=100),
            tmp_path / "cache",
            progress=False,
        )


def test_a_file_that_is_bad_as_a_whole_is_refused_all_the_same(tmp_path: Path) -> None:
    parquet(tmp_path / "rows", [])
    path = tmp_path / "rows.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"rows\.parquet: not a readable parquet file"):
        corpus(text(path, bad_rows="skip"), tmp_path / "cache")
    path.write_bytes(content[:4] + b"\xff" * 60 + content[64:])
    with pytest.raises(DataError, match=r"rows\.parquet, row 0 or one of the next 1024: cannot be read"):
        corpus(text(path, bad_rows="skip"), tmp_path / "cache")
    with pytest.raises(DataError, match=r"rows\.parquet: no field 'body' \(data\.field\); the columns are text"):
        corpus(text(path, bad_rows="skip", field="body"), tmp_path / "cache")


def test_only_the_choice_to_skip_is_part_of_cache_and_identity(tmp_path: Path) -> None:
    lines(tmp_path / "rows", [])
    refusing, skipping = (text(tmp_path / "rows.jsonl", bad_rows=choice) for choice in ("refuse", "skip"))
    assert refusing.fingerprint(tmp_path) != skipping.fingerprint(tmp_path)
    assert refusing.fingerprint(tmp_path) == fingerprint(
        "text", [[".jsonl", hash_files([tmp_path / "rows.jsonl"], tmp_path)[0]]], "text", None
    ), "as before there was a choice"
    for name in ("data.config.Text", "data.config.Hub", "data.hub.HubSource", "data.sources.TextSource"):
        tree = {"data": {"_target_": f"src.{name}", "bad_rows": "refuse"}}
        assert without_neutral(tree) == {"data": {"_target_": f"src.{name}"}}
        tree["data"]["bad_rows"] = "skip"
        assert without_neutral(tree) == tree


def test_a_mixture_sums_them_up_and_records_each_source(tmp_path: Path) -> None:
    inner = {}
    for number, name in enumerate("ab"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "good"}\n' + "{}\n" * (number + 1))
        inner[name] = text(tmp_path / f"{name}.jsonl", bad_rows="skip")
    data = Mixture.model_validate({**KEYS, "sources": inner, "weights": {"a": 1.0, "b": 1.0}})
    made = corpus(data, tmp_path / "cache")
    assert made.preparation.lines()[1] == "warning: 3 bad rows were skipped:"
    assert {name: each["rows"] for name, each in made.recipe()["skipped"].items()} == {"a": 1, "b": 2}
