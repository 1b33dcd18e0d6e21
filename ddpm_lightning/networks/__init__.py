"""Networks: anything that maps (x_t, t) to an output shaped like x_t.

A network keeps its constructor's arguments as attributes of the same names, so that a checkpoint
can describe it and build it again. One that has `num_classes` > 0 is told classes, too: it maps
(x_t, t, labels), labels int64 [N] in [0, num_classes], where `num_classes` stands for no label.
"""

from ddpm_lightning.networks.unet import UNet

__all__ = ["UNet"]
