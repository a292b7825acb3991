"""sweep=optuna: hyperparameter search, batch by batch; each batch is sampled knowing the results of earlier ones.

The ledger is the study's only memory: a killed search, or the same command with more trials, goes on from there.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import model_validator

from src.config.base import Config
from src.config.bounds import Count, CountFromZero, Seed
from src.config.build import build
from src.config.composition.requests import Request, point
from src.config.composition.space import Choices, Interval, ranges
from src.distributed.process.rank_context import joined
from src.errors import ConfigError, PlanError
from src.launch.start import ask_schedulers, checked
from src.sweeps.grid import SWEEPS, hand_over, in_group, ready, title
from src.sweeps.ledger import Ledger, SweepPoint
from src.sweeps.status import LIVE, OPEN, RunStatus
from src.tasks.source import completed

if TYPE_CHECKING:
    import optuna

POLL_SECONDS = 10.0
DRAWS = 20  # for each new point; a space of few choices repeats itself
Space = Mapping[str, Interval | Choices]


class Optuna(Config):
    """The objective is the final validation loss."""

    name: str | None
    """Name of the sweep's folder below <root>/sweeps and of its group; null: what the points' names share."""
    trials: Count
    """Points in all; more in a later call goes on from those that are there."""
    batch: Count
    """Points proposed at a time; on a cluster they run side by side."""
    sampler: Literal["tpe", "random"]
    """How points are drawn; tpe: by a tree-structured Parzen estimator of the results; random: blindly."""
    first_random: CountFromZero
    """Points drawn blindly before results count, with sampler=tpe."""
    seed: Seed
    """Seed of the draws."""

    @model_validator(mode="after")
    def _is_installed(self) -> "Optuna":
        if find_spec("optuna") is None:
            raise ValueError("the package optuna is not installed; pip install optuna, or choose sweep=grid")
        return self


def search(asked: Request, argv: Sequence[str], ledger: Ledger | None = None) -> int:
    """Draw, hand over, wait, until all trials are there; 1 when none of them finished. `ledger`: to be extended."""
    if joined():
        raise PlanError("a search starts its own ranks, one point after the other; leave the outer launcher out")
    space = ranges(asked.space)
    # Both ends of every range must make a run: a mistake is told before anything starts.
    trees = [point(asked.fixed, {key: each.ends[end] for key, each in space.items()}, completed).tree for end in (0, 1)]
    probes = checked(trees)
    if probes[0][1].dry_run:
        raise ConfigError("dry_run=true: a search has no plan before its points are drawn; give one value per key")
    ask_schedulers(probes)
    options = cast(Optuna, build(trees[0])["sweep"])
    salt = f"{asked.space} {options.sampler} {options.first_random} {options.seed}"
    if ledger is None:
        ledger = Ledger.make(probes[0][1].root / SWEEPS / title(trees, salt), argv, asked.space)
    print(f"ledger: {ledger.path}", file=sys.stderr)
    try:
        return Search(ledger, options, space, asked.fixed).run()
    except KeyboardInterrupt:
        print("the search stops; jobs go on, and the same command goes on from there", file=sys.stderr)
        return 130


class Search:
    """One command's part in a study."""

    def __init__(self, ledger: Ledger, options: Optuna, space: Space, fixed: Sequence[str]) -> None:
        self.ledger, self.options, self.space, self.fixed = ledger, options, space, fixed

    def run(self) -> int:
        """Points that an earlier command left open come first."""
        self._hand_over([each for each, standing in self.ledger.standings() if standing.state in OPEN])
        self._wait()
        while not self._stopped():
            known = self.ledger.standings()
            if len(known) >= self.options.trials or self._hopeless(known):
                break
            fresh = self._draw(known, min(self.options.batch, self.options.trials - len(known)))
            if not fresh:
                print("nothing new was drawn: the space may be used up", file=sys.stderr)
                break
            self._hand_over(fresh)
            self._wait()
        return self._conclude()

    def _draw(self, known: Sequence[tuple[SweepPoint, RunStatus]], count: int) -> list[SweepPoint]:
        """New points, written down; what was drawn before is drawn again, a few times."""
        study = remembered(self.options, self.space, known)
        there = [dict(each.proposal) for each, _ in known if each.proposal is not None]
        fresh: list[SweepPoint] = []
        for _ in range(DRAWS * count):
            drawn = study.ask(distributions(self.space)).params
            texts = {key: _text(self.space[key], value) for key, value in drawn.items()}
            proposal = {key: _value(self.space[key], text) for key, text in texts.items()}
            if proposal in there:
                continue
            there.append(proposal)
            composed = point(self.fixed, texts, completed)
            (tree,) = in_group([composed.tree], self.ledger.path.name)
            fresh.append(self.ledger.add(tree, composed.overrides, proposal))
            if len(fresh) == count:
                break
        return fresh

    def _hand_over(self, points: Sequence[SweepPoint]) -> None:
        entries, _ = ready(self.ledger, points)
        hand_over(self.ledger, entries, wait=True)

    def _wait(self) -> None:
        """For what an earlier command has submitted, too."""
        while any(standing.state in LIVE for _, standing in self.ledger.standings()):
            time.sleep(POLL_SECONDS)

    def _stopped(self) -> bool:
        return any(standing.state in OPEN - {"refused"} for _, standing in self.ledger.standings())

    def _hopeless(self, known: Sequence[tuple[SweepPoint, RunStatus]]) -> bool:
        """Whether a whole first round brought nothing: more of the same would only burn hours."""
        if len(known) < max(self.options.batch, self.options.first_random):
            return False
        return all(standing.state != "finished" for _, standing in known)

    def _conclude(self) -> int:
        known = self.ledger.standings()
        done = [(standing.loss, each) for each, standing in known if standing.state == "finished" and standing.loss]
        others = [standing.state for _, standing in known if standing.state != "finished"]
        print(f"{len(known)} points: {len(known) - len(others)} finished", file=sys.stderr)
        print("".join(f"  {others.count(state)} {state}\n" for state in dict.fromkeys(others)), end="", file=sys.stderr)
        if not done:
            return 1
        loss, best = min(done, key=lambda pair: pair[0])
        told = " ".join(f"{key}={best.overrides[key]}" for key in self.space)
        print(f"best: {told}\nloss {loss:.4f}: {best.folder}", file=sys.stderr)
        return 0


def remembered(options: Optuna, space: Space, known: Sequence[tuple[SweepPoint, RunStatus]]) -> "optuna.Study":
    """A study that has seen every point of the ledger.

    A diverged point counts as worse than every finished one, a failed one says nothing of its values.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = options.seed + len(known)  # each batch its own draws, the same at each call
    sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed)
    if options.sampler == "tpe":
        sampler = optuna.samplers.TPESampler(n_startup_trials=options.first_random, seed=seed, constant_liar=True)
    study = optuna.create_study(sampler=sampler)
    for each, standing in known:
        if each.proposal is None:
            continue
        state = _trial_state(standing)
        value = standing.loss if state == optuna.trial.TrialState.COMPLETE else None
        study.add_trial(
            optuna.trial.create_trial(
                state=state, value=value, params=dict(each.proposal), distributions=distributions(space)
            )
        )
    return study


def distributions(space: Space) -> "dict[str, optuna.distributions.BaseDistribution]":
    """Optuna's words for the ranges."""
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for key, each in space.items():
        if isinstance(each, Choices):
            found[key] = CategoricalDistribution(each.texts)
        elif each.whole:
            found[key] = IntDistribution(int(each.low), int(each.high), log=each.log)
        else:
            found[key] = FloatDistribution(each.low, each.high, log=each.log)
    return found


def _trial_state(standing: RunStatus) -> "optuna.trial.TrialState":
    from optuna.trial import TrialState

    if standing.state == "finished" and standing.loss is not None:
        return TrialState.COMPLETE if isfinite(standing.loss) else TrialState.PRUNED
    return TrialState.PRUNED if standing.state == "diverged" else TrialState.FAIL


def _text(each: Interval | Choices, value: Any) -> str:
    return each.text(value) if isinstance(each, Interval) else str(value)


def _value(each: Interval | Choices, text: str) -> str | int | float:
    """What a trial remembers: the value that ran, not the one that was drawn."""
    if isinstance(each, Choices):
        return text
    return int(text) if each.whole else float(text)
