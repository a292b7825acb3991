"""The data of each stage of a run, and what they say of its plan."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from src.data.corpus import Corpus, known_commits
from src.errors import DataError
from src.planning.plan import Plan
from src.planning.staged.plans import read_by_stages, tokenizing_as, with_data
from src.run import Run

Feed = Callable[[Run, Mapping[str, str] | None], Corpus | None]  # of a run, with the commits that it has begun with


def feeds(run: Run, folder: Path, feed: Feed) -> list[Corpus]:
    """The tokenised data of each stage; of a run without stages what `feed` makes, if it needs any. DataError.

    `folder`: of the run, which goes on with the datasets as it has begun with them.
    """
    if not run.stages:
        return [each for each in [feed(run, known_commits(folder))] if each is not None]
    found: list[Corpus] = []
    for number, stage in enumerate(read_by_stages(run), 1):
        try:
            corpus = feed(tokenizing_as(stage, found[0]) if found else stage, known_commits(folder, number))
        except DataError as error:
            raise DataError(f"stage {number}: {line}" for line in error.problems) from error
        assert corpus is not None, "only a task that reads data has stages"
        found.append(corpus)
    return found


def fed(planned: Plan, run: Run, corpora: Sequence[Corpus]) -> Plan:
    """The plan with what the data say of it."""
    if not run.stages:
        return planned.with_data(run, corpora[0]) if corpora else planned
    return with_data(planned, run, corpora)
