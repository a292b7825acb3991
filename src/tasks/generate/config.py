"""task=generate: text from a checkpoint."""

import codecs
import json
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, model_validator

from src.config.base import Config, PathField, Place
from src.config.bounds import Sequences, Steps, Temperature, Tokens, Vocabulary
from src.data.tokenizer import vocabulary_problems
from src.errors import DataError
from src.models.base import pass_multiple

if TYPE_CHECKING:
    from src.run import Run


class Generate(Config):
    """Continue each prompt; texts are printed and written to generated.jsonl in the task's run folder."""

    needs_corpus: ClassVar[bool] = False
    forward_only: ClassVar[bool] = True
    # No rows are read: a prompt is as long as it is, and every pass is padded to what the layout can cut.
    steps: ClassVar[int] = 1
    seq_len: ClassVar[int] = 0

    source: Place = Field(alias="run")
    """Run folder, or hf:<folder or hub id>, whose model and tokenizer write."""
    step: Steps | None
    """Step of its checkpoint; null: the newest complete one."""
    ema: bool
    """True: the moving average of the weights that a run with task.ema_decay keeps; false: its weights."""
    prompt: str | None
    """Text to go on from; null: those of prompts."""
    prompts: PathField | None
    """File with many prompts: one a line, or in .jsonl under "prompt" of each line; null: that of prompt."""
    max_tokens: Tokens
    """Most tokens after each prompt; the end of a document ends a text sooner."""
    temperature: Temperature
    """Divisor of the logits; 0: always the likeliest token; chance comes from the top key `seed`."""
    top_k: Vocabulary | None
    """Likeliest tokens that are drawn from; null: all."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None
    """Probability of the likeliest tokens, together, that are drawn from; null: all."""
    batch: Sequences
    """Prompts at once on each data rank."""

    @model_validator(mode="after")
    def _chance_has_a_temperature(self) -> "Generate":
        for key in ("top_k", "top_p"):
            if self.temperature == 0 and getattr(self, key) is not None:
                raise ValueError(
                    f"{key}={getattr(self, key)} does nothing at temperature=0, which takes the likeliest token; "
                    f"pass {key}=null or a temperature such as 0.8"
                )
        return self

    @property
    def micro_batch(self) -> int:
        """Prompts in one forward pass of a data rank."""
        return self.batch

    @property
    def global_batch(self) -> int:
        """Prompts of one forward pass: there is no gradient to accumulate."""
        return self.batch

    def texts(self) -> list[str]:
        """The prompts. DataError when `prompts` is no readable file of them."""
        if self.prompts is None:
            assert self.prompt is not None, "else `problems` has refused"
            return [self.prompt]
        return read_prompts(self.prompts)

    def problems(self, run: "Run") -> list[str]:
        """Missing prompts, and those that do not fit max_seq_len. Runs on the launcher."""
        return self._measured(run)[1]

    def _measured(self, run: "Run") -> tuple[list[int], list[str]]:
        """Tokens of each prompt, and what is wrong with them."""
        if (self.prompt is None) == (self.prompts is None):
            line = 'task.prompt: pass a text with prompt="...", or a file of them with prompts=<file>; one of the two'
            return [], [line]
        if unfit := vocabulary_problems(run.tokenizer, run.model.vocab_size):
            return [], unfit  # and no tokenizer is trained in vain
        try:
            texts = self.texts()
            tokenizer = run.tokenizer.open(run.cache, run.data)
        except DataError as error:
            return [], list(error.problems)
        lengths = [len(tokenizer.prompt(text)) for text in texts]
        room, found = run.model.max_seq_len - self.max_tokens, []
        for number, length in enumerate(lengths, 1):
            which = f"prompt {number}" if self.prompts else "task.prompt"
            if length == 0:
                found.append(f"{which}: is empty, and this tokenizer begins no document by a token; give some text")
            elif length > room:
                found.append(
                    f"{which}: {length} tokens and task.max_tokens={self.max_tokens} are more than model.max_seq_len="
                    f"{run.model.max_seq_len}; at most task.max_tokens={max(run.model.max_seq_len - length, 0)}"
                )
        return lengths, found

    def remembered(self, run: "Run") -> tuple[int, int]:
        """For the key-value cache: prompts at once on a data rank, and tokens of the longest text; (0, 0) where
        there are problems.
        """
        lengths, found = self._measured(run)
        if found:
            return 0, 0
        texts = min(self.batch, ceil(len(lengths) / run.parallel.data_ranks))
        return texts, max(lengths) + self.max_tokens + pass_multiple(run.parallel)

    def computed(self, run: "Run") -> "Run":
        """Weights in the dtype of the products, kept whole where no FSDP cuts them: each token reads them all."""
        return run.resting_in_compute_dtype().holding_weights()

    def run(self, run: "Run", folder: Path) -> bool:
        """Run the task on this rank, from joining the process groups to leaving them. Collective."""
        from src.tasks.generate.rank import write

        return write(self, run, folder)


def read_prompts(file: Path) -> list[str]:
    """One prompt a line, empty lines skipped; of a .jsonl file the key `prompt` of each line."""
    if file.exists() and not file.is_file():
        raise DataError(f"task.prompts={file}: is no regular file, and launcher and ranks read it; write it to one")
    try:
        content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(f"task.prompts={file}: cannot be read as text ({error})") from error
    read: Callable[[bytes], str] = _row if file.suffix.lower() == ".jsonl" else bytes.decode
    prompts = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            prompts.append(read(line.rstrip(b"\r")))
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            raise DataError(f"task.prompts={file}, line {number}: is not UTF-8 text ({error.reason})") from error
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise DataError(
                f"task.prompts={file}, line {number}: is no JSON object with a text under prompt"
            ) from error
    if not prompts:
        raise DataError(f"task.prompts={file}: holds no prompt")
    return prompts


def _row(line: bytes) -> str:
    prompt = json.loads(line)["prompt"]
    if not isinstance(prompt, str):
        raise TypeError(f"{type(prompt).__name__} under prompt")
    prompt.encode()  # UnicodeEncodeError for half a surrogate pair
    return prompt
