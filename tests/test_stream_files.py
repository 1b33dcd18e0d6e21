"""Files here and on a server that is slow, fails, cuts answers short, or changes what it serves."""

import logging
import os
import pickle
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from ddpm_lightning.data import stream_files
from ddpm_lightning.data.stream_files import (
    Hiccup,
    HttpFile,
    LocalFile,
    LocalFiles,
    RangeFile,
    StreamError,
    patiently,
)
from tests.streams import Server, answer, serving, sleep_then_answer

CONTENT = bytes(range(256)) * 40
DELAYS = (0.01, 0.02, 0.04)

Fault = Callable[[str, BaseHTTPRequestHandler], bool]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "some.bin").write_bytes(CONTENT)
    with serving(tmp_path) as server:
        yield server


def first(num_times: int, fault: Fault) -> Fault:
    """A fault that passes."""
    left = [num_times]

    def limited(path: str, handler: BaseHTTPRequestHandler) -> bool:
        left[0] -= 1
        return left[0] >= 0 and fault(path, handler)

    return limited


def unavailable(path: str, handler: BaseHTTPRequestHandler) -> bool:
    answer(handler, 503, b"")
    return True


def hang_up(path: str, handler: BaseHTTPRequestHandler) -> bool:
    handler.close_connection = True
    return True


def truncated(server: Server) -> Fault:
    def fault(path: str, handler: BaseHTTPRequestHandler) -> bool:
        handler.send_file(server.folder / path.lstrip("/"), cut=7)  # type: ignore[attr-defined]
        return True

    return fault


def test_ranges(server: Server, tmp_path: Path) -> None:
    for file in (HttpFile(f"{server.url}/some.bin"), LocalFile(str(tmp_path / "some.bin"))):
        stamp = file.stat()
        assert stamp.size == len(CONTENT)
        assert file.read(100, 300, stamp) == CONTENT[100:300]
        assert file.read_all() == CONTENT
        reader = RangeFile(pickle.loads(pickle.dumps(file)), stamp, ())
        reader.seek(-10, os.SEEK_END)
        assert reader.read(100) == CONTENT[-10:]
        assert reader.read(100) == b""
        reader.seek(5)
        reader.seek(5, os.SEEK_CUR)
        assert (reader.tell(), reader.read(3)) == (10, CONTENT[10:13])


def test_many_names_are_kept_small(tmp_path: Path) -> None:
    names = ["1.png", "a/é.png", "a/2.png"]
    files = LocalFiles(tmp_path, names)
    assert [file.name for file in files] == [str(tmp_path / name) for name in names]
    assert len(pickle.dumps(LocalFiles(tmp_path, ["123456.png"] * 1000))) < 20_000


@pytest.mark.parametrize("kind", ["slow", "503", "hangs up", "truncates"])
def test_faults_that_pass(server: Server, kind: str) -> None:
    file = HttpFile(f"{server.url}/some.bin")
    stamp = file.stat()
    server.fault = {
        "slow": sleep_then_answer(0.3),
        "503": first(3, unavailable),
        "hangs up": first(3, hang_up),
        "truncates": first(3, truncated(server)),
    }[kind]
    assert patiently(lambda: file.read(10, 5000, stamp), DELAYS) == CONTENT[10:5000]
    assert server.num_requests["/some.bin"] == (2 if kind == "slow" else 5)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("silent", "does not answer in time"),
        ("503", "the server answers 503 Service Unavailable"),
        ("hangs up", ".*"),
        ("truncates", ".*"),
    ],
)
def test_faults_that_last(
    server: Server, monkeypatch: pytest.MonkeyPatch, kind: str, reason: str
) -> None:
    monkeypatch.setattr(stream_files, "TIMEOUT", (0.3, 0.3))
    file = HttpFile(f"{server.url}/some.bin")
    stamp = file.stat()
    server.fault = {
        "silent": sleep_then_answer(1),
        "503": unavailable,
        "hangs up": hang_up,
        "truncates": truncated(server),
    }[kind]
    with pytest.raises(StreamError, match=rf"^{file.name}: {reason} \(tried 4 times in 0 s\)"):
        patiently(lambda: file.read(10, 5000, stamp), DELAYS)
    with pytest.raises(Hiccup):
        file.read_all()


def test_nobody_listens() -> None:
    with pytest.raises(StreamError, match=r"http://127.0.0.1:9/x.tar: .*refused.*--ckpt_path last"):
        patiently(HttpFile("http://127.0.0.1:9/x.tar").stat, DELAYS)


@pytest.mark.parametrize("status", [403, 404, 410])
def test_what_is_not_there_is_not_waited_for(server: Server, status: int) -> None:
    def fault(path: str, handler: BaseHTTPRequestHandler) -> bool:
        answer(handler, status, b"")
        return True

    server.fault = fault
    with pytest.raises(StreamError, match=f"the server answers {status} "):
        patiently(HttpFile(f"{server.url}/some.bin").stat, DELAYS)
    assert server.num_requests["/some.bin"] == 1


def test_server_without_ranges(server: Server) -> None:
    def fault(path: str, handler: BaseHTTPRequestHandler) -> bool:
        answer(handler, 200, CONTENT)
        return True

    server.fault = fault
    with pytest.raises(StreamError, match="only whole, not ranges of bytes"):
        HttpFile(f"{server.url}/some.bin").stat()


@pytest.mark.parametrize("etags", [True, False])
def test_changed_file(server: Server, tmp_path: Path, etags: bool) -> None:
    server.etags = etags
    for file in (HttpFile(f"{server.url}/some.bin"), LocalFile(str(tmp_path / "some.bin"))):
        (tmp_path / "some.bin").write_bytes(CONTENT)
        os.utime(tmp_path / "some.bin", (0, 0))
        stamp = file.stat()
        (tmp_path / "some.bin").write_bytes(CONTENT[:-1])
        with pytest.raises(StreamError, match="has changed since it was opened"):
            file.read(0, 10, stamp)
        (tmp_path / "some.bin").write_bytes(CONTENT)  # as long, but later
        with pytest.raises(StreamError, match="has changed since it was opened"):
            file.read(0, 10, stamp)


def test_local_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match="No such file or directory"):
        patiently(LocalFile(str(tmp_path / "none.tar")).stat, DELAYS)


def test_waiting_is_announced_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)

    def fail() -> None:
        raise Hiccup("x.tar: down")

    with caplog.at_level(logging.WARNING), pytest.raises(StreamError, match="in 255 s"):
        patiently(fail, stream_files.RETRY_DELAYS)
    assert slept == list(stream_files.RETRY_DELAYS)
    assert [record.message for record in caplog.records] == ["x.tar: down; trying again for 248 s"]
    caplog.clear()
    with caplog.at_level(logging.WARNING), pytest.raises(StreamError):
        patiently(fail, (1.0, 2.0))
    assert not caplog.records


def test_passwords_are_not_shown() -> None:
    file = HttpFile("https://me:secret@host/a.tar?key=secret", {"Authorization": "secret"})
    assert file.name == "https://host/a.tar"
    assert "headers" not in repr(file)
