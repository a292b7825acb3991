"""What reaches Hydra, and what its errors become."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from src.config.composition.command_line import arguments, problem
from src.errors import ConfigError


@pytest.mark.parametrize(
    ("typed", "passed"),
    [
        (["optim.lr=3"], ["++optim.lr=3"]),
        (["seed=1", "modle=x"], ["++seed=1", "++modle=x"]),
        (["model=llama3_8b", "experiment=demo"], ["model=llama3_8b", "experiment=demo"]),
        (["+data/source/text@data.sources.mine=text"], ["+data/source/text@data.sources.mine=text"]),
        (["~tracker", "+a.b=1", "++a.c=2"], ["~tracker", "+a.b=1", "++a.c=2"]),
        (["hydra.mode=MULTIRUN", "hydra/launcher=basic"], ["hydra.mode=MULTIRUN", "hydra/launcher=basic"]),
        (["--cfg", "job"], ["--cfg", "job"]),
        (["seed=1", "--cfg", "job", "~tracker"], ["--cfg", "job", "++seed=1", "~tracker"]),
        (["-m", "nonsense"], ["-m", "nonsense"]),
        (["seed=0,1", "-m", "optim.lr=1,2"], ["-m", "++seed=0,1", "++optim.lr=1,2"]),
        (["nonsense"], ["nonsense"]),
        (["prompt=a, b", "task.sample_prompt="], ["++prompt='a, b'", "++task.sample_prompt=''"]),
        (["prompt=null"], ["++prompt=null"]),
    ],
)
def test_assignments_may_name_any_key_so_that_build_can_judge_them(typed: list[str], passed: list[str]) -> None:
    assert arguments(typed) == passed


@pytest.mark.parametrize(
    "text", ["", "Once, twice", 'it\'s "so"', "a\\b\\", "back\\'s", "x=1,2 [a] {b: c}", "two\nlines", "ünï", "3"]
)
def test_a_prompt_arrives_as_it_was_typed(text: str) -> None:
    (passed,) = arguments([f"prompt={text}"])
    read = OverridesParser.create().parse_override(passed)
    assert (read.key_or_group, str(read.value()), read.is_sweep_override()) == ("prompt", text, False)


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("data.files=/a/epoch=3/x.jsonl", ["/a/epoch=3/x.jsonl"]),
        ("checkpoint.initial=/my runs/epoch=3 (old)/run", ["/my runs/epoch=3 (old)/run"]),
        ("root=~/runs", ["~/runs"]),
        ("task.run=/a/[b]/{c}", ["/a/[b]/{c}"]),
        ("tokenizer.eos=[SEP]", ["[SEP]"]),
        ("tokenizer.eos='[SEP]'", ["[SEP]"]),
        ("cluster.account=123", ["123"]),
        ("cluster.partition=train,urgent", ["train,urgent"]),
        ("cluster.exclude=n[3-5],n9", ["n[3-5],n9"]),
        ("cluster.constraint=h100&ib", ["h100&ib"]),
        ("data.separator=\\n\\n", ["\\n\\n"]),
        ("data.files=[/a/b.txt,/c.txt]", [["/a/b.txt", "/c.txt"]]),
        ("checkpoint.initial=/a/x=1,/b", ["/a/x=1", "/b"]),
        ("root=choice(/a,/b)", ["/a", "/b"]),
        ("folder=null", [None]),
        ("data.files=/a/epoch\\=3/x", ["/a/epoch=3/x"]),  # as Hydra has it
    ],
)
def test_paths_and_words_arrive_as_they_were_typed(argument: str, values: list[object]) -> None:
    (passed,) = arguments([argument])
    read = OverridesParser.create().parse_override(passed)
    if not read.is_sweep_override():
        found = [read.value()]
    else:
        found = [each.text if hasattr(each, "text") else each for each in read.sweep_iterator()]
    plain = [each.text if hasattr(each, "text") else each for each in found]
    assert [[*map(str, each)] if isinstance(each, list) else each for each in plain] == values


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("hydra.ouput_subdir=x", "hydra.ouput_subdir: no such key; did you mean output_subdir?"),
        ("+hydra.job.nmae=x", "hydra.job.nmae: no such key; did you mean name?"),
        ("model={dim: 3}", "model={dim: 3}: a group takes the name of an option; set single keys as model.<key>=..."),
    ],
)
def test_what_hydra_would_take_in_silence_is_refused(argument: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        arguments(["seed=1", argument, argument])
    assert caught.value.problems == (words, words)


def test_an_error_that_nobody_foresaw_keeps_its_first_line_and_its_key() -> None:
    assert problem(HydraException("First.\nSecond.\n    full_key: optim.lr\n"), ["optim.lr=1"]) == "optim.lr: First."
    assert problem(HydraException("First.\nSecond."), []) == "First."
