"""Tasks on this machine, in the form of lm-evaluation-harness: a file.yaml with templates over rows of a file.jsonl.

What a file asks for and is not read here is refused by name; the harness itself reads all of it (see the pages).
"""

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml

from src.config.wording import nearest
from src.errors import DataError

LOCAL = Path(__file__).parent / "local"
Kind = Literal["multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until"]
Row = Mapping[str, Any]

# Metrics of each kind; a file without metric_list has all of them.
METRICS: Mapping[Kind, tuple[str, ...]] = {
    "multiple_choice": ("acc", "acc_norm", "acc_bytes"),
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "generate_until": ("exact_match",),
}
KEYS = frozenset(
    {
        *("task", "tag", "dataset_path", "dataset_name", "dataset_kwargs", "output_type", "metadata"),
        *("test_split", "validation_split", "training_split", "fewshot_split"),
        *("doc_to_text", "doc_to_target", "doc_to_choice", "target_delimiter", "fewshot_delimiter", "description"),
        *("num_fewshot", "metric_list", "generation_kwargs", "repeats"),
        *("should_decontaminate", "doc_to_decontamination_query"),
    }
)
MOST_WRITTEN = 256  # tokens of a text, as in the harness
SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")


@dataclass(frozen=True)
class TaskFile:
    """One task as its file has it; DataError names the file and the key."""

    path: Path
    facts: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "TaskFile":
        try:
            facts = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise DataError(f"evaluate.tasks: {path}: cannot be read as a task ({error})") from error
        if not isinstance(facts, dict):
            raise DataError(f"evaluate.tasks: {path}: holds no task; it must be a mapping with output_type")
        found = cls(path, facts)
        if problems := found.problems():
            raise DataError([f"evaluate.tasks: {path}: {each}" for each in problems])
        return found

    @property
    def name(self) -> str:
        return str(self.facts.get("task", self.path.stem))

    @property
    def kind(self) -> Kind:
        return cast(Kind, self.facts["output_type"])

    @property
    def metrics(self) -> tuple[str, ...]:
        asked = self.facts.get("metric_list")
        return METRICS[self.kind] if asked is None else tuple(str(each["metric"]) for each in asked)

    @property
    def fewshot(self) -> int:
        return int(self.facts.get("num_fewshot") or 0)

    @property
    def until(self) -> tuple[str, ...]:
        """What ends a text that is written."""
        given = self._generation.get("until", self.delimiter)
        return (given,) if isinstance(given, str) else tuple(map(str, given))

    @property
    def most_written(self) -> int:
        """Tokens of such a text at most."""
        return int(self._generation.get("max_gen_toks", MOST_WRITTEN))

    @property
    def delimiter(self) -> str:
        """Between two worked examples."""
        return str(self.facts.get("fewshot_delimiter", "\n\n"))

    @property
    def description(self) -> str:
        return str(self.facts.get("description") or "")

    @property
    def target_delimiter(self) -> str:
        """Between a question and its answer."""
        return str(self.facts.get("target_delimiter", " "))

    @property
    def ignores(self) -> frozenset[str]:
        """Of exact_match: "case", "punctuation"."""
        listed = self.facts.get("metric_list") or []
        return frozenset(word for word in ("case", "punctuation") for each in listed if each.get(f"ignore_{word}"))

    @property
    def _generation(self) -> Mapping[str, Any]:
        return self.facts.get("generation_kwargs") or {}

    def problems(self) -> list[str]:
        """What of the file is not read here."""
        found = [
            f"{key}={value!r} is not read here; leave it out, or run the task with the harness itself"
            for key, value in self.facts.items()
            if key not in KEYS
        ]
        kind = self.facts.get("output_type")
        if kind not in get_args(Kind):
            near = nearest(str(kind), get_args(Kind)) or get_args(Kind)[0]
            return [*found, f"output_type={kind!r}: one of {', '.join(get_args(Kind))}; did you mean {near}?"]
        needed = ["doc_to_target", *(["doc_to_choice"] if kind == "multiple_choice" else [])]
        found += [f"{key} is missing, which output_type={kind} needs" for key in needed if key not in self.facts]
        unknown = [each for each in self.metrics if each not in METRICS[self.kind]]
        found += [f"metric {each!r}: output_type={kind} has {', '.join(METRICS[self.kind])}" for each in unknown]
        if self._generation.get("do_sample") or self._generation.get("temperature"):
            found.append("generation_kwargs: texts are written greedily here; pass do_sample: false")
        if self.facts.get("repeats", 1) != 1:
            found.append(f"repeats={self.facts['repeats']}: a greedy text is the same every time; pass 1")
        if self.fewshot and kind == "loglikelihood_rolling":
            found.append(f"num_fewshot={self.fewshot}: a text that is read whole has no question; pass 0")
        return found + self._problems_of_rows()

    def _problems_of_rows(self) -> list[str]:
        if self.facts.get("dataset_path") != "json":
            return [f"dataset_path={self.facts.get('dataset_path')!r}: json, the rows of a file, is read here"]
        files = self._files()
        if not any(split in files for split in map(self.facts.get, SPLITS[:2])):
            return [f"test_split names none of dataset_kwargs.data_files: {', '.join(files) or 'there are none'}"]
        return [f"{file}: no such file" for file in files.values() if not file.is_file()]

    def _files(self) -> dict[str, Path]:
        """By split; relative ones count from the task's own folder, or else from here."""
        given = (self.facts.get("dataset_kwargs") or {}).get("data_files") or {}
        named = given if isinstance(given, Mapping) else {"train": given}
        places = {split: Path(str(file)).expanduser() for split, file in named.items()}
        return {
            split: self.path.parent / file if (self.path.parent / file).is_file() else file
            for split, file in places.items()
        }

    def rows(self) -> list[Row]:
        """The documents that are asked about."""
        files = self._files()
        split = next(each for key in SPLITS[:2] if (each := self.facts.get(key)) in files)
        return _rows(files[split])

    def examples(self) -> tuple[list[Row], bool]:
        """What worked examples are drawn from, and whether it is the documents themselves."""
        files = self._files()
        asked = (self.facts.get(key) for key in ("fewshot_split", "training_split"))
        split = next((each for each in asked if each in files), None)
        return (self.rows(), True) if split is None else (_rows(files[split]), False)

    def question(self, row: Row) -> str:
        """doc_to_text of a document."""
        return str(self._rendered(self.facts.get("doc_to_text", ""), row))

    def choices(self, row: Row) -> list[str]:
        """doc_to_choice of a document."""
        given = self.facts["doc_to_choice"]
        if isinstance(given, Mapping):
            return [str(each) for each in given.values()]
        if isinstance(given, list):
            return [str(self._rendered(str(each), row)) for each in given]
        found = self._rendered(given, row)
        return [str(each) for each in (_literal(found) if isinstance(found, str) else found)]

    def target(self, row: Row) -> str:
        """doc_to_target of a document as text."""
        found = self._rendered(self.facts["doc_to_target"], row)
        return self.choices(row)[self.gold(row)] if self.kind == "multiple_choice" else str(found)

    def gold(self, row: Row) -> int:
        """Which of the choices is right. DataError where it is none of them."""
        found, choices = self._rendered(self.facts["doc_to_target"], row), self.choices(row)
        number = int(found) if isinstance(found, int) or str(found).isdigit() else None
        if number is None and str(found) in choices:
            number = choices.index(str(found))
        if number is None or not 0 <= number < len(choices):
            raise DataError(
                f"evaluate.tasks: {self.path}: doc_to_target={found!r} is none of {choices} in the row {dict(row)}"
            )
        return number

    def _rendered(self, template: Any, row: Row) -> Any:
        """A column of the row, or a template over its columns."""
        from jinja2 import TemplateError

        if isinstance(template, int):
            return template
        if template in row:
            return row[template]
        try:
            return self._environment.from_string(str(template)).render(**row)
        except (TemplateError, TypeError) as error:
            raise DataError(
                f"evaluate.tasks: {self.path}: {template!r} cannot be filled from the row {dict(row)}: {error}"
            ) from error

    @cached_property
    def _environment(self) -> Any:
        """A template may look at its row and nothing else."""
        from jinja2 import StrictUndefined
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError) as error:
        raise DataError(f"evaluate.tasks: doc_to_choice={text!r} is no list of choices") from error


def _rows(file: Path) -> list[Row]:
    try:
        found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"evaluate.tasks: {file}: cannot be read as rows of JSON ({error})") from error
    if not found or not all(isinstance(row, dict) for row in found):
        raise DataError(f"evaluate.tasks: {file}: holds no rows; a line is one JSON object")
    return found


def local_tasks() -> dict[str, Path]:
    """Those that come with this repository, by name."""
    return {file.stem: file for file in sorted(LOCAL.glob("*.yaml"))}
