"""Grids whose rows, columns and images are labelled by text."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddpm_lightning.images import enlarge, to_pil

MIN_CELL = 56  # pixels; narrower images are enlarged, so that one sees them and labels fit

BETWEEN = 3  # gaps between groups


class Group(NamedTuple):
    """Columns that belong together.

    Attributes:
        columns: What each is called, K texts.
        images: uint8 [R, K, C, H, W].
        heading: Stands above them.
        labels: Stand below the images, [R][K] texts; none where empty.
    """

    columns: Sequence[str]
    images: Tensor
    heading: str = ""
    labels: Sequence[Sequence[str]] = ()


def labelled_grid(title: str, rows: Sequence[str], groups: Sequence[Group]) -> Tensor:
    """Lay groups of columns out side by side on white.

    Small images are enlarged by a whole factor, each pixel to a square.

    Args:
        title: Lines above all; long ones are broken.
        rows: What each row is called, R texts.
        groups: The columns, their images of one shape.

    Returns:
        uint8 [C, height, width].
    """
    canvas = _Layout(title, rows, groups).draw()
    pixels = torch.from_numpy(np.array(canvas))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


class _Block(NamedTuple):
    """A group with the widths of its columns, and its own; a gap follows each column."""

    group: Group
    widths: Sequence[int]
    span: int


class _Layout:
    """Where everything stands, in pixels."""

    def __init__(self, title: str, rows: Sequence[str], groups: Sequence[Group]) -> None:
        self._rows = rows
        channels, height, width = groups[0].images.shape[2:]
        self._mode = "L" if channels == 1 else "RGB"
        self._scale = -(-MIN_CELL // min(height, width))
        self._height, self._width = height * self._scale, width * self._scale
        self._font = _font(max(13, self._width // 10))
        self._line = round(1.4 * self._font.size)
        self._gap = max(4, self._width // 20)
        self._blocks = [self._block(group) for group in groups]
        self._margin = max(map(self._length, rows)) + 2 * self._gap
        between = BETWEEN * self._gap * (len(groups) - 1)
        self._total = self._margin + sum(block.span for block in self._blocks) + between
        self._title = self._wrap(title)

    def draw(self) -> Image.Image:
        groups = [block.group for block in self._blocks]
        headings = self._line * any(group.heading for group in groups)
        columns = self._line * any(any(group.columns) for group in groups)
        top = self._gap + self._line * len(self._title)
        first = top + headings + columns + self._gap
        tops = [first]
        for row in range(len(self._rows)):
            labelled = any(group.labels and any(group.labels[row]) for group in groups)
            tops.append(tops[-1] + self._height + self._line * labelled + self._gap)
        canvas = Image.new(self._mode, (self._total, tops[-1]), "white")
        pen = ImageDraw.Draw(canvas)

        def write(x: float, y: float, text: str, anchor: str) -> None:
            # Pillow's anchors: (l)eft, (m)iddle or (r)ight; (m)iddle of the line
            pen.text((x, y), text, fill="black", font=self._font, anchor=anchor)

        for number, line in enumerate(self._title):
            write(self._gap, self._gap + (number + 0.5) * self._line, line, "lm")
        for row, text in enumerate(self._rows):
            write(self._margin - self._gap, tops[row] + self._height / 2, text, "rm")
        left = self._margin
        for group, widths, span in self._blocks:
            write(left + (span - self._gap) / 2, top + headings / 2, group.heading, "mm")
            # a heading may be wider than what stands below it
            x = left + (span - self._across(widths)) // 2
            for column, width in enumerate(widths):
                middle = x + width / 2
                write(middle, top + headings + columns / 2, group.columns[column], "mm")
                for row, images in enumerate(group.images):
                    image = to_pil(enlarge(images[column], self._scale))
                    canvas.paste(image, (x + (width - self._width) // 2, tops[row]))
                    if group.labels:
                        y = tops[row] + self._height + self._line / 2
                        write(middle, y, group.labels[row][column], "mm")
                x += width + self._gap
            left += span + BETWEEN * self._gap
        return canvas

    def _block(self, group: Group) -> "_Block":
        """Make each column as wide as its images, or as the widest text in it."""
        texts = [group.columns, *group.labels]
        widths = [
            max(self._width, *(self._length(line[column]) for line in texts))
            for column in range(len(group.columns))
        ]
        heading = self._length(group.heading) + self._gap
        return _Block(group, widths, max(self._across(widths), heading))

    def _across(self, widths: Sequence[int]) -> int:
        return sum(widths) + self._gap * len(widths)

    def _length(self, text: str) -> int:
        return round(self._font.getlength(text)) + 1

    def _wrap(self, title: str) -> list[str]:
        """Break lines that are wider than the picture, between words."""
        broken = []
        for line in title.splitlines():
            broken.append("")
            for word in line.split():
                longer = f"{broken[-1]} {word}".strip()
                if broken[-1] and self._length(longer) > self._total - 2 * self._gap:
                    broken.append(word)
                else:
                    broken[-1] = longer
        return broken


def _font(size: int) -> ImageFont.FreeTypeFont:
    # Matplotlib brings one with Greek letters, which Pillow's own lacks; its import takes a while
    from matplotlib import get_data_path

    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
