"""fit, validate and test: LightningCLI with run folders and one-line errors."""

import sys
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy

from ddpm_lightning.allocator import keep_freed_memory
from ddpm_lightning.callbacks import (
    EMA,
    FID,
    AtomicCheckpointIO,
    Checkpoints,
    Curves,
    Likelihood,
    Nonfinite,
    Progress,
    Samples,
    Signals,
    Together,
)
from ddpm_lightning.callbacks.run_logger import RunLogger
from ddpm_lightning.callbacks.shared import find_callback
from ddpm_lightning.checkpoints import check_same_model, check_same_optimizer, load_checkpoint
from ddpm_lightning.commands.clusters import cluster_plugins
from ddpm_lightning.commands.faults import go_on_command, told_in_one_line
from ddpm_lightning.commands.options import LineErrors
from ddpm_lightning.commands.shell import announce, refusals_of, run_command
from ddpm_lightning.commands.trainer_checks import (
    check_parts,
    check_scaler,
    check_trainer,
    check_whole,
)
from ddpm_lightning.data.datamodule import ImageDataModule
from ddpm_lightning.data.items import Labels
from ddpm_lightning.data.order import check_batch_size
from ddpm_lightning.diffusion.process import LEARNED_VARIANCES
from ddpm_lightning.errors import InputError
from ddpm_lightning.module import DDPM
from ddpm_lightning.nonfinite import OnNonfinite
from ddpm_lightning.randomness import NUM_SEEDS
from ddpm_lightning.runs import Run, RunLock, choose_run, find_checkpoint, is_rank_zero

# With the defaults in the signatures of DDPM, ImageDataModule, UNet and the callbacks, these are
# the digits experiment.
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_steps": 2500,
    "max_epochs": -1,
    "val_check_interval": 250,
    "check_val_every_n_epoch": None,
    "log_every_n_steps": 25,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # the order of the data is ours
}

PROG = "python -m ddpm_lightning"

NUM_CLASSES_SHOWN = 10


class Parser(LineErrors, LightningArgumentParser):
    """LightningCLI's parser, with one-line errors."""


class CLI(LightningCLI):
    """Wires the parts together; each part's own signature says what its options are."""

    run: Run | None = None
    lock: RunLock | None = None
    ckpt_path: str | None = None

    def __init__(self) -> None:
        usages = {name: {"usage": f"{PROG} {name} [options]"} for name in self.subcommands()}
        try:
            with told_in_one_line(self):
                super().__init__(
                    DDPM,
                    ImageDataModule,
                    save_config_callback=None,  # it writes to the logger's folder, not yet known
                    trainer_defaults=TRAINER_DEFAULTS,
                    parser_class=Parser,
                    # a half-written name is no option, as it is none in a file
                    parser_kwargs={"prog": PROG, "allow_abbrev": False, **usages},
                    auto_configure_optimizers=False,
                )
        finally:
            if self.lock is not None:
                self.lock.release()
            if self.run is not None:
                self.run.discard()  # if nothing is in it

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Give the commands, and the arguments of Trainer's methods that are not options."""
        commands = LightningCLI.subcommands()
        del commands["predict"]  # sample does that
        # checkpoints are read without running anything in them, whatever is asked for
        return {name: {*skipped, "weights_only"} for name, skipped in commands.items()}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed, which is a number here: there is no run without one."""
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=0,
            help="The run's seed, in [0, 2^32): all draws are functions of it and the step.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's options and the callbacks that every run has."""
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="The run's folder; runs/EXPERIMENT/N with the next free N when left out.",
        )
        parser.add_argument(
            "--experiment",
            type=str | None,
            default=None,
            help="The experiment's name; the names of the --config files when left out.",
        )
        parser.add_argument(
            "--on_nonfinite",
            type=OnNonfinite,
            default="stop",
            help="Where loss or gradient is not finite: stop, leaving the last good checkpoint, or "
            "skip the step and count it.",
        )
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(Samples, "samples")
        parser.add_lightning_class_args(FID, "fid")
        parser.add_lightning_class_args(Likelihood, "likelihood")
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.set_defaults({"model.net": {"class_path": "ddpm_lightning.networks.UNet"}})
        for part in ("model", "data"):
            parser.link_arguments("seed_everything", f"{part}.seed")
        parser.link_arguments("on_nonfinite", "model.on_nonfinite")

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the checkpoint's hyper-parameters silently replace what was asked for.
        pass

    # --- before ------------------------------------------------------------------------------

    def _set_seed(self) -> None:
        seed = self.config[self.subcommand].seed_everything
        if not 0 <= seed < NUM_SEEDS:
            raise InputError(f"--seed_everything {seed} must be in [0, {NUM_SEEDS})")
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Settle the run's folder and say where it is, before anything else."""
        config = self.config[self.subcommand]
        check_whole(config.trainer.strategy, config.model.optimizer.class_path)
        check_trainer(config.trainer)
        _widen_output(config.model)
        config.experiment = config.experiment or _experiment_name(config.config)
        if self.subcommand == "fit":
            self.run, self.ckpt_path = choose_run(
                config.run_dir, config.experiment, config.ckpt_path
            )
            if self.run is not None and is_rank_zero():
                self.lock = RunLock(self.run.root)
                announce(f"run: {self.run.root}")
        elif config.ckpt_path is None:
            raise InputError(f"{self.subcommand} needs --ckpt_path FILE, or --ckpt_path last")
        else:
            wanted = "last" if config.ckpt_path == "auto" else config.ckpt_path
            _, self.ckpt_path = find_checkpoint(config.run_dir, config.experiment, wanted)
        config.ckpt_path = self.ckpt_path

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer with this project's callbacks, its run folder as root."""
        options = self.config_init[self.subcommand]
        config = options.trainer
        callbacks: list[Callback] = [Together(), Nonfinite(options.on_nonfinite), Curves()]
        # ranks other than the first do not know a new folder
        root = self.run.root if self.run is not None else Path()
        if self.subcommand == "fit":
            callbacks.insert(0, Signals(go_on_command(root)))
        if config.enable_progress_bar is not False:
            callbacks.append(Progress())
        config.callbacks = [*callbacks, *_listed(config.callbacks)]
        plugins = _listed(config.plugins)
        if not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
            plugins = [*plugins, *cluster_plugins()]
        config.plugins = [*plugins, AtomicCheckpointIO()]
        if self.run is not None:
            config.default_root_dir = str(self.run.root)
        if config.logger is None or config.logger is True:
            # events of steps after the checkpoint belong to the run that was cut off
            purge_step = self.checkpoint["global_step"] + 1 if self.checkpoint else 0
            # on every rank, for callbacks that want one; only the first one's writes
            config.logger = self.subcommand == "fit" and RunLogger(
                root, name="", version="", default_hp_metric=False, purge_step=purge_step
            )
        with refusals_of("--trainer"):
            trainer = super().instantiate_trainer(**kwargs)
        check_parts(trainer)
        if isinstance(trainer.strategy, DDPStrategy):
            # a gradient is then a part of what ranks exchange, and not a copy of it
            trainer.strategy._ddp_kwargs.setdefault("gradient_as_bucket_view", True)
        return trainer

    def instantiate_classes(self) -> None:
        """Read the checkpoint's header first, so that a wrong one stops before any work."""
        self.checkpoint = load_checkpoint(self.ckpt_path) if self.ckpt_path else None
        super().instantiate_classes()

    def _prepare(self) -> None:
        """Check everything that can be checked before processes start and files are written."""
        trainer, data = self.trainer, self.datamodule
        check_batch_size(data.batch_size, trainer.world_size, trainer.accumulate_grad_batches)
        # Lightning counts micro-batches here
        if isinstance(trainer.val_check_interval, int):
            trainer.val_check_interval *= trainer.accumulate_grad_batches
        # as the Trainer itself does, but only when training starts
        data.trainer = trainer
        trainer.strategy.connect(self.model)
        data.prepare_data()
        data.setup(self.subcommand)
        self.model.check_images(data.image_shape)
        if self.checkpoint is not None:
            check_same_model(self.checkpoint, self.model.hyper_parameters(), self.ckpt_path or "")
            if self.run is not None and self.run.newest_checkpoint() is not None:
                data.check_same_data(self.checkpoint, self.ckpt_path or "")
            elif self.subcommand != "fit":
                data.check_held_out(self.checkpoint, self.ckpt_path or "", self.subcommand)

    def _prepare_training(self) -> None:
        """Check what only training needs."""
        samples = find_callback(self.trainer, Samples)
        if samples is not None:
            samples.check(self.model)
        fid = find_callback(self.trainer, FID)
        if fid is not None and fid.every_n_steps:
            fid.check(self.model, find_callback(self.trainer, EMA))
        with refusals_of("--model.optimizer"):
            optimizer = self.model.make_optimizer()
        check_scaler(self.trainer, optimizer)
        if self.checkpoint is not None:
            check_same_optimizer(self.checkpoint, optimizer, self.ckpt_path or "")
        step = self.checkpoint["global_step"] if self.checkpoint else 0
        is_new = self.run is not None and self.run.newest_checkpoint() is None
        if is_new and 0 <= self.trainer.max_steps <= step:
            raise InputError(
                f"--trainer.max_steps {self.trainer.max_steps}: {self.ckpt_path} is at step {step} "
                "already; give a larger number"
            )

    def before_fit(self) -> None:
        """Prepare, write config.yaml and say what is about to happen."""
        self._prepare()
        self._prepare_training()
        if not getattr(self.model.net, "checkpointing", False):
            keep_freed_memory()  # not with pieces: it would keep the holes between them, too
        if not is_rank_zero() or self.run is None:
            return
        self._save_config(self.run)
        channels, height, width = self.datamodule.image_shape
        num_parameters = sum(p.numel() for p in self.model.net.parameters())
        announce(
            f"data: {self.datamodule.num_train:,} images of {channels}x{height}x{width} to train "
            f"on, {self.datamodule.num_val:,} to validate{self.datamodule.note_of_skipped()}\n"
            f"{_list_classes(self.datamodule.classes)}"
            f"network: {type(self.model.net).__name__}, {num_parameters:,} parameters, "
            f"on {self.trainer.num_devices * self.trainer.num_nodes} x "
            f"{self.trainer.strategy.root_device.type}"
        )

    def before_validate(self) -> None:
        """Prepare."""
        self._prepare()
        if not self.datamodule.num_val:
            raise InputError("--data.val_fraction 0: leaves no images to validate on")

    before_test = before_validate

    # --- after -------------------------------------------------------------------------------

    def after_fit(self) -> None:
        """Say where everything is."""
        if self.run is None or not self.trainer.is_global_zero:
            return
        samples = find_callback(self.trainer, Samples)
        last = self.run.checkpoints / "last.ckpt"
        lines = [f"run: {self.run.root}"]
        if samples is not None and samples.latest is not None:
            lines.append(f"samples: {samples.latest}")
        lines.append(f"checkpoint: {last}")
        if any(isinstance(logger, RunLogger) for logger in self.trainer.loggers):
            lines.append(f"curves: {_beside_python('tensorboard')} --logdir {self.run.root}")
        python = _beside_python(Path(sys.executable).name)
        lines.append(f"more samples: {python} -m ddpm_lightning sample {last}")
        fid = find_callback(self.trainer, FID)
        if fid is not None and fid.latest:
            lines += [f"{name}: {value:.4g}" for name, value in fid.latest.items()]
            lines.append(
                f"judging took {fid.seconds:.0f} s, {fid.share_of_time():.0%} of the time; "
                f"records: {self.run.root / 'fid'}"
            )
        if fid is not None and fid.every_n_steps and fid.is_owed:  # and there was no step to do
            lines.append(
                "judging was cut short at the last step; to make up for it: "
                f"{python} -m ddpm_lightning fid {last} {fid.options}"
            )
        nonfinite = find_callback(self.trainer, Nonfinite)
        if nonfinite is not None and nonfinite.num_skipped:
            lines.append(f"skipped: {nonfinite.num_skipped} steps that were not finite")
        announce("\n".join(lines))

    def after_validate(self) -> None:
        """Print the losses."""
        if self.trainer.is_global_zero:
            metrics = self.trainer.callback_metrics
            announce("\n".join(f"{name}: {float(value):.6f}" for name, value in metrics.items()))

    after_test = after_validate

    def _save_config(self, run: Run) -> None:
        """Write config.yaml; a run that goes on with other options keeps both files."""
        config = self.config[self.subcommand].clone()
        for key in ("run_dir", "ckpt_path", "config"):  # they say where, not what
            del config[key]
        text = self._subcommand_parsers[str(self.subcommand)].dump(config, skip_none=False)
        step = 0 if self.checkpoint is None else self.checkpoint["global_step"]
        ends = chain([""], (f"-{number}" for number in count(2)))
        others = (f"config.step={step}{end}.yaml" for end in ends)
        path = run.config
        while path.exists() and path.read_text() != text:
            path = path.with_name(next(others))
        path.write_text(text)
        for logger in self.trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.log_config(yaml.safe_load(text))


def _experiment_name(configs: list[Any] | None) -> str:
    """Join the names of the --config files; without any, it is the digits experiment."""
    return "+".join(Path(str(config)).stem for config in configs or []) or "digits"


def _widen_output(model: Any) -> None:
    """Give a network for a learned variance twice the output channels, unless it has them.

    So `--model.variance learned_range` is enough for networks that say their channels as UNet does;
    the model refuses others by the channels that it needs.
    """
    arguments = model.net.get("init_args") or {}
    channels = arguments.get("in_channels")
    is_learned = model.variance in LEARNED_VARIANCES
    if is_learned and channels is not None and arguments.get("out_channels") == channels:
        arguments["out_channels"] = 2 * channels


def _list_classes(classes: Labels | None) -> str:
    """Say in a line which classes the network is told, if any."""
    if classes is None:
        return ""
    names = [f"{number} {name}" for number, name in enumerate(classes.names[:NUM_CLASSES_SHOWN])]
    names += ["…"] if len(classes.names) > NUM_CLASSES_SHOWN else []
    return f"classes: {', '.join(names) or classes.num_classes}\n"


def _beside_python(name: str) -> Path:
    """Give the path of a program of this environment, from this folder where it lies below it."""
    path = Path(sys.executable).with_name(name)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def main() -> int:
    """Run fit, validate or test."""
    return run_command(CLI)
