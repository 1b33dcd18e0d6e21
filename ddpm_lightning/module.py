"""DDPM: wires data, process, network and sampler together; the mathematics is elsewhere."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR

from ddpm_lightning import checkpoints
from ddpm_lightning.checkpoints import Weights
from ddpm_lightning.data.datamodule import Batch
from ddpm_lightning.denoiser import Denoiser
from ddpm_lightning.diffusion.combinations import Loss, Weighting
from ddpm_lightning.diffusion.likelihood import Bound, bound_terms
from ddpm_lightning.diffusion.objectives import Objective
from ddpm_lightning.diffusion.process import Prediction, Process, Variance
from ddpm_lightning.diffusion.schedules import Schedule, make_betas, rescale_to_zero_snr
from ddpm_lightning.diffusion.timestep_sampling import (
    TIMESTEP_SAMPLERS,
    LossSecondMoment,
    TimestepSampling,
)
from ddpm_lightning.diffusion.timesteps import draw_timesteps
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import to_float
from ddpm_lightning.nonfinite import BadSteps, OnNonfinite, leave_out
from ddpm_lightning.randomness import NoiseStreams, Stream, hash_indices, hash_uniform, to_device
from ddpm_lightning.resuming import align_batches, take_options
from ddpm_lightning.samplers import Network

VALIDATION_SEED = 20200619
"""Keys validation's t and noise: the same in every run, so that curves can be compared."""


class DDPM(Denoiser, LightningModule):
    """A denoising diffusion probabilistic model (Ho, Jain, Abbeel 2020).

    Args:
        net: Maps (x_t, t) to an output shaped like x_t, or with twice the channels where the
            variance is learned; keeps its constructor's arguments as attributes of the same names.
            With `num_classes` > 0 it maps (x_t, t, labels), and images need labels.
        schedule: The betas' schedule (see `make_betas`).
        num_timesteps: T, at least 1.
        beta_start: First beta; the schedules cosine, jsd and sigmoid have none.
        beta_end: Last beta; the schedules cosine, jsd and sigmoid have none.
        zero_terminal_snr: Rescale the schedule so that the last x_t is pure noise (Lin et al.
            2023); goes with the predictions x_0 and v.
        prediction: What the network gives: the noise, x_0, the mean of x_{t-1} (mu), or v.
        variance: sigma_t^2 of the reverse process (Ho et al. 2020, section 3.2): fixed, or learned
            as its logarithm or as a place in its range (Nichol & Dhariwal 2021, section 3.1).
        loss: The squared error (simple), the variational bound (vlb), or both, where the bound
            teaches the variance; `python -m ddpm_lightning combinations` says what goes together.
        weighting: How the squared error is weighted by timestep.
        timestep_sampling: How t is drawn: uniform, one from each part of the timesteps in each
            step's batch (stratified), or more often where losses are large (loss_second_moment).
        label_dropout: Share of training images whose label is withheld, in [0, 1), so that guidance
            has an unconditional model (Ho & Salimans 2021); no effect without classes.
        optimizer: Makes the optimizer from the parameters.
        lr_warmup_steps: The learning rate grows linearly from 0 over so many steps.
        lr_decay_steps: It falls linearly towards 0 over the last so many of `trainer.max_steps`,
            or over all of them where they are fewer.
        image_shape: (C, H, W) of the images; taken from the data module when None.
        compile: Have torch compile the network for training (`net.compile()`, inductor), for
            minutes at the start. Meant for GPUs, where it has not been measured; on a CPU a step
            takes at best a tenth less time then (docs/benchmarks.md).
        channels_last: In training, keep each pixel's channels together in memory, as GPUs' matrix
            units take them; the numbers are the same up to rounding. On a CPU a step of the paper's
            CIFAR-10 network takes 0.88 to 0.98 of the time, and one of small networks no less
            (docs/benchmarks.md); meant for GPUs, where it has not been measured.
        on_nonfinite: Whether a step whose loss or gradient is not finite stops training, at the
            next logging step or checkpoint, or is left out.
        seed: Keys t, noise and dropout in training.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule = "cosine",
        num_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        zero_terminal_snr: bool = False,
        prediction: Prediction = "v",
        variance: Variance = "fixed_large",
        loss: Loss = "simple",
        weighting: Weighting = "none",
        timestep_sampling: TimestepSampling = "uniform",
        label_dropout: float = 0.1,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=2e-3),
        lr_warmup_steps: int = 100,
        lr_decay_steps: int = 0,
        image_shape: tuple[int, int, int] | None = None,
        compile: bool = False,
        channels_last: bool = False,
        on_nonfinite: OnNonfinite = "stop",
        seed: int = 0,
    ) -> None:
        for name, steps in (
            ("lr_warmup_steps", lr_warmup_steps),
            ("lr_decay_steps", lr_decay_steps),
        ):
            if steps < 0:
                raise InputError(f"{name} must be at least 0, got {steps}")
        if not 0 <= label_dropout < 1:
            raise InputError(f"label_dropout must lie in [0, 1), got {label_dropout:g}")
        betas = make_betas(schedule, num_timesteps, beta_start, beta_end)
        if zero_terminal_snr:
            betas = rescale_to_zero_snr(betas)
        process = Process(betas, variance, prediction=prediction)
        super().__init__(net, process, label_dropout, image_shape)
        self._objective = Objective(self.process, loss, weighting)
        if timestep_sampling not in TIMESTEP_SAMPLERS:
            raise InputError(
                f"timestep_sampling must be one of {', '.join(TIMESTEP_SAMPLERS)}; got "
                f"{timestep_sampling!r}"
            )
        self._timesteps = TIMESTEP_SAMPLERS[timestep_sampling](num_timesteps)
        # of the micro-batches of this step so far: t and losses
        self._seen: list[tuple[Tensor, Tensor]] = []
        self.grad_norm: Tensor | None = None
        self.flops_per_image = 0  # of a forward pass; once there are images
        self.bad_steps = BadSteps(are_final=on_nonfinite == "stop")
        self._step_loss = torch.zeros(())
        self._skips = on_nonfinite == "skip"
        self._compiles = compile
        self._channels_last = channels_last
        self._optimizer = optimizer
        self._lr_warmup_steps = lr_warmup_steps
        self._lr_decay_steps = lr_decay_steps
        self._seed = seed
        self._description = {
            "net": checkpoints.describe(net),
            "schedule": schedule,
            "num_timesteps": num_timesteps,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "zero_terminal_snr": zero_terminal_snr,
            "prediction": prediction,
            "variance": variance,
            "loss": loss,
            "weighting": weighting,
            "timestep_sampling": timestep_sampling,
            "label_dropout": label_dropout,
        }
        # The tables are constants: DDP need not broadcast them at every step.
        self._ddp_params_and_buffers_to_ignore = [
            f"process.{name}" for name, _ in self.process.named_buffers()
        ]

    # --- checkpoints ---------------------------------------------------------------------------

    @classmethod
    def from_checkpoint(cls, path: str | Path, weights: Weights = "ema") -> "DDPM":
        """Rebuild the module and its network from a checkpoint alone, in eval mode on the CPU.

        Args:
            path: A .ckpt file that `fit` wrote.
            weights: The moving average, or the raw weights of that step.

        Raises:
            InputError: The file is missing, damaged, foreign, or has no such weights.
        """
        checkpoint = checkpoints.load_checkpoint(path)
        state = checkpoints.select_weights(checkpoint, weights, path)
        try:
            arguments = dict(checkpoint["hyper_parameters"])
            module = cls(checkpoints.build(arguments.pop("net")), **arguments)
            module.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: does not describe a model whole: {reason}") from error
        return module.eval()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path) -> "DDPM":
        """Do as `from_checkpoint` does, under Lightning's name for it."""
        return cls.from_checkpoint(checkpoint_path)

    def hyper_parameters(self) -> dict[str, Any]:
        """Give the plain values that rebuild this module without its optimizer."""
        shape = None if self.image_shape is None else list(self.image_shape)
        return {**self._description, "image_shape": shape}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `from_checkpoint` needs, and what t depends on."""
        checkpoint["hyper_parameters"] = self.hyper_parameters()
        if isinstance(self._timesteps, LossSecondMoment):
            checkpoint["timestep_sampling"] = self._timesteps.state_dict()
        if self.trainer.is_global_zero:  # which writes it; this is the last hook before that
            checkpoints.seal(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on at the step's first micro-batch, and draw t as training did."""
        limit = self.trainer.limit_train_batches  # up to 1.0 it is a share
        num_batches = int(limit) if isinstance(limit, int) or limit > 1 else None
        align_batches(checkpoint, self.trainer.accumulate_grad_batches, num_batches)
        if isinstance(self._timesteps, LossSecondMoment):
            self._timesteps.load_state_dict(checkpoint.get("timestep_sampling", {}))

    # --- images to loss ------------------------------------------------------------------------

    def losses(self, batch: Batch, seed: int, t: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise a batch at random timesteps and take the loss of each image.

        Args:
            batch: Images uint8 [N, C, H, W], the positions that key their draws, and labels, where
                the network is told them.
            seed: The draws' other key.
            t: The timesteps, int64 [N] on the CPU; drawn uniformly when None.

        Returns:
            Losses, float [N], and timesteps, int64 [N].

        Raises:
            InputError: Labels are needed and missing.
        """
        if self.num_classes and batch.labels is None:
            raise InputError("the network is told classes, but the images have no labels")
        x_0 = to_float(batch.images, self._noising_dtype)
        if t is None:
            t = draw_timesteps(seed, batch.positions, self.process.num_timesteps)
        t = to_device(t, self.device)
        noise_seeds = hash_indices(seed, Stream.NOISE, batch.positions)
        noise = NoiseStreams(noise_seeds, self.device).normal(x_0.shape[1:]).to(x_0.dtype)
        return self._objective(self._given(batch), x_0, t, noise), t

    def bound(
        self,
        batch: Batch,
        process: Process | None = None,
        seed: int = VALIDATION_SEED,
        after_step: Callable[[], object] | None = None,
    ) -> Bound:
        """Take all terms of the variational bound of each image; no random state is touched.

        Args:
            batch: Images uint8 [N, C, H, W]. The noise of each is a function of (seed, position)
                and the place of t in the process, not of the other images.
            process: This module's, respaced; all its timesteps when None.
            seed: The noise's other key.
            after_step: Called after each t.

        Returns:
            The bound's parts in bits/dim, in the mode in which the network is; given their labels
            where the batch has some.
        """
        x_0 = to_float(batch.images.to(self.device), self._noising_dtype)
        draw = self._draws(hash_indices(seed, Stream.NOISE, batch.positions), x_0.shape[1:])
        net = self._given(batch)
        return bound_terms(net, process or self.process, x_0, draw, after_step=after_step)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Give the loss, and its parts for the callbacks: `losses`, `t` and `weights`, each [N]."""
        torch.manual_seed(self._dropout_seed(batch_idx))
        num_parts = self.trainer.world_size * self.trainer.accumulate_grad_batches
        drawn = self._timesteps.draw(self._seed, batch.positions, len(batch.positions) * num_parts)
        losses, t = self.losses(self._withhold_labels(batch), self._seed, drawn.t)
        weights = to_device(drawn.weights.to(losses.dtype), self.device)
        if isinstance(self._timesteps, LossSecondMoment):
            self._note(self._timesteps, t, losses.detach(), batch_idx)
        loss = (weights * losses).mean()
        is_first = batch_idx % self.trainer.accumulate_grad_batches == 0
        self._step_loss = loss.detach() if is_first else self._step_loss + loss.detach()
        # Adds 0; but a loss that is not finite gives a weight a gradient that is not finite, and
        # gradients are what ranks exchange: all see that a step is bad, with nothing more to send.
        weight = next(p for p in self.net.parameters() if p.requires_grad).flatten()[0]
        loss = loss + 0 * loss.detach() * weight
        return {"loss": loss, "losses": losses.detach(), "t": t, "weights": weights}

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Give the loss of each image at its fixed t and noise, float [N].

        N is 0 where a rank has no images left; networks need not know how to take that.
        """
        if not len(batch.positions):
            return torch.empty(0, device=self.device)
        return self.losses(batch, VALIDATION_SEED)[0]

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Give the loss of each image of the test split, as `validation_step` does."""
        return self.validation_step(batch, batch_idx)

    # --- the Trainer's questions ---------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the image shape from the data module and see that the network can take it."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is not None:
            self.check_images(data.image_shape)
        if stage == "fit" and self._channels_last:
            # first: the optimizer's state, the average and DDP's buckets take the weights' layout
            self.net.to(memory_format=torch.channels_last)
        if stage == "fit" and self._compiles:
            _check_compiler()
            self.net.compile()  # in place: a compiled copy would give the weights other names

    def check_images(self, image_shape: tuple[int, int, int]) -> None:
        """Settle on an image shape; the network is run once on it, without computing anything.

        The floating-point operations that one image takes are counted on the way.

        Raises:
            InputError: The network cannot take it, or gives back another shape.
        """
        # here, for it imports triton, which only training needs
        from torch.utils.flop_counter import FlopCounterMode

        x = torch.empty(1, *image_shape, device="meta", dtype=self._net_dtype)
        t = torch.zeros(1, device="meta", dtype=torch.int64)
        state = (*self.net.named_parameters(), *self.net.named_buffers())
        weights = {name: value.to("meta") for name, value in state}
        size = "x".join(map(str, image_shape))
        told = (t,) if self.num_classes else ()
        try:
            # without gradients, for which checkpointing would take other operations
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                output = functional_call(self.net, weights, (x, t, *told))
        except TypeError as error:
            raise InputError(
                f"the network cannot be called as net({'x, t, labels' if told else 'x, t'}): its "
                f"num_classes is {self.num_classes} ({error})"
            ) from error
        except InputError as error:
            raise InputError(f"images of {size}: {error} (--data.image_size)") from error
        except RuntimeError as error:
            raise InputError(f"{self._misfit(size, image_shape[0])} ({error})") from error
        if output.shape != (1, self.process.count_outputs(image_shape[0]), *image_shape[1:]):
            raise InputError(self._misfit(size, image_shape[0]))
        if self.image_shape not in (None, image_shape):
            asked = "x".join(map(str, self.image_shape))
            raise InputError(f"--model.image_shape says {asked}, but the images are {size}")
        self.image_shape = image_shape
        self.flops_per_image = int(counter.get_total_flops())

    def on_train_start(self) -> None:
        """Let the optimizer's options be those asked for, where a checkpoint brought others."""
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LambdaLR)
        optimizer = scheduler.optimizer
        take_options(optimizer, self.make_optimizer())
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Make the optimizer that was asked for."""
        return self._optimizer(self.net.parameters())

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Warm the learning rate up linearly; the first update has rate 0, as the authors' has.

        Before its decay it does not depend on `max_steps`: a run that goes on from there with more
        of them is the longer run.
        """
        optimizer = self.make_optimizer()
        max_steps = self.trainer.max_steps
        if self._lr_decay_steps and max_steps < 0:
            raise InputError("lr_decay_steps needs --trainer.max_steps, where it ends")
        num_warmup = self._lr_warmup_steps
        num_decay = min(self._lr_decay_steps, max_steps) if self._lr_decay_steps else 0

        def factor(step: int) -> float:
            warmed = min(step / num_warmup, 1.0) if num_warmup else 1.0
            # a scheduler looks one step beyond the last
            return min(warmed, max(max_steps - step, 0) / num_decay) if num_decay else warmed

        scheduler = LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, and free the gradients, which Lightning keeps through the next forward pass."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip at the global norm, kept for the curves, and leave out what is not finite."""
        if gradient_clip_algorithm == "value":
            raise InputError("--trainer.gradient_clip_algorithm: only norm is supported")
        limit = gradient_clip_val or float("inf")  # 0 is no limit to Lightning
        self.grad_norm = nn.utils.clip_grad_norm_(self.net.parameters(), limit)
        loss = self._step_loss / self.trainer.accumulate_grad_batches
        # Overflowing gradients are how the scaler of 16-mixed finds its scale; it leaves them out.
        has_scaler = self.trainer.scaler is not None
        is_bad = ~(loss if has_scaler else self.grad_norm).isfinite()
        self.bad_steps.note(self.global_step + 1, loss, self.grad_norm, is_bad)
        if self._skips and not has_scaler:
            leave_out(optimizer, is_bad)

    # --- helpers -------------------------------------------------------------------------------

    def _given(self, batch: Batch) -> Network:
        """Give the network as it is for these images: told their labels where they have some."""
        if not self.num_classes or batch.labels is None:
            return self
        return partial(self, labels=batch.labels.to(self.device))

    def _withhold_labels(self, batch: Batch) -> Batch:
        """Replace some labels by "no label": which ones is a function of seed and position."""
        if batch.labels is None or not self.num_classes:
            return batch
        draws = hash_uniform(self._seed, Stream.LABEL, batch.positions)
        withheld = to_device(torch.from_numpy(draws < self.label_dropout), self.device)
        return batch._replace(labels=batch.labels.masked_fill(withheld, self.num_classes))

    def _note(self, timesteps: LossSecondMoment, t: Tensor, losses: Tensor, batch_idx: int) -> None:
        """Tell the draws of t about a whole step's losses, in the order of the positions.

        Not before the step's last micro-batch: t must not depend on how a batch is shared out. Here
        rather than in a hook, for those come after the checkpoint has been written.
        """
        self._seen.append((t, losses))
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        # a rank's micro-batches are a contiguous slice of the positions, and ranks follow in order
        all_t, all_losses = (
            torch.as_tensor(self.all_gather(torch.cat(parts))).flatten().cpu()
            for parts in zip(*self._seen, strict=True)
        )
        finite = all_losses.isfinite()  # a step that is left out must not poison the draws
        timesteps.update(all_t[finite], all_losses[finite])
        self._seen = []

    def _dropout_seed(self, batch_idx: int) -> int:
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        key = int(hash_indices(self._seed, Stream.DROPOUT, [self.global_step])[0])
        key = int(hash_indices(key, Stream.DROPOUT, [self.global_rank])[0])
        return int(hash_indices(key, Stream.DROPOUT, [micro_batch])[0]) >> 1  # fits int64

    def _misfit(self, size: str, channels: int) -> str:
        outputs = self.process.count_outputs(channels)
        wanted = (
            f"twice their channels, which --model.variance {self.process.variance} needs"
            if self.process.learns_variance
            else "their own shape"
        )
        return (
            f"the network does not map images of {size} to {wanted}; give it "
            f"--model.net.in_channels {channels} --model.net.out_channels {outputs}, "
            "or change --data.channels"
        )


def _check_compiler() -> None:
    """See that inductor has the compiler that it writes C++ for, on any kind of device."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise InputError(
            f"--model.compile true: needs a C++ compiler, and there is no {compiler}; install one "
            "(on Debian: apt install g++), or leave it out"
        )
