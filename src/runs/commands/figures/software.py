"""`cite`: the BibTeX of the software that runs were made with, at its versions where the runs know them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from src.config.tree import Tree, every_leaf
from src.runs.commands.listing import print_json
from src.runs.commands.summary import Summary
from src.runs.folder import attempts
from src.version import VERSION

# As these projects ask to be cited, long lists of authors shortened; compared with CITATION.cff of PyTorch, datasets,
# tokenizers and MLflow, and with the pages of Hydra, torchao and wandb, on 2026-11-30. torchft and Trackio do not say.
PYTORCH = {
    "key": "Ansel_PyTorch_2_2024",
    "type": "inproceedings",
    "author": "Ansel, Jason and Yang, Edward and He, Horace and others",
    "title": "{PyTorch} 2: Faster Machine Learning Through Dynamic {Python} Bytecode Transformation and Graph"
    " Compilation",
    "booktitle": "29th ACM International Conference on Architectural Support for Programming Languages and Operating"
    " Systems, Volume 2 (ASPLOS '24)",
    "year": "2024",
    "doi": "10.1145/3620665.3640366",
}
HYDRA = {
    "key": "Yadan2019Hydra",
    "type": "misc",
    "author": "Yadan, Omry",
    "title": "{Hydra} - A framework for elegantly configuring complex applications",
    "howpublished": "GitHub",
    "year": "2019",
    "url": "https://github.com/facebookresearch/hydra",
}
TORCHAO = {
    "key": "torchao",
    "type": "software",
    "author": "{torchao}",
    "title": "{TorchAO}: {PyTorch}-Native Training-to-Serving Model Optimization",
    "year": "2024",
    "url": "https://github.com/pytorch/ao",
}
TORCHFT = {
    "key": "torchft",
    "type": "software",
    "author": "{torchft maintainers and contributors}",
    "title": "{torchft}: easy per-step fault tolerance for {PyTorch}",
    "year": "2024",
    "url": "https://github.com/meta-pytorch/torchft",
}
DATASETS = {
    "key": "lhoest-etal-2021-datasets",
    "type": "inproceedings",
    "author": "Lhoest, Quentin and Villanova del Moral, Albert and Jernite, Yacine and others",
    "title": "Datasets: A Community Library for Natural Language Processing",
    "booktitle": "Proceedings of the 2021 Conference on Empirical Methods in Natural Language Processing:"
    " System Demonstrations",
    "pages": "175--184",
    "year": "2021",
    "url": "https://aclanthology.org/2021.emnlp-demo.21",
}
TOKENIZERS = {
    "key": "Moi_HuggingFace_s_Tokenizers_2023",
    "type": "software",
    "author": "Moi, Anthony and Patry, Nicolas",
    "title": "{HuggingFace's Tokenizers}",
    "year": "2023",
    "url": "https://github.com/huggingface/tokenizers",
}
WANDB = {
    "key": "wandb",
    "type": "misc",
    "author": "Biewald, Lukas",
    "title": "Experiment Tracking with {Weights and Biases}",
    "year": "2020",
    "note": "Software available from wandb.com",
    "url": "https://www.wandb.com/",
}
TRACKIO = {
    "key": "trackio",
    "type": "software",
    "author": "Abid, Abubakar and Nation, Zach and Noorassa, Saba",
    "title": "{Trackio}: lightweight, local-first experiment tracking",
    "year": "2025",
    "url": "https://github.com/gradio-app/trackio",
}
MLFLOW = {
    "key": "zaharia2018accelerating",
    "type": "article",
    "author": "Zaharia, Matei A. and Chen, Andrew and Davidson, Aaron and others",
    "title": "Accelerating the Machine Learning Lifecycle with {MLflow}",
    "journal": "IEEE Data Engineering Bulletin",
    "volume": "41",
    "pages": "39--45",
    "year": "2018",
}


def _of(tree: Tree, *path: str) -> Any:
    value: Any = tree
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _targets(tree: Tree, section: str) -> list[str]:
    """Classes of a section and of its parts."""
    return [str(value) for path, value in every_leaf(tree.get(section)) if path.endswith("_target_")]


ALWAYS = (PYTORCH, HYDRA)
# What a config shows to be in use, and its entry.
USED: Sequence[tuple[Callable[[Tree], bool], Mapping[str, str]]] = (
    (lambda tree: _of(tree, "precision", "float8") is not None, TORCHAO),
    (lambda tree: _of(tree, "fault_tolerance", "groups") is not None, TORCHFT),
    (lambda tree: any("Hub" in name for name in _targets(tree, "data")), DATASETS),
    (lambda tree: any(name.endswith((".Bpe", ".File")) for name in _targets(tree, "tokenizer")), TOKENIZERS),
    (lambda tree: _of(tree, "tracker", "wandb") is not None, WANDB),
    (lambda tree: _of(tree, "tracker", "trackio") is not None, TRACKIO),
    (lambda tree: _of(tree, "tracker", "mlflow") is not None, MLFLOW),
)


def cite(runs: Sequence[Summary], *, as_json: bool) -> int:
    """Entries on stdout, each once; without a run those of any run."""
    trees = [run.config for run in runs] or [{}]
    entries = [*_ours(runs), *ALWAYS, *(entry for used, entry in USED if any(map(used, trees)))]
    if as_json:
        print_json(entries)
    else:
        print("\n\n".join(map(bibtex, entries)))
    return 0


def _ours(runs: Sequence[Summary]) -> list[dict[str, str]]:
    """This project once for each version and commit that the runs' newest attempts ran."""
    newest = [tried[-1] for run in runs if (tried := attempts(run.folder))]
    found = dict.fromkeys((each.version or "0.1.0", each.sha or "") for each in newest) or {(VERSION, ""): None}
    entries = []
    for number, (version, sha) in enumerate(found):
        entry = {
            "key": "ropewalk" + (f"_{number + 1}" if number else ""),
            "type": "software",
            "author": "{The Ropewalk authors}",
            "title": "{Ropewalk}: pretraining of language models from hierarchical configs, on any parallel layout",
            "year": "2026",
            "version": version,
        }
        entries.append(entry | ({"note": f"git commit {sha}"} if sha else {}))
    return entries


def bibtex(entry: Mapping[str, str]) -> str:
    """One entry, a field a line."""
    fields = [f"  {name} = {{{value}}}," for name, value in entry.items() if name not in ("key", "type")]
    return "\n".join([f"@{entry['type']}{{{entry['key']},", *fields, "}"])
