"""What each rank of task=export does: fill the layout, write its shards, read them back, compare, send."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from src.checkpoint.config import FOREIGN
from src.checkpoint.folder import VALUES, is_complete, read_marker, step_of
from src.checkpoint.host_group import HostGroup
from src.config.tree import read
from src.data.tokenizer import Tokenizer
from src.distributed.mesh import Mesh
from src.distributed.model_stages import ModelStages
from src.errors import VerdictError
from src.hugging_face.archive import Archive
from src.hugging_face.check import E8M0, WEIGHTS
from src.hugging_face.companions import Sources, card, companions
from src.hugging_face.origin import lost, origin_of
from src.hugging_face.push import push
from src.hugging_face.save import FACTS, UNCOMPARED, Form, has_biases, publish, save, send
from src.hugging_face.write import held
from src.metrics.console import Console
from src.models.hugging_face import config_json
from src.run import Run
from src.tasks.export.config import Export
from src.tasks.export.self_check import Finding, Logits, native_logits, read_back, with_transformers
from src.tasks.source import load
from src.train.setup import build_uninitialized, join_ranks

GB = 10**9


def export(task: Export, run: Run, folder: Path) -> bool:
    """Write, check and push the export. Collective. Always True: an export that was stopped is started again."""
    ranks = join_ranks(run, folder)
    run = task.computed(run)
    network = build_uninitialized(run, ranks, Mesh(run.parallel, ranks.device.type))
    origin = load(task, run, network, folder, rounds=False)
    team, tokenizer = HostGroup(), run.tokenizer.open(run.cache, run.data)
    form = _form(task, run, team, network, origin)
    beside = _beside(task, run, tokenizer, form, origin, folder)
    ids = tokenizer.prompt(task.text)[: run.model.max_seq_len]
    before = native_logits(network, ids) if task.check else None
    stages = held(network.tensors())
    target = task.target if task.url is None else folder / "export"
    draft = save(team, target, stages, run.model, form, beside, _largest, ranks.device)
    if before is not None:
        finding = _check(task, run, network, team, draft, tokenizer, ids, before, form)
        if ranks.rank == 0:
            _tell(finding, lost(_whose(task, folder)))
        if finding.problems:
            raise VerdictError(finding.problems)
    team.on_rank_zero(lambda: publish(draft, target))
    if (url := task.url) is not None:
        team.on_rank_zero(lambda: send(target, url))
    if ranks.rank == 0:
        print(f"exported: {url or target}", flush=True)
    if task.push is not None:
        repository = task.push
        team.on_rank_zero(lambda: print(push(target, repository, send=task.send), flush=True))
    if url is not None:
        team.on_rank_zero(lambda: shutil.rmtree(target))
    ranks.leave()
    return True


def _form(task: Export, run: Run, team: HostGroup, network: ModelStages, origin: Path) -> Form:
    """Collective. Biases that transformers has no place for must not go lost in silence."""
    biased = has_biases(team, run.model, network.tensors())
    if biased and task.biases == "refuse":
        kind = config_json(run.model)["model_type"]
        raise VerdictError(
            "task.biases=refuse: this model's routers have softmax scores and biases that balance experts, for which "
            f"transformers' {kind} has no place; biases=drop leaves them out (other experts will be chosen), "
            "biases=keep writes them for vLLM and for this repository"
        )
    return Form(
        # float8 is released among bfloat16.
        task.dtype or ("bfloat16" if task.fp8 else _dtype(task, run, origin)),
        task.fp8,
        biased and task.biases == "keep",
        int(task.shard_gb * GB),
        E8M0 if task.fp8_scales == "e8m0" else "float32",
    )


def _dtype(task: Export, run: Run, origin: Path) -> str:
    """That of the weights as they lie there; of files with several the one that most bytes have."""
    if not task.source.startswith(FOREIGN):
        return run.precision.storage
    sizes = dict.fromkeys(WEIGHTS, 0)
    for entry in Archive.open(origin).entries.values():
        if entry.dtype in sizes:
            sizes[entry.dtype] += entry.bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _beside(
    task: Export, run: Run, tokenizer: Tokenizer, form: Form, checkpoint: Path, folder: Path
) -> dict[str, bytes]:
    """All files but the weights. `folder`: of this task's own run."""
    facts, whose = _facts(task, run, form, checkpoint), _whose(task, folder)
    origin = origin_of(whose)
    return {
        **companions(run.model, tokenizer, run.tokenizer, form, Sources(origin, _tokenizers(whose))),
        "README.md": card(Path(task.source).name, facts, origin),
        FACTS: (json.dumps(facts | {"form": asdict(form)}, indent=2) + "\n").encode(),
    }


def _whose(task: Export, folder: Path) -> Path:
    """The run folder that noted where the weights came from in the first place."""
    return folder if task.source.startswith(FOREIGN) else Path(task.source)


def _tokenizers(folder: Path) -> tuple[Path, ...]:
    """The tokenizer that a run folder's config names, if it names one: not the copy that its cache keeps."""
    named = read(folder / "config.yaml")["tokenizer"].get("path")
    return () if named is None else (Path(named),)


def _facts(task: Export, run: Run, form: Form, origin: Path) -> dict[str, Any]:
    counts = run.model.counts(run.model.max_seq_len)
    facts: dict[str, Any] = {
        "run": Path(task.source).name,
        "model": run.model.family,
        "parameters": f"{counts.parameters:,}",
        "weights": f"{form.dtype}{', linear ones in float8 with 128 x 128 scales' if form.fp8 else ''}",
        "torch": torch.__version__,
    }
    if counts.active != counts.parameters:
        facts["parameters of one token"] = f"{counts.active:,}"
    if is_complete(origin):
        values = json.loads((origin / VALUES).read_text())
        facts |= {"optimizer steps": step_of(origin), "tokens": f"{values['tokens']:,}", "seed": values["rng.seed"]}
        facts |= {"layout of the training": read_marker(origin).facts.get("layout")}
    return facts


def _check(
    task: Export,
    run: Run,
    network: ModelStages,
    team: HostGroup,
    draft: Path,
    tokenizer: Tokenizer,
    ids: list[int],
    before: Logits,
    form: Form,
) -> Finding:
    """Collective. The same on every rank."""
    after = read_back(network, team, draft, ids)
    exact = form.dtype == run.precision.storage and not form.fp8 and task.biases != "drop"
    if form.biases and run.model.routed and task.biases == "keep":
        return Finding([UNCOMPARED])
    storage = run.precision.storage
    return team.on_rank_zero(
        lambda: with_transformers(draft, tokenizer, task.text, before, after, storage, exact=exact)
    )


def _tell(finding: Finding, warnings: list[str]) -> None:
    with Console(0) as console:  # no steps, and so no bar
        for line in (*finding.lines, *warnings):
            console.say(line)


def _largest(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor
