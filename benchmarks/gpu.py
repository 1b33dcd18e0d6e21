"""Training and sampling on a GPU beside peers: `python -m benchmarks.gpu`. Prints, writes nothing.

Not measured yet: it was written where there is no GPU, and run on a CPU with small networks only.
"""

import argparse
import sys
from functools import partial
from itertools import product
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.command import sampling
from benchmarks.harness import Action, Row, alternate, make_row, own_process, rates, text_of
from benchmarks.peers import DiffusersStep
from benchmarks.training import CIFAR10, LEARNING_RATE, SMALL, OurStep, make_pixels
from ddpm_lightning import UNet
from tests.parity.networks import diffusers_unet

SHAPES = (
    ("train-small", SMALL, 256, 28, 1.4),
    ("train-large", CIFAR10, 128, 32, 1.2),
)
"""Row, network, batch, size of the images, target."""
DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}
PEER = "peer"
WAYS = ("plain", "channels-last", "fused", "compiled")
"""Of ours: as `fit` has it by default, and with its options channels_last, fused Adam, compile."""
NUM_STEPS = 10
"""Between two waits for the device."""


def waiting(action: Action, times: int, device: torch.device) -> Action:
    """Repeat something, then wait for the device."""

    def repeat() -> None:
        for _ in range(times):
            action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return repeat


def steps(
    way: str,
    arguments: tuple[Any, ...],
    batch_size: int,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Action:
    """Make the training steps of PEER, or ours in one of WAYS."""
    net = UNet(*arguments)
    pixels = make_pixels(size, net.in_channels)
    if way == PEER:
        theirs = DiffusersStep(diffusers_unet(net), pixels, batch_size, device, dtype)
        return waiting(theirs, NUM_STEPS, device)
    if way == "channels-last":
        net.to(memory_format=torch.channels_last)
    if way == "compiled":
        net.compile()
    adam = partial(torch.optim.Adam, lr=LEARNING_RATE, fused=True if way == "fused" else None)
    step = OurStep(net, pixels, batch_size, device, dtype, adam)
    never_waits(step, device)
    return waiting(step, NUM_STEPS, device)


def never_waits(step: Action, device: torch.device) -> None:
    """See that the host never waits for the GPU within a step.

    Raises:
        RuntimeError: It does; the traceback says where.
    """
    waiting(step, 3, device)()  # what is made once may wait, compilation too
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def flops_of(arguments: tuple[Any, ...], batch_size: int, size: int) -> int:
    """Count the floating-point operations of a training step: forward, and twice that backward."""
    with torch.device("meta"):
        net = UNet(*arguments)
        x, t = torch.empty(batch_size, net.in_channels, size, size), torch.zeros(batch_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x, t.long())
    return 3 * int(counter.get_total_flops())


def training(
    name: str,
    way: str,
    arguments: tuple[Any, ...],
    batch_size: int,
    size: int,
    target: float,
    precision: str,
    device: torch.device,
    runs: int,
) -> Row:
    """Compare images a second of whole training steps with diffusers'."""
    rest = (arguments, batch_size, size, device, DTYPES[precision])
    with own_process(steps, way, *rest) as ours, own_process(steps, PEER, *rest) as peer:
        rounds = alternate(lambda: ours(1), lambda: peer(1), runs)
    what = f"training step against diffusers', batch {batch_size}, {precision}, {way}"
    images = rates(rounds, NUM_STEPS * batch_size)
    return make_row(f"{name}-gpu-{precision}-{way}", what, "images/s", images, "at least", target)


def sampler_cost(device: torch.device, runs: int) -> Row:
    """Compare sampling with the bare network in a loop."""
    ours, bare = (waiting(sampling(is_ours, device), 1, device) for is_ours in (True, False))
    rounds = alternate(ours, bare, runs)
    return make_row(
        "sampler-cost-gpu",
        "chains a second of ancestral sampling, against the bare network in a loop",
        "1/s",
        rates(rounds, 1),
        "at least",
        0.97,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peak_tflops", type=float, help="the GPU's, to print the share of it")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no GPU that torch can use; on a CPU: python -m benchmarks")
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    for name, arguments, batch_size, size, target in SHAPES:
        for precision, way in product(DTYPES, WAYS):
            row = training(
                name, way, arguments, batch_size, size, target, precision, device, options.runs
            )
            tflops = row.ours / batch_size * flops_of(arguments, batch_size, size) / 1e12
            share = f", {tflops / options.peak_tflops:.1%}" if options.peak_tflops else ""
            print(f"{text_of(row)}; {tflops:.1f} TFLOP/s{share}", flush=True)
    print(text_of(sampler_cost(device, options.runs)))


if __name__ == "__main__":
    main()
