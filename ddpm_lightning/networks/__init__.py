"""Networks: anything that maps (x_t, t) to an output shaped like x_t.

A network keeps its constructor's arguments as attributes of the same names, so that a checkpoint
can describe it and build it again.
"""

from ddpm_lightning.networks.unet import UNet

__all__ = ["UNet"]
