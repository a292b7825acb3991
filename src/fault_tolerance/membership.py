"""One group among the others, through torchft: who is there, who must be healed, sums over groups, and the vote.

Of torchft its lighthouse, manager server, process groups and transport are used; what a step makes of them is ours.
After the first failure of a step its further sums do nothing: the ranks of a group go on together to the vote, which
then says no, so no rank waits for another that has already given up.
"""

import queue
import re
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from http.client import HTTPException
from itertools import count
from pickle import UnpicklingError
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit
from urllib.request import urlopen

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllreduceCoalescedOptions
from torchft.checkpointing.http_transport import HTTPTransport
from torchft.coordination import ManagerClient, ManagerServer
from torchft.process_group import ProcessGroup, ProcessGroupGloo, ProcessGroupNCCL

from src.distributed.collectives import any_rank
from src.distributed.process.rank_context import RankContext, Replica
from src.fault_tolerance.carry import fill, shards
from src.fault_tolerance.replica_groups import StateCallbacks
from src.fault_tolerance.table import Quorum

CONNECT_SECONDS = 10.0
LOOK_SECONDS, LOOKS_PER_WORD = 3.0, 20  # who waits looks around this often, and says so less often
HEARTBEATS_PER_LIMIT = 10  # so that one that is late means nothing
# Of the lighthouse's page of status: a group's number, and the seconds since its last heartbeat.
HEARD = re.compile(r"(\d{4,}):[0-9a-f-]{36}: seen ([\d.]+)s ago")
# The manager's server asks the lighthouse again and again, so its own clients may wait: ranks that gave up at different
# moments would ask for different quorums.
LONG = timedelta(days=7)
AGAIN = 1_000_000
# What a peer that dies leaves behind: in a sum, in a connection, or in the middle of a state that it gives away.
GONE = (RuntimeError, OSError, EOFError, UnpicklingError, HTTPException)


def _nothing(*_: object) -> None:
    """Instead of a line on stderr."""


class MembershipOptions(Protocol):
    """Keys of the section that matter here; conf/fault_tolerance/torchft.yaml says what each means."""

    @property
    def min_groups(self) -> int: ...
    @property
    def process_group(self) -> Literal["gloo", "nccl"] | None: ...
    @property
    def heartbeat_seconds(self) -> float: ...
    @property
    def sum_seconds(self) -> float: ...
    @property
    def heal_seconds(self) -> float: ...


class Membership:
    def __init__(self, options: MembershipOptions, ranks: RankContext, tell: Callable[[str], None]) -> None:
        """Collective in the group. From here on the lighthouse counts this group as alive."""
        replica = Replica.read()
        self.options, self.ranks, self.replica = options, ranks, replica
        self.error: Exception | None = None  # of this step, on this rank: see fail()
        self.failures = 0  # steps in a row that did not count
        self.heal_seconds = 0.0  # of the last time
        self._quorum: tuple[int, tuple[str, ...]] | None = None
        nccl = options.process_group == "nccl" or (options.process_group is None and ranks.device.type == "cuda")
        self.device = torch.device("cpu")  # of small sums, whose failures are then known at once
        # The limit of meeting only: sums bring their own. The lighthouse may still name a group that left while it
        # waited, until its heartbeat is missed; those who are there find out here.
        self._host: ProcessGroup = ProcessGroupGloo(timedelta(seconds=CONNECT_SECONDS))
        self.group: ProcessGroup = ProcessGroupNCCL(timedelta(seconds=options.sum_seconds)) if nccl else self._host
        self._transport = HTTPTransport[Any](timedelta(seconds=options.heal_seconds), num_chunks=0)
        self._transport._server.RequestHandlerClass.log_message = _nothing  # each request would be a line of the log
        self._serve(tell)

    def _serve(self, tell: Callable[[str], None]) -> None:
        """Collective in the group. Rank 0 hosts the manager, and before it the store in which groups meet this one."""
        address: list[str | None] = [None]
        if self.ranks.rank == 0:
            host = socket.gethostname()
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
            for attempt in count():
                try:
                    self._server = self._manager(host)
                    address = [self._server.address()]
                    break
                except RuntimeError:  # the lighthouse is not there yet, and it may be refused at once
                    if attempt % LOOKS_PER_WORD == 0:
                        tell(self._waits_for())
                    time.sleep(1.0 if attempt else 0.1)
        dist.broadcast_object_list(address, device=torch.device("cpu"))
        assert address[0] is not None
        self._lighthouse = self.replica.address()
        self._client = ManagerClient(address[0], connect_timeout=timedelta(seconds=CONNECT_SECONDS))

    def _manager(self, host: str) -> ManagerServer:
        return ManagerServer(
            replica_id=f"{self.replica.group:04d}:{uuid.uuid4()}",
            lighthouse_addr=self.replica.address(),
            hostname=host,
            bind="[::]:0",
            store_addr=f"{host}:{self._store.port}",
            world_size=self.ranks.world,
            heartbeat_interval=timedelta(seconds=self.options.heartbeat_seconds / HEARTBEATS_PER_LIMIT),
            connect_timeout=timedelta(seconds=CONNECT_SECONDS),
            quorum_retries=AGAIN,
        )

    def start_quorum(self, version: int, own: StateCallbacks) -> Quorum | None:
        """Join the next quorum; heal from a group with a newer `version`, or serve one that is behind. Collective.

        A failure is kept in `error`: the step must still be voted on. None: told to stop while it waited.
        """
        self.error = None
        answer = self._ask(version, own)
        if any_rank(answer is None, torch.device("cpu")):
            return None
        self._version = answer.max_step
        members = (answer.quorum_id, tuple(answer.replica_ids))
        if members != self._quorum or self.failures:
            self._quorum = members
            # A lighthouse that was started again counts from 1 again; the step keeps the meeting places apart.
            place = f"torchft/{answer.quorum_id}/{answer.max_step}/{self.ranks.rank}"
            self._try(lambda: self._connect(f"{answer.store_address}/{place}", answer))
        if answer.recover_dst_replica_ranks:
            self._try(lambda: self._give(answer, own))
        healed = answer.heal and self._heal(answer, own)
        return Quorum(answer.quorum_id, answer.replica_rank, answer.replica_world_size, healed)

    def _ask(self, version: int, own: StateCallbacks) -> Any:
        """The lighthouse's answer, however long it takes; who waits is told what for, and follows one that moves.

        None where a signal wants this rank to stop instead.
        """
        while True:
            answers: queue.Queue[Any] = queue.Queue()
            # A daemon: an answer of a lighthouse that is gone never comes.
            threading.Thread(target=self._quorum_into, args=(answers, version), daemon=True).start()
            for look in count():
                try:
                    answer = answers.get(timeout=LOOK_SECONDS)
                except queue.Empty:
                    if own.stopped():
                        return None
                    if look % LOOKS_PER_WORD == 0:
                        own.tell(self._waits_for())
                    if self.replica.address() != self._lighthouse:
                        break
                    continue
                if isinstance(answer, BaseException):
                    raise answer
                return answer
            own.tell(f"the lighthouse is at {self.replica.address()} now")
            if self.ranks.rank == 0:
                self._server.shutdown()
            self._serve(own.tell)

    def outside(self) -> set[int]:
        """Numbers of the groups that live and are not in the quorum, as the lighthouse knows them: they compute a step,
        or wait for a peer that died. Empty on ranks but the first, and where the lighthouse does not tell.
        """
        if self.ranks.rank > 0 or self._quorum is None:
            return set()
        heard = HEARD.findall(self._status() or "")
        living = {int(group) for group, seconds in heard if float(seconds) < self.options.heartbeat_seconds}
        return living - {int(name.partition(":")[0]) for name in self._quorum[1]}

    def _status(self) -> str | None:
        """The lighthouse's page about its groups; None where something else answers, or nothing."""
        try:
            with urlopen(f"{self.replica.address()}/status", timeout=CONNECT_SECONDS) as page:
                text: str = page.read().decode(errors="replace")
        except (OSError, HTTPException):
            return None
        return text if "quorum" in text else None

    def _quorum_into(self, answers: "queue.Queue[Any]", version: int) -> None:
        try:
            answer = self._client._quorum(
                group_rank=self.ranks.rank,
                step=version,
                checkpoint_metadata=self._transport.metadata(),
                shrink_only=False,
                timeout=LONG,
                init_sync=False,  # weights are functions of the seed, or of the same checkpoint
                commit_failures=self.failures,
            )
        except BaseException as error:  # noqa: BLE001  the training thread must hear of it instead of waiting
            answers.put(error)
        else:
            answers.put(answer)

    def _waits_for(self) -> str:
        url = self.replica.address()
        address = urlsplit(url)
        try:
            socket.create_connection((address.hostname, address.port or 80), CONNECT_SECONDS).close()
        except OSError:
            return f"waits for the lighthouse: nothing answers at {url}; training goes on when one does"
        if self._status() is None:
            return f"waits for the lighthouse: what answers at {url} is no lighthouse; training goes on when one does"
        needed = f"fault_tolerance.min_groups={self.options.min_groups}"
        return f"waits for other groups: the lighthouse has no quorum yet ({needed}, and more than half of those alive)"

    def _connect(self, address: str, answer: Any) -> None:
        for number, group in enumerate(dict.fromkeys((self._host, self.group))):
            place = f"{address}/{number}"
            group.configure(place, f"{self.replica.group}", answer.replica_rank, answer.replica_world_size)

    def _give(self, answer: Any, own: StateCallbacks) -> None:
        """Serve this rank's shards until the vote, before which they do not change."""
        limit = timedelta(seconds=self.options.heal_seconds)
        self._transport.send_checkpoint(answer.recover_dst_replica_ranks, answer.max_step, shards(own.give()), limit)

    def _heal(self, answer: Any, own: StateCallbacks) -> bool:
        """All ranks of the group take over what they fetched, or none does."""
        began, fetched = time.perf_counter(), list[dict[str, Any]]()
        self._try(lambda: fetched.append(self._fetch(answer)))
        if any_rank(not fetched, torch.device("cpu")):
            self.fail(RuntimeError("another rank of this group could not be healed"))
            return False
        own.take(fill(own.give(), fetched[0]))
        self.heal_seconds = time.perf_counter() - began
        return True

    def _fetch(self, answer: Any) -> dict[str, Any]:
        limit = timedelta(seconds=self.options.heal_seconds)
        source = ManagerClient(answer.recover_src_manager_address, connect_timeout=timedelta(seconds=CONNECT_SECONDS))
        place = source._checkpoint_metadata(self.ranks.rank, timeout=limit)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # nobody writes into it
            fetched: dict[str, Any] = self._transport.recv_checkpoint(
                answer.recover_src_replica_rank, place, answer.max_step, limit
            )
        return fetched

    def allreduce(self, tensors: Sequence[Tensor], seconds: float | None = None) -> None:
        """Sum each tensor over groups, in place; asynchronous where the library is. Collective over groups."""
        kinds = {(tensor.device, tensor.dtype): list[Tensor]() for tensor in tensors if tensor.numel()}
        for tensor in tensors:
            if tensor.numel():
                kinds[tensor.device, tensor.dtype].append(tensor)
        for alike in kinds.values():
            self._try(lambda alike=alike: self._sum(alike, seconds or self.options.sum_seconds))  # type: ignore[misc]

    def _sum(self, tensors: list[Tensor], seconds: float) -> None:
        group = self._host if tensors[0].device.type == "cpu" else self.group
        if group is not self._host:
            group.set_timeout(timedelta(seconds=seconds))  # what NCCL's goes by; gloo's goes by the option
        options = AllreduceCoalescedOptions()
        options.reduceOp = dist.ReduceOp.SUM  # type: ignore[assignment]
        options.timeout = timedelta(seconds=seconds)
        if not group.allreduce_coalesced(tensors, options).wait():
            raise RuntimeError("a sum over groups was given up")

    def _try(self, act: Callable[[], None]) -> None:
        """Nothing after the first failure."""
        if self.error is not None:
            return
        try:
            act()
        except GONE as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Take no further part in this step; the first error is the one that is reported.

        Connections are closed, so that ranks of other groups that wait for this one fail too instead of waiting for a
        timeout.
        """
        if self.error is None:
            self.error = error
            self._host.abort(errored=False)

    def vote(self, *, fine: bool) -> bool:
        """Whether all ranks of the group say yes. Collective in the group. Groups with another result heal later."""
        if (broken := self.group.errored()) is not None:
            self.fail(broken)
        self._try(self._transport.disallow_checkpoint)  # waits for those who still read
        yes = bool(
            self._client.should_commit(self.ranks.rank, self._version, fine and self.error is None, timeout=LONG)
        )
        self.failures = 0 if yes else self.failures + 1
        return yes

    def leave(self) -> None:
        """Tell the lighthouse, so that the others need not wait for a heartbeat timeout."""
        self._transport.shutdown(wait=False)
        if self.ranks.rank == 0:
            self._server.shutdown()
        for group in {self._host, self.group}:
            group.shutdown()
