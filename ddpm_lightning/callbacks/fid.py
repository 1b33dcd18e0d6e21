"""Judge samples while it trains."""

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lightning.pytorch import Callback, Trainer
from tqdm import tqdm

from ddpm_lightning.bars import bar_options
from ddpm_lightning.callbacks.curves import aside
from ddpm_lightning.callbacks.ema import EMA
from ddpm_lightning.callbacks.shared import (
    TrainerRanks,
    find_callback,
    log_scalars,
    make_run_folder,
    run_folder,
    sampler_options,
)
from ddpm_lightning.callbacks.signals import Interrupted, check_signals, is_stopping
from ddpm_lightning.checkpoints import Weights
from ddpm_lightning.data.batches import Batch
from ddpm_lightning.errors import InputError
from ddpm_lightning.metrics.features import Extractor, make_extractor
from ddpm_lightning.metrics.judge import (
    Collector,
    Metric,
    check_metrics,
    evaluate,
    metric_names,
    warnings_of,
)
from ddpm_lightning.metrics.record import (
    describe_guidance,
    describe_sampler,
    make_protocol,
    make_record,
    write_record,
)
from ddpm_lightning.metrics.reference import Reference, reference_of
from ddpm_lightning.module import DDPM
from ddpm_lightning.samplers import (
    SamplerName,
    count_evaluations,
    make_guidance,
    make_sampler,
)


class FID(Callback):
    """Compare samples with the training images every so many steps and at the end.

    All ranks sample their share; sums are reduced. The numbers are logged under names that say
    what they are, such as fd_efficientnet-lite0_1k/ema, and each has its record in
    RUN/fid/step=N-WEIGHTS.json. The extractor is no part of the module or its checkpoints, and
    training goes on as if nothing had been judged: no global random state is touched.

    Args:
        every_n_steps: Optimizer steps from number to number; 0 judges never.
        num_images: Samples, from seeds 0, 1, ...; few ones give distances that are too large, and
            comparable only with others of as many.
        extractor: inception, efficientnet-lite0, another of torch-fidelity's, or the class path of
            a torch.nn.Module that maps uint8 images to features.
        extractor_weights: Inception's weights file, where torch.hub's cache does not have it.
        metrics: fd (Frechet distance), kid, is (Inception Score), prc (precision and recall).
        weights: ema, raw, or both.
        sampler: Its name.
        num_steps: Timesteps to visit; None is the sampler's default.
        spacing: Which timesteps those are, as `sample` has it; None is the sampler's default.
        batch_size: Samples at a time on each device.
        guidance: How strongly samples are drawn towards their classes, of which seed i's is i
            modulo their number; None, which is 1, for a network without classes.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        num_images: int = 2000,
        extractor: str = "efficientnet-lite0",
        extractor_weights: str | None = None,
        metrics: list[Metric] = ["fd"],  # noqa: B006  # the parser shows it; nobody changes it
        weights: list[Weights] = ["ema"],  # noqa: B006
        sampler: SamplerName = "ddim",
        num_steps: int | None = 20,
        spacing: str | None = None,
        batch_size: int = 64,
        guidance: float | None = None,
    ) -> None:
        if every_n_steps < 0:
            raise InputError(f"--fid.every_n_steps {every_n_steps}: must be at least 0")
        if num_images < 2 or batch_size < 1:
            raise InputError("--fid.num_images must be at least 2, --fid.batch_size at least 1")
        if not metrics or not weights:
            raise InputError("--fid.metrics and --fid.weights must name at least one")
        self.every_n_steps = every_n_steps
        self.num_images = num_images
        self.metrics = metrics
        self.weights = weights
        with sampler_options("fid"):
            self.sampler = make_sampler(sampler, num_steps, spacing=spacing)
            self.guidance = make_guidance(guidance, rescale=None)
        self.batch_size = batch_size
        self.latest: dict[str, float] = {}
        self.seconds = 0.0
        self._extractor_name = extractor
        self._extractor_weights = extractor_weights
        self._extractor: Extractor | None = None
        self._reference: Reference | None = None
        self._start = 0.0
        self._step = 0
        self._judged_step = 0
        self._is_owed = False

    @property
    def names(self) -> list[str]:
        """What the metrics are called; Checkpoints may monitor one of them."""
        if not self.every_n_steps:
            return []
        distance = self.extractor.distance_name
        names = metric_names(self.metrics, distance, self.num_images)
        return [f"{name}/{weights}" for weights in self.weights for name in names]

    @property
    def extractor(self) -> Extractor:
        """The extractor, made when it is first asked for.

        Raises:
            InputError: There is none, or its weights are missing.
        """
        if self._extractor is None:
            self._extractor = make_extractor(self._extractor_name, self._extractor_weights)
        return self._extractor

    @property
    def is_owed(self) -> bool:
        """Whether a signal came before the newest step was judged."""
        return self._is_owed

    @property
    def options(self) -> str:
        """What has the command `fid` judge a checkpoint in the same way."""
        steps = "" if self.sampler.num_steps is None else f" --num_steps {self.sampler.num_steps}"
        return (
            f"--extractor {self._extractor_name} --num_images {self.num_images} "
            f"--weights {','.join(self.weights)} --sampler {self.sampler.name}{steps}"
        )

    def check(self, model: DDPM, ema: EMA | None) -> None:
        """Refuse early what cannot be judged.

        Raises:
            InputError: The extractor or its weights are missing, it cannot serve the metrics, the
                schedule has not the sampler's timesteps, there is no average of the weights, or the
                network cannot be guided.
        """
        if "ema" in self.weights and (ema is None or ema.decay == 0):
            raise InputError(
                "--fid.weights ema: there is no average of the weights (--ema.decay 0); give "
                "--fid.weights [raw], or judge never with --fid.every_n_steps 0"
            )
        with sampler_options("fid"):
            self.sampler.respace(model.process)
            model.check_guidance(self.guidance)
        check_metrics(self.metrics, self.extractor, self.num_images)

    def share_of_time(self) -> float:
        """Give the share of the wall time since training began that judging took."""
        return self.seconds / max(time.perf_counter() - self._start, 1e-9)

    def state_dict(self) -> dict[str, Any]:
        """Tell whether a signal came before the checkpoint's step was judged."""
        return {"is_owed": self._is_owed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what is owed."""
        self._is_owed = state_dict["is_owed"]

    def on_train_start(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Note where a resumed run goes on, and take the training images' features."""
        make_run_folder(trainer)
        is_owed, self._is_owed = self._is_owed, False
        self._start = time.perf_counter()
        self._step = self._judged_step = trainer.global_step
        if not self.every_n_steps:
            return
        self.check(pl_module, find_callback(trainer, EMA))
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data is None:
            raise InputError("the FID callback needs a data module: its images are the reference")
        self.extractor.module.to(pl_module.device)
        self._reference = reference_of(
            data.train_images, data.source, self.extractor, self.metrics, data.cache_dir
        )
        self.seconds += time.perf_counter() - self._start
        if is_owed:
            self._judge_all(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DDPM, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Judge where it is due."""
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        if not (self.every_n_steps and stepped):
            return
        if self._step % self.every_n_steps == 0 or self._step == trainer.max_steps:
            with aside(trainer):
                self._judge_all(trainer, pl_module)
            if not self._is_owed:
                pl_module.log_dict(self.latest, logger=False)  # for callbacks that monitor it

    def on_train_end(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Judge the last step, where it was not known beforehand that it would be the last."""
        if self.every_n_steps and trainer.global_step != self._judged_step:
            self._judge_all(trainer, pl_module)

    def _judge_all(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Judge, unless a signal comes before it is done: then it is owed."""
        start = time.perf_counter()
        self._judged_step = trainer.global_step
        self._is_owed = True
        if is_stopping(trainer):
            return
        try:
            for weights in self.weights:
                if weights == "raw":
                    self._judge(trainer, pl_module, weights)
                else:
                    ema = find_callback(trainer, EMA)
                    assert ema is not None  # see check
                    with ema.scope(pl_module):
                        self._judge(trainer, pl_module, weights)
        except Interrupted:
            return
        self._is_owed = False
        self.seconds += time.perf_counter() - start
        log_scalars(trainer, {**self.latest, "fid/share_of_time": self.share_of_time()})

    def _judge(self, trainer: Trainer, pl_module: DDPM, weights: Weights) -> None:
        assert self._reference is not None
        start = time.perf_counter()
        collector = Collector(self.extractor, self.metrics)
        ranks = TrainerRanks(trainer)
        with suppress(Interrupted):  # until the others know
            self._collect(
                trainer, pl_module, collector, ranks.share(range(self.num_images)), weights
            )
        if is_stopping(trainer, agree=True):
            raise Interrupted
        generated = collector.finish(ranks)
        values = evaluate(
            generated, self._reference.features, self.metrics, self.extractor.distance_name
        )
        names = metric_names(self.metrics, self.extractor.distance_name, self.num_images)
        self.latest |= {
            f"{name}/{weights}": value for name, value in zip(names, values.values(), strict=True)
        }
        if trainer.is_global_zero:
            record = make_record(
                values,
                self.num_images,
                make_protocol(self.num_images, self._reference.protocol),
                {
                    "run": trainer.default_root_dir,
                    "step": trainer.global_step,
                    "weights": weights,
                    "sampler": describe_sampler(
                        self.sampler, self.sampler.count_steps(pl_module.process)
                    ),
                    "nfe": count_evaluations(self.sampler, pl_module.process, self.guidance),
                    "guidance": describe_guidance(self.guidance, pl_module.num_classes),
                    "seeds": f"0-{self.num_images - 1}",
                    "batch_size": self.batch_size,
                    "world_size": trainer.world_size,
                },
                time.perf_counter() - start,
                pl_module.device,
                warnings_of(generated, self._reference.features),
            )
            name = f"step={trainer.global_step}-{weights}.json"
            write_record(run_folder(trainer, "fid") / name, record)

    def _collect(
        self,
        trainer: Trainer,
        pl_module: DDPM,
        collector: Collector,
        seeds: Sequence[int],
        weights: Weights,
    ) -> None:
        with tqdm(
            total=len(seeds),
            desc=f"judging ({weights})",
            unit="image",
            leave=False,
            disable=not trainer.is_global_zero,
            **bar_options(),
        ) as bar:
            batches = pl_module.batches(
                seeds,
                self.sampler,
                self.batch_size,
                lambda: check_signals(trainer),
                labels=pl_module.labels_of(seeds),
                guidance=self.guidance,
            )
            for images in batches:
                collector.add(images)
                bar.update(len(images))
