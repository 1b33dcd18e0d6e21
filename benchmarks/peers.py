"""What a user would take instead, put together as its own documentation says.

diffusers: `UNet2DModel` and `DDPMScheduler`, with the data, optimizer and EMA of its example for
unconditional training.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from diffusers import DDPMScheduler
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms  # type: ignore[import-untyped]

CPU = torch.device("cpu")
WARMUP_STEPS = 500
"""Of the learning rate in diffusers' example."""


def diffusers_batches(
    pixels: NDArray[np.uint8], batch_size: int, flip: bool = True
) -> Iterator[Tensor]:
    """Give float batches in [-1, 1] for ever, as its example's data pipeline does.

    Args:
        pixels: uint8 [N, H, W, C], C 1 or 3.
        batch_size: Images in a batch.
        flip: Whether half of the images are mirrored.
    """
    size = pixels.shape[1]
    mode = "RGB" if pixels.shape[3] == 3 else "L"
    images = [Image.fromarray(image.squeeze(), mode) for image in pixels]
    augment = transforms.Compose(
        [
            transforms.Resize(size, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(size),
            transforms.RandomHorizontalFlip() if flip else transforms.Lambda(lambda x: x),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )

    def transform(examples: dict[str, Any]) -> dict[str, Any]:
        return {"input": [augment(image.convert(mode)) for image in examples["image"]]}

    dataset = Dataset.from_dict({"image": images})
    dataset.set_transform(transform)
    loader: DataLoader[Any] = DataLoader(dataset, batch_size, shuffle=True, drop_last=True)
    while True:
        for batch in loader:
            yield batch["input"]


class DiffusersStep:
    """One training step of its example: data, noise, loss, clipping, AdamW, EMA.

    Args:
        net: Its network, or one with the same interface.
        pixels: See `diffusers_batches`.
        batch_size: Images in a step.
        device: Where the step is taken.
        dtype: The network's precision; below float32 by autocast, as `accelerate` does it.
        lr: The learning rate, after the warm-up.
        num_steps: Of the whole training, over which the rate falls as a cosine.
        flip: Whether half of the images are mirrored.
    """

    def __init__(
        self,
        net: Any,
        pixels: NDArray[np.uint8],
        batch_size: int,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        lr: float = 1e-4,
        num_steps: int = 100_000,
        flip: bool = True,
    ) -> None:
        self._device = device
        self._autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        self._net = net.train().to(device)
        self._batches = diffusers_batches(pixels, batch_size, flip)
        self._scheduler = DDPMScheduler(num_train_timesteps=1000)
        self._optimizer = torch.optim.AdamW(
            net.parameters(), lr=lr, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        self._rates = get_cosine_schedule_with_warmup(self._optimizer, WARMUP_STEPS, num_steps)
        self._ema = EMAModel(
            net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75
        )

    def __call__(self) -> None:
        """Take it."""
        x_0 = next(self._batches).to(self._device)
        noise = torch.randn(x_0.shape, device=self._device)
        t = torch.randint(0, 1000, (len(x_0),), device=self._device).long()
        x_t = self._scheduler.add_noise(x_0, noise, t)
        with self._autocast:
            prediction = self._net(x_t, t).sample
        loss = F.mse_loss(prediction.float(), noise.float())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._net.parameters(), 1.0)
        self._optimizer.step()
        self._rates.step()
        self._optimizer.zero_grad()
        self._ema.step(self._net.parameters())

    def averaged(self) -> Any:
        """Put the averaged weights into the network, for good, and give it for sampling."""
        self._ema.copy_to(self._net.parameters())
        return self._net.eval()
