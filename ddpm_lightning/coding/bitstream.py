"""The file: a header, then the stream in chunks, each with a checksum of all up to there.

Cut anywhere after its header a file is good; with a byte changed it is not. A change shows at the
end of its chunk: only in the last chunk of a cut file may one go unseen.
"""

import binascii
import platform
import struct
import zlib
from typing import NamedTuple

import numpy as np
import torch

from ddpm_lightning.errors import InputError

_MAGIC = b"DDPM"
_VERSION = 1
_CHUNK = 64  # bytes of the stream for each two of a checksum, 3 %


class Header(NamedTuple):
    """What one must know to decode."""

    checkpoint: bytes  # the first 8 bytes of the checkpoint file's SHA-256
    is_raw: bool  # the raw weights rather than the moving average
    channels: int
    height: int
    width: int
    num_steps: int
    seed: int
    image_crc: int  # CRC-32 of the pixels: tells the receiver that it has them right
    environment: int  # what the results of floating point depend on, see `environment`
    num_bytes: int  # of the whole stream


_PREFIX = struct.Struct(">4sB")
_FIELDS = struct.Struct(">8s?BHHHIIII")
_HEADER_CRC = struct.Struct(">I")
_CHUNK_CRC = struct.Struct(">H")
_NUM_FIELD_BYTES = _PREFIX.size + _FIELDS.size

NUM_HEADER_BYTES = _NUM_FIELD_BYTES + _HEADER_CRC.size


def environment() -> int:
    """Give a CRC-32 of what must be the same for two machines to compute the same."""
    names = (
        torch.__version__,
        np.__version__,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
    )
    return zlib.crc32(" ".join(names).encode())


def pack(header: Header, data: bytes) -> bytes:
    """Give a file's content for a stream."""
    head = _PREFIX.pack(_MAGIC, _VERSION) + _FIELDS.pack(*header)
    parts, crc = [head, _HEADER_CRC.pack(zlib.crc32(head))], 0
    for start in range(0, len(data), _CHUNK):
        chunk = data[start : start + _CHUNK]
        crc = binascii.crc_hqx(chunk, crc)
        parts += [chunk, _CHUNK_CRC.pack(crc)]
    return b"".join(parts)


def unpack(content: bytes, name: str) -> tuple[Header, bytes]:
    """Read a file's content, or the beginning of it.

    Args:
        content: The bytes.
        name: What to call the file in errors.

    Returns:
        The header, and as much of the stream as is there.

    Raises:
        InputError: It is something else, of a newer version, cut inside its header, or damaged.
    """
    header = _read_header(content, name)
    data, crc, position = b"", 0, NUM_HEADER_BYTES
    while len(data) < header.num_bytes and position < len(content):
        size = min(_CHUNK, header.num_bytes - len(data))
        chunk = content[position : position + size]
        sum_there = content[position + size : position + size + _CHUNK_CRC.size]
        crc = binascii.crc_hqx(chunk, crc)
        if len(sum_there) == _CHUNK_CRC.size and sum_there != _CHUNK_CRC.pack(crc):
            raise InputError(
                f"{name}: damaged near byte {position}; a file may be cut, but not changed"
            )
        data += chunk
        position += size + _CHUNK_CRC.size
    if position < len(content):
        raise InputError(f"{name}: damaged: bytes follow its end at byte {position}")
    return header, data


def _read_header(content: bytes, name: str) -> Header:
    if not content or content[: len(_MAGIC)] != _MAGIC[: len(content)]:
        raise InputError(f"{name}: not a file that compress wrote")
    if len(content) >= _PREFIX.size and content[len(_MAGIC)] > _VERSION:
        raise InputError(
            f"{name}: version {content[len(_MAGIC)]} is newer than this ddpm_lightning reads "
            f"({_VERSION}); upgrade it"
        )
    if len(content) < NUM_HEADER_BYTES:
        raise InputError(
            f"{name}: cut inside its header, after {len(content)} of {NUM_HEADER_BYTES} bytes; "
            "only what follows the header may be left out"
        )
    head = content[:_NUM_FIELD_BYTES]
    if content[_NUM_FIELD_BYTES:NUM_HEADER_BYTES] != _HEADER_CRC.pack(zlib.crc32(head)):
        raise InputError(f"{name}: the header is damaged; compress the picture again")
    return Header(*_FIELDS.unpack(head[_PREFIX.size :]))
