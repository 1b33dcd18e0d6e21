"""The Lightning module: losses, sampling, learning rate, precisions, what its checkpoints hold."""

import builtins
import io
import os
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD

from ddpm_lightning import DDPM, UNet
from ddpm_lightning.callbacks import EMA, Checkpoints, Curves
from ddpm_lightning.checkpoints import FORMAT_VERSION, load_checkpoint
from ddpm_lightning.data.batches import Batch
from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.errors import InputError
from ddpm_lightning.resuming import place_steps
from ddpm_lightning.samplers import (
    DDIMSampler,
    DPMSolver2MSampler,
    DPMSolver2MSDESampler,
    Draw,
    HeunSampler,
    Network,
    Sampler,
    Step,
)
from tests.training import (
    NUM_TIMESTEPS,
    MemoryLogger,
    Recorder,
    assert_same,
    assert_same_training,
    batch_of,
    flat_state,
    flat_weights,
    load,
    loss_by_hand,
    make_data,
    make_trainer,
    redraw,
    save,
    tiny_module,
    tiny_net,
)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


class UserNet(nn.Module):
    """A network of the user's own: dropout by a function, a buffer that is not in state_dict."""

    scale: Tensor

    def __init__(
        self, channels: int = 1, width: int = 4, rates: tuple[float, ...] = (0.5,)
    ) -> None:
        super().__init__()
        self.channels = channels
        self.width = width
        self.rates = rates
        self.layer_1 = nn.Conv2d(channels, width, 3, padding=1)
        self.layer_2 = nn.Conv2d(width, channels, 3, padding=1)
        self.register_buffer("scale", torch.full((width, 1, 1), 0.01), persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = F.silu(self.layer_1(x)) + self.scale * t[:, None, None, None].to(x.dtype)
        output: Tensor = self.layer_2(F.dropout(h, self.rates[0], self.training))
        return output


class Forgetful(UserNet):
    """Does not keep one of its arguments."""

    def __init__(self, channels: int = 1, depth: int = 2) -> None:
        super().__init__(channels)


class KeepsLayer(UserNet):
    """Keeps a layer under the name of an argument."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)


class Trimming(UserNet):
    """Gives back another size."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t)[..., 1:]


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_training_losses_are_those_by_hand(seed: int, tmp_path: Path) -> None:
    module = tiny_module(seed=seed)
    module.trainer = make_trainer(tmp_path)
    batch = batch_of(12, first=10**10)
    outputs = module.training_step(batch, 0)
    by_hand = [
        loss_by_hand(module.net, image, int(position), seed)
        for image, position in zip(batch.images, batch.positions, strict=True)
    ]
    torch.testing.assert_close(outputs["losses"], torch.stack(by_hand).detach())
    torch.testing.assert_close(outputs["loss"], torch.stack(by_hand).mean())
    assert outputs["loss"].requires_grad
    assert not outputs["losses"].requires_grad
    assert outputs["t"].dtype == torch.int64
    other = tiny_module(seed=1).losses(batch, 1)[1]
    assert not torch.equal(outputs["t"], other)


def test_draws_are_functions_of_the_position() -> None:
    module = tiny_module()
    whole = batch_of(12)
    losses, t = module.losses(whole, 3)
    for rows in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11], [11], [7, 3, 9]):
        part = Batch(whole.images[rows], whole.positions[rows])
        some, some_t = module.losses(part, 3)
        assert torch.equal(some_t, t[rows])
        torch.testing.assert_close(some, losses[rows], rtol=1e-5, atol=1e-6)
    assert not torch.equal(module.losses(Batch(whole.images, whole.positions + 1), 3)[1], t)


# --- images and networks that do not fit -----------------------------------------------------


def test_images_that_do_not_fit_are_refused() -> None:
    grey = tiny_module()
    grey.check_images((1, 8, 8))
    assert grey.image_shape == (1, 8, 8)
    with pytest.raises(InputError) as error:
        grey.check_images((3, 8, 8))
    for key in (
        "3x8x8",
        "--model.net.in_channels 3",
        "--model.net.out_channels 3",
        "--data.channels",
    ):
        assert key in one_line(error)
    with pytest.raises(InputError) as error:
        tiny_module(UNet(1, 1, 32, (1, 1), 1, ())).check_images((1, 7, 8))
    assert "1x7x8" in one_line(error)
    assert "--data.image_size" in one_line(error)
    for net in (Trimming(), UNet(1, 2, 32, (1,), 1, ())):
        with pytest.raises(InputError) as error:
            tiny_module(net).check_images((1, 8, 8))
        assert "--model.net.out_channels 1" in one_line(error)


def test_any_network_with_buffers_is_checked_without_running_it() -> None:
    net = UserNet()
    module = tiny_module(net)
    before = flat_weights(net)
    module.check_images((1, 5, 9))
    assert module.image_shape == (1, 5, 9)
    assert torch.equal(flat_weights(net), before)
    assert net.scale.device.type == "cpu"


@pytest.mark.parametrize(("net", "argument"), [(Forgetful, "depth"), (KeepsLayer, "dropout")])
def test_a_network_that_forgets_its_arguments_is_refused(
    net: type[nn.Module], argument: str
) -> None:
    with pytest.raises(InputError) as error:
        tiny_module(net())
    assert net.__name__ in one_line(error)
    assert f"self.{argument}" in one_line(error)


# --- checkpoints -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DDPM, EMA]:
    """A checkpoint of a user's network after three steps, the module and its average."""
    folder = tmp_path_factory.mktemp("trained")
    module = tiny_module(
        UserNet(width=6, rates=(0.25, 0.0)), schedule="cosine", variance="fixed_small"
    )
    ema = EMA(decay=0.5, warmup=False)
    trainer = make_trainer(folder, ema, Checkpoints(), max_steps=3)
    trainer.fit(module, make_data(pictures))
    return folder / "checkpoints" / "last.ckpt", module, ema


def test_a_checkpoint_rebuilds_a_users_network(trained: tuple[Path, DDPM, EMA]) -> None:
    path, module, ema = trained
    raw = DDPM.from_checkpoint(path, "raw")
    average = DDPM.from_checkpoint(path)
    for rebuilt in (raw, average):
        assert type(rebuilt.net) is UserNet
        assert (rebuilt.net.width, rebuilt.net.rates) == (6, (0.25, 0.0))
        assert rebuilt.image_shape == (1, 8, 8)
        assert not rebuilt.training
        assert not rebuilt.net.training
        assert rebuilt.hyper_parameters() == module.hyper_parameters()
        assert_same(dict(rebuilt.process.named_buffers()), dict(module.process.named_buffers()))
    assert_same(raw.net.state_dict(), module.net.state_dict())
    with ema.scope(module):
        assert_same(average.net.state_dict(), module.net.state_dict())
    assert not torch.equal(flat_weights(raw.net), flat_weights(average.net))
    assert torch.equal(raw.sample([5]), module.sample([5]))


def test_a_checkpoint_holds_plain_values_and_network_keys(trained: tuple[Path, DDPM, EMA]) -> None:
    checkpoint = load(trained[0])  # weights_only: nothing but plain values and tensors
    keys = [f"net.layer_{layer}.{name}" for layer in (1, 2) for name in ("weight", "bias")]
    assert list(checkpoint["state_dict"]) == keys
    assert list(checkpoint["ema_state_dict"]) == keys
    assert checkpoint["format_version"] == FORMAT_VERSION
    assert checkpoint["hyper_parameters"] == {
        "net": {
            "class_path": "tests.test_module.UserNet",
            "init_args": {"channels": 1, "width": 6, "rates": (0.25, 0.0)},
        },
        "schedule": "cosine",
        "num_timesteps": NUM_TIMESTEPS,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "zero_terminal_snr": False,
        "prediction": "noise",
        "variance": "fixed_small",
        "loss": "simple",
        "weighting": "none",
        "timestep_sampling": "uniform",
        "label_dropout": 0.1,
        "image_shape": [1, 8, 8],
    }


def test_only_networks_are_called(
    trained: tuple[Path, DDPM, EMA], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[object] = []
    monkeypatch.setattr(os, "system", called.append)
    monkeypatch.setattr(builtins, "print", called.append)
    checkpoint = load(trained[0])
    bad = tmp_path / "bad.ckpt"
    for name in ("os.system", "builtins.print", "pathlib.Path", "no.such", "Nothing", "torch.nope"):
        checkpoint["hyper_parameters"]["net"] = {"class_path": name, "init_args": {"command": "x"}}
        save(checkpoint, bad)
        with pytest.raises(InputError) as error:
            DDPM.from_checkpoint(bad)
        assert name in one_line(error)
    assert not called


def damaged_files(good: Path) -> dict[str, bytes]:
    data = good.read_bytes()
    lengths = (0, 1, 2, 10, 100, 1000, len(data) // 2, len(data) - 100, len(data) - 1)
    files = {f"cut to {length}": data[:length] for length in lengths}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("hello.txt", "hello")
    files |= {
        "zip": buffer.getvalue(),
        "text": b"hello\n" * 100,
        "zeros": bytes(1000),
        "png": b"\x89PNG\r\n\x1a\n" + bytes(50),
        "pickle": b"cos\nsystem\n(S'exit 1'\ntR.",
        "yaml": b"a: 1\n",
        "brackets": b"]]}}",
        "dots": b"....",
    }
    foreign: dict[str, Any] = {
        "list": [1],
        "dict": {"a": torch.ones(2)},
        "state": {"state_dict": {}},
    }
    for name, content in foreign.items():
        buffer = io.BytesIO()
        torch.save(content, buffer)
        files[name] = buffer.getvalue()
    return files


def test_damaged_and_foreign_files_are_refused(
    trained: tuple[Path, DDPM, EMA], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.ckpt"
    for name, content in damaged_files(trained[0]).items():
        bad.write_bytes(content)
        for mmap in (True, False):
            with pytest.raises(InputError) as error:
                load_checkpoint(bad, mmap)
            assert one_line(error).startswith(f"{bad}: "), name
    for missing in (tmp_path / "none.ckpt", tmp_path):
        with pytest.raises(InputError, match="no such checkpoint"):
            load_checkpoint(missing)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": FORMAT_VERSION + 1}, "newer than this ddpm_lightning"),
        ({"format_version": "new"}, "newer than this ddpm_lightning"),
        ({"ema_state_dict": None}, "no EMA weights"),
        ({"state_dict": None}, "lacks state_dict"),
        ({"hyper_parameters": None}, "lacks hyper_parameters"),
        ({"hyper_parameters": {}}, "does not describe a model"),
        ({"hyper_parameters": [1, 2]}, "hyper_parameters is no dict"),
        ({"hyper_parameters": {"net": "UNet"}}, "does not describe a model"),
        ({"hyper_parameters": {"net": {"class_path": "tests.test_module.UserNet"}}}, "init_args"),
        ({"ema_state_dict": {}}, "does not describe a model"),
        ({"ema_state_dict": {"net.layer_1.weight": torch.ones(1)}}, "does not describe a model"),
    ],
)
def test_checkpoints_that_lack_something_are_refused(
    trained: tuple[Path, DDPM, EMA], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    checkpoint = {**load(trained[0]), **changes}
    bad = tmp_path / "bad.ckpt"
    save({key: value for key, value in checkpoint.items() if value is not None}, bad)
    with pytest.raises(InputError, match=message) as error:
        DDPM.from_checkpoint(bad)
    assert str(bad) in one_line(error)
    if "ema_state_dict" in changes:
        DDPM.from_checkpoint(bad, "raw")


# --- sampling --------------------------------------------------------------------------------


class Draws(Sampler):
    """Yields what it draws, and no more."""

    num_steps = 3

    def __call__(self, net: Network, process: Process, draw: Draw) -> Any:
        for t in range(3):
            noise = draw()
            yield Step(t, noise, noise)


def draws(module: DDPM, seeds: list[int]) -> Tensor:
    return torch.stack([step.x_prev for step in module.denoise(seeds, Draws())], dim=1)


@pytest.fixture(scope="module")
def sampling() -> DDPM:
    return tiny_module(image_shape=(1, 8, 8))


def test_draws_depend_on_the_seed_alone(sampling: DDPM) -> None:
    seeds = [7, 0, 2**32 - 1, 12345, 3]
    together = draws(sampling, seeds)
    for index, seed in enumerate(seeds):
        assert torch.equal(draws(sampling, [seed])[0], together[index])
    assert torch.equal(draws(sampling, seeds[::-1]), together.flip(0))
    assert len({tuple(noise.flatten().tolist()) for noise in together.flatten(0, 1)}) == 15
    expected = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(7))
    assert torch.equal(together[0, 0], expected)


@pytest.mark.parametrize(
    "sampler",
    [
        "ddpm",
        "ddim",
        DDIMSampler(7, eta=1.0),
        DDIMSampler(7, clip="dynamic"),
        DPMSolver2MSampler(7),
        DPMSolver2MSDESampler(7),
        HeunSampler(5),
    ],
)
def test_an_image_depends_on_its_seed_alone(sampling: DDPM, sampler: Any) -> None:
    num_steps = 10 if sampler == "ddim" else None
    seeds = list(range(40))

    def sample(seeds: list[int], batch_size: int) -> Tensor:
        return sampling.sample(seeds, sampler, num_steps, batch_size)

    images = sample(seeds, 40)
    assert images.dtype == torch.uint8
    assert images.shape == (40, 1, 8, 8)
    assert images.device.type == "cpu"
    assert torch.equal(sample(seeds, 40), images)
    # other companions, another place, the same batch size
    mixed = sample([seed ^ 1 for seed in seeds], 8)
    assert torch.equal(mixed[[seed ^ 1 for seed in seeds]], sample(seeds, 8))
    for batch_size in (7, 8, 39):
        other = sample(seeds, batch_size)
        distance = (other.int() - images.int()).abs()
        assert int(distance.max()) <= 1
        assert float((distance > 0).float().mean()) <= 1e-3


def test_a_chain_is_not_kept_whole(sampling: DDPM) -> None:
    """Of a thousand steps of large images there would be no room for all."""
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []

    class Long(DDIMSampler):
        def __call__(self, net: Network, process: Process, draw: Draw) -> Iterator[Step]:
            for step in super().__call__(net, process, draw):
                alive.append(weakref.ref(step.x_prev))
                yield step

    def count() -> None:
        counts.append(sum(tensor() is not None for tensor in alive))

    list(sampling.batches(range(4), Long(20), 2, count))
    assert len(counts) == 40  # called after each step of both batches
    assert max(counts) <= 3


def test_what_is_raised_after_a_step_ends_the_work(sampling: DDPM) -> None:
    calls: list[int] = []

    def stop() -> None:
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(sampling.batches([0], DDIMSampler(5), 1, stop))
    assert len(calls) == 3


def test_float_images_agree_across_batch_sizes(sampling: DDPM) -> None:
    *_, together = sampling.denoise(range(16), DDIMSampler(None))
    for seed in (0, 9, 15):
        *_, alone = sampling.denoise([seed], DDIMSampler(None))
        assert float((alone.x_prev[0] - together.x_prev[seed]).abs().max()) <= 1e-3


def test_sampling_leaves_no_trace(sampling: DDPM) -> None:
    sampling.train()
    state = torch.get_rng_state()
    sampling.sample([1, 2], batch_size=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert sampling.net.training
    chain = sampling.denoise([1], DDIMSampler(5))
    next(chain)
    assert not sampling.net.training
    assert torch.is_grad_enabled()
    chain.close()
    assert sampling.net.training
    sampling.eval()
    sampling.sample([1])
    assert not sampling.net.training
    sampling.train()


def test_the_global_generator_does_not_matter(sampling: DDPM) -> None:
    torch.manual_seed(1)
    first = sampling.sample([4])
    torch.manual_seed(2)
    assert torch.equal(sampling.sample([4]), first)


def test_impossible_samples_are_refused(sampling: DDPM) -> None:
    for seeds in ([-1], [0, 2**32]):
        with pytest.raises(InputError, match=r"seeds must lie in 0\.\.4294967295"):
            sampling.sample(seeds)
    with pytest.raises(InputError, match="image_shape"):
        tiny_module().sample([0])
    with pytest.raises(InputError, match=r"num_steps must lie in 1\.\.20, got 50"):
        sampling.sample([0], "ddim", num_steps=50)


def test_diverged_weights_are_named(sampling: DDPM) -> None:
    parameter = next(sampling.net.parameters())
    kept = parameter.data.clone()
    parameter.data.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite.*earlier checkpoint"):
        sampling.sample([0], num_steps=2)
    parameter.data.copy_(kept)


def test_another_image_shape_is_refused() -> None:
    module = tiny_module(image_shape=(1, 8, 8))
    module.check_images((1, 8, 8))
    with pytest.raises(InputError, match="image_shape says 1x8x8, but the images are 1x4x4"):
        module.check_images((1, 4, 4))


# --- optimisation ----------------------------------------------------------------------------


class RecordingSGD(SGD):
    """Notes the learning rate of each update."""

    def __init__(self, params: Any, lr: float, rates: list[float]) -> None:
        super().__init__(params, lr)
        self._rates = rates

    def step(self, closure: Any = None) -> Any:
        self._rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


@pytest.mark.parametrize("lr_warmup_steps", [0, 1, 4])
def test_the_learning_rate_warms_up(lr_warmup_steps: int, pictures: Path, tmp_path: Path) -> None:
    rates: list[float] = []
    module = tiny_module(
        optimizer=lambda params: RecordingSGD(params, 0.5, rates), lr_warmup_steps=lr_warmup_steps
    )
    recorder = Recorder()
    make_trainer(tmp_path, recorder, max_steps=6).fit(module, make_data(pictures))
    factors: dict[int, list[float]] = {
        0: [1] * 6,
        1: [0, 1, 1, 1, 1, 1],
        4: [0, 0.25, 0.5, 0.75, 1, 1],
    }
    assert rates == [0.5 * factor for factor in factors[lr_warmup_steps]]
    stands_still = torch.equal(recorder.weights[0], recorder.initial)
    assert stands_still == (lr_warmup_steps > 0)
    assert not torch.equal(recorder.weights[1], recorder.weights[0])


@pytest.mark.parametrize(
    ("lr_decay_steps", "factors"),
    [
        (0, [0, 0.5, 1, 1, 1, 1]),
        (1, [0, 0.5, 1, 1, 1, 1]),
        (4, [0, 0.5, 1, 0.75, 0.5, 0.25]),
        (9, [0, 0.5, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),  # as 6, which all steps are
    ],
)
def test_the_learning_rate_decays(
    lr_decay_steps: int, factors: list[float], pictures: Path, tmp_path: Path
) -> None:
    rates: list[float] = []
    module = tiny_module(
        optimizer=lambda params: RecordingSGD(params, 0.5, rates), lr_decay_steps=lr_decay_steps
    )
    make_trainer(tmp_path, max_steps=6).fit(module, make_data(pictures))
    assert rates == pytest.approx([0.5 * factor for factor in factors], abs=1e-12)


def test_without_an_end_the_learning_rate_stays(pictures: Path, tmp_path: Path) -> None:
    rates: list[float] = []
    module = tiny_module(optimizer=lambda params: RecordingSGD(params, 0.5, rates))
    make_trainer(tmp_path, max_steps=-1, limit_train_batches=4, max_epochs=1).fit(
        module, make_data(pictures)
    )
    assert rates == [0, 0.25, 0.5, 0.5]


def test_a_decay_without_an_end_is_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lr_decay_steps needs --trainer\.max_steps"):
        make_trainer(tmp_path, max_steps=-1).fit(tiny_module(lr_decay_steps=2), make_data(pictures))


def test_negative_steps_of_the_learning_rate_are_refused() -> None:
    with pytest.raises(InputError, match="lr_warmup_steps must be at least 0, got -1"):
        tiny_module(lr_warmup_steps=-1)
    with pytest.raises(InputError, match="lr_decay_steps must be at least 0, got -1"):
        tiny_module(lr_decay_steps=-1)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("limit", [None, 0, 0.01, 1e6])
def test_gradients_are_clipped_at_their_norm(
    limit: float | None, accumulate: int, pictures: Path, tmp_path: Path
) -> None:
    module = tiny_module(optimizer=lambda params: SGD(params, 1.0), lr_warmup_steps=0)
    data = make_data(pictures)
    by_hand = tiny_module()
    batch = next(iter(data.train_dataloader()))
    loss = by_hand.losses(batch, 0)[0].mean()
    gradients = torch.autograd.grad(loss, list(by_hand.net.parameters()))
    gradient = torch.cat([value.double().flatten() for value in gradients])
    norm = float(gradient.norm())

    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        recorder,
        max_steps=1,
        gradient_clip_val=limit,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(module, data)
    assert recorder.grad_norms[-1] == pytest.approx(norm, rel=1e-5)
    factor = min(1.0, limit / norm) if limit else 1.0
    assert (factor < 1) == (limit == 0.01)
    update = recorder.initial - recorder.weights[-1]
    torch.testing.assert_close(update, factor * gradient, rtol=1e-4, atol=1e-6)


class GradientsNow(Callback):
    """Whether there are any before each forward pass."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append(any(weight.grad is not None for weight in pl_module.parameters()))


@pytest.mark.parametrize(("accumulate", "between"), [(1, []), (2, [True])])
def test_no_gradients_stay_from_step_to_step(
    accumulate: int, between: list[bool], pictures: Path, tmp_path: Path
) -> None:
    now = GradientsNow()
    trainer = make_trainer(tmp_path, now, max_steps=3, accumulate_grad_batches=accumulate)
    trainer.fit(tiny_module(), make_data(pictures))
    assert now.seen == [False, *between] * 3


def test_clipping_by_value_is_refused(pictures: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, gradient_clip_algorithm="value")
    with pytest.raises(InputError, match=r"--trainer.gradient_clip_algorithm"):
        trainer.fit(tiny_module(), make_data(pictures))


# --- precisions ------------------------------------------------------------------------------


class Probe(Recorder):
    """Notes what precision changes, seen from inside the network."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self.outputs: list[torch.dtype] = []
        pl_module.net.register_forward_hook(
            lambda net, arguments, output: self.outputs.append(output.dtype)
        )


PRECISIONS = {
    # precision: what the weights, the network's output and the losses have
    "32-true": (torch.float32, torch.float32, torch.float32),
    "bf16-mixed": (torch.float32, torch.bfloat16, torch.float32),
    "bf16-true": (torch.bfloat16, torch.bfloat16, torch.float32),
    "64-true": (torch.float64, torch.float64, torch.float64),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision: Any, pictures: Path, tmp_path: Path) -> None:
    weights, output, losses = PRECISIONS[precision]
    module, data, probe = tiny_module(), make_data(pictures), Probe()
    batch = next(iter(data.train_dataloader()))
    ema = EMA(decay=0.5)
    trainer = make_trainer(tmp_path, ema, probe, max_steps=3, precision=precision)
    trainer.fit(module, data)
    assert {p.dtype for p in module.net.parameters()} == {weights}
    assert set(probe.outputs) == {output}
    assert {value.dtype for value in probe.losses} == {losses}
    for table in module.process.buffers():
        assert table.dtype in (torch.float64, torch.int64)
    assert_same(dict(module.process.named_buffers()), dict(tiny_module().process.named_buffers()))
    assert not torch.equal(probe.weights[-1], probe.initial)
    assert bool(probe.weights[-1].isfinite().all())
    # The noise is the same at every precision: the first losses differ by the network's rounding.
    by_hand, t = tiny_module().losses(batch, 0)
    assert torch.equal(probe.t[0], t)
    tolerance = 3e-2 if output == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        probe.losses[0].double(), by_hand.detach().double(), rtol=tolerance, atol=0
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_both_validation_losses_have_one_precision(
    precision: Any, pictures: Path, tmp_path: Path
) -> None:
    """With weights that stand still their average is they themselves, and so is its loss."""
    module = tiny_module(optimizer=lambda params: SGD(params, 0.0))
    logger = MemoryLogger()
    trainer = make_trainer(
        tmp_path,
        Curves(),
        EMA(),
        max_steps=2,
        val_check_interval=2,
        precision=precision,
        logger=logger,
    )
    trainer.fit(module, make_data(pictures))
    assert logger.scalars["val/loss_ema"] == logger.scalars["val/loss"]


# --- dropout ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["layer", "function"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_dropout_repeats_and_resumes(
    kind: str, accumulate: int, pictures: Path, tmp_path: Path
) -> None:
    def train(name: str, steps: int, resume: Path | None = None) -> Path:
        net = tiny_net(dropout=0.5) if kind == "layer" else redraw(UserNet())
        trainer = make_trainer(
            tmp_path / name,
            EMA(),
            Checkpoints(),
            max_steps=steps,
            accumulate_grad_batches=accumulate,
        )
        torch.manual_seed(len(name))  # the global generator's state does not matter
        trainer.fit(tiny_module(net), make_data(pictures), ckpt_path=resume)
        return tmp_path / name / "checkpoints" / "last.ckpt"

    whole = train("whole", 6)
    assert_same_training(train("again", 6), whole)
    half = train("half run", 3)
    assert_same_training(train("resumed run", 6, resume=half), whole)


def test_dropout_differs_from_step_to_step(pictures: Path, tmp_path: Path) -> None:
    """The same images and noise at two steps and two micro-batches give four losses."""
    net = tiny_net(dropout=0.5)
    module = tiny_module(net)
    trainer = make_trainer(tmp_path, max_steps=1, accumulate_grad_batches=2)
    module.trainer = trainer
    batch = batch_of(4)
    seen = []
    progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
    for _ in range(2):
        seen += [module.training_step(batch, index)["loss"].item() for index in (0, 1, 2)]
        progress.optimizer.step.total.completed += 1
    assert seen[0] == seen[2]  # batch 2 is the first micro-batch of its step
    assert seen[3] == seen[5]
    assert len(set(seen)) == 4


def test_state_holds_network_keys_only() -> None:
    module = tiny_module()
    assert all(key.startswith("net.") for key in module.state_dict())
    assert len(module.state_dict()) == len(module.net.state_dict())
    assert flat_state(module.state_dict()).numel() == flat_weights(module.net).numel()


def test_counts_of_steps_go_where_the_kernels_look_for_them() -> None:
    """A device that is not the CPU stands for a GPU here."""
    weight = nn.Parameter(torch.empty(3, device="meta"))
    optimizer = torch.optim.Adam([weight])
    state = optimizer.state[weight]
    for there, options in (("meta", {"fused": True}), ("meta", {"capturable": True}), ("cpu", {})):
        state["step"] = torch.tensor(3.0)
        optimizer.param_groups[0] |= {"fused": None, "capturable": False, **options}
        place_steps(optimizer)
        assert state["step"].device.type == there
