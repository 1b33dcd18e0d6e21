"""How ranks watch each other, in one process; tests/test_dying.py has real deaths."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from ddpm_lightning import peers
from ddpm_lightning.peers import LEAVES, TOKEN_BYTES, Centre, Spoke


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_so()


@pytest.fixture
def died(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranks of which a process would say that they have died, and end."""
    ranks: list[int] = []
    monkeypatch.setattr(peers, "_end", lambda rank, has_left: ranks.append(rank))
    return ranks


def test_only_who_says_nothing_has_died(died: list[int]) -> None:
    """Rank 3 gives up when it has been let in, and by then has asked again."""
    centre = Centre("127.0.0.1")
    addresses, port, token = centre.invitation

    def join(rank: int) -> socket.socket:
        connection = socket.create_connection((addresses[0], port), timeout=30)
        connection.sendall(bytes.fromhex(token) + rank.to_bytes(4))
        assert len(connection.recv(TOKEN_BYTES, socket.MSG_WAITALL)) == TOKEN_BYTES
        return connection

    with join(3) as given_up:
        spoke = Spoke(3, centre.invitation)
        given_up.sendall(LEAVES)
    join(1).close()
    wait_until(lambda: bool(died))
    centre.leave()
    spoke.leave()
    assert set(died) == {1}  # to rank 0, which tells the others


def test_a_rank_that_gives_up_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 is too busy to answer; it reads later, and takes it for no death."""
    monkeypatch.setattr(peers, "ANSWER_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        heard: list[bytes] = []

        def listen() -> None:
            connection, _ = server.accept()
            with connection:
                while data := connection.recv(100):
                    heard.append(data)

        thread = threading.Thread(target=listen)
        thread.start()
        token = b"x" * TOKEN_BYTES
        with pytest.raises(OSError, match="timed out"):
            Spoke(2, (["127.0.0.1"], server.getsockname()[1], token.hex()))
        thread.join(timeout=30)
    assert b"".join(heard) == token + (2).to_bytes(4) + LEAVES


RANK = """
import atexit
import torch
import torch.distributed as dist
from ddpm_lightning.peers import end_process

torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
{last}
end_process(3)
"""
ADDS = "for _ in range(300): dist.all_reduce(torch.zeros(1_000_000), async_op=True)"
SAYS = "atexit.register(print, 'let go'); print('done')"


@pytest.mark.parametrize(
    ("last", "output"), [(ADDS, ""), (SAYS, "done\nlet go\n")], ids=["adds", "says"]
)
def test_a_rank_ends_with_its_status(last: str, output: str) -> None:
    """By sys.exit it would abort while gloo is busy with sums: 8 times of 8."""
    command = [sys.executable, "-c", RANK.format(last=last)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (3, output, "")


def test_a_process_without_others_ends_as_any() -> None:
    with pytest.raises(SystemExit) as ended:
        peers.end_process(2)
    assert ended.value.code == 2
