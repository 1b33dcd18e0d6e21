"""Streams for tests: files of numbered images, and a server that misbehaves as it is told."""

import io
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

SIZE = 4
"""Height and width of the images."""


def pixels_of(number: int) -> NDArray[np.uint8]:
    """Image `number` in [0, 65536), whose first two pixels say which it is."""
    pixels = np.full((SIZE, SIZE), 7, dtype=np.uint8)
    pixels[0, :2] = number % 256, number // 256
    return pixels


def numbers_of(images: torch.Tensor) -> list[int]:
    """Which images those are."""
    pixels = images.to(torch.int64)
    found: list[int] = (pixels[:, 0, 0, 0] + 256 * pixels[:, 0, 0, 1]).tolist()
    return found


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_of(number)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, numbers: Sequence[int], *others: tuple[str, bytes]) -> None:
    """A tar as webdataset writes them: an image and a text for each number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        members = [(f"{n:06}.{end}", n) for n in numbers for end in ("png", "txt")]
        for name, number in members:
            add(tar, name, png(number) if name.endswith("png") else b"a caption")
        for name, data in others:
            add(tar, name, data)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_parquet(path: Path, numbers: Sequence[int], rows_per_group: int = 10) -> None:
    """Encoded images as `datasets` lays them out, beside a column of no interest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": png(number), "path": None} for number in numbers]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"label": list(numbers), "image": pa.array(cells, kind)})
    pq.write_table(table, path, row_group_size=rows_per_group)


def write_folder(folder: Path, numbers: Sequence[int]) -> None:
    for number in numbers:
        path = folder / f"{number % 3}" / f"{number:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))


WRITERS: dict[str, Callable[[Path, Sequence[int]], None]] = {
    "parquet": write_parquet,
    "tar": write_tar,
}


class Server:
    """Serves a folder over HTTP on loopback, with ranges; counts, and fails where told to.

    Args:
        folder: What it serves.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.etags = True
        self.num_bytes: Counter[str] = Counter()
        self.num_requests: Counter[str] = Counter()
        self.fault: Callable[[str, BaseHTTPRequestHandler], bool] = lambda path, handler: False
        self.respond: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        handler = type("Handler", (_Handler,), {"owner": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.http.handle_error = _silent  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.http.server_port}"


def _silent(request: object, client_address: object) -> None:
    """Clients that hang up are no news."""


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.owner.num_requests[path] += 1
        if self.owner.fault(path, self):
            return
        if path in self.owner.respond:
            self.owner.respond[path](self)
            return
        file = self.owner.folder / path.lstrip("/")
        if not file.is_file():
            answer(self, 404, b"")
            return
        self.send_file(file)

    do_HEAD = do_GET

    def send_file(self, file: Path, cut: int = 0) -> None:
        """Answer with a file or a range of it, keeping back the last `cut` bytes of that."""
        data = file.read_bytes()
        start, stop = 0, len(data)
        self.send_response(206 if "Range" in self.headers else 200)
        if "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, len(data))
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("Content-Length", str(stop - start))
        changed = file.stat()
        self.send_header("Last-Modified", formatdate(changed.st_mtime, usegmt=True))
        if self.owner.etags:
            self.send_header("ETag", f'"{changed.st_mtime_ns}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[start : stop - cut])
            self.owner.num_bytes[f"/{file.relative_to(self.owner.folder)}"] += stop - start - cut
        if cut:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None: ...


def answer(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    """Answer a request with few bytes."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def sleep_then_answer(seconds: float) -> Callable[[str, BaseHTTPRequestHandler], bool]:
    """A fault: the server is slow, but answers."""

    def fault(path: str, handler: BaseHTTPRequestHandler) -> bool:
        time.sleep(seconds)
        return False

    return fault
