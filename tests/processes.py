"""Commands in several processes: by the Trainer, by torchrun, and on two nodes."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent

TRAINER = ("-m", "ddpm_lightning")
TORCHRUN = (
    *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    *("-m", "ddpm_lightning"),
)


class Job:
    """A command and all the processes that it starts; as a context it kills what is left.

    Args:
        folder: Where it runs.
        pictures: Its data; the cache is beside them.
        arguments: Python's own.
        environment: More variables.
        within: What comes before Python, such as ip netns exec NAME.
    """

    def __init__(
        self,
        folder: Path,
        pictures: Path,
        *arguments: object,
        environment: dict[str, str] | None = None,
        within: tuple[str, ...] = (),
    ) -> None:
        self.process = subprocess.Popen(
            [*within, sys.executable, *map(str, arguments)],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "PYTHONFAULTHANDLER": "1",
                "DDPM_LIGHTNING_CACHE": str(pictures.parent / "cache"),
                **(environment or {}),
            },
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired, ValueError):  # torchrun's are in other sessions
            self.process.communicate(timeout=60)

    def output(self, timeout: float = 240) -> str:
        """Wait until the last of its processes has ended, and give what they wrote."""
        try:
            return self.process.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired:
            # by which Python shows where its threads are
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGABRT)
            output = self.process.communicate(timeout=60)[0]
            raise AssertionError(f"not done after {timeout} s:\n{output}") from None

    def succeed(self) -> str:
        """The same of one that must succeed."""
        output = self.output()
        assert self.process.returncode == 0, output
        return output

    def wait_for(self, path: Path) -> None:
        """Wait for a file, at most two minutes."""
        for _ in range(6000):
            if path.exists():
                return
            try:
                self.process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
            break
        assert path.exists(), self.output(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- two nodes -----------------------------------------------------------------------------------


def _ip(*words: str) -> bool:
    if shutil.which("ip") is None:
        return False
    ran = subprocess.run(["ip", *words], capture_output=True, check=False, timeout=60)
    return ran.returncode == 0


def _can_make_namespaces() -> bool:
    name = f"ddpm-try-{os.getpid()}"
    return _ip("netns", "add", name) and _ip("netns", "del", name)


NETWORK = "network_namespaces" if _can_make_namespaces() else "loopback"


def _names() -> tuple[list[str], list[str]]:
    return [f"ddpm-{os.getpid()}-{n}" for n in range(2)], [f"dl{os.getpid()}-{n}" for n in range(2)]


def cut_cable() -> None:
    """Let the two nodes hear nothing more of each other."""
    for name, cable in zip(*_names(), strict=True):
        assert _ip("-n", name, "link", "set", cable, "down")


@contextmanager
def _namespaces() -> Iterator[tuple[list[tuple[str, ...]], list[str]]]:
    """Two machines as far as the network knows, with a cable between them.

    Gives what runs a command in each, and the cable's name there.
    """
    names, cables = _names()
    try:
        for name in names:
            assert _ip("netns", "add", name)
        first, second = (("name", c, "netns", n) for c, n in zip(cables, names, strict=True))
        assert _ip("link", "add", *first, "type", "veth", "peer", *second)
        for node, (name, cable) in enumerate(zip(names, cables, strict=True)):
            assert _ip("-n", name, "addr", "add", f"10.93.0.{node + 1}/24", "dev", cable)
            assert _ip("-n", name, "link", "set", cable, "up")
            assert _ip("-n", name, "link", "set", "lo", "up")
        yield [("ip", "netns", "exec", name) for name in names], cables
    finally:
        for name in names:
            _ip("netns", "del", name)


@contextmanager
def two_nodes(
    folder: Path,
    pictures: Path,
    *arguments: object,
    environment: dict[str, str] | None = None,
    max_restarts: int = 0,
) -> Iterator[list[Job]]:
    """Start a command by torchrun on two nodes of one rank each (see NETWORK)."""
    with ExitStack() as stack:
        if NETWORK == "loopback":
            nodes: list[tuple[str, ...]] = [(), ()]
            master, cables = "127.0.0.1", ["lo", "lo"]
        else:
            nodes, cables = stack.enter_context(_namespaces())
            master = "10.93.0.1"
        port = free_port()
        jobs = []
        for node, (within, cable) in enumerate(zip(nodes, cables, strict=True)):
            torchrun = (
                *("-m", "torch.distributed.run", "--nnodes", 2, "--node_rank", node),
                *("--nproc_per_node", 1, "--master_addr", master, "--master_port", port),
                *("--max_restarts", max_restarts),
            )
            job = Job(
                folder,
                pictures,
                *(*torchrun, "-m", "ddpm_lightning", *arguments),
                # this machine's name leads elsewhere
                environment={"GLOO_SOCKET_IFNAME": cable, **(environment or {})},
                within=within,
            )
            jobs.append(stack.enter_context(job))
        yield jobs
