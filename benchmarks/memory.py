"""Memory of a training step of a large network, with checkpointing of activations."""

import gc
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Row, alternate, make_row, own_process
from benchmarks.peers import CPU
from ddpm_lightning import UNet
from ddpm_lightning.allocator import keep_freed_memory, return_freed_memory
from tests.parity.networks import diffusers_unet

PIXELS_256 = (3, 3, 128, (1, 1, 2, 2, 4, 4), 2, (4,), 0.0)
"""The paper's network for 256x256 (Ho et al. 2020, appendix B)."""
SIZE = 256
MEGABYTE = 2**20


class NetworkStep:
    """Forward, backward and Adam of a network alone, batch 1; keeps what memory it took.

    Args:
        is_ours: Whether this project's network or diffusers'.
        checkpointing: Whether activations are computed again rather than kept.
        device: Whose memory it is.
    """

    def __init__(self, is_ours: bool, checkpointing: bool, device: torch.device = CPU) -> None:
        net: Any = UNet(*PIXELS_256, checkpointing=checkpointing)
        if not is_ours:
            net = diffusers_unet(net)
            if checkpointing:
                net.enable_gradient_checkpointing()
        self._net = net.train().to(device)
        self._is_ours = is_ours
        self._optimizer = torch.optim.Adam(net.parameters(), lr=2e-4)
        self._device = device
        self._x = torch.randn(1, 3, SIZE, SIZE, device=device)
        self._t = torch.tensor([500], device=device)
        # its state and the gradients exist before the memory is looked at
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        gc.collect()
        self._before = resident(device)

    def __call__(self) -> None:
        """Take it."""
        output: Any = self._net(self._x, self._t)
        prediction: Tensor = output if self._is_ours else output.sample
        F.mse_loss(prediction, self._x).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)

    def megabytes(self) -> float:
        """Give how much more memory there was at most than before the first step."""
        return (peak(self._device) - self._before) / MEGABYTE


def resident(device: torch.device = CPU) -> int:
    """Give this process's memory now, in bytes, after freed memory went back to the system."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return_freed_memory()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak(device: torch.device = CPU) -> int:
    """Give the highest memory of this process so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def megabytes_of(is_ours: bool, device: torch.device) -> float:
    """Give the memory of three steps with checkpointing; for a process of its own."""
    step = NetworkStep(is_ours, True, device)
    for _ in range(3):  # the third takes a little more than the first; further ones do not
        step()
    return step.megabytes()


def kept_step(device: torch.device) -> NetworkStep:
    """Make ours without checkpointing, its memory kept as `fit` has it; for its own process."""
    keep_freed_memory()
    return NetworkStep(True, False, device)


def memory(runs: int, budget: float, device: torch.device = CPU) -> Row:
    """Compare the highest memory with checkpointing of activations; a new process each time."""
    end = time.perf_counter() + budget
    rounds: list[tuple[float, float]] = []
    while len(rounds) < runs and (not rounds or time.perf_counter() < end):
        sizes = []
        for is_ours in (True, False):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                sizes.append(pool.submit(megabytes_of, is_ours, device).result())
        rounds.append((sizes[0], sizes[1]))
    what = "peak memory of a step over that before it, 256x256 network, batch 1, checkpointing"
    return make_row("memory", what, "MB", rounds, "at most", 0.5)


def memory_time(runs: int, budget: float, device: torch.device = CPU) -> Row:
    """Compare the time with checkpointing and without, each with its allocator in `fit`."""
    with (
        own_process(NetworkStep, True, True, device) as ours,
        own_process(kept_step, device) as plain,
    ):
        rounds = alternate(lambda: ours(1), lambda: plain(1), runs, budget)
    what = "its step with checkpointing against ours without, memory freed as `fit` has it in each"
    return make_row("memory-time", what, "s", rounds, "at most", 1.35)
