"""A real Slurm whose nodes are namespaces of this machine, for tests. Needs root.

Everything lives inside one "lab": a process namespace, a network namespace and a mount namespace of
its own. The kernel takes the lab's processes, bridge and addresses away with its first process, and
that one dies with the test process, however it ends: nothing has a name outside, and any number of
labs run beside each other. A node is again such a set of namespaces, with a host name and an
address on the lab's bridge. All nodes share this machine's file system.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Self

import psutil

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter")
HEAD = "head"
_NETWORK = "10.77.0"
_PR_SET_PDEATHSIG = 1
_MACHINE = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
shift 2
"$@" & wait
"""
_CONF = """
ClusterName=lab
SlurmctldHost=head
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
# A requeued job waits for the old one's credential to expire (120 s if unset).
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={dir}/jobs.txt
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout={patience}
MessageTimeout=5
TCPTimeout=2
BatchStartTimeout=10
MinJobAge=3600
KillWait=5
UnkillableStepTimeout=30
SlurmdParameters=config_overrides
StateSaveLocation={dir}/state
SlurmctldPidFile={dir}/slurmctld.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdPidFile={dir}/slurmd.%n.pid
SlurmdSpoolDir={dir}/spool.%n
SlurmdLogFile={dir}/slurmd.%n.log
PlugStackConfig={dir}/plugstack.conf
NodeName=node[0-{last}] CPUs=4 RealMemory=8000 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=60 DefaultTime=20 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=60 DefaultTime=5 PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """What is missing for a cluster on this machine, if anything."""
    if os.geteuid() != 0:
        return "a cluster of namespaces needs root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return (
            f"{', '.join(missing)} missing: apt-get install slurmctld slurmd slurm-client iproute2"
        )
    return None


class Cluster:
    """`with Cluster(folder, 3) as cluster:` node0, node1, node2 and the controller `head`, idle."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder = folder
        self.nodes = [f"node{i}" for i in range(num_nodes)]
        self._machines: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Self:
        (self.folder / "state").mkdir(parents=True)
        hosts = ["127.0.0.1 localhost", f"{_NETWORK}.1 {HEAD}"]
        hosts += [f"{_address(node)} {node}" for node in self.nodes]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        (self.folder / "plugstack.conf").write_text("")
        self._configure(patience=10)
        self._lab = _start(
            *("unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"),
            *("sleep", "infinity"),
        )
        try:
            self._bring_up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.down()

    def _bring_up(self) -> None:
        self._ip("link set lo up")
        self._ip("link add br0 type bridge")
        self._ip(f"addr add {_NETWORK}.1/24 dev br0")
        self._ip("link set br0 up")
        # The controller stays in the lab's own network: its link is never cut.
        self._boot(HEAD, "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"), own_net=False)
        for node in self.nodes:
            self.boot(node)
        self.wait_until_idle(self.nodes)

    def down(self) -> None:
        """Power the whole lab off, at once."""
        with contextlib.suppress(psutil.NoSuchProcess, StopIteration):
            os.kill(_init_of(self._lab), signal.SIGKILL)
        for machine in (self._lab, *self._machines.values()):
            machine.wait(10)

    def boot(self, node: str) -> None:
        """Switch a node on."""
        (self.folder / f"spool.{node}").mkdir(exist_ok=True)
        self._boot(node, "slurmd", "-D", "-f", str(self.folder / "slurm.conf"), own_net=True)

    def _boot(self, host: str, *daemon: str, own_net: bool) -> None:
        spaces = ["--mount", "--uts", "--pid", *(["--net"] if own_net else [])]
        started = "" if own_net else "exec 0</dev/null;"
        # With a network of its own a machine waits until it is plugged in.
        wait = "until ip addr show dev eth0 2>/dev/null | grep -q inet; do sleep 0.05; done;"
        with (self.folder / f"{host}.out").open("ab") as output:
            machine = _start(
                *self._in_lab(),
                *("unshare", *spaces, "--fork", "--kill-child", "--mount-proc"),
                *("bash", "-c", (wait if own_net else started) + _MACHINE, f"machine-{host}"),
                *(host, str(self.folder), *daemon),
                output=output,
            )
        self._machines[host] = machine
        if own_net:
            self._plug_in(host, _init_of(machine))

    def _plug_in(self, node: str, pid: int) -> None:
        port = f"p-{node}"
        self._ip(f"link del {port}", check=False)
        subprocess.run(
            # The pid as the lab's own /proc has it.
            [*self._in_lab(), "ip", "link", "add", port, "type", "veth", "peer", "name", "eth0",
             "netns", _pid_in_lab(pid)],
            check=True,
        )  # fmt: skip
        self._ip(f"link set {port} master br0 up")
        inside = ["nsenter", "-t", str(pid), "-n", "ip"]
        subprocess.run([*inside, "link", "set", "lo", "up"], check=True)
        subprocess.run([*inside, "link", "set", "eth0", "up"], check=True)
        address = f"{_address(node)}/24"
        subprocess.run([*inside, "addr", "add", address, "dev", "eth0"], check=True)

    def cut(self, node: str) -> None:
        """Pull the node's network cable."""
        self._ip(f"link set p-{node} down")

    def heal(self, node: str) -> None:
        self._ip(f"link set p-{node} up")

    def power_off(self, node: str) -> None:
        """Nobody on the network hears of it, as nobody would."""
        self.cut(node)
        os.kill(_init_of(self._machines[node]), signal.SIGKILL)
        self._machines.pop(node).wait(10)

    def run(self, *command: str, host: str = HEAD, timeout: float = 30, check: bool = True) -> str:
        """The command's output, on the controller or on a node."""
        pid = _init_of(self._machines[host])
        done = subprocess.run(
            ["nsenter", "-t", str(pid), "-n", "-u", "-m", "-p", "--", "env",
             f"--chdir={os.getcwd()}", f"SLURM_CONF={self.folder}/slurm.conf", *command],
            capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def miss_nodes_after(self, seconds: int) -> None:
        """How long Slurm waits for a node before it gives its jobs back to the queue."""
        self._configure(seconds)
        self.run("scontrol", "reconfigure")

    def _configure(self, patience: int) -> None:
        conf = _CONF.format(dir=self.folder, last=len(self.nodes) - 1, patience=patience)
        (self.folder / "slurm.conf").write_text(conf)

    def state_of(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait_until_idle(self, nodes: list[str], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while True:
            idle = self.run("sinfo", "-hN", "-p", "batch", "-t", "idle", "-o", "%N", check=False)
            if set(nodes) <= set(idle.split()):
                return
            assert time.monotonic() < deadline, self.run("sinfo", "-N")
            time.sleep(0.2)

    def _in_lab(self) -> list[str]:
        return ["nsenter", "-t", str(_init_of(self._lab)), "-n", "-m", "-p"]

    def _ip(self, words: str, *, check: bool = True) -> None:
        command = [*self._in_lab(), "ip", *words.split()]
        done = subprocess.run(command, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"ip {words}: {done.stderr}"


def _address(node: str) -> str:
    return f"{_NETWORK}.{10 + int(node.removeprefix('node'))}"


def _start(*command: str, output: object = subprocess.DEVNULL) -> subprocess.Popen:
    """A process that is killed when this one ends, in any way."""
    libc = ctypes.CDLL(None)
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output is not subprocess.DEVNULL else output,
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        start_new_session=True,
    )


def _init_of(outer: subprocess.Popen) -> int:
    """The first process of the innermost process namespace that `outer` made."""
    depth = len(_pids(os.getpid()))
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for process in psutil.Process(outer.pid).children(recursive=True):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                pids = _pids(process.pid)
                made = "nsenter" in outer.args
                if pids[-1] == "1" and len(pids) == depth + (2 if made else 1):
                    return process.pid
        time.sleep(0.01)
    raise StopIteration(f"no machine came of {outer.args}")


def _pids(pid: int) -> list[str]:
    """Of a process, its id in every namespace from ours inwards."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return line.split()[1:]
    raise AssertionError("no NSpid in /proc")


def _pid_in_lab(pid: int) -> str:
    return _pids(pid)[len(_pids(os.getpid()))]
