"""The rows of `python -m benchmarks` on a GPU: `python -m benchmarks.gpu` prints them, no more.

Training takes its precisions and the ways of `fit` in turn. Not measured yet: it was written where
there is no GPU, and run on a CPU with small networks only.
"""

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.command import sampling, trainer_cost
from benchmarks.harness import (
    SHORT,
    Action,
    Row,
    alternate,
    make_row,
    own_process,
    rates,
    text_of,
    wait_for_device,
)
from benchmarks.memory import memory, memory_time
from benchmarks.peers import DiffusersStep
from benchmarks.rows import measure
from benchmarks.training import CIFAR10, LEARNING_RATE, SMALL, OurStep, make_pixels
from ddpm_lightning import UNet
from ddpm_lightning.callbacks.utilisation import peak_of
from tests.parity.networks import diffusers_unet

SHAPES = (
    ("train-small", SMALL, 256, 28, 1.4),
    ("train-large", CIFAR10, 128, 32, 1.2),
)
"""Row, network, batch, size of the images, target."""
DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}
PEER = "peer"
WAYS = ("plain", "channels-last", "fused", "compiled", "channels-last fused compiled")
"""Of ours: as `fit` has it by default, and with its options channels_last, fused Adam, compile."""
NUM_STEPS = 10
"""Between two waits for the device."""
OF_THE_HOST = (
    "data-map",
    "data-stream-png",
    "data-stream-png-within",
    "data-stream-png-own",
    "data-stream-raw",
    "start",
)
"""Rows that are the same wherever the network is, but for the time that the GPU takes to start."""
BUDGET = 120.0
"""Seconds after which a row begins no further round."""


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
        return DiffusersStep(diffusers_unet(net), pixels, batch_size, device, dtype)
    if "channels-last" in way:
        net.to(memory_format=torch.channels_last)
    if "compiled" in way:
        net.compile()
    adam = partial(torch.optim.Adam, lr=LEARNING_RATE, fused="fused" in way or None)
    step = OurStep(net, pixels, batch_size, device, dtype, adam)
    never_waits(step, device)
    return step


def never_waits(step: Action, device: torch.device) -> None:
    """See that the host never waits for the GPU within a step.

    Raises:
        RuntimeError: It does; the traceback says where.
    """
    for _ in range(3):  # what is made once may wait, compilation too
        step()
    wait_for_device()
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
        rounds = alternate(lambda: ours(NUM_STEPS), lambda: peer(NUM_STEPS), runs)
    what = f"training step against diffusers', batch {batch_size}, {precision}, {way}"
    images = rates(rounds, NUM_STEPS * batch_size)
    return make_row(f"{name}-gpu-{precision}-{way}", what, "images/s", images, "at least", target)


def sampler_cost(device: torch.device, runs: int) -> Row:
    """Compare sampling with the bare network in a loop."""
    with own_process(sampling, True, device) as ours, own_process(sampling, False, device) as bare:
        turns = partial(ours, NUM_STEPS), partial(bare, NUM_STEPS)
        rounds = alternate(*turns, SHORT * runs, BUDGET)
    return make_row(
        "sampler-cost-gpu",
        "chains a second of ancestral sampling, against the bare network in a loop",
        "1/s",
        rates(rounds, NUM_STEPS),
        "at least",
        0.97,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peak_tflops", type=float, help="of a GPU that `fit` does not know")
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
            flops = row.ours / batch_size * flops_of(arguments, batch_size, size)
            peak = peak_of(device, precision)
            if options.peak_tflops:
                peak = 1e12 * options.peak_tflops
            share = f", {flops / peak:.1%}" if peak else ""
            print(f"{text_of(row)}; {flops / 1e12:.1f} TFLOP/s{share}", flush=True)
    print(text_of(sampler_cost(device, options.runs)), flush=True)
    rest: list[Callable[[], Row]] = [
        partial(trainer_cost, options.runs, BUDGET, device, NUM_STEPS),
        partial(memory, 1, BUDGET, device),  # a GPU's is the same each time
        partial(memory_time, options.runs, BUDGET, device),
        *(partial(measure, name, options.runs) for name in OF_THE_HOST),
    ]
    for row_of in rest:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            print(text_of(pool.submit(row_of).result()), flush=True)


if __name__ == "__main__":
    main()
