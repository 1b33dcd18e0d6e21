"""Labelled grids: every image stands whole in its place, and every text is there."""

import pytest
import torch
from torch import Tensor

from ddpm_lightning.images import enlarge
from ddpm_lightning.labelled_grid import MIN_CELL, Group, labelled_grid


def checks(num_rows: int, num_columns: int, channels: int, size: tuple[int, int]) -> Tensor:
    """Images without white or black, which are text's and paper's, each unlike the others."""
    generator = torch.Generator().manual_seed(num_columns)
    shape = (num_rows, num_columns, channels, *size)
    return torch.randint(50, 200, shape, generator=generator, dtype=torch.uint8)


def find(picture: Tensor, image: Tensor) -> tuple[int, int]:
    """Where an image lies in a picture, (top, left); it lies there once."""
    height, width = image.shape[1:]
    corners = (picture[:, : 1 - height or None, : 1 - width or None] == image[:, :1, :1]).all(0)
    places = [
        (int(top), int(left))
        for top, left in corners.nonzero()
        if torch.equal(picture[:, top : top + height, left : left + width], image)
    ]
    assert len(places) == 1, places
    return places[0]


@pytest.mark.parametrize(
    ("channels", "size"), [(1, (8, 8)), (3, (8, 8)), (3, (20, 30)), (1, (70, 64))]
)
def test_images_stand_in_rows_and_columns(channels: int, size: tuple[int, int]) -> None:
    first, second = checks(2, 3, channels, size), checks(2, 1, channels, size)
    groups = [Group(["a", "b", "c"], first), Group(["d"], second, "heading")]
    picture = labelled_grid("title", ["one", "two"], groups)
    assert picture.dtype == torch.uint8
    assert len(picture) == channels
    scale = -(-MIN_CELL // min(size))
    assert scale == 1 or min(size) * (scale - 1) < MIN_CELL <= min(size) * scale
    all_images = torch.cat([first, second], dim=1)
    places = [[find(picture, enlarge(image, scale)) for image in row] for row in all_images]
    for row in places:
        assert len({top for top, _ in row}) == 1
    lefts = [left for _, left in places[0]]
    assert lefts == sorted(lefts) == [left for _, left in places[1]]
    assert places[0][0][0] + size[0] * scale < places[1][0][0]
    assert lefts[3] - lefts[2] > lefts[2] - lefts[1] == lefts[1] - lefts[0]  # groups stand apart


def is_written_on(area: Tensor) -> bool:
    return bool((area < 100).any())


def test_texts_stand_where_they_belong() -> None:
    images = checks(2, 2, 1, (64, 64))
    texts = Group(["aa", "bb"], images, "heading", [["1", "2"], ["", "4"]])
    picture = labelled_grid("title", ["one", "two"], [texts])[0]
    tops, lefts = zip(*(find(picture[None], images[k, k]) for k in (0, 1)), strict=True)
    line = tops[0] // 4  # title, heading, columns, and what parts them
    assert is_written_on(picture[: 1 + line])
    assert is_written_on(picture[1 + line : 1 + 2 * line, lefts[0] :])
    for left in lefts:
        assert is_written_on(picture[1 + 2 * line : tops[0], left : left + 64])
    for row, left in ((0, lefts[0]), (0, lefts[1]), (1, lefts[1])):
        assert is_written_on(picture[tops[row] + 64 :, left : left + 64])
    for row in (0, 1):
        assert is_written_on(picture[tops[row] : tops[row] + 64, : lefts[0]])
    assert not is_written_on(picture[tops[1] + 64 :, : lefts[1]])  # an empty label
    # nothing but the images and what is asked for
    bare = labelled_grid("", [""], [Group([""], images[:1, :1])])[0]
    top, left = find(bare[None], images[0, 0])
    bare[top : top + 64, left : left + 64] = 255
    assert (bare == 255).all()


def test_a_wide_text_widens_its_column_and_the_heading_its_group() -> None:
    images = checks(1, 2, 1, (8, 8))
    narrow = labelled_grid("", ["r"], [Group(["a", "b"], images)])
    for wide in (
        Group(["a" * 20, "b"], images),
        Group(["a", "b"], images, "heading " * 5),
        Group(["a", "b"], images, "", [["", "1234567890"]]),
    ):
        assert labelled_grid("", ["r"], [wide]).shape[2] > narrow.shape[2]
    # a title is broken instead
    titled = labelled_grid("word " * 30, ["r"], [Group(["a", "b"], images)])
    assert titled.shape[2] == narrow.shape[2]
    assert titled.shape[1] > narrow.shape[1]
    assert not is_written_on(titled[0, :, -3:])


def test_rows_without_labels_take_no_space_for_them() -> None:
    images = checks(2, 1, 1, (64, 64))
    heights = [
        labelled_grid("", ["", ""], [Group([""], images, "", labels)]).shape[1]
        for labels in ([["a"], ["b"]], [[""], ["b"]], [[""], [""]], [])
    ]
    assert heights[0] - heights[1] == heights[1] - heights[2] > 0
    assert heights[2] == heights[3]


def test_letters_grow_with_the_images() -> None:
    ink = [
        (labelled_grid("", ["row"], [Group(["column"], checks(1, 1, 1, (n, n)))]) < 50).sum()
        for n in (64, 256)
    ]
    assert ink[1] > 2 * ink[0]
