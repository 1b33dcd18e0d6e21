"""`compress`: send a picture in as few bits as a model and a few of its steps can."""

import csv
import io
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ddpm_lightning.checkpoints import Weights, file_sha256
from ddpm_lightning.coding.bitstream import NUM_HEADER_BYTES, Header, environment, pack
from ddpm_lightning.coding.codec import Progress, encode
from ddpm_lightning.commands.coding import (
    NUM_CHECKPOINT_BYTES,
    load_model,
    reproducibly,
)
from ddpm_lightning.commands.options import parse_options
from ddpm_lightning.commands.shell import announce, new_file, run_command
from ddpm_lightning.data.decoding import BrokenImage, decode_item
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import to_pil, write_atomically
from ddpm_lightning.randomness import NUM_SEEDS

_MAX_ROWS = 25  # of the table that is shown; the CSV has all


def compress(
    image: str,
    checkpoint: str,
    out: str | None = None,
    num_steps: int = 20,
    weights: Weights = "ema",
    seed: int = 0,
    csv: bool = False,
) -> None:
    """Compress an image of the size that a model draws, without loss, and progressively.

    Any beginning of the file decodes to a picture, the more exact the longer it is. Decoding needs
    the same checkpoint, and is promised on the same machine with the same PyTorch: both sides run
    the network, on the CPU and on one thread, and must come to the same last bit. It is meant for
    small images: time grows with pixels times steps.

    Args:
        image: The image file. Its pixels, as 8 bits of grey or RGB, are what is kept exactly.
        checkpoint: A .ckpt file of a run.
        out: The file to write; IMAGE with the ending .ddpm when left out.
        num_steps: Network evaluations. More take longer, and each costs about two bits beside what
            it brings.
        weights: The moving average, or the raw weights.
        seed: Keys the random numbers that both sides share.
        csv: Also write a CSV with the rate and distortion after each step beside OUT.
    """
    if not 0 <= seed < NUM_SEEDS:
        raise InputError(f"--seed must lie in 0..{NUM_SEEDS - 1}, got {seed}")
    target = new_file(out or Path(image).with_suffix(".ddpm"))
    table = new_file(target.with_suffix(".csv")) if csv else None
    pixels = _read_image(image)
    net, process = load_model(checkpoint, weights, num_steps)
    shape = tuple(pixels.shape)
    if net.image_shape not in (None, shape):
        asked = "x".join(map(str, net.image_shape or ()))
        raise InputError(
            f"{image}: {'x'.join(map(str, shape))} (channels, height, width), but the model draws "
            f"{asked}; convert it first"
        )
    with reproducibly():
        data, history = encode(net, process, pixels, seed)
    channels, height, width = shape
    header = Header(
        checkpoint=bytes.fromhex(file_sha256(checkpoint))[:NUM_CHECKPOINT_BYTES],
        is_raw=weights == "raw",
        channels=channels,
        height=height,
        width=width,
        num_steps=num_steps,
        seed=seed,
        image_crc=zlib.crc32(pixels.numpy().tobytes()),
        environment=environment(),
        num_bytes=len(data),
    )
    content = pack(header, data)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, lambda file: file.write(content))
    if table is not None:
        text = _to_csv(history)
        write_atomically(table, lambda file: file.write(text.encode()))
    announce(_describe(history))
    announce(_compare(pixels, content, data))
    announce(f"compressed: {target}" + (f"\nrates: {table}" if table else ""))


def _read_image(name: str) -> Tensor:
    """Read an image's own pixels, uint8 [C, H, W]."""
    try:
        content = Path(name).read_bytes()
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror})") from error
    pixels = decode_item(lambda: content, size=None, channels=None)
    if isinstance(pixels, BrokenImage):
        raise InputError(f"{name}: cannot be decoded: {pixels}; give another image")
    return torch.from_numpy(pixels.copy())


def _describe(history: Sequence[Progress]) -> str:
    """Lay out rates and distortion as a table, all rows or some, the last two always."""
    *steps, last = history
    stride = -(-len(steps) // _MAX_ROWS)
    lines = ["    t   bits/dim   theory     RMSE"]
    for step in [*steps[::-1][::stride][::-1], last]:
        t = "x_0" if step is last else str(step.t)
        lines.append(f"{t:>5} {step.rate:10.3f} {step.theoretical:8.3f} {step.rmse:8.2f}")
    return "\n".join(lines)


def _compare(pixels: Tensor, content: bytes, data: bytes) -> str:
    png = io.BytesIO()
    to_pil(pixels).save(png, "PNG", optimize=True)
    num_sums = len(content) - len(data) - NUM_HEADER_BYTES
    return (
        f"the file: {_size(content, pixels)}: header {NUM_HEADER_BYTES}, stream {len(data)}, "
        f"checksums {num_sums}; as PNG: {_size(png.getvalue(), pixels)}"
    )


def _size(content: bytes, pixels: Tensor) -> str:
    return f"{len(content)} bytes, {8 * len(content) / pixels.numel():.3f} bits/dim"


def _to_csv(history: Sequence[Progress]) -> str:
    """Give `t,rate_bits_per_dim,theoretical_bits_per_dim,rmse`; t = -1 is the whole stream."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["t", "rate_bits_per_dim", "theoretical_bits_per_dim", "rmse"])
    for t, *values in history:
        writer.writerow([t, *(f"{value:.6f}" for value in values)])
    return file.getvalue()


def main() -> int:
    """Run `compress` with the options of sys.argv."""
    options = parse_options(compress, "compress", "IMAGE CHECKPOINT [options]")
    return run_command(lambda: compress(**options))
