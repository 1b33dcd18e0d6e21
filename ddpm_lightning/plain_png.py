"""PNGs without peculiarities, at the cost of their pixels.

Reading a small PNG's file takes Pillow about as long as decoding its pixels. Where there is nothing
else in the file, its decoder can be had alone.
"""

import struct
import zlib

from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MODES = {0: "L", 2: "RGB"}  # by the colour type; others may need a palette or have transparency
_HEADER = struct.Struct(">2I5B")
_CHUNK = struct.Struct(">I4s")
_MEANINGLESS = (b"gAMA", b"sRGB", b"cHRM", b"pHYs", b"tIME")
"""Chunks that Pillow reads and that change no pixel."""
_MAX_PIXELS = 2**24  # larger ones take their time anyway, and Pillow warns of the largest


def open_plain_png(data: bytes) -> Image.Image | None:
    """Decode a PNG of 8-bit grey or RGB that is not interlaced and has no transparency or EXIF.

    Args:
        data: The file.

    Returns:
        What `PIL.Image.open` and `load` give, pixel for pixel; None where the file is any other, or
        damaged: Pillow then says in what way.
    """
    if not data.startswith(_SIGNATURE):
        return None
    view, place, parts = memoryview(data), len(_SIGNATURE), []
    header: tuple[int, ...] | None = None
    while True:
        begin = place + _CHUNK.size
        if begin > len(data):
            return None
        length, name = _CHUNK.unpack_from(data, place)
        place = begin + length + 4
        check = data[begin + length : place]
        if zlib.crc32(view[begin - 4 : begin + length]) != int.from_bytes(check):
            return None  # or cut short: then there are no four bytes there
        if name == b"IDAT":
            parts.append(view[begin : begin + length])
        elif name == b"IHDR" and length == _HEADER.size:
            header = _HEADER.unpack_from(data, begin)
        elif name == b"IEND":
            break
        elif name not in _MEANINGLESS:
            return None
    if header is None or not parts:
        return None
    width, height, depth, colours, *methods = header
    if depth != 8 or colours not in _MODES or any(methods) or not 0 < width * height <= _MAX_PIXELS:
        return None
    mode = _MODES[colours]
    pixels = parts[0] if len(parts) == 1 else b"".join(parts)
    try:
        return Image.frombytes(mode, (width, height), bytes(pixels), "zip", mode)
    except (ValueError, OSError):
        return None
