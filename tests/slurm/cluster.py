"""A real SLURM on this machine: munged, slurmctld and three slurmd, each node in its own network namespace.

Only inside of tests/slurm/run.sh, which gives it namespaces of its own (network, mounts, host name, processes): nothing
here meets the machine's network or another SLURM, and everything ends with the process that made it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONTROLLER = "10.77.0.1"
NODES = {"node0": "10.77.0.10", "node1": "10.77.0.11", "node2": "10.77.0.12"}
"""Components of a heterogeneous job never share a node: two for a teacher's need a third for the student."""


def run(*command: str, check: bool = True, timeout: float = 60) -> str:
    """Standard output of a command; its standard error is in the exception where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait; the error names what did not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.1)


class Cluster:
    """The daemons, and what tests ask SLURM's own clients."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        root.chmod(0o755)  # or munge takes its socket for inaccessible
        for name in ("munge", "state", "log"):
            (root / name).mkdir()
        text = (HERE / "slurm.conf.in").read_text(encoding="utf-8")
        values = {"ROOT": str(root), "CONTROLLER": CONTROLLER} | {n.upper(): a for n, a in NODES.items()}
        self.conf = root / "slurm.conf"
        self.conf.write_text(re.sub(r"@(\w+)@", lambda found: values[found.group(1)], text), encoding="utf-8")
        os.environ["SLURM_CONF"] = str(self.conf)

    def start(self) -> None:
        """All daemons, until all nodes are idle."""
        self._network()
        (self.root / "munge" / "key").write_bytes(os.urandom(128))
        (self.root / "munge" / "key").chmod(0o600)
        socket = self.root / "munge" / "sock"
        self._daemon(
            "munged", "munged", "-F", f"--key-file={self.root}/munge/key", f"--socket={socket}",
            f"--pid-file={self.root}/munge/pid", f"--seed-file={self.root}/munge/seed",
            f"--log-file={self.root}/log/munged.log", "--num-threads=2",
        )  # fmt: skip
        until(lambda: subprocess.run(["munge", "-S", str(socket), "-n"], capture_output=True).returncode == 0, "munged")
        self._daemon("slurmctld", "slurmctld", "-c", "-D", "-f", str(self.conf))
        until(lambda: "UP" in run("scontrol", "ping", check=False), "slurmctld")
        for node in NODES:
            self.start_node(node)
        self.wait_idle()

    def _network(self) -> None:
        """A bridge with the controller on it, and one namespace for each node."""
        run("hostname", "controller")
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "bridge", "type", "bridge")
        run("ip", "address", "add", f"{CONTROLLER}/24", "dev", "bridge")
        run("ip", "link", "set", "bridge", "up")
        self._hosts("controller", NODES)
        run("mount", "--bind", str(self.root / "hosts.controller"), "/etc/hosts")
        for node, address in NODES.items():
            run("ip", "netns", "add", node)
            run("ip", "link", "add", f"to-{node}", "type", "veth", "peer", "name", "eth0", "netns", node)
            run("ip", "link", "set", f"to-{node}", "master", "bridge", "up")
            run("ip", "-n", node, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                run("ip", "-n", node, "link", "set", device, "up")
            # As on Debian, a machine's own name is loopback; the other node is known by its address.
            self._hosts(node, NODES | {node: "127.0.1.1"})

    def _hosts(self, machine: str, addresses: Mapping[str, str]) -> None:
        lines = ["127.0.0.1 localhost", f"{CONTROLLER} controller", *(f"{a} {n}" for n, a in addresses.items())]
        (self.root / f"hosts.{machine}").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def start_node(self, node: str) -> None:
        """One slurmd in its node's network, with its own host name and /etc/hosts."""
        (self.root / f"spool.{node}").mkdir(exist_ok=True)
        inside = 'hostname "$1" && mount --bind "$2" /etc/hosts && exec slurmd -D -N "$1" -f "$SLURM_CONF"'
        self._daemon(
            f"slurmd.{node}", "nsenter", f"--net=/run/netns/{node}", "unshare", "--mount", "--uts",
            "sh", "-c", inside, "sh", node, str(self.root / f"hosts.{node}"),
        )  # fmt: skip

    def kill_node(self, node: str) -> None:
        """Power off: every process in the node's network gets SIGKILL, and the controller finds the node down."""
        for _ in range(3):  # a process may have been starting another one
            for pid in self.processes(node):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._daemons.pop(f"slurmd.{node}").wait()
        run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def processes(self, node: str, pattern: str = "") -> list[int]:
        """Processes in a node's network whose command line matches."""
        found = []
        for pid in run("ip", "netns", "pids", node).split():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if re.search(pattern, command):
                found.append(int(pid))
        return found

    def _daemon(self, name: str, *command: str) -> None:
        with (self.root / "log" / f"{name}.out").open("ab") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        self._daemons[name] = process

    def wait_idle(self) -> None:
        """Until all nodes take jobs."""
        until(lambda: len(set(run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split())) == len(NODES), "idle nodes")

    def stop(self) -> None:
        """Cancel all jobs and end the daemons, munged last."""
        if "slurmctld" in self._daemons:
            run("scancel", "--user=root", check=False)
        for name, process in reversed(self._daemons.items()):
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    print(f"{name} had to be killed")
        self._daemons.clear()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, ... of a job or of a heterogeneous job's first component."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """One value of `scontrol show job`."""
        found = re.search(rf"\b{name}=(\S+)", run("scontrol", "show", "job", "-o", job, check=False))
        return found.group(1) if found else ""

    def wait_for(self, job: str, *states: str, seconds: float = 300) -> str:
        """Until a job is in one of these states; the log's tail is in the error."""
        until(lambda: self.state(job) in states, f"job {job} in {states}", seconds)
        return self.state(job)

    def report(self, logs: Sequence[Path]) -> str:
        """What to look at when a test fails."""
        parts = [run("squeue", "-a", check=False), run("scontrol", "show", "job", check=False)[-6000:]]
        for log in [*logs, self.root / "log" / "slurmctld.log"]:
            if log.is_file():
                lines = re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace"))
                parts.append("\n".join([f"--- {log}", *lines[-40:]]))
        return "\n".join(parts)


def missing() -> str | None:
    """Why a cluster cannot be had here, or None."""
    programs = ("slurmctld", "slurmd", "sbatch", "munged", "munge", "ip", "nsenter", "unshare")
    lacking = [name for name in programs if shutil.which(name) is None]
    if lacking:
        return f"no {', '.join(lacking)}"
    return None if os.environ.get("GRPO_KD_NAMESPACES") else "start it with `make test-slurm`"
