"""TensorBoard's files of a run: curves, charts and options."""

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from typing import Any

import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from ddpm_lightning.checkpoints import flatten

# TensorBoard's CUSTOM SCALARS: what one compares, in one chart each; tags are regular expressions.
CHARTS = {
    "loss": ["Multiline", ["^train/loss$", "^val/loss"]],
    "loss by quarter of the timesteps": ["Multiline", ["^train/loss_q"]],
    "channel mean, samples and data": ["Multiline", ["^channel_.*/mean_"]],
    "channel standard deviation, samples and data": ["Multiline", ["^channel_.*/std_"]],
}


class RunLogger(TensorBoardLogger):
    """TensorBoard's events in the run's folder, and nothing else there."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log; what the disk refuses stays an OSError, of which Lightning makes a ValueError."""
        try:
            super().log_metrics(metrics, step)
        except ValueError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise

    def save(self) -> None:
        """Flush; Lightning's would write an hparams.yaml, but config.yaml holds all options."""
        self.experiment.flush()

    def finalize(self, status: str) -> None:
        """Close the file; where training has failed, what the disk says now is no news."""
        with suppress(OSError) if status == "failed" else nullcontext():
            super().finalize(status)

    @rank_zero_only
    def log_config(self, config: dict[str, Any]) -> None:
        """Show the options under TensorBoard's TEXT and HPARAMS."""
        text = yaml.safe_dump(config, sort_keys=False)
        self.experiment.add_text("config", "    " + text.replace("\n", "\n    "))
        plain = {
            key: value if isinstance(value, int | float | bool) else str(value)
            for key, value in flatten(config).items()
        }
        # names the metrics of the table without logging values for them
        metrics = dict.fromkeys(("train/loss", "val/loss", "val/loss_ema"), 0)
        for summary in hparams(plain, metrics):  # type: ignore[no-untyped-call]
            self.experiment._get_file_writer().add_summary(summary)
        self.experiment.add_custom_scalars({"side by side": CHARTS})
