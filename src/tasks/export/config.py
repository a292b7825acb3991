"""task=export: a checkpoint as a folder in Hugging Face layout."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from src.checkpoint.config import FOREIGN
from src.config.base import Config, Place
from src.config.bounds import Gibibytes, Steps
from src.config.tree import read
from src.data.tokenizer import vocabulary_problems
from src.errors import CheckpointError, DataError, RemoteError
from src.storage.remote import is_url

if TYPE_CHECKING:
    from src.run import Run


class Export(Config):
    """Write a checkpoint in Hugging Face layout, check it, and push it if asked to."""

    needs_corpus: ClassVar[bool] = False
    forward_only: ClassVar[bool] = True
    # No rows are read; the text that is compared is padded to what the layout can cut.
    steps: ClassVar[int] = 1
    seq_len: ClassVar[int] = 0
    global_batch: ClassVar[int] = 1
    micro_batch: ClassVar[int] = 1

    source: Place = Field(alias="run")
    """Run folder, or hf:<folder or hub id> to write it anew in another dtype."""
    step: Steps | None
    """Step of its checkpoint; null: the newest complete one."""
    ema: bool
    """True: the moving average of the weights that a run with task.ema_decay keeps; false: its weights."""
    to: Place | None
    """Folder to write, or its URL, such as s3://bucket/models/mine; null: <run>/exports/step_XXXXXXXX."""
    dtype: Literal["float32", "bfloat16", "float16"] | None
    """Dtype of the weights; null: as the checkpoint has them, so nothing is rounded; with fp8 bfloat16."""
    fp8: bool
    """True: linear weights in float8 (e4m3) with a scale for each block of 128 x 128, the others in dtype."""
    fp8_scales: Literal["float32", "e8m0"]
    """Dtype of these scales; float32: as DeepSeek-V3 has them; e8m0: powers of two, a byte each."""
    biases: Literal["refuse", "drop", "keep"]
    """Biases of softmax routers, for which transformers has no place; keep: vLLM reads them, and so does an import."""
    shard_gb: Gibibytes
    """Largest file, in 10^9 bytes."""
    check: bool
    """True: read it back and compare its logits with transformers', if that is installed."""
    text: str
    """Text that the check computes logits of."""
    push: str | None
    """Hub id to send it to, such as me/my-model; null: nothing is sent."""
    send: bool
    """False: say what push= would send; true: send it, to a private repository if it is new; HF_TOKEN must be set."""

    @field_validator("push")
    @classmethod
    def _names_a_repository(cls, push: str | None) -> str | None:
        from src.hugging_face.hub import HUB_NAME

        if push is not None and ("@" in push or not HUB_NAME.fullmatch(push)):
            raise ValueError(f"{push!r} is no hub id; such as me/my-model")
        return push

    @property
    def target(self) -> Path:
        """The folder that is written, where it is no `url`."""
        if self.to is not None:
            return Path(self.to).expanduser().absolute()
        form = "".join(
            f"-{part}"
            for part in ("ema" if self.ema else None, self.dtype, "fp8" if self.fp8 else None, self._scales)
            if part
        )
        return Path(self.source) / "exports" / f"step_{self.step or 0:08d}{form}"

    @property
    def url(self) -> str | None:
        """Where the folder is sent from the one of this task's own run."""
        return self.to if self.to is not None and is_url(self.to) else None

    @property
    def _scales(self) -> str | None:
        return None if self.fp8_scales == "float32" else self.fp8_scales

    def problems(self, run: "Run") -> list[str]:
        """A model that transformers does not have, a target that exists, a tokenizer that is missing or too large for
        the model. Runs on the launcher.
        """
        from src.hugging_face.save import refuse_foreign, refuse_foreign_url
        from src.models.hugging_face import export_problems

        found: list[str] = []
        if self.to is None and self.source.startswith(FOREIGN):
            found.append(f"task.to=null: {self.source} is no run folder to write into; pass to=<folder>")
        if self._scales is not None and not self.fp8:
            found.append(f"task.fp8_scales={self.fp8_scales}: no weight is float8; pass fp8=true, or leave it out")
        found += [*export_problems(run.model), *self._dtype_problems(run)]
        try:
            refuse_foreign(self.target) if self.url is None else refuse_foreign_url(self.url)
        except (CheckpointError, RemoteError) as error:
            found += error.problems
        if unfit := vocabulary_problems(run.tokenizer, run.model.vocab_size):
            return found + unfit
        try:
            run.tokenizer.open(run.cache, run.data)
        except DataError as error:
            found += error.problems
        return found

    def _dtype_problems(self, run: "Run") -> list[str]:
        """A typed precision.storage that is not the run's."""
        if self.source.startswith(FOREIGN):
            return []
        if not (config := Path(self.source) / "config.yaml").is_file():
            return []  # src/tasks/source.py has said that it is no run
        saved, storage = read(config)["precision"]["storage"], run.precision.storage
        if storage == saved:
            return []
        return [
            f"precision.storage={storage}: {self.source} has saved {saved}, and an export reads weights as they are; "
            f"leave precision out, and pass dtype={storage} to write them so"
        ]

    def computed(self, run: "Run") -> "Run":
        """Weights as they were saved, arithmetic in float32, attention that is causal: what a comparison needs."""
        precision = run.precision.model_copy(update={"compute": "float32", "reduce": "float32", "float8": None})
        return replace(
            run,
            model=run.model.model_copy(update={"attention": "sdpa", "mask": "causal"}),
            precision=precision,
            recompute=run.recompute.model_copy(update={"mode": "none", "every": None, "budget": None}),
            compile=run.compile.model_copy(update={"blocks": False, "loss": False}),
            parallel=run.parallel.model_copy(update={"async_tensor": False}),
        )

    def run(self, run: "Run", folder: Path) -> bool:
        """Run the task on this rank, from joining the process groups to leaving them. Collective. VerdictError when
        transformers computes other logits.
        """
        from src.tasks.export.rank import export

        return export(self, run, folder)
