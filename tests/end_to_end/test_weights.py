"""Weights in and out of whole runs: any layout exports the same files, and training starts from them again."""

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from safetensors.torch import load_file

from src.errors import UserError
from src.hugging_face.archive import Archive
from src.models.llama3 import hugging_face
from src.models.stored import rope_keys
from tests.end_to_end.commands import command
from tests.end_to_end.lives import WORLDS, live, opened, series, values
from tests.hugging_face.foreign import edit, saved
from tests.ranks import RankPool

Straight = Callable[[str], Path]


def exported(ranks: RankPool, run: Path, *argv: str, layout: str = "single") -> None:
    more = (f"root={run.parent}", "cluster.gpus=0", f"parallel={layout}", f"name=export-{layout}")
    folder = opened("task=export", f"run={run}", *more, *argv)
    assert ranks(WORLDS[layout], live, folder) == [True] * WORLDS[layout]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def test_a_run_goes_out_and_comes_back_bit_for_bit(
    text: tuple[str, ...], straight: Straight, ranks: RankPool, tmp_path: Path
) -> None:
    """Exported on two layouts, the files are the same; a run that starts from them has the checkpoint's weights."""
    run = straight("single")
    for layout in ("single", "tp2"):
        exported(ranks, run, f"to={tmp_path / layout}", "task.check=false", layout=layout)
    files = [(tmp_path / layout / "model.safetensors").read_bytes() for layout in ("single", "tp2")]
    assert files[0] == files[1]
    start = (f"checkpoint.initial=hf:{tmp_path / 'single'}", "task.steps=1", "optim.lr=1e-30", "checkpoint.every=1")
    again = opened(*text, *start, "parallel=fsdp2", "name=again")
    assert ranks(2, live, again) == [True] * 2
    exported(ranks, again, f"to={tmp_path / 'again'}", "task.check=false")
    assert (tmp_path / "again/model.safetensors").read_bytes() == files[0]
    assert values(again, 1)["step"] == 1, "weights only: the steps begin anew"


def test_model_auto_trains_like_the_model_that_it_reads(
    text: tuple[str, ...], straight: Straight, ranks: RankPool, tmp_path: Path
) -> None:
    exported(ranks, straight("single"), f"to={tmp_path / 'out'}", "task.check=false")
    others = tuple(each for each in text if not each.startswith("model."))
    start = (f"checkpoint.initial=hf:{tmp_path / 'out'}", "task.steps=4")
    by_hand = opened(*text, *start, "name=hand")
    auto = opened(*others, *start, "model=auto", "name=auto")
    assert "_target_: src.models.llama3.config.Llama3Config" in (auto / "config.yaml").read_text()
    for folder in (by_hand, auto):
        assert ranks(1, live, folder) == [True]
    assert series(auto) == series(by_hand)
    assert series(auto)[1] < series(straight("single"))[1] - 1, "it begins where the other ended"


def test_weights_that_do_not_fit_start_nothing(text: tuple[str, ...], ranks: RankPool, tmp_path: Path) -> None:
    saved("llama", tmp_path / "theirs")
    edit(tmp_path / "theirs/config.json", vocab_size=258)
    (code, told) = command(*small(text, tmp_path / "theirs"))
    assert code == 2, told
    assert "model.embed_tokens.weight: shape [96, 64] found, [258, 64] expected" in told
    assert "Traceback" not in told
    assert not list(Path(text[-1].partition("=")[2]).glob("once-*")), "nothing was started"


def test_weights_without_a_tokenizer_are_told_so_on_the_launcher(tmp_path: Path) -> None:
    saved("llama-bytes", tmp_path / "theirs")
    argv = ("task=export", f"run=hf:{tmp_path / 'theirs'}", f"to={tmp_path / 'out'}", f"root={tmp_path}")
    with pytest.raises(UserError) as caught:
        opened(*argv, "cluster.gpus=0")
    (told,) = caught.value.problems
    assert told.startswith(f"tokenizer.path={tmp_path / 'theirs'}: needs tokenizer.json")
    assert told.endswith(" more. Pass tokenizer=file tokenizer.path=<folder with one>, or tokenizer=bytes")
    assert opened(*argv, "cluster.gpus=0", "tokenizer=bytes").is_dir()


def small(text: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    others = tuple(each for each in text if not each.startswith("model."))
    return (*others, "model=auto", "tokenizer=bytes", f"checkpoint.initial=hf:{folder}", "name=once")


def test_a_resumed_run_does_not_look_for_them(
    text: tuple[str, ...], straight: Straight, ranks: RankPool, tmp_path: Path
) -> None:
    exported(ranks, straight("single"), f"to={tmp_path / 'out'}", "task.check=false")
    argv = (*text, f"checkpoint.initial=hf:{tmp_path / 'out'}", "name=resumed", "task.steps=4", "checkpoint.every=2")
    folder = opened(*argv)
    assert ranks(1, live, folder) == [True]
    (tmp_path / "out").rename(tmp_path / "gone")
    further = opened(*argv, f"folder={folder}")
    assert ranks(1, live, further) == [True]
    assert json.loads((folder / "initial.json").read_text())["folder"] == str(tmp_path / "out")


def test_an_export_beside_the_training_is_that_of_the_checkpoint(
    text: tuple[str, ...], ranks: RankPool, tmp_path: Path
) -> None:
    argv = ("checkpoint.export_every=5", "checkpoint.every=5", "task.steps=12", "parallel=fsdp2", "name=beside")
    folder = opened(*text, *argv)
    assert ranks(2, live, folder) == [True] * 2
    assert sorted(path.name for path in (folder / "exports").iterdir()) == ["step_00000005", "step_00000010"]
    exported(ranks, folder, "step=10", f"to={tmp_path / 'out'}", "task.check=false")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        folder / "exports/step_00000010/model.safetensors"
    ).read_bytes()
    assert set(series(folder, "export/write_seconds")) == {5, 10}


@pytest.mark.slow
def test_a_wrong_export_beside_the_training_is_told_and_does_not_end_it(text: tuple[str, ...], ranks: RankPool) -> None:
    folder = opened(*text, "checkpoint.export_every=5", "task.steps=6", "parallel=fsdp2", "name=besidewrong")
    assert ranks(2, live_with_another_theta, folder) == [True] * 2
    assert [path.name for path in (folder / "exports").iterdir()] == ["step_00000005.partial"]
    assert series(folder, "export/write_seconds") == {}
    assert list(series(folder)) == list(range(1, 7))


def test_a_wrong_folder_is_not_put_in_its_place(straight: Straight, ranks: RankPool, tmp_path: Path) -> None:
    """transformers is told another base of the rotary angles than the model has: logits differ, and all say so."""
    folder = opened(
        "task=export",
        f"run={straight('single')}",
        f"root={straight('single').parent}",
        f"to={tmp_path / 'out'}",
        "cluster.gpus=0",
        "parallel=fsdp2",
        "name=wrong",
    )
    first, second = ranks(2, live_with_another_theta, folder)
    assert first == second
    assert f"{tmp_path / 'out.partial'}: transformers' logits differ by" in first[0]
    assert not (tmp_path / "out").exists()


def live_with_another_theta(folder: Path) -> bool | tuple[str, ...]:
    write = hugging_face.write
    with patch.object(hugging_face, "write", lambda config: write(config) | rope_keys(10.0, None)):
        return live(folder)


SOFTMAX = (
    *("model=deepseek_v3_debug", "model.kv_lora_rank=16", "model.qk_nope_head_dim=8", "model.qk_rope_head_dim=8"),
    *("model.v_head_dim=8", "model.ffn_dim=64", "model.moe.hidden_dim=16", "task.steps=3", "name=softmax"),
)


def test_biases_that_transformers_has_no_place_for(text: tuple[str, ...], ranks: RankPool, tmp_path: Path) -> None:
    """Refused, or dropped, which changes logits, or kept, and then they come back."""
    run = opened(
        *(each for each in text if not each.startswith(("model.n_kv", "model.mult"))),
        *SOFTMAX,
        "checkpoint.export_every=3",
    )
    assert ranks(1, live, run) == [True]
    argv = ("task=export", f"run={run}", f"root={run.parent}", "cluster.gpus=0")
    refused = opened(*argv, f"to={tmp_path / 'refused'}", "name=refused")
    ((told,),) = ranks(1, live, refused)
    assert told.startswith("task.biases=refuse: this model's routers have softmax scores and biases")
    for how in ("drop", "keep"):
        exported(ranks, run, f"to={tmp_path / how}", f"task.biases={how}", f"name={how}")
    dropped, kept = weights(tmp_path / "drop"), weights(tmp_path / "keep")
    biases = {key for key in kept if key.endswith("e_score_correction_bias")}
    assert kept.keys() - dropped.keys() == biases
    assert biases == {"model.layers.1.mlp.gate.e_score_correction_bias"}
    beside = (run / "exports/step_00000003/model.safetensors").read_bytes()
    assert beside == (tmp_path / "keep/model.safetensors").read_bytes(), "exports beside the training keep them"
    exported(
        ranks, Path(f"hf:{tmp_path / 'keep'}"), f"to={tmp_path / 'again'}", "task.biases=keep", f"root={run.parent}"
    )
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "keep/model.safetensors").read_bytes()


QWEN3 = {
    "dense": ("model=qwen3_debug", "model.head_dim=8", "model.ffn_dim=64", "model.tie_word_embeddings=true"),
    "experts": (
        "model=qwen3_moe_debug",
        "model.head_dim=8",
        "model.moe.hidden_dim=16",
        "model.moe.load_balance_coeff=null",
    ),
}


@pytest.mark.parametrize("kind", QWEN3)
def test_a_qwen3_computes_the_same_in_transformers(
    text: tuple[str, ...], ranks: RankPool, tmp_path: Path, kind: str
) -> None:
    """The task compares logits with transformers', and fails where they differ; then the weights come back."""
    run = opened(
        *(each for each in text if not each.startswith("model.mult")), *QWEN3[kind], "task.steps=3", f"name={kind}"
    )
    assert ranks(1, live, run) == [True]
    exported(ranks, run, f"to={tmp_path / 'out'}")
    again = (f"to={tmp_path / 'again'}", "task.check=false", f"root={run.parent}", "name=again")
    exported(ranks, Path(f"hf:{tmp_path / 'out'}"), *again, layout="tp2")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


@pytest.mark.parametrize("form", [("dtype=bfloat16",), ("fp8=true", "task.shard_gb=0.00002")])
def test_other_forms_load_in_transformers(
    straight: Straight, ranks: RankPool, tmp_path: Path, form: tuple[str, ...]
) -> None:
    """The task itself compares logits; here, that nothing is missing or unexpected, and what the folder holds."""
    exported(ranks, straight("single"), f"to={tmp_path / 'out'}", *form, layout="fsdp2")
    archive = Archive.open(tmp_path / "out")
    dtypes = {entry.dtype for key, entry in archive.entries.items() if key.endswith("q_proj.weight")}
    assert dtypes == {"bfloat16" if form == ("dtype=bfloat16",) else "float8_e4m3fn"}
    if archive.quantised:
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
        return
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("kära")["input_ids"] == [256, *"kära".encode()]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257)
    assert model.generation_config.eos_token_id == 257
    assert "| optimizer steps | 12 |" in (tmp_path / "out/README.md").read_text()


def test_the_command_says_what_it_found(straight: Straight, tmp_path: Path) -> None:
    """With what would be sent, and the refusal of a place that is taken."""
    run = straight("single")
    argv = ("task=export", f"run={run}", "step=12", "push=me/my-model", "cluster.gpus=0", f"root={run.parent}")
    code, told = command(*argv, f"to={tmp_path / 'out'}")
    assert code == 0, told
    assert "read back: the same bits" in told
    assert "transformers' logits differ by at most " in told
    assert "greedy continuation of 'The first rays" in told
    assert "would send to me/my-model (pass task.send=true to do it):" in told
    assert "MB  model.safetensors" in told
    code, told = command(*argv, f"to={tmp_path}")
    assert (code, "is there and was not written by an export; pass another to=..." in told) == (2, True), told
    code, told = command(*argv[:2], "step=15", f"root={run.parent}")
    assert code == 2
    assert "has no complete checkpoint of that step; it has 6, 12" in told
