"""The classes of a set's images, read from its source when a network is told them.

They are not kept beside the decoded pixels: reading them takes a moment, and caches that were
written before there were labels stay good.
"""

import numpy as np

from ddpm_lightning.data.batches import ImageSet
from ddpm_lightning.data.items import Labels, Source
from ddpm_lightning.data.order import Indices
from ddpm_lightning.errors import InputError


def read_classes(source: Source, num_classes: int) -> Labels:
    """Read the training images' labels, and see that the network is told as many classes.

    Raises:
        InputError: There are none, or other numbers of classes.
    """
    if "train" not in source.labels:
        raise InputError(
            f"--model.net.num_classes {num_classes}: --data.source {source.name} has no labels; "
            "those of a folder are its subfolders, one for each class; or leave num_classes out"
        )
    classes = source.labels["train"]()
    if classes.num_classes != num_classes:
        raise InputError(
            f"--model.net.num_classes {num_classes}: --data.source {source.name} has "
            f"{classes.num_classes} classes; give --model.net.num_classes {classes.num_classes}"
        )
    return classes


def read_labels(source: Source, images: ImageSet, num_classes: int) -> Indices:
    """Read the classes of a set's images, int64 [len(images)] in [0, num_classes).

    Raises:
        InputError: There are none, one is missing or out of range, or the cache does not say which
            images it has left out.
    """
    if images.split not in source.labels:
        raise InputError(
            f"--data.source {source.name} has labels for its training images but none for its "
            f"{images.split} images; label or remove those"
        )
    if images.cached.skipped is None:
        raise InputError(
            f"{images.cached.folder}: was decoded by an older version, which did not note which "
            "images are broken; remove it, and they are decoded again"
        )
    values = source.labels[images.split]().values
    wrong = np.flatnonzero((values < 0) | (values >= num_classes))
    if len(wrong):
        name = source.splits[images.split].name(int(wrong[0]))
        raise InputError(
            f"{name} has label {values[wrong[0]]}, but the training images' classes are "
            f"0-{num_classes - 1}; label or remove it"
        )
    return images.pick(values)
