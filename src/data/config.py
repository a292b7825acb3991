"""Config classes of the section `data`: one source, or a mixture of several with weights in tokens."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self, TypeVar

from pydantic import Field, InstanceOf, model_validator

from src.config.base import Config
from src.config.bounds import PerNode, Scale
from src.data.hub import BRANCH, HubSource
from src.data.packing.rules import Packing, RowRules
from src.data.sources import DataSource, HoldOut, Source, StdlibSource, SyntheticSource, TextSource
from src.data.token_files.config import TokenFileSource

OfHub = TypeVar("OfHub", bound=HubSource)


class Data(Config, ABC):
    """The keys that every choice of `data` has."""

    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Share of the documents held out; the content of a document decides its side."""
    hold_out: HoldOut
    """What is held out; documents: whole ones; ends: the last share of each, which serves where there are few."""
    packing: Packing
    """How samples are made of documents; concatenate: one stream, cut wherever a sample ends; best_fit: whole
    documents side by side, padded, of which only those are cut that are longer than a sample.
    """
    bos_at_row_start: bool
    """True: every sample begins with the tokenizer's begin of document, though it begins inside of one."""
    mask_document_starts: bool
    """True: no loss for predicting the first token of another document."""
    document_masks: bool
    """True: attention stays inside a document, positions restart with it; for model.mask=block_causal."""
    max_epochs: Scale | None
    """Most passes over a source, beyond which a run is refused; null: no limit."""
    processes: PerNode | None
    """Processes that tokenize; null: one per core."""

    @property
    def held_out_by(self) -> tuple[float | str, ...]:
        """What of a fingerprint says which texts are held out; whole documents, as every version did, go unnamed."""
        named = () if self.hold_out == "documents" else (self.hold_out,)
        return (self.validation_fraction, *named)

    def row_rules(self, bos: int | None, eos: int | None) -> RowRules:
        """How rows are made with the marks of a tokenizer."""
        return RowRules(self.packing, bos if self.bos_at_row_start else None, eos)

    def here(self, cache: Path) -> Self:
        """With the copies in the cache in the place of URLs, whether they are there yet."""
        return self

    @abstractmethod
    def parts(self) -> Mapping[str, tuple[float, DataSource]]:
        """Weight (not normalised) and source, by the source's name."""

    def pinned(self, cache: Path, commits: Mapping[str, str] | None) -> Self:
        """With each dataset of the hub at a commit (`HubSource.at_commit`): of a run that has begun the one in
        `commits`, by the source's name; where that has none, as it is named, as every version before did. DataError.
        """
        return self

    def branches(self, named: "Data") -> list[str]:
        """Lines on what was `named` by a branch of the hub, for a person: which commit of it is read."""
        found = []
        for name, (_, source) in self.parts().items():
            asked = named.parts()[name][1]
            if isinstance(asked, HubSource) and asked.commit is None and not asked.local:
                where = f"data: {name}: {asked.revision or BRANCH} of {asked.path}"
                known = source.commit and f"is commit {source.commit} here; data.revision= reads another"
                found.append(
                    f"{where} {known or 'as it was once: its commit was not kept by the version that read it'}"
                )
        return found


class Stdlib(StdlibSource, Data):
    def parts(self) -> dict[str, tuple[float, Source]]:
        return {"stdlib": (1.0, self)}


class Text(TextSource, Data):
    def parts(self) -> dict[str, tuple[float, Source]]:
        return {"text": (1.0, self)}


class Hub(HubSource, Data):
    def parts(self) -> dict[str, tuple[float, Source]]:
        return {"hub": (1.0, self)}

    def pinned(self, cache: Path, commits: Mapping[str, str] | None) -> Self:
        return _at_commit("hub", self, cache, commits)


class Synthetic(SyntheticSource, Data):
    def parts(self) -> dict[str, tuple[float, Source]]:
        return {"synthetic": (1.0, self)}


class TokenFiles(TokenFileSource, Data):
    def parts(self) -> dict[str, tuple[float, TokenFileSource]]:
        return {"tokens": (1.0, self)}


class Mixture(Data):
    """Every prefix of the sample order holds the weights, to within one sample of each source."""

    sources: dict[str, InstanceOf[DataSource]]
    """Sources by their names."""
    weights: dict[str, Scale]
    """Share of each source in tokens; only their ratios count."""

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        if not self.sources:
            raise ValueError("data.sources is empty: name at least one source")
        if self.sources.keys() != self.weights.keys():
            raise ValueError(
                f"data.weights names {', '.join(self.weights)} but data.sources names {', '.join(self.sources)}: "
                "give each source one weight"
            )
        return self

    def parts(self) -> dict[str, tuple[float, DataSource]]:
        return {name: (self.weights[name], self.sources[name]) for name in sorted(self.sources)}

    def here(self, cache: Path) -> Self:
        sources = {name: source.here(cache) for name, source in self.sources.items()}
        return self.model_copy(update={"sources": sources})

    def pinned(self, cache: Path, commits: Mapping[str, str] | None) -> Self:
        sources = {
            name: _at_commit(name, source, cache, commits) if isinstance(source, HubSource) else source
            for name, source in self.sources.items()
        }
        return self.model_copy(update={"sources": sources})


def _at_commit(name: str, source: OfHub, cache: Path, commits: Mapping[str, str] | None) -> OfHub:
    return source if commits is not None and name not in commits else source.at_commit(cache, (commits or {}).get(name))
