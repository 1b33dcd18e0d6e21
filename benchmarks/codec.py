"""What `compress` takes beside theory and PNG: `python -m benchmarks.codec CKPT SOURCE`.

Prints, in bits per dimension, the means over the first test images of SOURCE, or over those that
`fit` would have validated on where it has no test images, and lays some of them out as they look
from 5, 10, 25, 50 and 100 % of what follows the header.
"""

import argparse
import io
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_lightning.coding.bitstream import NUM_HEADER_BYTES, Header, pack, unpack
from ddpm_lightning.coding.codec import decode, encode
from ddpm_lightning.commands.coding import Model, load_model, reproducibly
from ddpm_lightning.data.datamodule import ImageDataModule
from ddpm_lightning.images import make_grid, to_pil, write_png

PERCENTS = (5, 10, 25, 50, 100)
SEED = 0


def held_out_images(source: str, num_images: int) -> Tensor:
    """Give uint8 [N, C, H, W] that the model was not trained on."""
    data = ImageDataModule(source)
    images = data.test_images or data.val_images
    assert images is not None, f"{source} has no images to test with"
    return torch.from_numpy(images[np.arange(min(num_images, len(images)))])


def cut(model: Model, image: Tensor, content: bytes) -> list[Tensor]:
    """Decode some beginnings of what follows a file's header."""
    stages = []
    for percent in PERCENTS:
        length = NUM_HEADER_BYTES + (len(content) - NUM_HEADER_BYTES) * percent // 100
        _, data = unpack(content[:length], "file")
        channels, height, width = image.shape
        stages.append(decode(*model, data, SEED, (channels, height, width)).image)
    assert torch.equal(stages[-1], image)
    return stages


def main() -> None:
    """Print the table, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("source")
    parser.add_argument("--num_images", type=int, default=32)
    parser.add_argument("--num_steps", type=int, default=20)
    parser.add_argument("--strip", type=Path, help="the picture, of the first images")
    parser.add_argument("--num_rows", type=int, default=4, help="its rows")
    options = parser.parse_args()

    images = held_out_images(options.source, options.num_images)
    model = load_model(options.checkpoint, "ema", options.num_steps)
    histories, sizes, seconds = [], [], []
    strip: list[Tensor] = []
    for image in images:
        start = time.process_time()
        with reproducibly():
            data, history = encode(*model, image, SEED)
        content = pack(Header(b"", False, 0, 0, 0, 0, 0, 0, 0, len(data)), data)
        seconds.append(time.process_time() - start)
        png = io.BytesIO()
        to_pil(image).save(png, "PNG", optimize=True)
        histories.append(history)
        sizes.append((len(content), len(png.getvalue())))
        if options.strip and len(strip) < options.num_rows * len(PERCENTS):
            with reproducibly():
                strip += cut(model, image, content)

    print("    t   bits/dim   theory     RMSE")
    for t, rate, theoretical, rmse in np.mean(histories, axis=0):
        print(f"{t:5.0f} {rate:10.3f} {theoretical:8.3f} {rmse:8.2f}")
    ours, pngs = np.mean(sizes, axis=0)
    dims = images[0].numel()
    print(
        f"{len(images)} images, bytes a file: {ours:.1f} ({8 * ours / dims:.3f} bits/dim), as PNG "
        f"{pngs:.1f} ({8 * pngs / dims:.3f}); CPU seconds an image: {np.mean(seconds):.2f}"
    )
    if options.strip:
        write_png(options.strip, make_grid(torch.stack(strip), num_columns=len(PERCENTS)))


if __name__ == "__main__":
    main()
