"""What share of a GPU's arithmetic training uses."""

import torch

PEAK_TFLOPS = {
    "A100": (312.0, 156.0),
    "H100 PCIe": (756.0, 378.0),
    "H100": (989.4, 494.7),
    "H200": (989.4, 494.7),
    "L40S": (362.0, 183.0),
    "L4": (121.0, 60.0),
    "T4": (65.0, 8.1),
    "V100": (125.0, 15.7),
}
"""By a part of the device's name, the more special names first: TFLOP/s of dense products of 16-bit
numbers, and of float32 in the fastest mode that the device has for it (TF32, where it has that), as
in NVIDIA's data sheets."""


def peak_flops(device_name: str, precision: str) -> float | None:
    """Give the FLOP/s that a device can reach, None where it is not known.

    Args:
        device_name: As `torch.cuda.get_device_name` gives it.
        precision: As Lightning's Trainer has it: bf16-mixed, 32-true, ...
    """
    words = device_name.replace("-", " ").split()
    for name, (half, single) in PEAK_TFLOPS.items():
        if set(name.split()) <= set(words):
            return 1e12 * (half if "16" in precision else single)
    return None


def peak_of(device: torch.device, precision: str) -> float | None:
    """Give the FLOP/s that a device can reach; None for a CPU, and for GPUs that are not known."""
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), precision)
