"""The processes of a job end together: none waits for one that is gone.

A collective notices that a rank has died only where its backend does: gloo at once, NCCL not within
a machine. A rank that is busy elsewhere does not notice either, until it meets the others; and the
time-out of a collective is 30 minutes, since some waits are meant. So every rank holds a connection
to rank 0, which the kernel closes when a process ends, in whatever way. Rank 0 tells the others.
"""

import atexit
import json
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

from ddpm_lightning.errors import Stopped

logger = logging.getLogger("ddpm_lightning")

GRACE_SECONDS = 8.0
"""What a rank is given to end by itself: its own error says more than that another has died."""

ANSWER_SECONDS = 60.0
"""What rank 0 is given to answer another, once they are connected: its machine may be busy."""

MEETING_TIME = timedelta(minutes=5)
"""What torchrun's ranks are given to start; where its agent ends before, they are told at once."""

Invitation = tuple[list[str], int, str]
"""Addresses of rank 0, its port, and the word by which the ranks know each other."""

TOKEN_BYTES = 16
LEAVES = b"."

# A machine without power closes nothing: ask after 5 s of silence, and give up after 20 s.
KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


def end_with_parent() -> None:
    """End this process soon after the one that started it, where that is a launcher of ranks.

    Rank 0 that the Trainer made others from, or torchrun's agent, may be killed; the others would
    hold their devices for as long as they wait.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(GRACE_SECONDS)
        os._exit(1)

    if "LOCAL_RANK" in os.environ:
        threading.Thread(target=watch, daemon=True, name="parent").start()


def end_process(status: int) -> NoReturn:
    """End this process with an exit status; one with a process group as it stands.

    gloo's threads let go of a collective's tensors some time after it is done. Where the
    interpreter is being torn down by then, they abort the process (torch 2.14), and launchers take
    a success for a death. `destroy_process_group` does not wait for them where DDP holds the group.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        sys.exit(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def watched_by_torchruns_ranks() -> Iterator[None]:
    """Watch the others from the start, where torchrun has started them; otherwise do nothing.

    A rank may die before there is a process group: data or a checkpoint may be missing on one
    machine alone. The ranks of the others would wait for it for 30 minutes.
    """
    peer = _meet_at_agent()
    try:
        yield
    except (KeyboardInterrupt, Stopped):  # the others are ending in their own time
        _leave(peer)
        raise
    _leave(peer)


def watch_each_other_already() -> bool:
    """Tell whether the ranks do so from the start."""
    return _MET in os.environ


_MET = "DDPM_LIGHTNING_RANKS_MET"


def _meet_at_agent() -> "Centre | Spoke | None":
    """Find rank 0 by the store of torchrun's agent, which is there before any rank."""
    uses_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not uses_agent or os.environ["WORLD_SIZE"] == "1":
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # is there all the same

    os.environ[_MET] = ""
    rank, master = int(os.environ["RANK"]), os.environ["MASTER_ADDR"]
    store = TCPStore(master, int(os.environ["MASTER_PORT"]), timeout=MEETING_TIME)
    # the store outlives those that are restarted
    key = f"ddpm_lightning/{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    if rank == 0:
        centre = Centre(master)
        store.set(key, json.dumps(centre.invitation))
        return centre
    return join(rank, json.loads(store.get(key)))


def join(rank: int, invitation: Invitation) -> "Spoke | None":
    """Let a rank watch rank 0, and be watched; it is told where that cannot be."""
    try:
        return Spoke(rank, invitation)
    except OSError as error:
        addresses, port, _ = invitation
        logger.warning(
            "rank %d cannot reach rank 0 at port %d of %s (%s): should one of the two die, the "
            "other may wait for the time-out of the process group",
            *(rank, port, " or ".join(addresses), error),
        )
        return None


def _leave(peer: "Centre | Spoke | None") -> None:
    if peer is not None:
        peer.leave()


class Centre:
    """Rank 0's part: it hears all the others, and ends this process where one dies.

    Args:
        master: The address at which the ranks found each other.
    """

    def __init__(self, master: str) -> None:
        both = socket.has_dualstack_ipv6()
        self._server = socket.create_server(
            ("", 0),
            family=socket.AF_INET6 if both else socket.AF_INET,
            dualstack_ipv6=both,
            backlog=1024,
        )
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._others: set[socket.socket] = set()
        self._has_left = threading.Event()
        self._port = int(self._server.getsockname()[1])
        self._addresses = _addresses(master)
        threading.Thread(target=self._watch, daemon=True, name="peers").start()

    @property
    def invitation(self) -> Invitation:
        """What `Spoke` needs."""
        return self._addresses, self._port, self._token.hex()

    def leave(self) -> None:
        """Have done: watch no more, and tell the others that all is well."""
        self._has_left.set()
        self._tell(LEAVES)

    def _tell(self, what: bytes) -> None:
        for connection in list(self._others):
            with suppress(OSError):
                connection.sendall(what)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector, closing(self._server):
            selector.register(self._server, selectors.EVENT_READ)
            while not self._has_left.is_set():
                for key, _ in selector.select(timeout=1):
                    if key.fileobj is self._server:
                        self._welcome(selector)
                    else:
                        self._hear(selector, *key.data)

    def _welcome(self, selector: selectors.BaseSelector) -> None:
        """Let a rank in; anyone else may call, too."""
        connection, _ = self._server.accept()
        _keep_alive(connection)
        with suppress(OSError):
            hello = connection.recv(TOKEN_BYTES + 4, socket.MSG_WAITALL)
            if len(hello) == TOKEN_BYTES + 4 and hello[:TOKEN_BYTES] == self._token:
                connection.sendall(self._token)
                rank = int.from_bytes(hello[TOKEN_BYTES:])
                self._others.add(connection)
                selector.register(connection, selectors.EVENT_READ, (connection, rank))
                return
        connection.close()

    def _hear(self, selector: selectors.BaseSelector, connection: socket.socket, rank: int) -> None:
        self._others.remove(connection)
        said = _receive(connection)
        selector.unregister(connection)
        connection.close()
        if said != LEAVES and not self._has_left.is_set():
            self._tell(str(rank).encode())
            _end(rank, self._has_left)


class Spoke:
    """Another rank's part: it hears rank 0, and ends this process where any dies.

    Args:
        rank: Its number.
        invitation: Rank 0's.

    Raises:
        OSError: Rank 0 cannot be reached.
    """

    def __init__(self, rank: int, invitation: Invitation) -> None:
        self._has_left = threading.Event()
        addresses, port, token = invitation
        self._connection = self._connect(rank, addresses, port, bytes.fromhex(token))
        threading.Thread(target=self._watch, daemon=True, name="peers").start()

    @staticmethod
    def _connect(rank: int, addresses: list[str], port: int, token: bytes) -> socket.socket:
        problem = OSError("no address")
        for address in addresses:
            try:
                connection = socket.create_connection((address, port), timeout=5)
            except OSError as error:
                problem = error
                continue
            try:
                _keep_alive(connection)
                connection.settimeout(ANSWER_SECONDS)
                connection.sendall(token + rank.to_bytes(4))
                if connection.recv(TOKEN_BYTES, socket.MSG_WAITALL) != token:
                    raise OSError(f"{address}:{port} is something else")
                connection.settimeout(None)
                return connection
            except OSError as error:
                problem = error
                with suppress(OSError):  # rank 0 may hear this late, and would take it for a death
                    connection.sendall(LEAVES)
                connection.close()
        raise problem

    def leave(self) -> None:
        """Have done: watch no more, and tell rank 0 that all is well."""
        self._has_left.set()
        with suppress(OSError):
            self._connection.sendall(LEAVES)

    def _watch(self) -> None:
        said = _receive(self._connection)
        if said != LEAVES and not self._has_left.is_set():
            _end(int(said or b"0"), self._has_left)


def _receive(connection: socket.socket) -> bytes:
    """Wait for a word; it is empty where the other side has ended or its machine is silent."""
    try:
        return connection.recv(16)
    except OSError:
        return b""


def _end(rank: int, has_left: threading.Event) -> None:
    if has_left.wait(GRACE_SECONDS):
        return
    sys.stdout.flush()
    sys.stderr.write(
        f"error: rank {rank} has died, and the job with it; why is said above, or where it ran\n"
    )
    sys.stderr.flush()
    os._exit(1)  # whatever the main thread is waiting for


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(5)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        with suppress(AttributeError, OSError):  # not every system has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _addresses(master: str) -> list[str]:
    """Give this machine's address on the way to the master, unless it is the master itself."""
    family, kind, _, _, where = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(where)  # sends nothing
        own = str(probe.getsockname()[0])
    return [own, master] if own not in ("127.0.0.1", "::1") else [master]
