"""Tasks of lm-evaluation-harness by their names, asked of our own model: the library is needed by nobody else.

It is imported where a task is asked for that is neither ours nor a file, on the launcher first, which also has it fetch
the task's data: ranks of a cluster may have no way out.
"""

import importlib.util
import logging
from collections.abc import Mapping, Sequence, Set
from statistics import fmean, stdev
from typing import Any

from src.config.wording import nearest
from src.errors import DataError
from src.evaluation.local_task import Answers
from src.evaluation.score import TaskScore, mean_score

INSTALL = "pip install lm_eval"
_UNTIL = "\n\n"
_MOST_WRITTEN = 256


def installed() -> bool:
    """Whether its tasks can be asked for."""
    return importlib.util.find_spec("lm_eval") is not None


def problems(names: Sequence[str]) -> list[str]:
    """Names that it does not know, and tasks whose data cannot be fetched; what can be is here afterwards."""
    _quiet()
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    found = []
    for name in names:
        if name not in manager.all_tasks:
            near = nearest(name, manager.all_tasks)
            meant = f"; did you mean {near}?" if near else ""
            found.append(f"evaluate.tasks: lm_eval has no task {name!r}{meant}")
            continue
        try:
            manager.load([name])
        except Exception as error:  # noqa: BLE001 (whatever a task's own code or a download raises)
            found.append(f"evaluate.tasks: lm_eval cannot open {name!r}: {type(error).__name__}: {error}")
    return found


def evaluate(
    names: Sequence[str], model: Answers, *, samples: int | None, fewshot: int | None, seeds: int
) -> dict[str, dict[str, TaskScore]]:
    """Scores by task and metric; of a group of tasks also those of its parts. Collective: each rank has all of them."""
    _quiet()
    from lm_eval.evaluator import evaluate as ask
    from lm_eval.tasks import TaskManager

    drawn: list[Mapping[str, Any]] = []
    for seed in range(seeds):
        loaded = TaskManager().load(list(names))
        for task in loaded["tasks"].values():
            _set_examples(task, fewshot, seed)
        # Without its own standard errors: it would fork processes for them, on every rank.
        greedy = {name for name, task in loaded["tasks"].items() if _asks_greedy(task)}
        found = ask(lm=_adapted(model, greedy), task_dict=loaded, limit=samples, bootstrap_iters=0, log_samples=True)
        if found is None:
            raise DataError(f"evaluate.tasks: lm_eval returned nothing for {', '.join(names)}")
        drawn.append(found)
        if not any(task.get_config("num_fewshot") for task in loaded["tasks"].values()):
            break  # nothing is drawn
    return {
        task: {metric: _score(drawn, task, f"{metric},{kept}") for metric, kept in _metrics(values)}
        for task, values in drawn[0]["results"].items()
    }


def _set_examples(task: Any, fewshot: int | None, seed: int) -> None:
    """As the harness's own command does: a task that says 0 stays at it."""
    own = task.get_config("num_fewshot")
    if fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=seed)


def _metrics(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Metric and filter of each number; of several filters the first."""
    names = [key.split(",") for key, value in values.items() if "," in key and isinstance(value, int | float)]
    kept: dict[str, str] = {}
    for metric, used in names:
        if not metric.endswith("_stderr"):
            kept.setdefault(metric, used)
    return list(kept.items())


def _score(drawn: Sequence[Mapping[str, Any]], task: str, key: str) -> TaskScore:
    values = [float(each["results"][task][key]) for each in drawn]
    metric, _, used = key.partition(",")
    documents = [
        [row.get(metric) for row in each.get("samples", {}).get(task, ()) if row.get("filter") == used]
        for each in drawn
    ]
    if all(isinstance(one, int | float) for each in documents for one in each) and all(map(len, documents)):
        own = mean_score([[float(one) for one in each] for each in documents])
        if abs(own.value - fmean(values)) < 1e-9:  # the mean is what it is: no perplexity
            return own
    return TaskScore(fmean(values), None, stdev(values) if len(values) > 1 else None)


def _quiet() -> None:
    """It tells every task and seed that it meets, on every rank."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _adapted(model: Answers, greedy: Set[str]) -> Any:
    """Our model in the harness's words; `greedy`: tasks that ask whether a text would be written."""
    from lm_eval.api.model import LM

    class Adapted(LM):  # type: ignore[misc]  # the library is optional, so its types are not known
        """Each rank asks for everything, and each has every answer."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            pairs = [(str(context), str(follows)) for context, follows, *_ in (each.args for each in requests)]
            asked = [number for number, each in enumerate(requests) if each.task_name in greedy]
            best = dict(zip(asked, model.greedy([pairs[number] for number in asked]), strict=True))
            likely = model.log_likelihoods(pairs)
            return [(nats, best.get(number, False)) for number, nats in enumerate(likely)]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return model.whole([str(each.args[0]) for each in requests])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            found: dict[int, str] = {}
            for until, most, numbers in _alike(requests):
                texts = model.written([str(requests[number].args[0]) for number in numbers], until, most)
                found |= dict(zip(numbers, texts, strict=True))
            return [found[number] for number in range(len(requests))]

    return Adapted()


def _asks_greedy(task: Any) -> bool:
    """Of several choices mostly the likelihoods alone count, and a greedy text costs a pass for each of its tokens."""
    return bool(task.OUTPUT_TYPE == "loglikelihood" or "exact_match" in task.aggregation())


def _alike(requests: Sequence[Any]) -> list[tuple[tuple[str, ...], int, list[int]]]:
    """Numbers of the requests that end alike. DataError for texts that are drawn by chance."""
    groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
    for number, each in enumerate(requests):
        asked = each.args[1]
        if asked.get("do_sample") or asked.get("temperature"):
            raise DataError(f"evaluate.tasks: {each.task_name} draws its texts by chance; only greedy ones are written")
        until = asked.get("until", _UNTIL)
        ends = (until,) if isinstance(until, str) else tuple(map(str, until))
        groups.setdefault((ends, int(asked.get("max_gen_toks", _MOST_WRITTEN))), []).append(number)
    return [(*key, numbers) for key, numbers in groups.items()]
