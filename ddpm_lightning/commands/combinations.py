"""combinations: what of prediction, loss, weighting and variance goes together, as a table."""

from ddpm_lightning.commands.options import parse_options
from ddpm_lightning.commands.shell import announce, run_command
from ddpm_lightning.diffusion.combinations import combinations_table


def combinations() -> None:
    """Print which predictions, losses, weightings and variances `fit` takes together."""
    announce(combinations_table())


def main() -> int:
    """Run the command."""
    return run_command(
        lambda: combinations(**parse_options(combinations, "combinations", "[options]"))
    )
