"""What `fit` is told about the objective: in runs, in checkpoints, on the command line."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from torch import Tensor
from torch.optim import SGD

from ddpm_lightning import DDPM, UNet
from ddpm_lightning.callbacks import EMA, Checkpoints, Curves, Samples
from ddpm_lightning.checkpoints import load_checkpoint
from ddpm_lightning.diffusion.objectives import Objective
from ddpm_lightning.diffusion.process import LEARNED_VARIANCES, Variance
from ddpm_lightning.diffusion.schedules import Schedule
from ddpm_lightning.diffusion.timestep_sampling import (
    HISTORY,
    TIMESTEP_SAMPLERS,
    LossSecondMoment,
    TimestepSampling,
)
from ddpm_lightning.errors import InputError
from ddpm_lightning.samplers import SamplerName
from tests.command_line import TINY, run_here
from tests.test_module import UserNet, one_line
from tests.training import (
    MemoryLogger,
    Recorder,
    assert_same,
    assert_same_training,
    batch_of,
    load,
    make_data,
    make_trainer,
    redraw,
    save,
    tiny_module,
)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

NUM_FEW = 4
"""So few timesteps have their losses between the fourth and the eighth step of eight images."""


def net_for(variance: Variance) -> UNet:
    outputs = 2 if variance in LEARNED_VARIANCES else 1
    return redraw(UNet(1, outputs, 32, (1,), 1, ()))


# --- how t is drawn ------------------------------------------------------------------------------


def train(
    folder: Path,
    pictures: Path,
    sampling: TimestepSampling,
    steps: int = 12,
    accumulate: int = 1,
    resume: Path | None = None,
    logger: Any = False,
) -> Recorder:
    recorder = Recorder()
    trainer = make_trainer(
        folder,
        Curves(),
        EMA(0.9),
        recorder,
        Checkpoints(every_n_steps=0, keep_every_n_steps=4),
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=4,
        logger=logger,
    )
    # not Adam: in this network it makes steps of the rounding of gradients that are zero
    module = tiny_module(
        num_timesteps=NUM_FEW,
        timestep_sampling=sampling,
        optimizer=lambda params: SGD(params, lr=0.01, momentum=0.9),
    )
    trainer.fit(module, make_data(pictures), ckpt_path=resume)
    return recorder


@pytest.mark.parametrize("sampling", get_args(TimestepSampling))
def test_draws_are_those_of_the_sampler_however_a_batch_is_shared_out(
    sampling: TimestepSampling, pictures: Path, tmp_path: Path
) -> None:
    seen = train(tmp_path / "whole", pictures, sampling)
    halves = train(tmp_path / "halves", pictures, sampling, accumulate=2)
    assert torch.equal(torch.cat(halves.t), torch.cat(seen.t))
    expected = TIMESTEP_SAMPLERS[sampling](NUM_FEW)
    weights = []
    for step, (t, losses) in enumerate(zip(seen.t, seen.losses, strict=True)):
        drawn = expected.draw(0, torch.arange(8 * step, 8 * step + 8).numpy(), 8)
        assert torch.equal(drawn.t, t)
        weights.append(drawn.weights)
        if isinstance(expected, LossSecondMoment):
            expected.update(t, losses)
    if isinstance(expected, LossSecondMoment):
        assert (weights[0] == 1).all()
        assert not (weights[-1] == 1).any()
        state = load(tmp_path / "whole" / "checkpoints" / "last.ckpt")["timestep_sampling"]
        assert_same(state, expected.state_dict())
        assert int(state["counts"].min()) > HISTORY
    torch.testing.assert_close(halves.weights[-1], seen.weights[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampling", ["stratified", "loss_second_moment"])
def test_resuming_is_going_on(sampling: TimestepSampling, pictures: Path, tmp_path: Path) -> None:
    """From before and after each timestep has its losses."""
    train(tmp_path / "whole", pictures, sampling)
    whole = tmp_path / "whole" / "checkpoints"
    if sampling == "loss_second_moment":
        states = [load(whole / f"step={step}.ckpt")["timestep_sampling"] for step in (4, 8)]
        assert int(states[0]["counts"].min()) < HISTORY <= int(states[1]["counts"].min())
    for start in (4, 8):
        folder = tmp_path / f"from {start}"
        train(folder, pictures, sampling, resume=whole / f"step={start}.ckpt")
        resumed = folder / "checkpoints" / "last.ckpt"
        assert_same_training(resumed, whole / "last.ckpt")
        assert_same(
            load(resumed).get("timestep_sampling"),
            load(whole / "last.ckpt").get("timestep_sampling"),
        )


def test_the_loss_and_the_curves_count_importance(pictures: Path, tmp_path: Path) -> None:
    module = tiny_module(
        num_timesteps=NUM_FEW,
        timestep_sampling="loss_second_moment",
        optimizer=lambda params: SGD(params, 0.0),
    )
    outputs: list[dict[str, Tensor]] = []

    class Keep(Recorder):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
            outputs.append(arguments[0])

    logger = MemoryLogger()
    trainer = make_trainer(
        tmp_path, Curves(), Keep(), max_steps=24, log_every_n_steps=8, logger=logger
    )
    trainer.fit(module, make_data(pictures))
    for out in outputs:
        torch.testing.assert_close(out["loss"], (out["weights"] * out["losses"]).mean())
    window = outputs[16:]
    weights = torch.cat([out["weights"] for out in window]).double()
    losses = torch.cat([out["losses"] for out in window]).double()
    t = torch.cat([out["t"] for out in window])
    assert weights.max() > 1.01 > 0.99 > weights.min()
    expected = float((weights * losses).sum() / weights.sum())
    assert logger.scalars["train/loss"][24] == pytest.approx(expected, rel=1e-9)
    first = t * 4 // NUM_FEW == 0
    expected = float((weights * losses)[first].sum() / weights[first].sum())
    assert logger.scalars["train/loss_q1"][24] == pytest.approx(expected, rel=1e-9)


def test_a_checkpoint_without_the_losses_is_refused(pictures: Path, tmp_path: Path) -> None:
    train(tmp_path / "first", pictures, "loss_second_moment", steps=1)
    path = tmp_path / "first" / "checkpoints" / "last.ckpt"
    checkpoint = load(path)
    del checkpoint["timestep_sampling"]
    save(checkpoint, path)
    with pytest.raises(InputError, match="timestep_sampling loss_second_moment"):
        train(tmp_path / "second", pictures, "loss_second_moment", resume=path)


# --- objectives ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({"prediction": "v", "variance": "learned_range", "loss": "hybrid"}, "bf16-mixed"),
        ({"prediction": "x_0", "variance": "learned", "loss": "vlb"}, "bf16-true"),
        ({"prediction": "mu", "variance": "learned", "loss": "rescaled_hybrid"}, "64-true"),
        ({"prediction": "noise", "loss": "simple", "weighting": "p2"}, "32-true"),
        ({"prediction": "v", "weighting": "min_snr", "zero_terminal_snr": True}, "bf16-mixed"),
        ({"prediction": "x_0", "schedule": "jsd", "loss": "vlb"}, "32-true"),
    ],
)
def test_models_train_draw_and_come_back(
    options: dict[str, Any], precision: Any, pictures: Path, tmp_path: Path
) -> None:
    module = tiny_module(net_for(options.get("variance", "fixed_large")), **options)
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        EMA(0.5),
        Samples(every_n_steps=2, num_images=2, num_steps=2),
        recorder,
        Checkpoints(),
        max_steps=4,
        precision=precision,
    )
    batch = next(iter(make_data(pictures).train_dataloader()))
    trainer.fit(module, make_data(pictures))
    assert torch.cat(recorder.losses).isfinite().all()
    assert recorder.losses[0].dtype == (torch.float64 if "64" in precision else torch.float32)
    # noising and loss are those of full precision; only the network rounds
    whole = tiny_module(net_for(options.get("variance", "fixed_large")), **options)
    expected, _ = whole.losses(batch, 0)
    tolerance = {"32-true": 1e-5, "64-true": 1e-4}.get(precision, 5e-2)
    torch.testing.assert_close(
        recorder.losses[0].double(), expected.detach().double(), rtol=tolerance, atol=1e-3
    )
    path = tmp_path / "checkpoints" / "last.ckpt"
    described = load(path)["hyper_parameters"]
    assert options.items() <= described.items()
    model = DDPM.from_checkpoint(path)
    assert model.hyper_parameters() == module.hyper_parameters()
    assert model.sample([0, 1]).shape == (2, 1, 8, 8)
    assert model.sample([0, 1], "ddim", 5).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_every_schedule_trains_and_draws(schedule: Schedule, zero_terminal_snr: bool) -> None:
    """By every sampler; `sample` refuses images that are not finite."""
    ends_in_noise = zero_terminal_snr or schedule == "jsd"
    module = tiny_module(
        schedule=schedule,
        zero_terminal_snr=zero_terminal_snr,
        prediction="v" if ends_in_noise else "noise",
    )
    assert (module.process.alphas_cumprod[-1] == 0) == ends_in_noise
    losses, t = module.losses(batch_of(20), 0, torch.arange(20))
    assert t.tolist() == [*range(20)]
    assert losses.isfinite().all()
    losses.mean().backward()  # type: ignore[no-untyped-call]
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in module.net.parameters()
    )
    module.image_shape = (1, 8, 8)
    for sampler in get_args(SamplerName):
        for num_steps in (1, 7, 20):
            assert module.sample([0, 1], sampler, num_steps).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("variance", get_args(Variance))
def test_networks_of_another_variance_are_refused(variance: Variance) -> None:
    loss = "vlb"
    right, wrong = (2, 1) if variance in LEARNED_VARIANCES else (1, 2)
    tiny_module(UNet(1, right, 32, (1,), 1, ()), variance=variance, loss=loss).check_images(
        (1, 8, 8)
    )
    module = tiny_module(UNet(1, wrong, 32, (1,), 1, ()), variance=variance, loss=loss)
    with pytest.raises(InputError) as error:
        module.check_images((1, 8, 8))
    assert f"--model.net.out_channels {right}" in one_line(error)
    assert (f"--model.variance {variance}" in one_line(error)) == (right == 2)
    # whoever does not ask is told when it runs
    module.image_shape = (1, 8, 8)
    with pytest.raises(InputError, match=f"variance {variance}: 1 channels need a network of"):
        module.sample([0], num_steps=2)
    with pytest.raises(InputError, match=f"variance {variance}: 1 channels need a network of"):
        module.losses(batch_of(2), 0)


def test_options_that_do_not_go_together_are_refused() -> None:
    for options, told in [
        ({"variance": "learned"}, "--model.loss simple with --model.variance learned: "),
        ({"weighting": "p2", "prediction": "v"}, "--model.weighting p2 with --model.prediction v"),
        ({"zero_terminal_snr": True}, "prediction noise: .*zero_terminal_snr"),
        ({"timestep_sampling": "x"}, "timestep_sampling must be one of uniform, stratified"),
    ]:
        with pytest.raises(InputError, match=told) as error:
            tiny_module(**options)  # type: ignore[arg-type]
        one_line(error)


# --- checkpoints written before ------------------------------------------------------------------


def test_checkpoints_of_version_1_mean_what_they_meant(pictures: Path, tmp_path: Path) -> None:
    module = tiny_module(redraw(UserNet()), schedule="cosine", variance="fixed_small")
    trainer = make_trainer(tmp_path / "new", EMA(), Checkpoints(), max_steps=2)
    trainer.fit(module, make_data(pictures))
    checkpoint = load(tmp_path / "new" / "checkpoints" / "last.ckpt")
    checkpoint["format_version"] = 1
    del checkpoint["content_sha256"]
    old = ("net", "schedule", "num_timesteps", "beta_start", "beta_end", "variance", "image_shape")
    checkpoint["hyper_parameters"] = {key: checkpoint["hyper_parameters"][key] for key in old}
    path = tmp_path / "old.ckpt"
    torch.save(checkpoint, path)

    model = DDPM.from_checkpoint(path, "raw")
    assert (model.process.prediction, model.process.variance) == ("noise", "fixed_small")
    assert model.hyper_parameters() == module.hyper_parameters()
    assert torch.equal(model.sample([3]), module.sample([3]))
    assert load_checkpoint(path)["hyper_parameters"] == module.hyper_parameters()
    batch = batch_of(4)
    module.eval()  # as the model is: without dropout
    assert torch.equal(model.losses(batch, 0)[0], module.losses(batch, 0)[0])
    assert model.process is not module.process
    plain = Objective(model.process)
    assert (plain.loss, plain.weighting) == ("simple", "none")

    # and a run goes on from it
    for name, start in (("from old", path), ("from new", tmp_path / "new/checkpoints/last.ckpt")):
        again = tiny_module(redraw(UserNet()), schedule="cosine", variance="fixed_small")
        trainer = make_trainer(tmp_path / name, EMA(), Checkpoints(), max_steps=4)
        trainer.fit(again, make_data(pictures), ckpt_path=start)
    last = "checkpoints/last.ckpt"
    assert_same_training(tmp_path / "from old" / last, tmp_path / "from new" / last)


# --- the command line ----------------------------------------------------------------------------


def test_a_learned_variance_needs_no_other_option_of_the_network(
    pictures: Path, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "tiny.yaml").write_text(TINY.format(source=pictures))
    overlay = {
        "model": {
            "prediction": "v",
            "variance": "learned_range",
            "loss": "rescaled_hybrid",
            "timestep_sampling": "loss_second_moment",
        },
        "trainer": {"max_steps": 5},
    }
    (here / "over.yaml").write_text(yaml.safe_dump(overlay))
    two = ("--config", "tiny.yaml", "--config", "over.yaml")
    result = run_here(here, "fit", *two, "--run_dir", "run", "--model.net.out_channels", 1)
    assert result.status == 0, result.err
    config = yaml.safe_load((here / "run" / "config.yaml").read_text())
    assert config["model"]["net"]["init_args"]["out_channels"] == 2
    checkpoint = "run/checkpoints/last.ckpt"
    for arguments in (
        ("validate", "--config", "run/config.yaml", "--ckpt_path", checkpoint),
        ("fit", *two, "--run_dir", "more", "--ckpt_path", checkpoint, "--trainer.max_steps", 6),
        ("sample", checkpoint, "--num_images", 2, "--out", "drawn", "--accelerator", "cpu"),
    ):
        result = run_here(here, *arguments)
        assert result.status == 0, result.err
    assert len(list((here / "drawn").glob("0*.png"))) == 2

    # as a fixed one it is not read
    for variance in ("fixed_large", "learned"):
        others = ("--model.loss", "vlb", "--model.variance", variance)
        result = run_here(here, "validate", *two, "--ckpt_path", checkpoint, *others)
        assert result.status == 2
        told = f"{checkpoint}: written with model.variance = learned_range, but this command has "
        assert told + variance in result.err


def test_the_table_is_printed(tmp_path: Path) -> None:
    result = run_here(tmp_path, "combinations")
    assert result.status == 0, result.err
    assert result.out.startswith("loss             weighting  variance")
    assert "fixed_small, fixed_large" in result.out
    assert (
        "Schedule jsd and zero_terminal_snr go with the predictions x_0 and v alone." in result.out
    )
    result = run_here(tmp_path, "combinations", "--help")
    assert result.status == 0
    assert "usage: python -m ddpm_lightning combinations" in result.out
