"""How the ranks find each other, where torchrun or SLURM has started them."""

import os
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment


class Torchrun(TorchElasticEnvironment):
    """torchrun's job, whose restarted ranks find each other and not their predecessors.

    The agent's store, in which ranks look for each other, outlives a restart together with the
    addresses of ranks that are gone (pytorch issue 135712): new ranks would call those, and hang
    or fail. From the first restart on, rank 0 has a store of its own, at another port each time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._main_port = super().main_port
        num_restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        if num_restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
            # of the same parity: Linux has the other one for connections
            self._main_port += 2 * num_restarts

    @property
    def main_port(self) -> int:
        """Give the port of the store."""
        return self._main_port


def cluster_plugins() -> list[Any]:
    """Give the Trainer's plugins for what has started this process.

    In a job of SLURM, Lightning is kept from requeueing it. At SIGUSR1 it would write a checkpoint
    of its own from within the signal's handler, in the middle of a step, beside those that we
    resume from. docs/slurm.sbatch requeues instead.
    """
    if TorchElasticEnvironment.detect():  # inside SLURM, too
        return [Torchrun()]
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
