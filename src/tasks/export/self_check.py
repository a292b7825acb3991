"""Checks an exported folder against the run: our model reads it back, and transformers loads it by itself."""

import importlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.checkpoint.host_group import HostGroup
from src.data.tokenizer import StoredTokenizer, Tokenizer
from src.data.tokenizer_files import needs_vendor_code, read_codec
from src.data.tokenizer_formats.sentencepiece_form import SentencePieceCodec
from src.distributed.model_stages import ModelStages
from src.hugging_face.archive import quantisation, read_json
from src.hugging_face.check import SCALE
from src.hugging_face.load import load
from src.hugging_face.write import BLOCK
from src.models.base import pass_multiple

PLACES = 8  # of the text
SENTENCE = 24  # tokens that transformers goes on with
# Both compute in float32, in another order, some hundred sums deep: of the largest logit.
TOLERANCE = 2e-4
Logits = Mapping[int, Tensor]  # by place in the text: (vocabulary) float32 on the host


@dataclass
class Finding:
    """Report of a check; `problems` are reasons not to use the folder."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def places_of(ids: Sequence[int]) -> list[int]:
    """PLACES positions spread over a text, the last included."""
    return sorted({(len(ids) - 1) * place // (PLACES - 1) for place in range(PLACES)})


def native_logits(network: ModelStages, ids: Sequence[int]) -> Logits:
    """Our logits at `places_of(ids)`. Collective."""
    padding = -len(ids) % pass_multiple(network.mesh.degrees)  # comes after, where nobody looks
    row = torch.tensor([[*ids, *[0] * padding]], device=network.device)
    with network.inference():
        return {place: network.logits(row, place, None, None)[0].float().cpu() for place in places_of(ids)}


def read_back(network: ModelStages, team: HostGroup, folder: Path, ids: Sequence[int]) -> Logits:
    """Load the folder's weights into the network, which keeps them; returns its logits. Collective."""
    team.on_all(lambda: load(folder, network.tensors(), network.stages[0].config))
    return native_logits(network, ids)


def with_transformers(
    folder: Path, tokenizer: Tokenizer, text: str, before: Logits, after: Logits, storage: str, *, exact: bool
) -> Finding:
    """Compare with transformers, on one rank. `before`, `after`: logits of the run's and the folder's weights;
    `storage`: dtype that the run rests them in; `exact`: nothing was rounded.
    """
    finding = Finding()
    moved = _difference(before, after)
    if exact and moved > 0:
        finding.problems.append(
            f"{folder}: read back, its weights move logits by {moved:.3g}; they must be the same bits"
        )
    finding.lines.append(f"rounding moves logits by at most {moved:.3g}" if not exact else "read back: the same bits")
    if (why_not := obstacle(folder)) is not None:
        finding.lines.append(f"not compared: {why_not}")
        return finding
    ids = tokenizer.prompt(text)[: max(after) + 1]
    compare(folder, text, ids, after, storage, finding, gpu=True)
    if needs_vendor_code(folder):
        finding.lines.append("its tokenizer was not compared: transformers opens it with the vendor's code only")
    elif not finding.problems:
        finding.problems += tokenizer_problems(folder, tokenizer, text)
    return finding


def obstacle(folder: Path) -> str | None:
    """Why transformers cannot read the folder here."""
    if find_spec("transformers") is None:
        return "transformers is not installed"
    needed = sum(path.stat().st_size for path in folder.glob("*.safetensors")) * 4
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed <= free:
        return None
    return f"transformers would need up to {needed / 2**30:.0f} GiB of this host's {free / 2**30:.0f}"


def compare(
    folder: Path, text: str, ids: Sequence[int], ours: Logits, storage: str, finding: Finding, *, gpu: bool
) -> None:
    """Add transformers' logits beside ours, and its continuation of the text, to `finding`.

    `storage`: dtype that our weights rested in; `gpu`: on a GPU with room.
    """
    try:
        theirs = _theirs(folder, ids, list(ours), storage, gpu=gpu)
    except Exception as error:  # noqa: BLE001  (whatever it raises, the folder is of no use to it)
        said = str(error).strip().partition("\n")[0]
        finding.problems.append(f"{folder}: transformers cannot use it: {type(error).__name__}: {said}")
        return
    if strangers := {key: found for key, names in theirs.info.items() if (found := _strangers(folder, names))}:
        finding.problems.append(f"{folder}: transformers tells of {strangers}")
    difference, largest = _difference(theirs.logits, ours), max(float(each.abs().max()) for each in ours.values())
    finding.lines.append(
        f"transformers' logits differ by at most {difference:.3g} (the largest is {largest:.3g}), "
        f"compared at {len(ours)} of the {len(ids)} tokens of task.text"
    )
    if not difference <= TOLERANCE * max(1.0, largest):
        finding.problems.append(
            f"{folder}: transformers' logits differ by {difference:.3g} where the largest is {largest:.3g}; it is left "
            "there for a look, and must not be used"
        )
    finding.lines.append(f"its greedy continuation of {text!r}: {read_codec(folder).decode(theirs.written)!r}")


def _strangers(folder: Path, names: Iterable[Any]) -> list[Any]:
    """Without the layers of multi-token prediction, of which transformers by itself passes over number 61 alone."""
    facts = read_json(folder / "config.json")
    first, depths = facts.get("num_hidden_layers", 0), facts.get("num_nextn_predict_layers") or 0
    further = tuple(f"model.layers.{layer}." for layer in range(first, first + depths))
    return sorted(name for name in names if not (isinstance(name, str) and name.startswith(further)))


@dataclass(frozen=True)
class _Theirs:
    """What transformers makes of a folder."""

    logits: Logits
    written: list[int]  # its greedy continuation
    info: Mapping[str, Any]  # what it missed or did not expect in the files


def _theirs(folder: Path, ids: Sequence[int], places: Sequence[int], storage: str, *, gpu: bool) -> _Theirs:
    model, info = _opened(folder, storage, gpu=gpu)
    row = torch.tensor([list(ids)], device=next(model.parameters()).device)
    with torch.no_grad():
        logits = model(row).logits[0].float().cpu()
        written = model.generate(row, max_new_tokens=SENTENCE, do_sample=False, attention_mask=torch.ones_like(row))
    return _Theirs({place: logits[place] for place in places}, written[0, len(ids) :].tolist(), info)


def _opened(folder: Path, storage: str, *, gpu: bool) -> tuple[Any, dict[str, Any]]:
    """transformers' model in float32 with weights as rounded as ours, and what it missed or did not expect."""
    logging.disable(logging.WARNING)  # torchao, which it imports, warns of kernels that this machine cannot load
    try:
        transformers: Any = importlib.import_module("transformers")
        importlib.import_module("transformers.quantizers.auto")
    finally:
        logging.disable(logging.NOTSET)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    given: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    if quantisation(read_json(folder / "config.json")) is None:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **given)
    else:
        # Its own reader of float8 divides rows by rows of scales, which is no 128 where a matrix has 576 rows.
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        del config.quantization_config
        given |= {"config": config, "state_dict": multiplied_out(folder)}
        family = getattr(transformers, config.architectures[0])
        model, info = family.from_pretrained(None, **given)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, storage)))
    size = sum(parameter.nbytes for parameter in model.parameters())
    if gpu and torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.3 * size:
        model = model.cuda()
    return model.eval(), info


def multiplied_out(folder: Path) -> dict[str, Tensor]:
    """All tensors of a float8 folder, whole and in float32: not by the code that reads shards, which this is to check.

    One scale for each 128 x 128 block of a matrix, the last ones cut off by its edges.
    """
    from safetensors.torch import load_file

    found = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
    for key in [key for key in found if key.endswith(SCALE)]:
        scale, name = found.pop(key).float(), key.removesuffix(SCALE)
        rows, columns = found[name].shape
        whole = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
        found[name] = found[name].float() * whole
    return {key: tensor.float() for key, tensor in found.items()}


def tokenizer_problems(folder: Path, tokenizer: Tokenizer, text: str) -> list[str]:
    """Of the text alone: whether it is begun by a token is a habit of each.

    So is a leading space with a sentencepiece model: the library puts one more before it, transformers 5 does not.
    """
    transformers: Any = importlib.import_module("transformers")
    opened = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if isinstance(tokenizer, StoredTokenizer) and isinstance(tokenizer.codec, SentencePieceCodec):
        text = text.lstrip(" ")
    (ours,), theirs = tokenizer.encode([text]), opened(text, add_special_tokens=False)["input_ids"]
    if theirs == ours.tolist():
        return []
    return [f"{folder}: transformers' tokenizer makes {theirs[:8]}... of the text, the run's {ours.tolist()[:8]}..."]


def _difference(first: Logits, second: Logits) -> float:
    return max(float((first[place] - second[place]).abs().max()) for place in second)
