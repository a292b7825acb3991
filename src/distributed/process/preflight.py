"""Preflight check: rendezvous and one all-reduce before anything slow; ranks that miss are named by their node."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from src.distributed.process.rank_context import DeviceType, LauncherEnv, join_all, prepare_connections

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store

_POLL_SECONDS = 0.05
_MARGIN_SECONDS = 60.0
# A rank arrives when it has imported torch, which a cold disk may stretch to a minute on one node and not on another.
_ARRIVAL_SHARE = 3
_ARRIVED, _ANSWER = "arrived", "answer"  # keys of the store


class PreflightError(RuntimeError):
    """The machines, not the run: `node` is the one to leave out, where one can be named."""

    def __init__(self, text: str, node: str | None) -> None:
        super().__init__(text, node)
        self.text, self.node = text, node

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Presence:
    """Facts that a rank reports about itself."""

    rank: int
    node: str
    device: str
    world: int


def preflight(
    facts: LauncherEnv,
    device_type: DeviceType,
    world: int,
    nodes: Sequence[str],
    address: tuple[str, int],
    seconds: float,
    *,
    traces: Path | None = None,
    then: "Callable[[torch.device], None] | None" = None,
) -> list[Presence]:
    """Collective. PreflightError on every rank that arrived, instead of a hang; otherwise rank 0 is told of all ranks,
    in order, and each other one of itself. More ranks than one are joined in the default group then, which is that of
    what follows (`RankContext.join`); `leave_all` ends it.

    `nodes`: names by node number. `address`: where rank 0 can open a rendezvous.
    `seconds`: for the sum, and three times that without one more rank arriving. `traces`: folder for the flight
    recorder's dumps. `then`: called on each rank's device once all are joined, collective.
    """
    if facts.world != world:
        raise PreflightError(f"{facts.world} ranks were started, but the plan has {world}", None)
    if (expected := facts.rank % facts.local_world) != facts.local_rank:
        raise PreflightError(
            f"rank {facts.rank} is number {facts.local_rank} of its node, not {expected}: the layout takes ranks to be "
            "numbered node by node; leave the batch system's distribution of tasks alone, or pass block",
            None,
        )
    node = nodes[facts.rank // facts.local_world]
    mine = Presence(facts.rank, node, _device(facts, device_type, node), facts.world)
    if world == 1:
        return [mine]
    prepare_connections(facts.rank, world)
    store = _store(facts, nodes, address, _ARRIVAL_SHARE * seconds)
    present = _gather(store, mine, nodes, facts, _ARRIVAL_SHARE * seconds)
    _add_up(store, facts, device_type, nodes, seconds, traces, then)
    return present


def table(present: Sequence[Presence]) -> str:
    """A line per node."""
    by_node: dict[str, list[Presence]] = {}
    for each in present:
        by_node.setdefault(each.node, []).append(each)
    lines = []
    for node, here in by_node.items():
        devices = ", ".join(dict.fromkeys(each.device for each in here))
        ranks = f"rank {here[0].rank}" if len(here) == 1 else f"ranks {here[0].rank}-{here[-1].rank}"
        lines.append(f"{node}: {ranks} on {devices}")
    return "\n".join(lines)


def _device(facts: LauncherEnv, device_type: DeviceType, node: str) -> str:
    import torch

    if device_type == "cpu":
        return "cpu"
    if not torch.cuda.is_available() or facts.local_rank >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise PreflightError(f"rank {facts.rank} on {node}: no GPU {facts.local_rank}; torch sees {seen} there", node)
    return torch.cuda.get_device_name(facts.local_rank)


def _store(facts: LauncherEnv, nodes: Sequence[str], address: tuple[str, int], seconds: float) -> "Store":
    import torch.distributed as dist

    host, port = address
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            host, port, is_master=facts.rank == 0, wait_for_workers=False, timeout=timedelta(seconds=seconds)
        )
    except (dist.DistError, RuntimeError) as error:
        if facts.rank == 0:
            raise PreflightError(f"rank 0 on {nodes[0]}: port {port} cannot be opened: {error}", nodes[0]) from error
        raise PreflightError(f"rank 0 on {nodes[0]}:{port} cannot be reached: {error}", nodes[0]) from error


def _gather(store: "Store", mine: Presence, nodes: Sequence[str], facts: LauncherEnv, seconds: float) -> list[Presence]:
    """Rank 0 waits for the others, reads one record a node, and tells all the answer.

    Four operations a rank, whatever the world: one store serves 31,600 reads a second, so that 4,096 ranks that each
    read what all have said would take it 530 s, and leave ranks too far apart for any time limit.
    """
    line = json.dumps(asdict(mine)) + "\n"
    store.append(_record(mine.rank // facts.local_world), line)  # type: ignore[attr-defined]
    store.add(_ARRIVED, 1)
    if mine.rank == 0:
        missing = [] if _all_arrive(store, mine.world, seconds) else _missing(store, mine.world, facts.local_world)
        places = {nodes[rank // facts.local_world]: rank for rank in reversed(missing)}
        text = "".join(f"; rank {rank} on {node}" for node, rank in reversed(places.items()))
        told = {
            "text": text and f"no word for {seconds:g} s of {len(missing)} ranks{text}",
            "node": next(reversed(places), None),
        }
        store.set(_ANSWER, json.dumps(told))
    # Rank 0 gives each late rank its time; an answer comes unless rank 0 itself dies, which closes the connection.
    store.wait([_ANSWER], timedelta(seconds=seconds * mine.world + _MARGIN_SECONDS))
    answer = json.loads(store.get(_ANSWER))
    if answer["text"]:
        raise PreflightError(answer["text"], answer["node"])
    if mine.rank > 0:
        return [mine]
    return _present(store, range(-(-mine.world // facts.local_world)))


def _record(node: int) -> str:
    """Where the ranks of a node say that they are there, a line each."""
    return f"node/{node}"


def _all_arrive(store: "Store", world: int, seconds: float) -> bool:
    """False once no further rank has come for so long. One operation at each look."""
    count, last = 0, time.monotonic()
    while time.monotonic() - last < seconds:
        if (now := store.add(_ARRIVED, 0)) >= world:
            return True
        if now > count:
            count, last = now, time.monotonic()
        time.sleep(_POLL_SECONDS)
    return False


def _missing(store: "Store", world: int, per_node: int) -> list[int]:
    heard = [node for node in range(-(-world // per_node)) if store.check([_record(node)])]
    here = {each.rank for each in _present(store, heard)}
    return [rank for rank in range(world) if rank not in here]


def _present(store: "Store", nodes: Sequence[int]) -> list[Presence]:
    """What the ranks of these nodes have said, in order of rank."""
    records = store.multi_get([_record(node) for node in nodes])
    lines = [line for record in records for line in record.decode().splitlines()]
    return sorted((Presence(**json.loads(line)) for line in lines), key=lambda each: each.rank)


def _add_up(
    store: "Store",
    facts: LauncherEnv,
    device_type: DeviceType,
    nodes: Sequence[str],
    seconds: float,
    traces: Path | None,
    then: "Callable[[torch.device], None] | None",
) -> None:
    """Make the default group, and the first collective over the network that training will use."""
    import torch
    import torch.distributed as dist

    node = nodes[facts.rank // facts.local_world]
    met = dist.PrefixStore("all", store)  # type: ignore[attr-defined]
    try:
        device = join_all(facts, device_type, seconds, traces=traces, store=met)
        total = torch.tensor(float(facts.rank), device=device)
        dist.all_reduce(total)
        got = total.item()
        if then is not None:
            then(device)
    except PreflightError:
        raise
    except RuntimeError as error:
        raise PreflightError(
            f"rank {facts.rank} on {node}: the first sum over all ranks failed: {error}", None
        ) from error
    wanted = facts.world * (facts.world - 1) / 2
    if got != wanted:
        raise PreflightError(f"rank {facts.rank} on {node}: the ranks add up to {got:g}, not {wanted:g}", None)
