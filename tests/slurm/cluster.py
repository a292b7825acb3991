"""A real SLURM of three nodes with pretend GPUs on this machine, in one folder, gone when closed.

`python -m tests.slurm.cluster` starts one for a person and prints what to export; Ctrl-C ends it.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

NODES = ("n1", "n2", "n3")
GPUS_PER_NODE = 8
HOSTS = Path("/etc/hosts")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PATIENCE_SECONDS = 60.0

HINTS = """In another terminal, in this folder:

export SLURM_CONF={folder}/slurm.conf
{python} launch.py experiment=demo cluster=slurm cluster.partition=low cluster.device=cpu cluster.cpus_per_gpu=1

Nodes n1 n2 n3, 8 pretend GPUs each; partitions low, graced (30 s of grace), pair (n1 n2) and high, which preempts
them.
Ctrl-C ends the cluster and its jobs."""

# config_overrides: the nodes have more cores than this machine. linuxproc and none: no cgroups in a container.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool_%n
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmdLogFile={folder}/slurmd_%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait={kill_wait_seconds}
SlurmdTimeout=15
OverTimeLimit=0
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs=64 Sockets=1 CoresPerSocket=64 \
ThreadsPerCore=1 RealMemory=20000 Gres=gpu:{gpus}
PartitionName=low Nodes={nodes} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 MaxTime=4-00:00:00
PartitionName=graced Nodes={nodes} PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 MaxTime=4-00:00:00
PartitionName=pair Nodes={pair} PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 MaxTime=4-00:00:00
PartitionName=high Nodes={nodes} PriorityTier=10 PreemptMode=OFF MaxTime=1:00:00
"""


def missing() -> str | None:
    """Why no cluster can be started here."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"no SLURM here ({', '.join(absent)} not found; on Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "starting SLURM daemons takes root"
    return None


@dataclass
class TestCluster:
    """Running daemons. Clients need `environment`."""

    __test__ = False

    folder: Path
    kill_wait_seconds: int = 10
    daemons: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        for node in NODES:
            (self.folder / f"spool_{node}").mkdir()
        self._munge()
        ports = _free_ports(1 + len(NODES))
        self._configure(ports)
        _name_nodes()
        self._spawn("slurmctld", "-D")
        for node in NODES:
            self._spawn("slurmd", "-D", "-N", node)
        self._until_idle()

    def stop(self) -> None:
        """Jobs first, so that no rank outlives its node."""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self.run("scancel", "--full", "--signal=KILL", "--user=root", timeout=10)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self._strays():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def run(self, *command: str, timeout: float = 60, check: bool = True) -> str:
        """What a SLURM command says."""
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, timeout=timeout
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._spawn(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            *(f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "log", "seed")),
            f"--socket={self.folder}/munge.socket",
        )
        _until(lambda: (self.folder / "munge.socket").exists(), "munged made no socket")

    def _configure(self, ports: list[int]) -> None:
        for gpu in range(GPUS_PER_NODE):
            (self.folder / f"nvidia{gpu}").touch()
        nodes = ",".join(NODES)
        text = CONFIG.format(
            folder=self.folder,
            host=socket.gethostname(),
            user="root",
            controller_port=ports[0],
            nodes=nodes,
            pair=",".join(NODES[:2]),
            ports=",".join(map(str, ports[1:])),
            gpus=GPUS_PER_NODE,
            kill_wait_seconds=self.kill_wait_seconds,
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text(
            f"NodeName={nodes} Name=gpu File={self.folder}/nvidia[0-{GPUS_PER_NODE - 1}]\n"
        )
        (self.folder / "cgroup.conf").write_text("")

    def _spawn(self, *command: str) -> None:
        log = (self.folder / "daemons.log").open("ab")
        self.daemons.append(
            subprocess.Popen(command, env=os.environ | self.environment, stdout=log, stderr=log, start_new_session=True)
        )
        log.close()

    def _until_idle(self) -> None:
        def idle() -> bool:
            states = self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T", check=False).split()
            return states == ["idle"] * len(NODES)

        _until(idle, f"the nodes did not come up; see {self.folder}/*.log")

    def _strays(self) -> list[int]:
        """Step daemons that this cluster's slurmd started."""
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]
        return [
            pid
            for pid in pids
            if _command(pid).startswith("slurmstepd")
            and _environment(pid).get("SLURM_CONF") == self.environment["SLURM_CONF"]
        ]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _environment(pid: int) -> dict[str, str]:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _until(condition: "object", complaint: str) -> None:
    assert callable(condition)
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(complaint)
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _name_nodes() -> None:
    """Ranks look for rank 0 under its node's name."""
    for node in NODES:
        try:
            known = socket.gethostbyname(node) == "127.0.0.1"
        except OSError:
            known = False
        if not known:
            with HOSTS.open("a") as hosts:
                hosts.write(f"127.0.0.1 {node}\n")


@contextlib.contextmanager
def cluster(kill_wait_seconds: int = 10) -> Iterator[TestCluster]:
    """Up inside the block."""
    folder = Path(tempfile.mkdtemp(prefix="slurm_", dir="/tmp"))
    running = TestCluster(folder, kill_wait_seconds)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """`make slurm`."""
    if (reason := missing()) is not None:
        sys.exit(reason)
    with cluster() as running:
        python = Path(sys.executable)
        known = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
        print(HINTS.format(folder=running.folder, python=known), flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
