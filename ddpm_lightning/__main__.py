"""The command line: finds the command, and answers --help, --version and typos at once.

Only the standard library is imported here; torch and Lightning wait until a command is known.
"""

import sys
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

from ddpm_lightning import __version__
from ddpm_lightning.allocator import keep_freed_memory

COMMANDS = {
    "fit": ("ddpm_lightning.cli:main", "train; with no option at all, on handwritten digits"),
    "validate": ("ddpm_lightning.cli:main", "validation loss of a checkpoint"),
    "test": ("ddpm_lightning.cli:main", "the same on the test split, and bits/dim"),
    "combinations": (
        "ddpm_lightning.commands.combinations:main",
        "which predictions, losses, weightings and variances go together",
    ),
    "sample": ("ddpm_lightning.commands.sample:main", "turn noise into PNGs with a checkpoint"),
    "reconstruct": (
        "ddpm_lightning.commands.reconstruct:main",
        "turn images into noise and back, with DDIM",
    ),
    "likelihood": (
        "ddpm_lightning.commands.likelihood:main",
        "bits/dim of images, and how rate and distortion go with t",
    ),
    "fid": ("ddpm_lightning.commands.fid:main", "judge checkpoints or images: FID, KID, IS, P&R"),
    "progressive": (
        "ddpm_lightning.commands.progressive:main",
        "draw how samples come about: x_0 as predicted along the chain",
    ),
    "shared-latents": (
        "ddpm_lightning.commands.shared_latents:main",
        "draw samples that share an x_t",
    ),
    "interpolate": (
        "ddpm_lightning.commands.interpolate:main",
        "draw interpolations between two images",
    ),
    "neighbours": (
        "ddpm_lightning.commands.neighbours:main",
        "draw samples beside the nearest training images",
    ),
    "compress": ("ddpm_lightning.commands.compress:main", "an image to few bits with a checkpoint"),
    "decompress": ("ddpm_lightning.commands.decompress:main", "and back, or any beginning of them"),
}

HELP = """usage: python -m ddpm_lightning COMMAND [OPTIONS]

Train, sample and judge denoising diffusion probabilistic models.

commands:
{commands}

options:
  -h, --help     this text; COMMAND --help lists a command's options
  --version      the version
"""


def main() -> int:
    """Run the command that sys.argv names.

    Returns:
        The exit status: 0, or 2 for bad input.
    """
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = (f"  {name:<14} {text}" for name, (_, text) in COMMANDS.items())
        sys.stdout.write(HELP.format(commands="\n".join(lines)))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        sys.stdout.write(f"ddpm_lightning {__version__}\n")
        return 0
    if arguments[0] not in COMMANDS:
        near = get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        known = ", ".join(COMMANDS)
        sys.stderr.write(f"error: no command {arguments[0]!r}{hint} (commands: {known})\n")
        return 2
    if arguments[0] != "fit":  # which looks at the network first
        keep_freed_memory()
    module, function = COMMANDS[arguments[0]][0].split(":")
    status: int = getattr(import_module(module), function)()
    return status


def run() -> NoReturn:
    """End this process with the status of the command that sys.argv names."""
    status = main()
    from ddpm_lightning.peers import end_process  # commands have it already; --help waits for none

    end_process(status)


if __name__ == "__main__":
    run()
