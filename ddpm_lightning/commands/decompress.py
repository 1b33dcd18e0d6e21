"""`decompress`: show what a file of `compress`, or the beginning of one, holds."""

import zlib
from pathlib import Path

from ddpm_lightning.checkpoints import file_sha256
from ddpm_lightning.coding.bitstream import Header, environment, unpack
from ddpm_lightning.coding.codec import decode
from ddpm_lightning.commands.coding import (
    NUM_CHECKPOINT_BYTES,
    load_model,
    reproducibly,
)
from ddpm_lightning.commands.options import parse_options
from ddpm_lightning.commands.shell import announce, new_file, run_command
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import write_png


def decompress(
    file: str,
    checkpoint: str,
    out: str | None = None,
    bytes: int | None = None,
    finish: bool = False,
) -> None:
    """Decompress a file that compress wrote, with the checkpoint that it was made with.

    A file that was cut after its header gives the picture that the last whole step predicts.
    Decoding is promised on the machine that encoded, with the same PyTorch.

    Args:
        file: The file.
        checkpoint: The .ckpt file that it was made with.
        out: The PNG to write; FILE with the ending .png when left out.
        bytes: Use only so many of the file's first bytes.
        finish: Where the stream is cut, draw what is missing as sample does: sharper, and invented.
    """
    if bytes is not None and bytes < 0:
        raise InputError(f"--bytes must be at least 0, got {bytes}")
    target = new_file(out or Path(file).with_suffix(".png"))
    if not Path(file).is_file():
        raise InputError(f"{file}: no such file")
    content = Path(file).read_bytes()[:bytes]
    header, data = unpack(content, file)
    _check_checkpoint(header, file, checkpoint)
    net, process = load_model(checkpoint, "raw" if header.is_raw else "ema", header.num_steps)
    if header.environment != environment():
        announce(
            f"warning: {file} was made with another PyTorch, NumPy or kind of CPU, and may come "
            "out wrong here"
        )
    shape = header.channels, header.height, header.width
    with reproducibly():
        image, num_steps, is_whole = decode(net, process, data, header.seed, shape, finish)
    if is_whole and zlib.crc32(image.numpy().tobytes()) != header.image_crc:
        raise InputError(
            f"{file}: other pixels come out than went in: this machine computes otherwise than the "
            "one that compressed it; decompress it there"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_png(target, image)
    announce(
        f"bytes {len(content)}, steps {num_steps} of {header.num_steps}: "
        + ("lossless" if is_whole else "cut, finished by sampling" if finish else "cut, predicted")
    )
    announce(f"image: {target}")


def _check_checkpoint(header: Header, file: str, checkpoint: str) -> None:
    if not Path(checkpoint).is_file():
        raise InputError(f"{checkpoint}: no such checkpoint file")
    sha256 = file_sha256(checkpoint)
    if sha256[: 2 * NUM_CHECKPOINT_BYTES] != header.checkpoint.hex():
        raise InputError(
            f"{file}: made with the checkpoint of SHA-256 {header.checkpoint.hex()}..., but "
            f"{checkpoint} has {sha256[: 2 * NUM_CHECKPOINT_BYTES]}...; give that one"
        )


def main() -> int:
    """Run `decompress` with the options of sys.argv."""
    options = parse_options(decompress, "decompress", "FILE CHECKPOINT [options]")
    return run_command(lambda: decompress(**options))
