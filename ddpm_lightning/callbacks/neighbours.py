"""Does it learn by heart? Samples beside the training images that are nearest to them."""

from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from ddpm_lightning.callbacks.signals import check_signals
from ddpm_lightning.data.batches import Images
from ddpm_lightning.data.order import Indices
from ddpm_lightning.labelled_grid import Group, labelled_grid
from ddpm_lightning.metrics.neighbours import Nearest, NeighbourSearch

SHOWN = 8
BATCH_SIZE = 64


class Comparison(NamedTuple):
    """What TensorBoard gets of it."""

    scalars: dict[str, float]
    picture: Tensor  # uint8 [C, height, width]


class TrainingNeighbours:
    """Compares samples with training images: how far is each from the nearest one, by its pixels?

    About as far as images that were not trained on, and samples are as new as those; nearer, and
    they are copies. Copies of training images that are not searched are not found.

    Args:
        num_train: Training images to search, spread evenly, or all where there are fewer.
    """

    def __init__(self, num_train: int) -> None:
        self._num_train = num_train
        self._distance_val: float | None = None

    def compare(self, trainer: Trainer, samples: Tensor) -> Comparison:
        """Search on the trainer's device.

        Args:
            trainer: It has a data module.
            samples: uint8 [N, C, H, W] from seeds 0, 1, ...

        Returns:
            Median distances, the ratio of the samples' to that of as many validation images (1:
            as new as those, 0: copies), and the first samples above their neighbours.

        Raises:
            Interrupted: A signal has come.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]
        train, val = data.train_images, data.val_images
        searched = train.spread(self._num_train)
        nearest = _search(trainer, samples, train, searched)
        distance = float(nearest.distances.quantile(0.5))
        scalars = {"neighbours/distance_samples": distance}
        if self._distance_val is None and val is not None:
            images = torch.from_numpy(val[val.spread(len(samples))])
            found = _search(trainer, images, train, searched)
            self._distance_val = float(found.distances.quantile(0.5))
        if self._distance_val:  # 0 where validation images are training images
            scalars["neighbours/distance_val"] = self._distance_val
            scalars["neighbours/ratio"] = distance / self._distance_val
        shown = nearest.indices[:SHOWN, 0].cpu().numpy()
        images = torch.from_numpy(train[searched[shown]])
        return Comparison(scalars, _draw(samples, images, nearest, len(searched)))


def _search(trainer: Trainer, queries: Tensor, images: Images, searched: Indices) -> Nearest:
    """Find the nearest of the images at `searched`, in grey levels, by their places there."""
    device = trainer.strategy.root_device
    search = NeighbourSearch(queries.to(device).flatten(1), 1)
    for start in range(0, len(searched), BATCH_SIZE):
        check_signals(trainer)
        rows = torch.from_numpy(images[searched[start : start + BATCH_SIZE]])
        search.add(rows.to(device).flatten(1))
    return search.finish().in_grey_levels(queries[0].numel())


def _draw(samples: Tensor, neighbours: Tensor, nearest: Nearest, num_searched: int) -> Tensor:
    """Lay the first samples out above their neighbours, uint8 [C, height, width]."""
    num_shown = len(neighbours)
    images = torch.stack([samples[:num_shown], neighbours])
    distances = nearest.distances[:num_shown, 0].tolist()
    labels = [[""] * num_shown, [f"{distance:.3g}" for distance in distances]]
    group = Group([f"seed {seed}" for seed in range(num_shown)], images, "", labels)
    title = (
        f"Samples and the nearest of {num_searched:,} training images; below, root mean square "
        "differences in grey levels"
    )
    return labelled_grid(title, ["sample", "nearest"], [group])
