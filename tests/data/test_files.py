"""Files become documents: the same ones however the file is cut, and every fault names its file and line."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from src.data import files
from src.data.sources import StdlibSource, SyntheticSource, TextSource, divided, held_out, matched
from src.errors import DataError
from tests.data.corpora import texts_of, write_lines

STORY = ["first", "zweite Zeile ä", "", "x" * 300, "fünf", "last"]


def source(*patterns: object, field: str = "text", separator: str | None = None) -> TextSource:
    return TextSource(files=tuple(map(str, patterns)), field=field, separator=separator, bad_rows="refuse")


def told(span: files.TextSpan, field: str = "text") -> list[str]:
    """Of the bad rows of a span."""
    rows = files.read(span, field=field, separator=None)
    return files.described(row for row in rows if isinstance(row, files.BadRow))


@pytest.mark.parametrize("largest", [1, 7, 50, 10_000])
def test_lines_are_neither_lost_nor_doubled_by_a_cut(tmp_path: Path, largest: int) -> None:
    path = tmp_path / "story.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in STORY) + "\n\n")
    spans = files.spans(path, largest)
    assert sum(span.bytes for span in spans) == path.stat().st_size
    assert [text for span in spans for text in files.read(span, field="text", separator=None)] == STORY


@pytest.mark.parametrize("largest", [1, 10_000])
def test_parquet_rows_come_once(tmp_path: Path, largest: int) -> None:
    path = tmp_path / "story.parquet"
    pq.write_table(pa.table({"id": range(len(STORY)), "body": STORY}), path, row_group_size=2)
    spans = files.spans(path, largest)
    assert [text for span in spans for text in files.read(span, field="body", separator=None)] == STORY


def test_plain_text_is_one_document_or_cut_at_a_separator(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\nstill two\n\nthree")
    assert texts_of(source(path)) == ["one\n\ntwo\nstill two\n\nthree"]
    assert texts_of(source(path, separator="\n\n")) == ["one", "two\nstill two", "three"]


def test_a_separator_may_be_typed_on_a_command_line(tmp_path: Path) -> None:
    assert source("a", separator="\\n\\n").separator == source("a", separator="\n\n").separator == "\n\n"
    with pytest.raises(ValidationError, match="at least 1 character"):
        source("a", separator="")


def test_a_separator_across_read_blocks_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    parts = ["a" * ((1 << 20) - 1), "b" * 10, "c" * (1 << 20)]
    path.write_text("<->".join(parts))
    assert texts_of(source(path, separator="<->")) == parts


def test_globs_are_sorted_and_no_file_comes_twice(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.md", "deep/c.txt"):
        (tmp_path / name).write_text(name)
    assert texts_of(source(tmp_path / "**/*.txt", tmp_path / "*")) == ["b.txt", "deep/c.txt", "a.md"]


def test_one_file_needs_no_list(tmp_path: Path) -> None:
    assert TextSource.model_validate(
        {"files": "a.txt", "field": "text", "separator": None, "bad_rows": "refuse"}
    ).files == ("a.txt",)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": 1}', "field 'text' (data.field) holds int, not text"),
        ('{"body": "", "id": 3}', "no field 'text' (data.field); the row has 'body', 'id'"),
        ('{"text": ', "not JSON"),
        ("[1]", "a row is list, not an object with the field 'text'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str, reason: str) -> None:
    bad = write_lines(tmp_path / "rows.jsonl", '{"text": "good"}', "", line)
    with pytest.raises(DataError) as caught:
        texts_of(bad)
    assert f"rows.jsonl, line 3: {reason}" in str(caught.value)
    middle = files.TextSpan(str(tmp_path / "rows.jsonl"), 5, 1000)
    assert "line 3: " in told(middle)[-1]


def test_a_parquet_without_the_field_or_with_a_null_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"body": ["a", None]}), path, row_group_size=1)
    with pytest.raises(DataError, match=r"rows\.parquet: no field 'text' \(data\.field\); the columns are body"):
        texts_of(source(path))
    with pytest.raises(DataError, match=r"rows\.parquet, row 1: field 'body' \(data\.field\) holds NoneType"):
        texts_of(source(path, field="body"))
    assert "row 1: " in told(files.spans(path, 1)[1], field="body")[0]
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"rows\.parquet: not a readable parquet file"):
        texts_of(source(path))


def test_all_patterns_that_match_nothing_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.txt").symlink_to("gone.txt")
    names = ("no*.txt", "", "rows.json", "pipe", "link.txt")
    with pytest.raises(DataError) as caught:
        source(*(tmp_path / name for name in names)).pieces()
    first, second, third, fourth, fifth = caught.value.problems
    assert "no*.txt: matches no file" in first
    assert f"data.files={tmp_path}: matches no file with one of the suffixes .txt, " in second
    assert ".json is not read; convert it" in third
    assert "it is a pipe or a device, which can be read once" in fourth
    assert "it is a link to gone.txt, which is not there" in fifth


def test_a_folder_stands_for_the_text_in_it(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.MD", "deep/c.jsonl", "no.csv", "no.png"):
        (tmp_path / name).write_text('{"text": "x"}')
    found, problems = matched([str(tmp_path)])
    assert ([path.name for path in found], problems) == (["a.MD", "b.txt", "c.jsonl"], [])
    assert source(tmp_path).problems() == []
    assert "matches no file" in source(tmp_path / "no*.txt").problems()[0]


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ok \xff")
    with pytest.raises(DataError, match=r"a\.txt, line 1: not UTF-8 text \(byte 3"):
        texts_of(source(tmp_path / "a.txt"))


def test_the_standard_library_is_here_and_large() -> None:
    texts = texts_of(StdlibSource())
    assert sum(map(len, texts)) > 8_000_000
    assert any("class JSONDecoder" in text for text in texts)
    assert texts == texts_of(StdlibSource())


def test_the_synthetic_language_repeats_itself_and_no_other() -> None:
    one = SyntheticSource(documents=50, words=10, seed=0)
    other = SyntheticSource(documents=50, words=10, seed=1)
    assert texts_of(one) == texts_of(one)
    assert set(texts_of(one)).isdisjoint(texts_of(other))


def test_the_held_out_share_is_what_was_asked() -> None:
    texts = [str(number) for number in range(20_000)]
    held = {text for text in texts if held_out(text, 0.05)}
    assert abs(len(held) / 20_000 - 0.05) < 0.005
    assert held <= {text for text in texts if held_out(text, 0.2)}
    assert not any(held_out(text, 0.0) for text in texts)


def test_capitals_in_a_suffix_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "A.JSONL"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert texts_of(source(path)) == ["one", "two"]
    (tmp_path / "B.CSV").write_text("a")
    with pytest.raises(DataError, match=r"\.CSV is not read; convert it"):
        source(tmp_path / "B.CSV").pieces()


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "a\ud800b"}' + "\n" + r'{"text": "\ud83d\ude00 ü"}' + "\n")
    assert texts_of(source(path)) == ["a?b", "\U0001f600 ü"]


def test_a_mark_of_utf8_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone--two")
    assert texts_of(source(tmp_path / "a.txt")) == ["one--two"]
    assert texts_of(source(tmp_path / "a.txt", separator="--")) == ["one", "two"]


def test_a_separator_that_windows_line_ends_hide_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n\r\ntwo")
    with pytest.raises(DataError, match=r"a\.txt: its lines end with \\r\\n, so that data\.separator="):
        texts_of(source(path, separator="\\n\\n"))
    assert texts_of(source(path, separator="\\r\\n\\r\\n")) == ["one", "two"]


def test_bad_utf8_between_separators_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo\n\nx\n\xff")
    with pytest.raises(DataError, match=r"a\.txt, line 6: not UTF-8 text \(byte 2"):
        texts_of(source(tmp_path / "a.txt", separator="\n\n"))


@pytest.mark.parametrize(("text", "parts"), [("one two three four", ["one two three ", "four"]), ("", [""])])
def test_ends_are_held_out_at_a_word(text: str, parts: list[str]) -> None:
    assert [part for _, part in divided(text, 0.2, "ends")] == parts
    assert [split for split, _ in divided(text, 0.2, "ends")] == ["train", "validation"][: len(parts)]
    assert divided("a" * 1000, 0.25, "ends") == [("train", "a" * 750), ("validation", "a" * 250)]
    assert divided(text, 0.0, "ends") == [("train", text)]
    assert divided(text, 1.0 - 1e-9, "documents") == [("validation", text)]
