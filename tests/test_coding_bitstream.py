"""The file: every cut after its header is read, and every change is seen."""

import numpy as np
import pytest

from ddpm_lightning.coding import bitstream
from ddpm_lightning.coding.bitstream import NUM_HEADER_BYTES, Header
from ddpm_lightning.errors import InputError


def header(num_bytes: int) -> Header:
    return Header(b"12345678", True, 3, 32, 40, 20, 2**32 - 1, 7, 9, num_bytes)


@pytest.mark.parametrize("num_bytes", [0, 1, 63, 64, 65, 200])
def test_every_cut_of_a_file_is_read_or_refused(num_bytes: int) -> None:
    data = np.random.default_rng(num_bytes).bytes(num_bytes)
    content = bitstream.pack(header(num_bytes), data)
    assert bitstream.unpack(content, "file") == (header(num_bytes), data)
    for cut in range(len(content)):
        if cut < NUM_HEADER_BYTES:
            with pytest.raises(InputError, match="not a file that|cut inside its header"):
                bitstream.unpack(content[:cut], "file")
        else:
            there, part = bitstream.unpack(content[:cut], "file")
            assert there == header(num_bytes)
            assert data.startswith(part)
            assert len(part) >= (cut - NUM_HEADER_BYTES) * 64 // 66 - 2
    with pytest.raises(
        InputError, match=f"file: damaged: bytes follow its end at byte {len(content)}"
    ):
        bitstream.unpack(content + b"x", "file")


def test_every_changed_byte_of_a_file_is_seen() -> None:
    data = np.random.default_rng(0).bytes(150)
    content = bitstream.pack(header(len(data)), data)
    for position in range(len(content)):
        for change in (1, 0x80, 0xFF):
            changed = bytearray(content)
            changed[position] ^= change
            with pytest.raises(InputError) as error:
                bitstream.unpack(bytes(changed), "file")
            assert str(error.value).startswith("file: ")
            # a file that is cut later, too
            if NUM_HEADER_BYTES <= position < NUM_HEADER_BYTES + 66:
                with pytest.raises(InputError, match="file: damaged near byte"):
                    bitstream.unpack(bytes(changed[: NUM_HEADER_BYTES + 70]), "file")
