"""Steps that are not finite: what finding them costs, and on several ranks."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_lightning import nonfinite
from ddpm_lightning.callbacks import EMA, Checkpoints, Curves, Nonfinite, Progress, ema
from ddpm_lightning.nonfinite import OnNonfinite
from tests.children import SickUNet
from tests.processes import TRAINER, Job
from tests.test_dying import TWO_RANKS, options
from tests.training import MemoryLogger, load, make_data, make_trainer, scalars, tiny_module

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Counts how often Python asks a tensor for its value, which waits for the tensor's device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_reads = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.num_reads += 1
        return func(*args, **(kwargs or {}))


class PerStep(Callback):
    """Notes the reads of each optimizer step, from before its batch until after its callbacks."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads
        self._before = 0
        self.num_reads: list[int] = []

    def on_train_start(self, *arguments: Any) -> None:
        self._before = self._reads.num_reads

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.num_reads.append(self._reads.num_reads - self._before)
        self._before = self._reads.num_reads


@pytest.mark.parametrize(("on_nonfinite", "accumulate"), [("stop", 1), ("skip", 2)])
def test_a_step_waits_for_no_device(
    on_nonfinite: OnNonfinite,
    accumulate: int,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But where it logs, every fifth here. The CPU stands for the device, and does as one does."""
    monkeypatch.setattr(ema, "keep_if_bad", nonfinite.select)
    reads = Reads()
    per_step = PerStep(reads)
    trainer = make_trainer(
        tmp_path,
        EMA(0.5),
        Nonfinite(on_nonfinite),
        Curves(),
        Progress(),
        Checkpoints(every_n_steps=0, keep_every_n_steps=0),
        per_step,
        max_steps=12,
        log_every_n_steps=5,
        val_check_interval=100,
        accumulate_grad_batches=accumulate,
        logger=MemoryLogger(),
        enable_progress_bar=True,
    )
    module = tiny_module(
        on_nonfinite=on_nonfinite,
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-3, fused=True),
    )
    with reads:
        trainer.fit(module, make_data(pictures))
    assert len(per_step.num_reads) == 12 * accumulate
    for index, num_reads in enumerate(per_step.num_reads, start=1):
        is_logged = index in (5 * accumulate, 10 * accumulate, 12 * accumulate)
        assert (num_reads > 0) == is_logged, per_step.num_reads


@pytest.mark.slow
def test_all_ranks_see_what_one_rank_has(pictures: Path, tmp_path: Path) -> None:
    """Of the second rank's images alone the loss of step 4 is not finite: both stop, or skip it."""
    net = ("--model.net", f"{SickUNet.__module__}.{SickUNet.__name__}")
    stop, skip = tmp_path / "stop", tmp_path / "skip"
    values = {**TWO_RANKS, "max_steps": 10, "accumulate_grad_batches": 2}
    sick = {"SICK_RANK": "1", "SICK_PASS": "8"}  # the last micro-batch of step 4
    arguments = ("fit", *options(pictures, stop, **values), *net)
    with Job(tmp_path, pictures, *TRAINER, *arguments, environment=sick) as job:
        output = job.output()
    assert job.process.returncode == 2, output
    assert "Traceback" not in output
    assert re.findall("error: .* is not finite", output) == ["error: step 4 is not finite"], output
    report = json.loads((stop / "nonfinite.json").read_text())
    assert (report["step"], report["seed"], report["positions"]) == (4, 0, [24, 31])
    assert len(report["training_images"]) == 8
    assert load(stop / "checkpoints/last.ckpt")["global_step"] == 3

    arguments = ("fit", *options(pictures, skip, **values), *net, "--on_nonfinite", "skip")
    with Job(tmp_path, pictures, *TRAINER, *arguments, environment=sick) as job:
        output = job.succeed()
    assert "skipped: 1 steps that were not finite" in output
    assert scalars(skip, "skipped_steps") == {5: 1, 10: 1}
    last = load(skip / "checkpoints/last.ckpt")
    assert last["global_step"] == 10
    for key in ("state_dict", "ema_state_dict"):
        assert all(value.isfinite().all() for value in last[key].values())
