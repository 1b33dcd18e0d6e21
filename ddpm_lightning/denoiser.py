"""A trained network with its process: noise to images."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import to_uint8
from ddpm_lightning.randomness import NUM_SEEDS, NoiseStreams, to_device
from ddpm_lightning.samplers import (
    Draw,
    Guidance,
    Guided,
    Network,
    Sampler,
    SamplerName,
    Start,
    Step,
    check_guidance,
    check_labels,
    make_guidance,
    make_sampler,
)


def finished_images(last: Step) -> Tensor:
    """Turn the last step of a chain into uint8 images [N, C, H, W].

    Raises:
        InputError: A sample is not finite.
    """
    if not last.x_prev.isfinite().all():
        raise InputError(
            "a sample is not finite: the weights have diverged; take an earlier checkpoint"
        )
    return to_uint8(last.x_prev)


class Denoiser(nn.Module):
    """A network with its process, and what of training matters to those who use it.

    Args:
        net: Maps (x_t, t), with `num_classes` > 0 (x_t, t, labels), to what the process reads.
        process: The process.
        label_dropout: Share of the training images whose label was withheld.
        image_shape: (C, H, W) of the images; None where it is not known yet.
    """

    def __init__(
        self,
        net: nn.Module,
        process: Process,
        label_dropout: float,
        image_shape: tuple[int, int, int] | None,
    ) -> None:
        super().__init__()
        self.net = net
        self.process = process
        # a user's network need not say that it knows no classes
        self.num_classes: int = getattr(net, "num_classes", 0)
        self.label_dropout = label_dropout
        self.image_shape = None if image_shape is None else tuple(image_shape)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.net.parameters()).device

    def sample(
        self,
        seeds: Sequence[int],
        sampler: SamplerName | Sampler = "ddpm",
        num_steps: int | None = None,
        batch_size: int = 64,
        labels: Sequence[int] | None = None,
        guidance: float | None = None,
        guidance_rescale: float | None = None,
        guide: "Denoiser | None" = None,
    ) -> Tensor:
        """Turn seeds into images.

        Args:
            seeds: One per image, each in [0, 2^32). An image is a function of the weights, the
                sampler and its own seed; others in the batch do not matter but for rounding.
            sampler: Its name, or a `Sampler` for the less usual options.
            num_steps: Timesteps to visit, for a sampler given by name; None is its default.
            batch_size: Images at a time.
            labels: The images' classes, one per seed; by default all in turn (see `labels_of`).
            guidance: See `Guidance`; 1, the model alone, when None, which no guide takes.
            guidance_rescale: See `Guidance`; 0 when None.
            guide: See `denoise`.

        Returns:
            uint8 [N, C, H, W] on the CPU.
        """
        if not isinstance(sampler, Sampler):
            sampler = make_sampler(sampler, num_steps)
        made = make_guidance(guidance, guidance_rescale)
        if guide is not None and guidance is None:
            made = None  # a scale of 1 would not heed the guide
        batches = self.batches(
            seeds,
            sampler,
            batch_size,
            labels=self.labels_of(seeds) if labels is None else labels,
            guidance=made,
            guide=guide,
        )
        return torch.cat([images.cpu() for images in batches])

    def labels_of(self, seeds: Sequence[int]) -> list[int] | None:
        """Give the classes that samples have by default: seed i's is i modulo `num_classes`.

        None for a model without classes.
        """
        return [seed % self.num_classes for seed in seeds] if self.num_classes else None

    def batches(
        self,
        seeds: Sequence[int],
        sampler: Sampler,
        batch_size: int,
        after_step: Callable[[], object] | None = None,
        start: Start | None = None,
        labels: Sequence[int] | None = None,
        guidance: Guidance | None = None,
        guide: "Denoiser | None" = None,
    ) -> Iterator[Tensor]:
        """Yield images batch by batch, uint8 [<= batch_size, C, H, W] on the module's device.

        Args:
            seeds: See `sample`.
            sampler: The sampler.
            batch_size: Images at a time.
            after_step: Called after each step of a chain; what it raises ends the work.
            start: Where in the middle of the chain to start, one x_t per seed (see `denoise`).
            labels: The images' classes, one per seed; None tells the network none.
            guidance: How strongly samples are guided.
            guide: See `denoise`.

        Raises:
            InputError: A sample is not finite; or see `denoise`.
        """
        for first in range(0, len(seeds), batch_size):
            part = slice(first, first + batch_size)
            start_of = None if start is None else Start(start.x_t[part], start.t)
            told = None if labels is None else labels[part]
            step = None
            # not `*_, last`: that keeps all the steps, a thousand batches of images
            for step in self.denoise(  # noqa: B007
                seeds[part], sampler, start_of, told, guidance, guide
            ):
                if after_step is not None:
                    after_step()
            assert step is not None
            yield finished_images(step)

    @torch.no_grad()
    def denoise(
        self,
        seeds: Sequence[int],
        sampler: Sampler,
        start: Start | None = None,
        labels: Sequence[int] | None = None,
        guidance: Guidance | None = None,
        guide: "Denoiser | None" = None,
    ) -> Iterator[Step]:
        """Run one batch of seeds through the reverse process, yielding every step of the chain.

        The networks are in eval mode meanwhile. No global random state is read or changed.

        Args:
            seeds: One per image.
            sampler: The sampler.
            start: Where in the middle of the chain to start: the seeds give the noise of the steps
                that are left. None starts from x_T, which is then the seeds' first draw.
            labels: The images' classes, one per seed; None tells the network none.
            guidance: How strongly samples are drawn towards them, or away from the guide; None is
                scale 1, and is refused where there is a guide.
            guide: A weaker model of the same images, on the same device, such as this one's average
                at an earlier step (see `check_guide`); None is this model without labels.

        Raises:
            InputError: A seed or label is out of range, the model was not trained for that, or the
                guide is none of its kind.
        """
        if self.image_shape is None:
            raise InputError("image_shape is not known yet: give it to DDPM, or fit first")
        if not all(0 <= seed < NUM_SEEDS for seed in seeds):
            raise InputError(f"seeds must lie in 0..{NUM_SEEDS - 1}")
        net = self._told(labels, guidance, guide)
        if labels is not None and len(labels) != len(seeds):
            raise InputError(f"labels: {len(labels)} of them for {len(seeds)} seeds")
        draw, process = self._draws(seeds, self.image_shape), self.process
        if start is not None:
            sampler, process = sampler.below(process, start.t)
            # a sampler's first draw is where its chain starts
            given, fresh = [start.x_t.to(self.device, self._noising_dtype)], draw

            def draw() -> Tensor:
                return given.pop() if given else fresh()

        modes = [(module, module.training) for module in (self.net, guide and guide.net) if module]
        for module, _ in modes:
            module.eval()
        try:
            yield from sampler(net, process, draw)
        finally:
            for module, was_training in modes:
                module.train(was_training)

    def check_guidance(self, guidance: Guidance | None, guide: "Denoiser | None" = None) -> None:
        """Refuse guidance that the model has not been trained for, and a guide of another kind.

        Raises:
            InputError: See `check_guidance` of the samplers, and `check_guide`.
        """
        check_guidance(guidance, self.num_classes, self.label_dropout, guide is not None)
        if guide is not None:
            self.check_guide(guide)

    def check_guide(self, guide: "Denoiser") -> None:
        """Refuse a guide whose output does not mean what the model's does.

        Raises:
            InputError: Its images, classes, outputs or schedule are others.
        """
        for name, theirs, ours in (
            ("images of", guide.image_shape, self.image_shape),
            ("num_classes", guide.num_classes, self.num_classes),
            ("prediction", guide.process.prediction, self.process.prediction),
            ("learned variances", guide.process.learns_variance, self.process.learns_variance),
        ):
            if theirs != ours:
                raise InputError(
                    f"guide: has {name} {theirs}, but the model {ours}; take an earlier checkpoint "
                    "of the same run, or a smaller model of the same kind"
                )
        pair = (guide.process.betas.cpu(), self.process.betas.cpu())
        if pair[0].shape != pair[1].shape or not torch.equal(*pair):
            raise InputError(
                "guide: its schedule is not the model's; take an earlier checkpoint of the same run"
            )

    def _told(
        self, labels: Sequence[int] | None, guidance: Guidance | None, guide: "Denoiser | None"
    ) -> Network:
        """Give the network as it is for these labels."""
        self.check_guidance(guidance, guide)
        told = None
        if labels is not None:
            check_labels(labels, self.num_classes)
            told = to_device(torch.tensor(labels, dtype=torch.int64), self.device)
        elif guide is None:
            if guidance is not None:
                raise InputError(f"guidance {guidance.scale:g}: needs labels")
            return self
        return Guided(self, told, guidance or Guidance(), guide)

    def _draws(self, seeds: Sequence[int] | NDArray[np.uint64], shape: Sequence[int]) -> Draw:
        """Make the function whose k-th call gives the k-th draw of each seed."""
        # On the CPU, so that a seed means the same picture on any kind of device.
        streams = NoiseStreams(seeds, torch.device("cpu"), self.device.type == "cuda")
        return lambda: to_device(streams.normal(shape), self.device).to(self._noising_dtype)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Run the network at its own precision.

        Args:
            x_t: Float [N, C, H, W].
            t: int64 [N].
            labels: int64 [N] in [0, num_classes], where `num_classes` is no label, as None is.

        Returns:
            Its output, [N, C or 2C, H, W] in the dtype of x_t.

        Raises:
            InputError: There are no labels, and the model has never seen an image without one.
        """
        if self.num_classes and labels is None:
            if not self.label_dropout:
                raise InputError(
                    "the model was trained with label_dropout 0, and has never seen an image "
                    "without a label: it cannot do without them"
                )
            labels = torch.full_like(t, self.num_classes)
        told = () if labels is None else (labels,)
        output: Tensor = self.net(x_t.to(self._net_dtype), t, *told)
        return output.to(x_t.dtype)

    @property
    def _net_dtype(self) -> torch.dtype:
        return next(self.net.parameters()).dtype

    @property
    def _noising_dtype(self) -> torch.dtype:
        # float32 under any reduced precision: in bfloat16 small betas vanish
        return torch.float64 if self._net_dtype == torch.float64 else torch.float32
