"""Where images come from: one name or path to a `Source`."""

import difflib
import os
import re
from pathlib import Path

import numpy as np

from ddpm_lightning.data import hugging_face, idx, image_folder
from ddpm_lightning.data.items import ArraySplit, Labels, Source, fingerprint, numbered
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import Pixels, levels_to_uint8

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:\w[\w.-]*)?")


def open_source(source: str) -> Source:
    """Find what `source` names; no image is decoded yet.

    In this order: "digits", the handwritten digits of scikit-learn (1797 of 8 x 8); a folder with
    IDX files (MNIST, Fashion-MNIST); a folder written by `datasets.save_to_disk`; a folder of
    images; a folder of Parquet or Arrow files, or one Parquet file; the name of a data set on the
    Hugging Face hub, with :CONFIGURATION where it has several. What looks like a path never goes to
    the hub.

    Raises:
        InputError: Nothing there, nothing in it, or the hub does not have it or is out of reach.
    """
    if source == "digits":
        digits = ArraySplit(source, 1797, _digits)
        return Source(source, fingerprint(source), {"train": digits}, {"train": _digit_labels})
    path = Path(source).expanduser()
    try:
        if source and path.is_dir():
            return _open_folder(source, path)
        if path.is_file():
            return _open_file(source, path)
    except OSError as error:
        raise InputError(f"--data.source {source} cannot be read: {error}") from error
    hint = suggest(source, path)
    if not HUB_NAME.fullmatch(source):
        raise InputError(
            f"--data.source {source!r} does not exist{hint}; it takes digits, a folder of images, "
            f"a folder with IDX, Parquet or Arrow files, or a data set on the Hugging Face hub"
        )
    return hugging_face.open_hub(source, hint)


def _open_folder(source: str, folder: Path) -> Source:
    if idx.is_idx_folder(folder):
        return idx.open_idx(source, folder)
    if hugging_face.is_saved(folder):
        return hugging_face.open_saved(source, folder)
    files = image_folder.list_files(folder)
    if any(file.path.lower().endswith(image_folder.SUFFIXES) for file in files):
        return image_folder.open_image_folder(source, folder, files)
    if any(file.path.lower().endswith(hugging_face.SUFFIXES) for file in files):
        return hugging_face.open_folder(source, folder)
    raise InputError(
        f"--data.source {source} has no images in it; it takes a folder with files that end in "
        f"{', '.join(image_folder.SUFFIXES)}, at any depth, or with IDX, Parquet or Arrow "
        f"files"
    )


def _open_file(source: str, file: Path) -> Source:
    if not file.name.lower().endswith(hugging_face.SUFFIXES):
        raise InputError(
            f"--data.source {source} is a file; it takes a folder, or a file that ends in "
            f"{' or '.join(hugging_face.SUFFIXES)}"
        )
    return hugging_face.open_file(source, file)


def suggest(source: str, path: Path) -> str:
    """Give the nearest folder beside what was asked for, or "digits", as a clause; "" for none."""
    siblings = []
    if path.parent.is_dir():
        siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    bare = os.sep not in source
    near = difflib.get_close_matches(path.name, [*siblings, *(["digits"] if bare else [])], n=1)
    return f" (did you mean {near[0] if bare else path.with_name(near[0])}?)" if near else ""


def _digits() -> Pixels:
    # Here, because the import takes a second and a decoded cache makes it needless.
    from sklearn.datasets import load_digits

    return levels_to_uint8(load_digits().images, 16)


def _digit_labels() -> Labels:
    from sklearn.datasets import load_digits

    return numbered(load_digits().target.astype(np.int64))
