"""Train, sample and judge denoising diffusion probabilistic models on PyTorch Lightning."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm_lightning.data.datamodule import ImageDataModule
    from ddpm_lightning.diffusion.process import Process
    from ddpm_lightning.diffusion.schedules import make_betas
    from ddpm_lightning.module import DDPM
    from ddpm_lightning.muon import Muon
    from ddpm_lightning.networks.unet import UNet

__all__ = ["DDPM", "ImageDataModule", "Muon", "Process", "UNet", "__version__", "make_betas"]

try:
    __version__ = version("ddpm-lightning")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "unknown"

# `python -m ddpm_lightning --help` imports this file first: torch and Lightning wait until used.
_LAZY = {
    "DDPM": "ddpm_lightning.module",
    "ImageDataModule": "ddpm_lightning.data.datamodule",
    "Muon": "ddpm_lightning.muon",
    "Process": "ddpm_lightning.diffusion.process",
    "UNet": "ddpm_lightning.networks.unet",
    "make_betas": "ddpm_lightning.diffusion.schedules",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
