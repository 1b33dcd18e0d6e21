"""Training on streams by the command line: ranks, a server that dies, the hub."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from ddpm_lightning.data import stream_batches, stream_order
from tests.command_line import TINY_OPTIONS, run_here, start_process
from tests.streams import Server, answer, serving, write_parquet, write_tar
from tests.test_ranks import assert_equal_runs, launch, options
from tests.training import assert_same_training, fit_here, load

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

STREAM = (
    "--data.streaming",
    "true",
    "--data.val_fraction",
    "0",
    "--checkpoints.every_n_steps",
    "0",
)


def hang_up(path: str, handler: BaseHTTPRequestHandler) -> bool:
    handler.close_connection = True
    return True


def fit_options(source: str, run: str, *arguments: object) -> list[str]:
    given = ("fit", *TINY_OPTIONS, *STREAM, "--data.source", source, "--run_dir", run)
    return list(
        map(str, (*given, "--trainer.max_steps", 30, "--samples.every_n_steps", 0, *arguments))
    )


def fit(folder: Path, source: str, run: str, *arguments: object) -> Any:
    return run_here(folder, *fit_options(source, run, *arguments))


def test_server_that_dies_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_order, "WINDOW_BLOCKS", 4)
    monkeypatch.setattr(stream_batches, "RETRY_DELAYS", (0.01, 0.02))
    write_tar(tmp_path / "served" / "0.tar", range(100))
    with serving(tmp_path / "served") as server:
        source = f"{server.url}/0.tar"
        undisturbed = fit(tmp_path, source, "whole")
        assert undisturbed.status == 0, undisturbed.err
        num_requests = iter(range(10**6))
        server.fault = lambda path, handler: next(num_requests) > 60 and hang_up(path, handler)
        stopped = fit(tmp_path, source, "run")
        assert stopped.status == 2
        *_, line = stopped.err.splitlines()  # behind the bar
        assert line.startswith(f"error: {source}: ")
        assert "--ckpt_path last goes on" in line
        assert "Traceback" not in stopped.err
        last = tmp_path / "run" / "checkpoints" / "last.ckpt"
        assert 0 < load(last)["global_step"] < 30
        server.fault = lambda path, handler: False
        resumed = fit(tmp_path, source, "run", "--ckpt_path", "last")
        assert resumed.status == 0, resumed.err
    assert_same_training(last, tmp_path / "whole" / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_signals_do_not_wait_for_a_server(tmp_path: Path, num_workers: int) -> None:
    """It hangs for minutes; SIGTERM saves the step, and says how to go on."""
    write_tar(tmp_path / "served" / "0.tar", range(4000))
    with serving(tmp_path / "served") as server:
        released, is_hanging = threading.Event(), threading.Event()
        last = tmp_path / "run" / "checkpoints" / "last.ckpt"

        def hang(path: str, handler: BaseHTTPRequestHandler) -> bool:
            if last.exists():
                is_hanging.set()
                released.wait()
            return False

        server.fault = hang
        arguments = ["--trainer.max_steps", 10**6, "--checkpoints.every_n_steps", 1]
        arguments += ["--data.num_workers", num_workers]
        process = start_process(tmp_path, *fit_options(f"{server.url}/0.tar", "run", *arguments))
        try:
            assert is_hanging.wait(300)
            time.sleep(1)  # or it hears the signal before it waits: the same holds
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=120)
        finally:
            released.set()
            process.kill()
    assert process.returncode == 143, err
    told = re.search(r"stopped by SIGTERM at step (\d+); go on with: ", out)
    assert told is not None, out
    assert load(last)["global_step"] == int(told[1])
    assert "Traceback" not in err


def test_ranks_stop_before_the_same_step(tmp_path: Path) -> None:
    """A file vanishes; amid accumulated batches, too, what was trained is saved, and told once."""
    write_tar(tmp_path / "served" / "0.tar", range(4000))
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    with serving(tmp_path / "served") as server:

        def gone(path: str, handler: BaseHTTPRequestHandler) -> bool:
            if last.exists():
                answer(handler, 404, b"")
            return last.exists()

        server.fault = gone
        source = f"{server.url}/0.tar"
        arguments = ["--trainer.max_steps", 10**6, "--checkpoints.every_n_steps", 50]
        arguments += ["--trainer.devices", 2, "--trainer.strategy", "ddp"]
        arguments += ["--trainer.accumulate_grad_batches", 2]
        process = start_process(tmp_path, *fit_options(source, "run", *arguments))
        try:
            _, err = process.communicate(timeout=400)
        finally:
            process.kill()
    assert process.returncode == 2, err
    assert err.count("error: ") == err.count("the server answers 404 Not Found") == 1, err
    assert "Traceback" not in err
    # images are read ahead: it was not step 50 that could not be fed
    step = load(last)["global_step"]
    assert step > 50, step
    assert step % 50, step


def test_another_stream_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "train-0.parquet", range(40))
    assert fit(tmp_path, "set", "run").status == 0
    write_parquet(tmp_path / "set" / "train-1.parquet", range(40, 50))
    result = fit(tmp_path, "set", "run", "--ckpt_path", "last", "--trainer.max_steps", 40)
    assert result.status == 2
    assert "written with data.images_sha256" in result.err


def test_training_does_not_depend_on_ranks(tmp_path: Path) -> None:
    """One process here, and two with two workers each, reading over HTTP."""
    for index in range(3):
        write_tar(tmp_path / "served" / f"{index}.tar", range(30 * index, 30 * index + 30))
    with serving(tmp_path / "served") as server:
        source = f"{server.url}/{{0..2}}.tar"
        shared = ["--data.streaming", "true", "--data.image_size", "8"]
        shared += ["--data.cache_dir", str(tmp_path / "cache")]
        fit_here(*options(source, tmp_path / "one", "32-true"), *shared)
        two = options(source, tmp_path / "two", "32-true", devices=2, strategy="ddp")
        launch(tmp_path, tmp_path, "fit", *two, *shared, "--data.num_workers", "2")
    assert_equal_runs(tmp_path / "two", tmp_path / "one", 1e-5)


HUB = """
import sys
from pathlib import Path
import numpy as np
import torch
from ddpm_lightning.data.datamodule import ImageDataModule
from ddpm_lightning.errors import InputError
from tests.streams import numbers_of
data = ImageDataModule("owner/name", streaming=True, batch_size=8, cache_dir=sys.argv[1])
train = data.train_images[np.arange(data.num_train)]
print(sorted(numbers_of(torch.from_numpy(train))) == list(range(40)), data.num_val)
try:
    ImageDataModule("owner/other", streaming=True, batch_size=8).prepare_data()
except InputError as error:
    print(error)
"""


class Hub:
    """As much of the hub as listing and reading a data set takes."""

    revision = "a" * 40

    def __init__(self, server: Server) -> None:
        self.folder = server.folder
        self.files = [str(p.relative_to(self.folder)) for p in self.folder.rglob("*.parquet")]

    def __call__(self, path: str, handler: BaseHTTPRequestHandler) -> bool:
        api, files = "/api/datasets/owner/name", "/datasets/owner/name/resolve/"
        if path.startswith(f"{api}/tree/"):
            below = path.removeprefix(f"{api}/tree/{self.revision}").strip("/")
            entries = [self.entry(file) for file in self.files]
            folder = {"type": "directory", "path": "data", "size": 0, "oid": self.revision}
            self.send(handler, entries if below else [folder])
        elif path in (api, f"{api}/revision/{self.revision}"):
            siblings = [{"rfilename": file} for file in self.files]
            self.send(handler, {"id": "owner/name", "sha": self.revision, "siblings": siblings})
        elif path.startswith(files):
            file = self.folder / path.removeprefix(files).partition("/")[2]
            if not file.is_file():
                answer(handler, 404, b"", X_Error_Code="EntryNotFound")
            else:
                handler.send_file(file)  # type: ignore[attr-defined]
        else:
            answer(handler, 404, b"", X_Error_Code="RepoNotFound")
        return True

    def entry(self, file: str) -> dict[str, Any]:
        data = (self.folder / file).read_bytes()
        oid = hashlib.sha1(data).hexdigest()
        return {"type": "file", "path": file, "size": len(data), "oid": oid}

    @staticmethod
    def send(handler: BaseHTTPRequestHandler, content: Any) -> None:
        answer(handler, 200, json.dumps(content).encode(), Content_Type="application/json")


def test_data_set_on_the_hub(tmp_path: Path) -> None:
    data = tmp_path / "repository" / "data"
    write_parquet(data / "train-00000-of-00002.parquet", range(25))
    write_parquet(data / "train-00001-of-00002.parquet", range(25, 40))
    write_parquet(data / "validation-00000-of-00001.parquet", range(40, 47))
    with serving(tmp_path / "repository") as server:
        server.fault = Hub(server)
        found = subprocess.run(
            [sys.executable, "-c", HUB, str(tmp_path / "cache")],
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "0",
                "HF_ENDPOINT": server.url,
                "HF_HOME": str(tmp_path / "home"),
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert found.returncode == 0, found.stderr
    first, second = found.stdout.splitlines()
    assert first == "True 7"
    assert second.startswith("--data.source owner/other cannot be loaded"), second
