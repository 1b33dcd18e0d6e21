"""The Trainer that commands run on: it brings devices and processes, and nothing else."""

import torch
from lightning.pytorch import Trainer

from ddpm_lightning.callbacks import Together
from ddpm_lightning.commands.clusters import cluster_plugins
from ddpm_lightning.commands.shell import refusals_of
from ddpm_lightning.commands.trainer_checks import check_device


def make_trainer(accelerator: str, devices: str, num_nodes: int) -> Trainer:
    """Make a Trainer for one pass of `predict`, which writes nothing of its own.

    Raises:
        InputError: There are no such devices, or they have no float64.
    """
    with refusals_of("--accelerator, --devices or --num_nodes"):
        trainer = Trainer(
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[Together()],
            plugins=cluster_plugins(),
        )
    check_device(trainer, "--accelerator")
    return trainer


def choose_device(accelerator: str) -> torch.device:
    """Choose the one device of a command that is not worth several.

    Raises:
        InputError: There is no such device.
    """
    device: torch.device = make_trainer(accelerator, "1", 1).strategy.root_device
    return device
