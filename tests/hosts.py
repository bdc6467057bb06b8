"""Isolated hosts on one machine: for trying `ray up`, power cuts and cut cables on the real thing.

A host has network, processes, mounts and a name of its own, an empty `/tmp` (its disk: Ray lives
there), `/dev/shm`, a home folder, and sshd. All else is this machine's: files outside `/tmp`,
such as the checkout and its virtual environment, are seen by every host at the same path. All hosts
hang on one switch, with the addresses 10.77.0.11, .12, ... and no way out; nor does anything of
this machine's network reach them, so several runs may use the same addresses at once.

    with Hosts() as hosts:
        hosts.up(3)                                # hosts 0, 1 and 2
        hosts.run(0, "hostname")                   # 'host0'; runs as root, cables do not matter
        hosts.run(0, f"ssh {hosts.ip(1)} true")    # any host reaches any, as root, with hosts.key
        hosts.cut(1)                               # its cable is out
        hosts.mend(1)
        hosts.power_off(2)                         # its processes and its disk are gone at once
        hosts.power_on(2)                          # an empty host with the same name and address
        (hosts.shared / "x").write_text("y")       # a folder that all hosts and this process see

Nothing is left behind: the namespaces end with their processes, and those with this one, however
it ends. Needs root, openssh-server, iproute2 and util-linux; :func:`why_not` says what is missing.

Tests take the fixture ``hosts``, four hosts that a whole run shares, or ``launched``, a cluster on
them for a module, made by `ray up` (:mod:`tests.launched`). One cluster fits on them at a time, and
whoever breaks something mends it. They carry the marker ``hosts``.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

ROOT = Path(__file__).parents[1]
SSHD = "/usr/sbin/sshd"
TOOLS = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "rsync": "rsync",
    "setpriv": "util-linux",
    "ssh": "openssh-client",
    "unshare": "util-linux",
}
NET = "10.77.0"
HOME = "/tmp/home"

_Found = TypeVar("_Found")

# What runs as process 1 of a host. `keep` holds the folders below /tmp that hosts share.
_INIT = """
set -e
hostname {name}
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
n=0
for path in {keep}; do
    n=$((n + 1)); mkdir "/run/keep$n"; mount --rbind "$path" "/run/keep$n"
done
mount -t tmpfs -o size={disk},mode=1777 tmpfs /tmp
n=0
for path in {keep}; do
    n=$((n + 1)); mkdir -p "$path"; mount --move "/run/keep$n" "$path"
done
mount -t tmpfs -o size=2g,mode=1777 tmpfs /dev/shm
mkdir -m 700 {home} {home}/.ssh
if [ -d /etc/skel ]; then cp -r /etc/skel/. {home}; fi
touch {home}/.bashrc
cp {shared}/ssh_config {home}/.ssh/config
mount --bind {shared}/passwd /etc/passwd
ip link set lo up
{sshd} -D -e -f /dev/null -h {shared}/host_key -o AuthorizedKeysFile={shared}/key.pub \
    -o StrictModes=no -o PermitRootLogin=yes -o UsePAM=no -o PidFile=none &
wait
"""


def why_not() -> str | None:
    """Why there can be no hosts here, in a sentence; None where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "isolated hosts need Linux and root, for its namespaces"
    missing = {package for tool, package in TOOLS.items() if shutil.which(tool) is None}
    if not Path(SSHD).exists():
        missing.add("openssh-server")
    if missing:
        return f"isolated hosts need {', '.join(sorted(missing))} (apt install them)"
    made = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--mount", "true"], capture_output=True, text=True
    )
    if made.returncode:
        return f"isolated hosts need namespaces, which are not allowed here: {made.stderr.strip()}"
    return None


class HostError(Exception):
    """A command on a host, or one that makes hosts, has failed."""


class Host:
    """One host: its number and the process whose end is its end."""

    def __init__(self, number: int, process: subprocess.Popen[bytes], pid: int) -> None:
        self.number = number
        self.process = process
        self.pid = pid  # of process 1 inside, as seen from outside


class Hosts:
    """Isolated hosts; see the module.

    Args:
        disk: size of a host's `/tmp`, as tmpfs takes it.
    """

    def __init__(self, disk: str = "4g") -> None:
        self._disk = disk
        self._hosts: dict[int, Host] = {}
        self._switch: subprocess.Popen[bytes] | None = None
        self.shared = Path()
        self.key = Path()

    def __enter__(self) -> Hosts:
        self.shared = Path(tempfile.mkdtemp(prefix="datamix-hosts-"))
        try:
            self._make_keys()
            self._switch = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"],
                stdin=subprocess.DEVNULL,
            )
            _until(lambda: self._other_network(self._switch_pid), "a switch")
            for words in ("link add br0 type bridge", f"addr add {NET}.1/24 dev br0"):
                self._ip(self._switch_pid, words)
            self._ip(self._switch_pid, "link set br0 up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def up(self, count: int) -> list[str]:
        """Power on hosts 0 to ``count - 1``, those that are off; their addresses."""
        for number in range(count):
            if number not in self._hosts:
                self.power_on(number)
        return [self.ip(number) for number in range(count)]

    def ip(self, number: int) -> str:
        """The address of a host, whether it is on or not."""
        return f"{NET}.{11 + number}"

    def power_on(self, number: int) -> None:
        """Start a host that is off, with an empty disk; back when sshd answers."""
        if number in self._hosts:
            raise HostError(f"host {number} is on, expected it off")
        script = self.shared / f"init{number}"
        script.write_text(
            _INIT.format(
                name=f"host{number}",
                keep=" ".join(shlex.quote(str(path)) for path in self._kept()),
                disk=self._disk,
                home=HOME,
                shared=self.shared,
                sshd=SSHD,
            )
        )
        with (self.shared / f"sshd{number}.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL"),
                    *("unshare", "--net", "--pid", "--mount", "--uts", "--ipc"),
                    *("--fork", "--kill-child", "--mount-proc", "bash", str(script)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            pid = _until(lambda: _child(process.pid), f"host {number}")
        except BaseException:
            process.kill()
            process.wait()
            raise
        self._hosts[number] = Host(number, process, pid)
        try:
            _until(lambda: self._other_network(pid), f"host {number}'s network")
            # The same address each time: the others remember it for a while.
            peer = f"peer name eth0 address 02:00:00:00:00:{number:02x} netns {pid}"
            self._ip(self._switch_pid, f"link add h{number} type veth {peer}")
            self._ip(self._switch_pid, f"link set h{number} master br0 up")
            self._ip(pid, f"addr add {self.ip(number)}/24 dev eth0")
            self._ip(pid, "link set eth0 up")
            # Without a default route Ray takes 127.0.0.1 for the node's address.
            self._ip(pid, f"route add default via {NET}.1")
            _until(lambda: self._answers(number), f"host {number}'s sshd")
        except BaseException:
            self.power_off(number)
            raise

    def power_off(self, number: int) -> None:
        """As if the plug were pulled: processes, network and disk end at once."""
        host = self._hosts.pop(number)
        # Process 1 first, and all inside with it, so that its parent is there to collect it.
        with contextlib.suppress(ProcessLookupError):
            os.kill(host.pid, signal.SIGKILL)
        host.process.wait()

    def cut(self, number: int) -> None:
        """Pull a host's network cable: it goes on, reaches nobody, and nobody it."""
        self._ip(self._switch_pid, f"link set h{number} down")

    def mend(self, number: int) -> None:
        """Put the cable in again."""
        self._ip(self._switch_pid, f"link set h{number} up")

    def run(self, number: int, command: str, timeout_s: float = 60, check: bool = True) -> str:
        """Run a command line in a login shell of a host, as root; what it says on stdout.

        Raises:
            HostError: its exit status is not 0, unless ``check`` is false.
            subprocess.TimeoutExpired: it took too long; it is killed then.
        """
        with self.start(number, command) as process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            except BaseException:
                self.stop(process)
                raise
        if check and process.returncode:
            raise HostError(
                f"host {number}: {command!r} ended with {process.returncode}: "
                f"{out[-3000:]}{err[-3000:]}"
            )
        return out

    def start(self, number: int, command: str) -> subprocess.Popen[str]:
        """Start a command line as :meth:`run` does, without waiting.

        It leads a process group of its own: ``os.killpg(process.pid, signal.SIGINT)`` is Ctrl-C,
        and :meth:`stop` ends it.
        """
        environment = {
            "HOME": HOME,
            "LANG": "C.UTF-8",
            "LOGNAME": "root",
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "USER": "root",
        }
        return subprocess.Popen(
            [*self._inside(self._hosts[number].pid), "bash", "-lc", command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )

    @staticmethod
    def stop(process: subprocess.Popen[str]) -> None:
        """Kill what :meth:`start` started, with its children, unless it has ended."""
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def processes(self, number: int) -> list[str]:
        """Command lines of all that runs on a host, but for its own process 1 and sshd."""
        space = os.readlink(f"/proc/{self._hosts[number].pid}/ns/pid")
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(folder / "ns/pid") != space:
                    continue
                words = (folder / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            except OSError:  # it has ended
                continue
            line = b" ".join(words).decode(errors="replace")
            ours = str(self.shared / f"init{number}") in line or "sshd" in line.partition(" ")[0]
            if line and not ours:
                found.append(line)
        return found

    def close(self) -> None:
        """End all that was made here."""
        for number in list(self._hosts):
            self.power_off(number)
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()
            self._switch = None
        if self.shared != Path():
            shutil.rmtree(self.shared, ignore_errors=True)

    @property
    def _switch_pid(self) -> int:
        if self._switch is None:
            raise HostError("there are no hosts, expected `with Hosts() as hosts`")
        return self._switch.pid

    def _make_keys(self) -> None:
        self.key = self.shared / "key"
        for path in (self.key, self.shared / "host_key"):
            _call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)])
        (self.shared / "ssh_config").write_text(
            f"IdentityFile {self.key}\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
            "LogLevel ERROR\n"
        )
        # The same users with another home: this machine's own must not be written to.
        lines = Path("/etc/passwd").read_text().splitlines()
        rest = [line for line in lines if not line.startswith("root:")]
        passwd = [f"root:*:0:0:root:{HOME}:/bin/bash", *rest]
        (self.shared / "passwd").write_text("\n".join(passwd) + "\n")

    def _kept(self) -> Sequence[Path]:
        """What must stay visible although a host's /tmp hides it."""
        wanted = {self.shared, ROOT, Path(sys.prefix), Path(sys.base_prefix)}
        below = sorted(path for path in wanted if path.is_relative_to("/tmp"))
        return [p for p in below if not any(p != q and p.is_relative_to(q) for q in below)]

    def _answers(self, number: int) -> bool:
        host = self._hosts[number]
        if host.process.poll() is not None:
            said = (self.shared / f"sshd{number}.log").read_text()[-500:].strip()
            raise HostError(f"host {number} did not start: {said}")
        probe = ["bash", "-c", f": </dev/tcp/{self.ip(number)}/22"]
        command = ["nsenter", "--target", str(self._switch_pid), "--net", *probe]
        return subprocess.run(command, capture_output=True).returncode == 0

    def _ip(self, pid: int, words: str) -> None:
        _call(["nsenter", "--target", str(pid), "--net", "ip", *words.split()])

    @staticmethod
    def _inside(pid: int) -> list[str]:
        spaces = ("--net", "--pid", "--mount", "--uts", "--ipc")
        return ["nsenter", "--target", str(pid), *spaces, "--wd=/"]

    @staticmethod
    def _other_network(pid: int) -> bool:
        return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")


def _child(pid: int) -> int | None:
    """The first child of a process."""
    words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(words[0]) if words else None


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise HostError(f"{shlex.join(command)} failed: {done.stderr.strip()}")


def _until(look: Callable[[], _Found | None], what: str, timeout_s: float = 10) -> _Found:
    """What ``look`` finds, once it finds something."""
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        if time.monotonic() > deadline:
            raise HostError(f"waited {timeout_s} s for {what} in vain")
        time.sleep(0.02)
    return found
