"""The panel that shows memorisation: numbers by hand, picture, and that nothing is disturbed."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ddpm_lightning.callbacks import EMA, Samples
from ddpm_lightning.callbacks.run_logger import RunLogger
from ddpm_lightning.data.batches import Images
from ddpm_lightning.images import enlarge, to_float
from tests.conftest import NUM_TRAIN
from tests.test_labelled_grid import find
from tests.training import (
    NUM_TIMESTEPS,
    MemoryLogger,
    events,
    make_data,
    make_trainer,
    scalars,
    tiny_module,
)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


def pixels(images: Images | None) -> Tensor:
    assert images is not None
    return torch.from_numpy(images[np.arange(len(images))])


def median_distance(images: Tensor, others: Tensor) -> float:
    """Median over images of the root mean square difference to the nearest of the others."""
    differences = images[:, None].double() - others[None].double()
    nearest = differences.square().mean(dim=(2, 3, 4)).sqrt().min(dim=1).values
    return float(np.median(nearest.numpy()))


def test_numbers_and_picture(pictures: Path, tmp_path: Path) -> None:
    ema, data, module = EMA(0.5), make_data(pictures), tiny_module()
    trainer = make_trainer(
        tmp_path,
        ema,
        Samples(every_n_steps=2, num_images=5, num_steps=4, num_train=12),
        max_steps=4,
        accumulate_grad_batches=2,
        logger=RunLogger(tmp_path, name="", version="", default_hp_metric=False),
    )
    trainer.fit(module, data)
    with ema.scope(module):
        samples = module.sample(range(5), "ddim", 4)
    searched = pixels(data.train_images)[np.linspace(0, NUM_TRAIN - 1, 12).astype(int)]
    val = pixels(data.val_images)[np.linspace(0, 6, 5).astype(int)]
    distance, at_best = median_distance(samples, searched), median_distance(val, searched)
    expected = {"distance_samples": distance, "distance_val": at_best, "ratio": distance / at_best}
    for tag, value in expected.items():
        curve = scalars(tmp_path, f"neighbours/{tag}")
        assert list(curve) == [2, 4]
        assert curve[4] == pytest.approx(value, rel=1e-5), tag
    drawn = events(tmp_path).Images("neighbours")
    assert [event.step for event in drawn] == [2, 4]
    with Image.open(io.BytesIO(drawn[-1].encoded_image_string)) as image:
        panel = torch.from_numpy(np.array(image.convert("L")))[None]
    (top, left), (top_4, left_4) = (find(panel, enlarge(samples[k], 7)) for k in (0, 4))
    assert top == top_4
    assert left < left_4


class KnowsOneByHeart(nn.Module):
    """Takes every noisy image for one certain image."""

    x_0: Tensor
    alphas_cumprod: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        betas = torch.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=torch.float64)
        self.register_buffer("alphas_cumprod", (1 - betas).cumprod(0).float(), persistent=False)
        self.register_buffer("x_0", torch.zeros(1, 8, 8), persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a = self.alphas_cumprod[t][:, None, None, None]
        return self.gain * (x - a.sqrt() * self.x_0) / (1 - a).sqrt()


def test_copies_have_the_ratio_0(pictures: Path, tmp_path: Path) -> None:
    data, net, logger = make_data(pictures), KnowsOneByHeart(), MemoryLogger()
    net.x_0 = to_float(pixels(data.train_images)[3])
    trainer = make_trainer(
        tmp_path, Samples(every_n_steps=1, num_images=3), max_steps=1, logger=logger
    )
    trainer.fit(tiny_module(net), data)  # the first step has a rate of 0
    assert logger.scalars["neighbours/distance_samples"] == {1: 0}
    assert logger.scalars["neighbours/ratio"] == {1: 0}
    assert logger.scalars["neighbours/distance_val"][1] > 0


@pytest.mark.parametrize(
    ("num_train", "streaming", "named"),
    [(3, False, ["neighbours/distance_samples"]), (0, False, []), (3, True, [])],
)
def test_what_there_is_not_is_left_out(
    num_train: int, streaming: bool, named: list[str], pictures: Path, tmp_path: Path
) -> None:
    logger = MemoryLogger()
    samples = Samples(every_n_steps=1, num_images=2, num_steps=2, num_train=num_train)
    trainer = make_trainer(tmp_path, samples, max_steps=1, logger=logger)
    trainer.fit(tiny_module(), make_data(pictures / "train", val_fraction=0.0, streaming=streaming))
    assert [name for name in logger.scalars if name.startswith("neighbours/")] == named
