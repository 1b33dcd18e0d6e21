"""What happens around the training steps: averaging, pictures, curves, checkpoints."""

from ddpm_lightning.callbacks.checkpoints import AtomicCheckpointIO, Checkpoints
from ddpm_lightning.callbacks.curves import Curves
from ddpm_lightning.callbacks.ema import EMA
from ddpm_lightning.callbacks.fid import FID
from ddpm_lightning.callbacks.likelihood import Likelihood
from ddpm_lightning.callbacks.nonfinite import Nonfinite
from ddpm_lightning.callbacks.progress import Progress
from ddpm_lightning.callbacks.samples import Samples
from ddpm_lightning.callbacks.signals import Signals
from ddpm_lightning.callbacks.together import Together

__all__ = [
    "EMA",
    "FID",
    "AtomicCheckpointIO",
    "Checkpoints",
    "Curves",
    "Likelihood",
    "Nonfinite",
    "Progress",
    "Samples",
    "Signals",
    "Together",
]
