"""Load a checkpoint that has been looked at before, possibly hours ago."""

from pathlib import Path

from ddpm_lightning.checkpoints import Weights, file_sha256
from ddpm_lightning.errors import InputError
from ddpm_lightning.module import DDPM


def load_unchanged(path: Path, sha256: str, weights: Weights, option: str = "") -> DDPM:
    """Build the model of a checkpoint whose content is still what it was.

    Args:
        path: The file.
        sha256: Of its content, when it was looked at.
        weights: Which of its weights.
        option: By which it was named, such as --guide.

    Raises:
        InputError: The file has changed, or has no such weights.
    """
    if file_sha256(path) != sha256:
        raise InputError(
            f"{f'{option} {path}'.strip()}: has changed since it was first read; name a "
            "checkpoint that stays as it is, such as a step=N.ckpt"
        )
    return DDPM.from_checkpoint(path, weights)
