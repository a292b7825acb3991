"""The weights of a run as what evaluation tasks ask: likelihoods and texts, in the layout that trains, unconverted."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from src.data.batches import Batch
from src.data.tokenizer import Tokenizer
from src.distributed.model_stages import ModelStages
from src.models.base import pass_multiple
from src.models.cross_entropy import IGNORED
from src.tasks.generate.decoding import generate
from src.tasks.generate.sampling import SamplingParams
from src.train.validate import StoppedError, row_sums

GREEDY = SamplingParams(0.0)
# Rows are padded to a power of two of so many times what a layout can cut evenly: 16 at least, as float8 products ask.
UNITS = 8


@dataclass(frozen=True)
class ScoredIds:
    """Ids of which the last `scored` are predicted from those before each."""

    ids: tuple[int, ...]
    scored: int


class LanguageModel:
    """Answers of src/evaluation/local_task.py. Texts longer than `length` tokens lose their beginning."""

    def __init__(
        self,
        network: ModelStages,
        tokenizer: Tokenizer,
        *,
        length: int,
        rows: int,
        ends: Collection[int],
        stopped: Callable[[], bool],
    ) -> None:
        """`length`, `rows`: of a micro-batch of training, which fits; `ends`: ids that end a text; `stopped`: a vote of
        all ranks, asked between batches, which ends with StoppedError.
        """
        self.network, self.tokenizer, self.length, self.rows = network, tokenizer, length, rows
        self.ends, self.stopped = ends, stopped
        mark = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        self.mark = [] if mark is None else [mark]  # where a document begins

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        return self._scored([[self._piece(*self._encoded(*pair))] for pair in pairs])

    def whole(self, texts: Sequence[str]) -> list[float]:
        return self._scored([self._windows(text) for text in texts])

    def greedy(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        encoded = [self._encoded(*pair) for pair in pairs]
        found: dict[int, bool] = {}
        for count in sorted({len(follows) for _, follows in encoded}):
            numbers = [number for number, (_, follows) in enumerate(encoded) if len(follows) == count]
            if count >= self.length:  # no model of this length writes it
                found |= dict.fromkeys(numbers, False)
                continue
            prompts = [self._end(encoded[number][0], self.length - count) for number in numbers]
            texts = self._generated(prompts, count, ends=())
            found |= {number: text == encoded[number][1] for number, text in zip(numbers, texts, strict=True)}
        return [found[number] for number in range(len(pairs))]

    def written(self, prompts: Sequence[str], until: Sequence[str], most: int) -> list[str]:
        count = min(most, max(self.length // 2, 1))
        read = [self._end(self._prompt(each), self.length - count) for each in prompts]
        return [_cut(self.tokenizer.decode(ids), until) for ids in self._generated(read, count, self.ends)]

    def _prompt(self, text: str) -> list[int]:
        return self.tokenizer.prompt(text, add_eos=False) if text else list(self.mark)

    def _encoded(self, context: str, follows: str) -> tuple[list[int], list[int]]:
        """Ids of both, split where those of the context alone end; a space between them is of what follows."""
        bare = context.rstrip()
        context, follows = bare, context[len(bare) :] + follows
        if not context:
            (ids,) = self.tokenizer.encode([follows])
            return list(self.mark), ids.tolist()
        before, whole = self._prompt(context), self._prompt(context + follows)
        return whole[: len(before)], whole[len(before) :]

    def _piece(self, context: list[int], follows: list[int]) -> ScoredIds:
        ids = (*context, *follows)[-self.length - 1 :]
        return ScoredIds(ids, min(len(follows), len(ids) - 1))

    def _windows(self, text: str) -> list[ScoredIds]:
        """Each token once, in windows of `length` that do not overlap but for the last one's context."""
        (encoded,) = self.tokenizer.encode([text])
        ids = [*self.mark, *encoded.tolist()]
        ends = range(self.length + 1, len(ids) + self.length, self.length)
        found = []
        for last in ends:
            stop = min(last, len(ids))
            found.append(ScoredIds(tuple(ids[max(stop - self.length - 1, 0) : stop]), stop - (last - self.length)))
        return found

    def _scored(self, texts: Sequence[Sequence[ScoredIds]]) -> list[float]:
        """Nats (negative) of each text, over its pieces. Collective."""
        pieces = [(number, piece) for number, many in enumerate(texts) for piece in many if piece.scored > 0]
        pieces.sort(key=lambda each: len(each[1].ids), reverse=True)  # stable: all ranks agree; the fullest come first
        total = [0.0] * len(texts)
        # Documents and blocks are masks that a compiler makes for one length; else each batch has a length of its own.
        masked = self.network.stages[0].config.attention == "flex"
        with torch.compiler.set_stance("default" if masked else "force_eager"):
            nats, _ = row_sums(self.network, self._batches([each for _, each in pieces], fixed=masked), self.stopped)
        for (number, _), lost in zip(pieces, nats, strict=False):
            total[number] -= lost
        return total

    def _batches(self, pieces: Sequence[ScoredIds], *, fixed: bool) -> Iterator[Batch]:
        """This data rank's micro-batches, as many on every rank; row i of micro-batch m on rank r is piece
        (m * ranks + r) * rows + i.
        """
        mesh, together = self.network.mesh, self.network.mesh.data_ranks * self.rows
        group = together * self.network.width
        for first in range(0, len(pieces), group):
            longest = max(len(each.ids) - 1 for each in pieces[first : first + group])
            length = self.length if fixed else self._padded(longest)
            for start in range(first, min(first + group, len(pieces)), together):
                mine = start + mesh.data_rank * self.rows
                yield self._batch(pieces[mine : mine + self.rows], length)

    def _padded(self, longest: int) -> int:
        padded = UNITS * pass_multiple(self.network.mesh.degrees)
        while padded < longest:
            padded *= 2
        return min(padded, self.length)

    def _batch(self, pieces: Sequence[ScoredIds], length: int) -> Batch:
        tokens = torch.zeros(self.rows, length, dtype=torch.int64)
        labels = torch.full_like(tokens, IGNORED)
        for row, piece in enumerate(pieces):
            ids = torch.tensor(piece.ids)
            tokens[row, : len(ids) - 1] = ids[:-1]
            labels[row, len(ids) - 1 - piece.scored : len(ids) - 1] = ids[len(ids) - piece.scored :]
        documents = torch.zeros(tokens.shape, dtype=torch.int32)
        within = self.network.stages[0].config.within_documents
        return Batch(tokens, labels, None, documents if within else None, ())

    def _generated(self, prompts: Sequence[list[int]], count: int, ends: Collection[int]) -> list[list[int]]:
        together, found = self.rows * self.network.mesh.data_ranks, list[list[int]]()
        for first in range(0, len(prompts), together):
            if self.stopped():
                raise StoppedError
            some = prompts[first : first + together]
            found += generate(self.network, some, count=count, rule=GREEDY, seed=0, ends=ends, batch=self.rows)
        return found

    @staticmethod
    def _end(ids: list[int], most: int) -> list[int]:
        """The last of a prompt, which has one token at least: a text of a tokenizer without marks begins after id 0."""
        return ids[-most:] or [0]


def _cut(text: str, until: Sequence[str]) -> str:
    """Up to the first of these."""
    ends = [place for mark in until if mark and (place := text.find(mark)) >= 0]
    return text[: min(ends)] if ends else text
