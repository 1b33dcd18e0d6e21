"""Guidance: by the model without labels, or by a weaker model.

Classifier-free guidance (Ho & Salimans 2021), autoguidance (Karras et al. 2024, arXiv 2406.02507),
and the rescaling of both (Lin et al. 2023).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.errors import InputError
from ddpm_lightning.samplers.base import Sampler

ConditionalNetwork = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x_t, t, labels int64 [N], None for no label) -> what a `Network` gives."""


@dataclass(frozen=True)
class Guidance:
    """How strongly samples are drawn away from what a worse prediction says.

    That is the same network's without labels (classifier-free guidance), or, where there is one,
    that of a guide, a weaker model of the same images (autoguidance).

    Args:
        scale: w in worse + w (model - worse), at least 0: 1 is the model alone, 0 the worse
            prediction. Each takes one evaluation of a network, all else two.
        rescale: Share, in [0, 1], of the prediction scaled to the standard deviation of the
            model's (Lin et al. 2023, section 3.4, where it is 0.7).

    Raises:
        InputError: One is out of range.
    """

    scale: float = 1.0
    rescale: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise InputError(f"guidance {self.scale:g}: must be at least 0, and finite")
        if not 0 <= self.rescale <= 1:
            raise InputError(f"guidance_rescale {self.rescale:g}: must lie in [0, 1]")

    @property
    def num_evaluations(self) -> int:
        """How often the network is evaluated where a sampler asks once."""
        is_single = self.scale == 1 or (self.scale == 0 and self.rescale == 0)
        return 1 if is_single else 2

    @property
    def words(self) -> list[str]:
        """What is not the default, such as `guidance 2`, `rescale 0.7`."""
        words = [f"guidance {self.scale:g}"] if self.scale != 1 else []
        return words + ([f"rescale {self.rescale:g}"] if self.rescale else [])


def make_guidance(scale: float | None, rescale: float | None) -> Guidance | None:
    """Make guidance from options, None where they say nothing.

    Raises:
        InputError: One is out of range.
    """
    if scale is None and rescale is None:
        return None
    default = Guidance()
    return Guidance(
        default.scale if scale is None else scale, default.rescale if rescale is None else rescale
    )


def check_guidance(
    guidance: Guidance | None, num_classes: int, label_dropout: float, has_guide: bool = False
) -> None:
    """Refuse guidance that a model has not been trained for; a guide needs no training for it.

    Raises:
        InputError: There is no guide, and the model knows no classes, or has never seen an image
            without a label; or there is one, and nothing says how strongly it guides.
    """
    if has_guide and guidance is None:
        raise InputError("guide: say how strongly it guides with guidance, such as 1.5 or 2")
    if guidance is None or has_guide:
        return
    if not num_classes:
        raise InputError(
            f"guidance {guidance.scale:g}: the model knows no classes; leave it out, name a weaker "
            "checkpoint as guide, or train a model with --model.net.num_classes"
        )
    if guidance.scale != 1 and not label_dropout:
        raise InputError(
            f"guidance {guidance.scale:g}: the model was trained with label_dropout 0, and has "
            "never seen an image without a label; leave it out"
        )


def check_labels(labels: Sequence[int], num_classes: int) -> None:
    """Refuse labels that a model does not know.

    Raises:
        InputError: It knows no classes, or not this one.
    """
    if not num_classes:
        raise InputError("labels: the model knows no classes; leave them out")
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong:
        raise InputError(f"labels {wrong[0]}: the model's classes are 0-{num_classes - 1}")


def count_evaluations(sampler: Sampler, process: Process, guidance: Guidance | None) -> int:
    """Count the evaluations of the network that one guided image takes."""
    each = 1 if guidance is None else guidance.num_evaluations
    return sampler.count_evaluations(process) * each


class Guided:
    """A network that is guided or told classes, as a sampler sees it: a `Network`.

    Two evaluations of N images rather than one of 2 N: no more memory than without guidance, and
    the model's own has the bits that it has at scale 1.

    Args:
        net: The network.
        labels: One per image, int64 [N]; None tells it none.
        guidance: How strongly.
        guide: What it is drawn away from, told the same labels; None is the network without labels.
    """

    def __init__(
        self,
        net: ConditionalNetwork,
        labels: Tensor | None,
        guidance: Guidance,
        guide: ConditionalNetwork | None = None,
    ) -> None:
        self._net = net
        self._labels = labels
        self._guidance = guidance
        self._guide = guide

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Give the guided output, float [N, C or 2C, H, W].

        Whatever is predicted is guided; a learned variance is the model's own.
        """
        scale, rescale = self._guidance.scale, self._guidance.rescale
        if self._guidance.num_evaluations == 1:
            return self._net(x_t, t, self._labels) if scale else self._worse(x_t, t)
        output = self._net(x_t, t, self._labels)
        channels = x_t.shape[1]
        better, variance = output[:, :channels], output[:, channels:]
        worse = self._worse(x_t, t)[:, :channels]
        guided = worse + scale * (better - worse)
        if rescale:
            guided = rescale * rescaled(guided, better) + (1 - rescale) * guided
        return torch.cat([guided, variance], dim=1)

    def _worse(self, x_t: Tensor, t: Tensor) -> Tensor:
        if self._guide is None:
            return self._net(x_t, t, None)
        return self._guide(x_t, t, self._labels)


def rescaled(guided: Tensor, better: Tensor) -> Tensor:
    """Scale each image to the standard deviation of the model's own (Lin et al. 2023).

    Args:
        guided: Float [N, C, H, W].
        better: The model's own prediction, shaped like it.

    Returns:
        Shaped like it (Eq. 15).
    """
    stds = [x.flatten(1).std(dim=1).clamp_min(torch.finfo(x.dtype).tiny) for x in (better, guided)]
    return guided * (stds[0] / stds[1]).reshape(-1, 1, 1, 1)
