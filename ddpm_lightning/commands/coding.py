"""What `compress` and `decompress` share: the model, and computing the same twice."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ddpm_lightning.checkpoints import Weights
from ddpm_lightning.coding.codec import space_by_noise
from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.module import DDPM

NUM_CHECKPOINT_BYTES = 8  # of the SHA-256, by which a file knows its checkpoint


class Model(NamedTuple):
    """What a picture is sent with."""

    net: DDPM
    process: Process  # on the timesteps that the codec visits


def load_model(checkpoint: str, weights: Weights, num_steps: int) -> Model:
    """Load a checkpoint, on the CPU.

    A codec's `Network` takes x_t and t alone: a model that is told more, say a class, is given that
    here, by both commands alike, and what it is told belongs in the file's header.

    Raises:
        InputError: It is none, or has fewer timesteps.
    """
    net = DDPM.from_checkpoint(checkpoint, weights)
    return Model(net, net.process.respace(space_by_noise(net.process, num_steps)))


@contextmanager
def reproducibly() -> Iterator[None]:
    """Compute on one thread and without gradients: sums over more threads round otherwise."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(num_threads)
