"""`fid`: judge checkpoints and images; sweeps, comparisons and the self-test."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from ddpm_lightning.checkpoints import Weights
from ddpm_lightning.commands.judging import JudgeTask, Plan, predict
from ddpm_lightning.commands.options import parse_options, split_names, split_numbers
from ddpm_lightning.commands.references import choose_reference
from ddpm_lightning.commands.results import Results
from ddpm_lightning.commands.rows import make_rows, settle_num_images
from ddpm_lightning.commands.shell import announce, run_command
from ddpm_lightning.commands.subjects import (
    Checkpoint,
    CheckpointReader,
    Subject,
    find_subjects,
)
from ddpm_lightning.commands.sweep import SweepFolder
from ddpm_lightning.commands.told import open_guide
from ddpm_lightning.commands.trainer import make_trainer
from ddpm_lightning.commands.watching import Watcher, await_first_checkpoint
from ddpm_lightning.errors import InputError
from ddpm_lightning.metrics.features import make_extractor
from ddpm_lightning.metrics.judge import METRICS, check_metrics, metric_titles
from ddpm_lightning.metrics.record import make_protocol, protocol_differences, read_record
from ddpm_lightning.runs import is_rank_zero
from ddpm_lightning.samplers import (
    Clip,
    Guidance,
    Sampler,
    SamplerName,
    make_guidance,
    make_sampler,
    options_of,
)

NUM_IMAGES = 50_000  # Heusel et al. 2017; fewer give larger distances


def fid(
    subjects: list[str],
    reference: str | None = None,
    extractor: str = "inception",
    extractor_weights: str | None = None,
    metrics: str = "fd",
    num_images: int | None = None,
    num_repeats: int = 1,
    weights: str = "ema",
    sampler: str = "ddim",
    num_steps: str | None = None,
    eta: float | None = None,
    spacing: str | None = None,
    clip: Clip | None = None,
    guidance: str | None = None,
    guidance_rescale: float | None = None,
    guide: str | None = None,
    out: str | None = None,
    batch_size: int = 64,
    watch: bool = False,
    accelerator: str = "auto",
    devices: str = "auto",
    num_nodes: int = 1,
    compare: list[str] | None = None,
    selftest: bool = False,
) -> int:
    """Judge checkpoints and images.

    Each combination of checkpoint, weights, sampler, num_steps and guidance is a row. OUT gets
    sweep.json, sweep.csv, sweep.png and a record of each row; rows that are there already are not
    judged again, so that the same command goes on where it was interrupted.

    Args:
        subjects: Checkpoints, run folders (all their step=N.ckpt), folders of images, or .npz files
            of images (uint8 [N, H, W, C]).
        reference: A data set as --data.source takes it, of which all training images are used, at
            the subjects' size and channels; or an .npz file of saved statistics. By default what
            the checkpoints' run trains on.
        extractor: inception, efficientnet-lite0, another of torch-fidelity's, or the class path of
            a torch.nn.Module that maps uint8 images to features. Only inception's distance is FID.
        extractor_weights: Inception's weights file, where torch.hub's cache does not have it.
        metrics: Some of fd (Frechet distance), kid, is (Inception Score), prc (precision and
            recall), divided by commas.
        num_images: Images of each row, from seeds 0, 1, ...; 50,000, or as many as there are where
            only images from the disk are judged. Only numbers of as many images can be compared.
        num_repeats: Judge so many times, from disjoint seeds, and give mean and standard deviation.
        weights: ema, raw, or ema,raw.
        sampler: ddpm, ddim, dpmpp_2m, dpmpp_2m_sde, heun, or several, as in ddim,ddpm; with its own
            num_steps, as in ddim,heun:5:10,ddpm:250.
        num_steps: Timesteps to visit, such as 50 or 20,50,100; by default as `sample` has it.
        eta: Share of fresh noise for ddim, from 0 (deterministic, the default) to 1.
        spacing: Which timesteps those are, as `sample` has it.
        clip: What happens to the predicted x_0, as `sample` has it: static, dynamic or none.
        guidance: How strongly samples are drawn towards their classes, or away from what the guide
            would make, such as 2 or 1,1.5,2; the class of seed i is i modulo their number.
        guidance_rescale: As `sample` has it.
        guide: A weaker checkpoint that guides all others, as `sample` has it.
        out: The output folder; RUN/fid_sweep for checkpoints of one run, else fid_sweep beside the
            first subject.
        batch_size: Images at a time on each device.
        watch: Judge the checkpoints of a run's folder as training writes them, until max_steps.
        accelerator: As Lightning's Trainer has it: auto, cpu, gpu, ...
        devices: Number of devices, or auto.
        num_nodes: Number of machines.
        compare: Compare two records instead; the exit status is 1 where their protocols differ.
        selftest: See instead whether this installation computes the metrics right.

    Returns:
        The exit status.
    """
    if selftest:
        from ddpm_lightning.metrics import selftest as tests

        return tests.run(announce)
    if compare:
        return compare_records(*compare)
    if not subjects:
        raise InputError("give a SUBJECT: a checkpoint, a run's folder, or images (see --help)")
    metrics_ = split_names("--metrics", metrics, METRICS)
    kinds = split_names("--weights", weights, get_args(Weights))
    samplers = make_samplers(sampler, num_steps, eta, spacing, clip)
    if num_repeats < 1 or batch_size < 1:
        raise InputError("--num_repeats and --batch_size must be at least 1")
    guidances = make_guidances(guidance, guidance_rescale)
    opened = open_guide(guide, guidance)
    read = CheckpointReader(kinds, samplers, guidances, opened)
    run = await_first_checkpoint(subjects) if watch else None
    found = find_subjects(subjects, read)
    count = settle_num_images(found, num_images, num_repeats, NUM_IMAGES)
    extractor_ = make_extractor(extractor, extractor_weights)
    check_metrics(metrics_, extractor_, count)
    choice = choose_reference(reference, found, extractor_, metrics_, batch_size)
    trainer = make_trainer(accelerator, devices, num_nodes)
    protocol = make_protocol(count, choice.protocol)
    settings = {"protocol": protocol, "metrics": metrics_, "num_repeats": num_repeats}
    titles = metric_titles(metrics_, extractor_.distance_name, count)
    folder = SweepFolder(Path(out) if out else default_folder(found), settings, titles)
    if is_rank_zero():
        folder.claim()
    results = Results(folder, draws_each=watch)
    rows = results.expect(make_rows(found, kinds, samplers, guidances, opened))
    watcher = None
    if run is not None:
        watcher = Watcher(
            run,
            lambda paths: results.expect(
                make_rows([*map(read, paths)], kinds, samplers, guidances, opened)
            ),
            [subject.path for subject in found],
        )
    if rows or watcher is not None:
        task = JudgeTask(
            Plan(rows, watcher),
            extractor_,
            choice,
            metrics_,
            count,
            num_repeats,
            batch_size,
            results.keep,
        )
        try:
            predict(trainer, task)
        finally:
            if is_rank_zero():
                results.finish()
    elif is_rank_zero():
        results.finish()
    return 0


def make_samplers(
    names: str, num_steps: str | None, eta: float | None, spacing: str | None, clip: Clip | None
) -> list[Sampler]:
    """Combine samplers and numbers of steps.

    Args:
        names: Of samplers, divided by commas; after one, with colons, its own numbers of steps.
        num_steps: Numbers divided by commas, for those without their own; None is each sampler's
            default.
        eta: For those that have it; the others do without.
        spacing: For all.
        clip: For all.

    Raises:
        InputError: One is unknown or out of range, or none of the samplers has eta.
    """
    words = [word.partition(":") for word in names.split(",")]
    chosen = split_names("--sampler", ",".join(name for name, _, _ in words), get_args(SamplerName))
    default = [None] if num_steps is None else split_numbers("--num_steps", num_steps)
    counts = [
        split_numbers(f"--sampler {name}:", own.replace(":", ",")) if colon else default
        for name, colon, own in words
    ]
    # where none has it, each is given it and refuses
    taking_eta = [name for name in chosen if "eta" in options_of(name)] or chosen
    return [
        make_sampler(name, count, eta if name in taking_eta else None, spacing, clip)
        for name, own in zip(chosen, counts, strict=True)
        for count in own
    ]


def make_guidances(scales: str | None, rescale: float | None) -> list[Guidance | None]:
    """Make guidance of each of the scales, numbers divided by commas.

    Raises:
        InputError: One is no number, out of range, or there twice.
    """
    if scales is None:
        return [make_guidance(None, rescale)]
    try:
        numbers = [float(word) for word in scales.split(",")]
    except ValueError as error:
        raise InputError(f"--guidance {scales}: say something like 2 or 1,1.5,2") from error
    if len(set(numbers)) < len(numbers):
        raise InputError(f"--guidance {scales}: names a number twice")
    return [make_guidance(number, rescale) for number in numbers]


def default_folder(subjects: Sequence[Subject]) -> Path:
    """Give RUN/fid_sweep for checkpoints of one run, else fid_sweep beside the first subject."""
    runs = [subject.run if isinstance(subject, Checkpoint) else None for subject in subjects]
    run = runs[0]
    if run is not None and all(run == other for other in runs):
        return run.root / "fid_sweep"
    first = run.root if run is not None else subjects[0].path
    return (first if first.name else first.absolute()).parent / "fid_sweep"


def compare_records(first: str, second: str) -> int:
    """Print two records' numbers, and what differs in their protocols.

    Returns:
        The exit status: 0 where the numbers may be compared, 1 where not.
    """
    records = [read_record(path) for path in (first, second)]
    for path, record in zip((first, second), records, strict=True):
        count = record.get("repeats", {}).get("count", 1)
        values = ", ".join(f"{name} {value:.6g}" for name, value in record["metrics"].items())
        mean = f", mean of {count} repeats" if count > 1 else ""
        announce(f"{path}: {values} ({record['protocol'].get('num_images')} images{mean})")
    differences = protocol_differences(*records)
    if differences:
        lines = "\n".join(f"  {line}" for line in differences)
        announce(f"cannot be compared; the protocols differ (first, second):\n{lines}")
        return 1
    announce("can be compared: the protocols are equal")
    return 0


def main() -> int:
    """Run `fid` with the options of sys.argv."""
    options = parse_options(
        fid,
        "fid",
        usage="SUBJECT [SUBJECT ...] [options]\n"
        "       %(prog)s --compare RECORD RECORD\n       %(prog)s --selftest",
        words={"subjects": "*", "compare": 2},
    )
    return run_command(lambda: fid(**options))
