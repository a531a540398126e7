"""Nodes of a cluster on one machine: Linux namespaces with names and addresses of their own, cables and a switch.

Nothing outlives them: they are one tree of PID namespaces, whose root ends when the process that made it does.
"""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.helpers.launched import ROOT, children

_IS_ROOT = os.geteuid() == 0
_NEW = ["unshare", *([] if _IS_ROOT else ["--user", "--map-root-user"])]
_ENTER = ["nsenter", *([] if _IS_ROOT else ["--user", "--preserve-credentials"])]


def refusal() -> str | None:
    """Why this machine gives no namespaces, in its own words; None where it does."""
    attempt = "mount --bind /etc/hosts /etc/hosts && ip link add type bridge && ip link add type veth"
    command = [*_NEW, "--net", "--uts", "--pid", "--fork", "--mount-proc", "sh", "-c", attempt]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip() or f"status {done.returncode}"


class Nodes:
    """node0, node1, ... at 10.77.0.1, 10.77.0.2, ...; a context manager that ends them with all that runs on them.

    Args:
        folder: for the file of their names, which they all have as /etc/hosts.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self.names = [f"node{i}" for i in range(count)]
        hosts = folder / "hosts"
        lines = [f"{address(i)} {name}" for i, name in enumerate(self.names)]
        hosts.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        self._switch = _Room([], ["--net"], f"mount --bind '{hosts}' /etc/hosts")
        self._switch.ip("link add switch up type bridge")
        self._nodes = [self._boot(i) for i in range(count)]

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_: object) -> None:
        self._switch.end()

    def through(self, i: int) -> list[str]:
        """What a command is put behind to run on a node. It is then the child of a process that is not on it."""
        return self._nodes[i].enter("--net", "--uts", "--pid", "--mount", "--wd")

    def kill(self, i: int) -> None:
        """SIGKILL to every process of a node at once. The system closes their connections, so the others notice."""
        self._nodes[i].end()
        self._switch.run("ip", "link", "delete", f"cable{i}")  # or the system does, in its own time

    def boot(self, i: int) -> None:
        """A killed node comes back, with nothing running on it."""
        self._nodes[i] = self._boot(i)

    def cut_off(self, i: int) -> None:
        """Pulls its cable: what is sent is lost, and nobody is told."""
        self._switch.ip(f"link set cable{i} down")

    def reconnect(self, i: int) -> None:
        self._switch.ip(f"link set cable{i} up")

    def delay(self, i: int, milliseconds: int) -> bool:
        """Whatever is sent to a node comes later; whether the kernel has what it takes."""
        return self._switch.run("tc", *f"qdisc add dev cable{i} root netem delay {milliseconds}ms".split()) == 0

    def _boot(self, i: int) -> "_Room":
        through = self._switch.enter("--net", "--pid", "--mount", "--wd")
        node = _Room(through, ["--net", "--uts"], f"hostname {self.names[i]}")
        card = f"name eth0 address 02:00:00:00:00:{i + 1:02x} netns {node.init}"  # the same when it is booted again
        self._switch.ip(f"link add cable{i} up master switch type veth peer {card}")
        node.ip(f"address add {address(i)}/24 dev eth0", "link set eth0 up", "link set lo up")
        return node


def address(i: int) -> str:
    return f"10.77.0.{i + 1}"


class _Room:
    """New namespaces, and the first process in them, with which they and all their processes end.

    Args:
        through: what enters the namespaces in which it is made.
        kinds: of namespaces, beside those of processes and mounts.
        script: what is done there first.
    """

    def __init__(self, through: Sequence[str], kinds: Sequence[str], script: str) -> None:
        first = ["sh", "-ec", f"{script}; echo ready; exec cat"]  # until the pipe is closed, or its other end has died
        new = [*(_NEW if not through else ["unshare"]), *kinds, "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._process = subprocess.Popen(
            [*through, *new, *first], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout.readline() == "ready\n"
        self.init = self._process.pid
        while below := children(self.init):
            (self.init,) = below

    def enter(self, *kinds: str) -> list[str]:
        return [*_ENTER, "--target", str(self.init), *kinds]

    def run(self, *command: str) -> int:
        """In its network, with this process's numbers of processes."""
        return subprocess.run([*self.enter("--net"), *command], capture_output=True, check=False).returncode

    def ip(self, *commands: str) -> None:
        for command in commands:
            subprocess.run([*self.enter("--net"), "ip", *command.split()], check=True)

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
