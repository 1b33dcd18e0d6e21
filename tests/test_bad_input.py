"""Bad input: one line that names the key or file, status 2, and nothing written or lost."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from ddpm_lightning.commands.trainer_checks import check_device, check_scaler
from ddpm_lightning.errors import InputError
from tests.command_line import TINY, TINY_OPTIONS, Result, run_here, run_process, train, tree
from tests.training import save

CONFIGS = {
    "top.yaml": "modle:\n  schedule: linear\n",
    "nested.yaml": "model:\n  schedul: linear\n",
    "network.yaml": "model:\n  net:\n    init_args:\n      base_chanels: 32\n",
    "trainer.yaml": "trainer:\n  max_step: 3\n",
    "value.yaml": "data:\n  batch_size: many\n",
    "good.yaml": "trainer:\n  max_steps: 3\n",
    "broken.yaml": "model: [1, 2\nfoo: : bar\n",
    "text.yaml": "hello world\n",
    "empty.yaml": "",
    "twice.yaml": "trainer:\n  max_steps: 3\ndata: {}\ntrainer:\n  max_time: 00:01:00:00\n",
    "linked.yaml": "data:\n  seed: 3\n",
    "section.yaml": "ema:\n",
    "list.yaml": "ema: []\n",
    "null.yaml": "data:\n  batch_size: null\n",
    "endless.yaml": "data: &data\n  source: *data\n",
    "laughs.yaml": "a: &a [1, 1, 1, 1]\n"
    + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghijkl")),
    "deep.yaml": "data: " + "[" * 1000 + "]" * 1000 + "\n",
    "digits.yaml": f"trainer:\n  max_steps: {'9' * 5000}\n",
    "zero.yaml": 'run_dir: "a\\0b"\n',
    "flag.yaml": "print_config: true\n",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    return train(tmp_path_factory.mktemp("trained"), pictures)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, run: Path, pictures: Path) -> Path:
    """A folder with all kinds of files in it, which no refused command may change."""
    folder = tmp_path_factory.mktemp("here")
    for name, text in CONFIGS.items():
        (folder / name).write_text(text)
    (folder / "tiny.yaml").write_text(TINY.format(source=pictures))
    for name in ("full", "empty"):
        (folder / name).mkdir()
    (folder / "full" / "x").touch()
    (folder / "file").write_text("x")

    whole = (run / "checkpoints" / "last.ckpt").read_bytes()
    (folder / "whole.ckpt").write_bytes(whole)
    (folder / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (folder / "none.ckpt").touch()
    (folder / "text.ckpt").write_text("hello world\n")
    torch.save({"state_dict": {}}, folder / "foreign.ckpt")
    torch.save(nn.Linear(1, 1), folder / "pickled.ckpt")
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    del checkpoint["ema_state_dict"]
    save(checkpoint, folder / "raw.ckpt")
    checkpoint["format_version"] = 1000
    save(checkpoint, folder / "newer.ckpt")
    return folder


def assert_refused(result: Result, *needles: str) -> None:
    assert result.status == 2, result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert result.err.endswith("\n")
    assert "Traceback" not in result.err + result.out
    assert "usage:" not in result.err + result.out
    for needle in needles:
        assert needle in result.err


def refuse(cwd: Path, line: str, *needles: str) -> str:
    """See a command refused, in this process; its words are divided by spaces."""
    before = tree(cwd)
    result = run_here(cwd, *line.split())
    assert_refused(result, *needles)
    assert tree(cwd) == before
    return result.err


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("fit --data.bach_size 3", "no option --data.bach_size; did you mean --data.batch_size?"),
        ("fit --data.bach_size=3", "no option --data.bach_size; did you mean --data.batch_size?"),
        ("fit --modell.x 1", "no option --modell.x; did you mean --model"),
        ("fit --trainer.max_step 3", "--trainer.max_step; did you mean --trainer.max_steps?"),
        ("fit --trainer.max_s 3", "no option --trainer.max_s"),
        ("fit --weights_only false", "no option --weights_only"),
        ("fit extra", "no place for extra"),
        ("validate --ckpt_pth last", "no option --ckpt_pth; did you mean --ckpt_path?"),
        ("fit --model.net.base_chanels 32", "base_chanels; did you mean base_channels?"),
        ("fit --model.optimizer.lrr 1", "model.optimizer: no option lrr; did you mean lr?"),
        ("fit --config top.yaml", "no option modle.schedule; did you mean model.schedule?"),
        ("fit --config nested.yaml", "no option model.schedul; did you mean model.schedule?"),
        ("fit --config good.yaml --config nested.yaml", "model.schedul; did you mean"),
        ("fit --config trainer.yaml", "trainer.max_step; did you mean trainer.max_steps?"),
        ("fit --config network.yaml", "network.yaml: model.net: "),
        ("fit --config network.yaml", "no option base_chanels; did you mean base_channels?"),
        ("fit --model.net NoSuchNet", "model.net: no class NoSuchNet; give package.module.Class"),
        ("fit --model.net ddpm_lightning.networks.UNett", "model.net: ddpm_lightning.networks.UN"),
        ("fit --model.net nowhere.UNet", "model.net: nowhere.UNet: No module named 'nowhere'"),
        ("fit --model.net torch.optim.Adam", "model.net: torch.optim.Adam is no Module"),
        ("fit --model.net torch.nn.Linear", "model.net: torch.nn.Linear: the following arguments"),
        ("fit --model.optimizer torch.optim.Adamm", "model.optimizer: "),
        ("fit --trainer.callbacks Foo", "trainer.callbacks: "),
        ("sample whole.ckpt --numimages 3", "no option --numimages; did you mean --num_images?"),
        ("sample whole.ckpt --num_im 3", "no option --num_im"),
        ("sample whole.ckpt more.ckpt", "no place for more.ckpt"),
        ("sample", "arguments are required: checkpoint"),
        ("smaple", "no command 'smaple'; did you mean sample?"),
    ],
)
def test_unknown_names(here: Path, line: str, told: str) -> None:
    refuse(here, line, told)


# --- files of options ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--config broken.yaml", "broken.yaml: not YAML: "),
        ("--config text.yaml", "text.yaml: holds no options"),
        ("--config empty.yaml", "empty.yaml: holds no options"),
        ("--config good.yaml --config broken.yaml", "broken.yaml: not YAML: "),
        ("--config whole.ckpt", "whole.ckpt: not a text file"),
        ("--config missing.yaml", "missing.yaml"),
        ("--config empty", "not a file"),
        ("--config twice.yaml", "twice.yaml: trainer is given twice (lines 1 and 4)"),
        ("--config linked.yaml", "linked.yaml: data.seed: give seed_everything, which sets it"),
        ("--config section.yaml", "section.yaml: ema: holds no options; leave it out"),
        ("--config list.yaml", "list.yaml: ema: holds no options; leave it out"),
        ("--config null.yaml", "data.batch_size: expected int, got None"),
        ("--config endless.yaml", "endless.yaml: not options: nested too deeply"),
        ("--config laughs.yaml", "laughs.yaml: not options: nested too deeply"),
        ("--config deep.yaml", "deep.yaml: not options: nested too deeply"),
        ("--config digits.yaml", "digits.yaml: Exceeds the limit"),
        ("--config zero.yaml", "zero.yaml: run_dir: holds a character of code 0"),
        ("--config flag.yaml", "no option print_config; did you mean config?"),
        ("--config value.yaml", "data.batch_size: expected int, got many"),
        ("--config", "--config: expected one argument"),
    ],
)
def test_configs(here: Path, line: str, told: str) -> None:
    refuse(here, f"fit {line}", told)


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("data.batch_size many", "expected int, got many"),
        ("data.batch_size 2.5", "expected int, got 2.5"),
        ("model.schedule linaer", "one of 'linear', 'quad', 'warmup10', 'warmup50', 'const', 'co"),
        ("model.variance fixed", "'fixed_small', 'fixed_large', 'learned', 'learned_range', got f"),
        ("model.prediction eps", "one of 'noise', 'x_0', 'mu', 'v', got eps"),
        ("model.loss mse", "one of 'simple', 'vlb', 'hybrid', 'rescaled_hybrid', got mse"),
        ("model.weighting snr", "one of 'none', 'min_snr', 'p2', got snr"),
        ("model.timestep_sampling x", "'uniform', 'stratified', 'loss_second_moment', got x"),
        ("model.zero_terminal_snr maybe", "expected bool, got maybe"),
        ("model.net.base_channels x", "base_channels: expected int, got x"),
        (
            "model.net.dropout null",
            "model.net: ddpm_lightning.UNet: dropout: expected float, got None",
        ),
        ("model.net.channel_mults 1,2", "channel_mults: expected Sequence, got 1,2"),
        ("model.optimizer.lr x", "lr: expected float"),
        ("trainer.max_steps x", "expected int, got x"),
        ("trainer.max_steps", "expected one argument"),
        ("trainer.precision 17", "'bf16-mixed'"),
        ("data.channels 2", "expected one of 1, 3, got 2"),
        ("data.image_size [8,8,8]", "expected int or tuple with 2 elements, got [8, 8, 8]"),
        ("data.on_error stopp", "one of 'stop', 'skip', got stopp"),
        ("data.flip maybe", "expected bool, got maybe"),
        ("data.seed 3", "data.seed: give seed_everything, which sets it"),
        (
            "samples.sampler ddmp",
            "one of 'ddpm', 'ddim', 'dpmpp_2m', 'dpmpp_2m_sde', 'heun', got ddmp",
        ),
        ("seed_everything true", "expected int, got True"),
        ("seed_everything x", "expected int, got x"),
    ],
)
def test_types(here: Path, option: str, told: str) -> None:
    error = refuse(here, f"fit --{option}", option.split()[0].split(".")[-1], told)
    assert len(error) < 250


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("model.num_timesteps 0", "num_timesteps must be at least 1, got 0"),
        ("model.beta_start 0", "0 < beta_start <= beta_end < 1"),
        ("model.beta_end 1", "0 < beta_start <= beta_end < 1"),
        (
            "model.prediction noise --model.zero_terminal_snr true",
            "prediction noise: alphas_cumprod is 0 at the last",
        ),
        (
            "model.prediction noise --model.schedule jsd",
            "prediction noise: alphas_cumprod is 0 at the last timestep",
        ),
        ("model.variance learned", "--model.loss simple with --model.variance learned: the squa"),
        ("model.loss hybrid", "--model.loss hybrid with --model.variance fixed_large: in a"),
        ("model.lr_warmup_steps -1", "lr_warmup_steps"),
        ("model.optimizer.lr -1", "--model.optimizer: Invalid learning rate: -1.0"),
        (
            "model.optimizer ddpm_lightning.Muon --model.optimizer.momentum 1",
            "--model.optimizer: momentum must lie in [0, 1), got 1",
        ),
        ("model.net.base_channels 30", "base_channels"),
        ("model.net.channel_mults []", "channel_mults"),
        ("model.net.channel_mults [0]", "channel_mults"),
        ("model.net.num_res_blocks 0", "num_res_blocks"),
        ("model.net.attention_levels [7]", "attention_levels"),
        ("model.net.dropout 1", "dropout"),
        ("model.net.group_channels 3", "group_channels must divide 32, got 3"),
        ("model.net.in_channels 3", "--model.net.in_channels 1"),
        ("model.net.out_channels 2", "--model.net.out_channels 1"),
        ("data.batch_size 0", "batch_size"),
        ("data.batch_size 31", "--data.batch_size 31 is more than the 30 training images"),
        ("data.image_size 0", "image_size"),
        ("data.val_fraction 1", "val_fraction"),
        ("data.num_workers -1", "num_workers"),
        ("data.streaming true --data.on_error skip", "--data.on_error skip: not with"),
        ("ema.decay 1", "decay"),
        ("ema.decay -0.1", "decay"),
        ("samples.every_n_steps -1", "every_n_steps"),
        ("samples.num_images 0", "num_images"),
        ("samples.num_steps 0", "--samples.num_steps must lie in 1..20, got 0"),
        ("samples.num_steps 21", "--samples.num_steps must lie in 1..20, got 21"),
        ("samples.spacing evn", "--samples.spacing evn: none of even, leading, trailing"),
        ("samples.spacing ddim2 --samples.num_steps 3", "--samples.num_steps 3: the spacing ddim2"),
        ("samples.num_steps null --samples.spacing 11,2", "--samples.spacing 11,2: section 1 has"),
        ("checkpoints.every_n_steps -1", "every_n_steps"),
        ("checkpoints.keep_every_n_steps -1", "keep_every_n_steps"),
        ("seed_everything -1", "seed_everything"),
        ("seed_everything 4294967296", "seed_everything"),
        ("trainer.max_steps 0", "max_steps"),
        ("trainer.max_steps -2", "max_steps"),
        ("trainer.max_epochs 3", "--trainer.max_steps N"),
        ("trainer.val_check_interval 0", "val_check_interval"),
        ("trainer.val_check_interval 0.5", "val_check_interval"),
        ("trainer.val_check_interval 00:00:10:00", "give a whole number of optimizer steps"),
        ("trainer.check_val_every_n_epoch 1", "--trainer.val_check_interval N optimizer steps"),
        (
            "trainer.limit_train_batches 5 --trainer.accumulate_grad_batches 2",
            "--trainer.limit_train_batches 5: must be a multiple of --trainer.accumulate_grad_ba",
        ),
        (
            "trainer.callbacks+=GradientAccumulationScheduler "
            '--trainer.callbacks.scheduling={"0":2}',
            "GradientAccumulationScheduler: not supported",
        ),
        ("trainer.accumulate_grad_batches 0", "accumulate_grad_batches"),
        (
            "trainer.accumulate_grad_batches 3",
            "4 does not divide by 1 ranks x 3 accumulated",
        ),
        ("trainer.devices 3", "--data.batch_size 4 does not divide by 3 ranks x 1 accumulated"),
        ("trainer.overfit_batches 1", "overfit_batches"),
        ("trainer.gradient_clip_val 0", "null clips nothing"),
        ("trainer.gradient_clip_val -1", "gradient_clip_val"),
        ("trainer.gradient_clip_algorithm value", "gradient_clip_algorithm"),
        ("trainer.devices 0", "--trainer: `Trainer(devices='0')`"),
        ("trainer.num_nodes 0", "--trainer: `num_nodes`"),
        ("trainer.accelerator magic", "accelerator='magic'"),
        ("trainer.strategy magic", "strategy='magic'"),
    ],
)
def test_ranges(here: Path, option: str, told: str) -> None:
    refuse(here, f"fit --config tiny.yaml --{option}", told)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_where_there_is_none(here: Path) -> None:
    refuse(here, "fit --config tiny.yaml --trainer.accelerator gpu", "gpu")
    refuse(here, "sample whole.ckpt --accelerator gpu", "--accelerator", "gpu")


def test_devices_and_optimizers_that_would_be_silently_wrong() -> None:
    strategy = SimpleNamespace(root_device=torch.device("mps"))
    for option in ("--accelerator", "--trainer.accelerator"):
        with pytest.raises(InputError, match=f"{option} mps: has no float64.*use {option} cpu"):
            check_device(SimpleNamespace(strategy=strategy), option)  # type: ignore[arg-type]
    scaling, plain = (SimpleNamespace(scaler=scaler) for scaler in (object(), None))
    weights = [torch.nn.Parameter(torch.ones(2))]
    fused, unfused = (torch.optim.Adam(weights, fused=value) for value in (True, False))
    with pytest.raises(InputError, match="16-mixed with a fused optimizer"):
        check_scaler(scaling, fused)  # type: ignore[arg-type]
    check_scaler(scaling, unfused)  # type: ignore[arg-type]
    check_scaler(plain, fused)  # type: ignore[arg-type]


# --- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("digit", "did you mean digits?"),
        ("ful", "did you mean full?"),
        ("./missing", "./missing"),
        ("empty", "empty has no images in it"),
        ("full", "full has no images in it"),
        ("file", "file is a file"),
        ("owner/name", "owner/name is no folder here"),
    ],
)
def test_sources(here: Path, source: str, told: str) -> None:
    refuse(here, f"fit --data.source {source}", "--data.source", told)


def test_a_broken_image_stops_or_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(5):
        Image.new("L", (8, 8), index * 40).save(folder / f"{index}.png")
    (folder / "2.png").write_bytes(b"not an image")
    options = f"fit --data.source images --data.val_fraction 0 {' '.join(TINY_OPTIONS)}"
    refuse(tmp_path, options, "2.png", "--data.on_error skip")
    result = run_here(tmp_path, *options.split(), "--data.on_error", "skip")
    assert result.status == 0, result.err
    assert "data: 4 images of 1x8x8 to train on, 0 to validate" in result.out


# --- runs and checkpoints ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("fit --run_dir full", "--run_dir full: not empty"),
        ("fit --run_dir file", "--run_dir file: a file"),
        ("fit --run_dir file/x", "file/x"),
        ("fit --experiment ../x", "--experiment ../x: leads out of runs/"),
        ("validate --experiment /x --ckpt_path last", "--experiment /x: leads out of runs/"),
        ("fit --run_dir empty --trainer.devices 0", "--trainer"),
        ("fit --run_dir new/folder --data.batch_size 5000", "--data.batch_size 5000"),
        ("fit --ckpt_path last", "--ckpt_path last: no checkpoint under runs/digits"),
        ("fit --ckpt_path missing.ckpt", "missing.ckpt: no such file"),
        ("fit --ckpt_path cut.ckpt", "cut.ckpt: not a whole checkpoint file"),
        ("fit --ckpt_path none.ckpt", "none.ckpt: not a whole checkpoint file"),
        ("fit --ckpt_path text.ckpt", "text.ckpt: not a whole checkpoint file"),
        ("fit --ckpt_path pickled.ckpt", "pickled.ckpt: not a whole checkpoint file"),
        ("fit --ckpt_path foreign.ckpt", "foreign.ckpt: not a ddpm_lightning checkpoint"),
        ("fit --ckpt_path newer.ckpt", "newer.ckpt: format_version 1000 is newer"),
        ("fit --ckpt_path whole.ckpt", "model.net.init_args."),
        ("fit --ckpt_path whole.ckpt", "give --model.net.init_args.attention_levels []"),
        ("fit --config tiny.yaml --ckpt_path whole.ckpt", "--trainer.max_steps 10: whole.ckpt is"),
        ("validate", "validate needs --ckpt_path"),
        ("test", "test needs --ckpt_path"),
        ("validate --ckpt_path auto", "no checkpoint under runs/digits"),
        ("test --ckpt_path whole.ckpt", "give --model.net.init_args.attention_levels []"),
        ("validate --ckpt_path cut.ckpt", "cut.ckpt: not a whole checkpoint file"),
    ],
)
def test_runs_and_checkpoints(here: Path, options: str, told: str) -> None:
    refuse(here, options, told)


def test_another_network_is_named_by_the_key_that_differs(here: Path) -> None:
    line = "fit --config tiny.yaml --trainer.max_steps 12 --ckpt_path whole.ckpt"
    refuse(here, f"{line} --model.schedule quad", "model.schedule = cosine", "has quad")
    refuse(
        here,
        f"{line} --model.net.num_res_blocks 2",
        "whole.ckpt: written with model.net.init_args.num_res_blocks = 1, but this command has 2",
    )


def test_another_optimizer_is_refused(here: Path) -> None:
    line = "fit --config tiny.yaml --trainer.max_steps 12 --ckpt_path whole.ckpt --model.optimizer"
    for name, lr in (("ddpm_lightning.Muon", 0.01), ("torch.optim.SGD", 0.1)):
        told = f"whole.ckpt: written by another optimizer than {name.rpartition('.')[2]}, one that"
        refuse(here, f"{line} {name} --model.optimizer.lr {lr}", told, "give its --model.optimizer")


# --- sample --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("missing.ckpt", "missing.ckpt: no such checkpoint file"),
        ("empty", "empty: no such checkpoint file"),
        ("cut.ckpt", "cut.ckpt: not a whole checkpoint file"),
        ("text.ckpt", "text.ckpt: not a whole checkpoint file"),
        ("foreign.ckpt", "foreign.ckpt: not a ddpm_lightning checkpoint"),
        ("raw.ckpt", "raw.ckpt: the run kept no EMA weights"),
        ("whole.ckpt --seeds x", "--seeds x"),
        ("whole.ckpt --seeds 5-3", "--seeds 5-3"),
        ("whole.ckpt --seeds 0-3,5-", "--seeds 0-3,5-"),
        ("whole.ckpt --seeds=-1", "--seeds -1"),
        ("whole.ckpt --seeds 0,7,0-3", "--seeds 0,7,0-3: names a seed twice"),
        ("whole.ckpt --seeds=", "--seeds"),
        ("whole.ckpt --seeds 4294967296", "--seeds 4294967296"),
        ("whole.ckpt --seeds 0-3 --num_images 3", "--seeds names 4 images, --num_images 3"),
        ("whole.ckpt --num_images 0", "--num_images"),
        ("whole.ckpt --num_images x", "num_images: expected int, got x"),
        ("whole.ckpt --num_steps 21", "num_steps must lie in 1..20, got 21"),
        ("whole.ckpt --num_steps 0", "num_steps must lie in 1..20, got 0"),
        ("whole.ckpt --sampler ddim --num_steps 0", "num_steps must lie in 1..20, got 0"),
        ("whole.ckpt --sampler ddmi", "sampler: expected one of 'ddpm', 'ddim', 'dpmpp_2m', 'd"),
        ("whole.ckpt --eta 0.5", "eta belongs to the ddim sampler; leave it out, or choose ddim"),
        ("whole.ckpt --sampler heun --eta 0", "eta belongs to the ddim sampler"),
        ("whole.ckpt --sampler dpmpp_2m_sde --eta 1", "eta belongs to the ddim sampler"),
        ("whole.ckpt --sampler heun --num_steps 21", "num_steps must lie in 1..20, got 21"),
        ("whole.ckpt --spacing trailin", "trailin: none of even, leading, trailing, log_snr"),
        ("whole.ckpt --spacing trailin", "did you mean trailing?"),
        ("whole.ckpt --spacing ddim0", "spacing ddim0: none of even"),
        ("whole.ckpt --spacing ddim", "spacing ddim: none of even"),
        ("whole.ckpt --spacing 5,0", "spacing 5,0: none of even"),
        ("whole.ckpt --spacing 5,", "spacing 5,: none of even"),
        ("whole.ckpt --spacing 5", "spacing 5: a number alone is num_steps"),
        ("whole.ckpt --spacing ddim6", "ddim6: no whole stride visits 6 of 20 timesteps; the ne"),
        ("whole.ckpt --spacing ddim21", "num_steps must lie in 1..20, got 21"),
        ("whole.ckpt --spacing 11,5", "spacing 11,5: section 1 has only 10 of the 20 timesteps"),
        ("whole.ckpt --spacing 5,15", "spacing 5,15: section 2 has only 10 of the 20 timesteps"),
        ("whole.ckpt --spacing ddim5 --num_steps 4", "num_steps 4: the spacing ddim5 has 5 steps"),
        ("whole.ckpt --clip hard", "clip: expected one of 'static', 'dynamic', 'none', got hard"),
        ("whole.ckpt --clip true", "clip: expected one of 'static', 'dynamic', 'none', got"),
        ("whole.ckpt --sampler ddim --eta 1.5 --num_steps 5", "eta must lie in [0, 1], got 1.5"),
        ("whole.ckpt --weights emma", "weights: expected one of 'ema', 'raw', got emma"),
        ("whole.ckpt --format jpg", "format: expected one of 'png', 'npz', got jpg"),
        ("whole.ckpt --batch_size 0", "--batch_size must be at least 1, got 0"),
        ("whole.ckpt --devices 0", "--devices"),
        ("whole.ckpt --accelerator magic", "--accelerator"),
        ("whole.ckpt --out full", "--out full: not empty"),
        ("whole.ckpt --out file", "--out file: a file"),
    ],
)
def test_sample(here: Path, options: str, told: str) -> None:
    refuse(here, f"sample {options}", told)


# --- a user's own processes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("fit --config good.yaml --config nested.yaml", "did you mean model.schedule?"),
        ("fit --data.batch_size 5000", "--data.batch_size 5000 is more than the 1707 training"),
        ("sample cut.ckpt", "cut.ckpt: not a whole checkpoint file"),
    ],
)
def test_in_a_process_of_its_own(here: Path, line: str, told: str) -> None:
    before = tree(here)
    assert_refused(run_process(here, *line.split()), told)
    assert tree(here) == before
