"""`compress` and `decompress`: files that may be cut, and refusals of one line."""

import csv
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ddpm_lightning.coding.bitstream import NUM_HEADER_BYTES, Header, pack, unpack
from tests.command_line import Result, run_here, run_process, train

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A trained run, three pictures, and file.ddpm, which is grey.png compressed."""
    folder = tmp_path_factory.mktemp("codec")
    train(folder, pictures)
    (folder / "last.ckpt").symlink_to("runs/tiny/1/checkpoints/last.ckpt")
    (folder / "other.ckpt").symlink_to("runs/tiny/1/checkpoints/step=5.ckpt")
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    Image.fromarray(levels).save(folder / "grey.png")
    Image.fromarray(levels[:, :6]).save(folder / "narrow.png")
    Image.fromarray(levels).convert("RGB").save(folder / "colour.png")
    (folder / "text.png").write_text("hello")
    options = ("--num_steps", STEPS, "--out", "file.ddpm", "--csv", "--seed", 4)
    compressed = run_here(folder, "compress", "grey.png", "last.ckpt", *options)
    assert compressed.status == 0, compressed.err
    (folder / "log.txt").write_text(compressed.out)
    return folder


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def refused(result: Result, *needles: str) -> None:
    assert result.status == 2, result.out
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    for needle in needles:
        assert needle in result.err


def test_another_process_decodes_what_this_one_encoded(folder: Path) -> None:
    result = run_process(folder, "decompress", "file.ddpm", "last.ckpt")
    assert result.status == 0, result.err
    size = (folder / "file.ddpm").stat().st_size
    assert result.out == f"bytes {size}, steps 3 of 3: lossless\nimage: file.png\n"
    np.testing.assert_array_equal(pixels(folder / "file.png"), pixels(folder / "grey.png"))


def test_the_table_and_the_csv(folder: Path) -> None:
    header, data = unpack((folder / "file.ddpm").read_bytes(), "file")
    assert header[1:7] == (False, 1, 8, 8, STEPS, 4)
    with (folder / "file.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["t", "rate_bits_per_dim", "theoretical_bits_per_dim", "rmse"]
    assert [int(row[0]) for row in rows[1:]] == [19, *sorted({int(r[0]) for r in rows[2:]})[::-1]]
    assert rows[-1][0] == "-1"
    assert float(rows[-1][1]) == pytest.approx(8 * len(data) / 64)
    assert float(rows[-1][3]) == 0
    for column in (1, 2):
        values = [float(row[column]) for row in rows[1:]]
        assert values == sorted(values)

    out = (folder / "log.txt").read_text().splitlines()
    assert out[0].split() == ["t", "bits/dim", "theory", "RMSE"]
    assert [line.split()[0] for line in out[1:5]] == [*(row[0] for row in rows[1:4]), "x_0"]
    assert float(out[4].split()[1]) == pytest.approx(float(rows[-1][1]), abs=5e-4)
    size = (folder / "file.ddpm").stat().st_size
    sums = size - NUM_HEADER_BYTES - len(data)
    assert out[5].startswith(
        f"the file: {size} bytes, {8 * size / 64:.3f} bits/dim: header {NUM_HEADER_BYTES}, stream "
        f"{len(data)}, checksums {sums}; as PNG: "
    )
    assert sums == 2 * -(-len(data) // 64)
    assert out[6:] == ["compressed: file.ddpm", "rates: file.csv"]


def test_beginnings_decode_by_option_and_by_cutting(folder: Path) -> None:
    whole = (folder / "file.ddpm").read_bytes()
    cuts = [NUM_HEADER_BYTES, NUM_HEADER_BYTES + 20, len(whole) - 3]
    for cut in cuts:
        (folder / "cut.ddpm").write_bytes(whole[:cut])
        by_cutting = run_here(folder, "decompress", "cut.ddpm", "last.ckpt")
        options = ("--bytes", cut, "--out", "option.png")
        by_option = run_here(folder, "decompress", "file.ddpm", "last.ckpt", *options)
        for result in (by_cutting, by_option):
            assert result.status == 0, result.err
            assert result.out.startswith(f"bytes {cut}, steps ")
            assert ": cut, predicted\n" in result.out
        np.testing.assert_array_equal(pixels(folder / "cut.png"), pixels(folder / "option.png"))
        (folder / "cut.png").unlink()
        (folder / "option.png").unlink()
    finish = ("--bytes", cuts[1], "--finish", "--out", "finished.png")
    finished = run_here(folder, "decompress", "file.ddpm", "last.ckpt", *finish)
    assert ": cut, finished by sampling\n" in finished.out
    assert pixels(folder / "finished.png").shape == (8, 8)


def test_raw_weights_go_into_the_file_and_folders_are_made(folder: Path) -> None:
    options = ("--num_steps", STEPS, "--weights", "raw", "--out", "a/b/raw.ddpm")
    assert run_here(folder, "compress", "grey.png", "last.ckpt", *options).status == 0
    assert unpack((folder / "a/b/raw.ddpm").read_bytes(), "raw")[0].is_raw
    away = ("a/b/raw.ddpm", "last.ckpt", "--out", "a/c/raw.png")
    result = run_here(folder, "decompress", *away)
    assert ": lossless\n" in result.out
    np.testing.assert_array_equal(pixels(folder / "a/c/raw.png"), pixels(folder / "grey.png"))


def rewritten(folder: Path, name: str, **fields: int) -> str:
    """Write a file whose header says something else, with the right checksum."""
    header, data = unpack((folder / "file.ddpm").read_bytes(), "file")
    (folder / name).write_bytes(pack(Header(**(header._asdict() | fields)), data))
    return name


def test_another_machine_is_warned_of_and_a_wrong_picture_refused(folder: Path) -> None:
    name = rewritten(folder, "elsewhere.ddpm", environment=0)
    result = run_here(folder, "decompress", name, "last.ckpt")
    assert result.status == 0
    assert result.out.startswith(f"warning: {name} was made with another PyTorch, NumPy or kind of")
    name = rewritten(folder, "wrong.ddpm", image_crc=0)
    result = run_here(folder, "decompress", name, "last.ckpt")
    refused(result, f"{name}: other pixels come out than went in", "decompress it there")
    assert not (folder / "wrong.png").exists()


@pytest.mark.parametrize(
    ("command", "usage"),
    [("compress", "IMAGE CHECKPOINT [options]"), ("decompress", "FILE CHECKPOINT [options]")],
)
def test_help_says_what_it_cannot_do(folder: Path, command: str, usage: str) -> None:
    result = run_here(folder, command, "--help")
    assert result.status == 0
    assert result.out.startswith(f"usage: python -m ddpm_lightning {command} {usage}\n\n")
    assert "promised on the" in " ".join(result.out.split())
    assert "same PyTorch" in " ".join(result.out.split())


def huge_png() -> bytes:
    """A PNG of 20,000 x 20,000 pixels, at whose header Pillow stops, with an error of its own."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    size = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"")


def test_bad_input_is_refused_by_name(folder: Path) -> None:
    whole = (folder / "file.ddpm").read_bytes()
    changed = bytearray(whole)
    changed[NUM_HEADER_BYTES + 10] ^= 4
    files = {
        "head.ddpm": whole[: NUM_HEADER_BYTES - 1],
        "changed.ddpm": bytes(changed),
        "header.ddpm": whole[:20] + b"?" + whole[21:],
        "newer.ddpm": whole[:4] + b"\x07" + whole[5:],
        "longer.ddpm": whole + b"?",
        "none.ddpm": b"",
        "huge.png": huge_png(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    before = sorted(folder.iterdir())

    def decompress(*line: object) -> Result:
        return run_here(folder, "decompress", *line)

    def compress(*line: object) -> Result:
        return run_here(folder, "compress", *line)

    refused(
        decompress("head.ddpm", "last.ckpt"), "head.ddpm: cut inside its header, after 40 of 41"
    )
    refused(decompress("changed.ddpm", "last.ckpt"), "changed.ddpm: damaged near byte 41")
    refused(decompress("header.ddpm", "last.ckpt"), "header.ddpm: the header is damaged")
    refused(decompress("newer.ddpm", "last.ckpt"), "newer.ddpm: version 7 is newer", "upgrade it")
    refused(decompress("longer.ddpm", "last.ckpt"), "longer.ddpm: damaged: bytes follow its end")
    refused(decompress("none.ddpm", "last.ckpt"), "none.ddpm: not a file that compress wrote")
    refused(decompress("grey.png", "last.ckpt", "--out", "x.png"), "grey.png: not a file that")
    refused(decompress("missing.ddpm", "last.ckpt"), "missing.ddpm: no such file")
    refused(decompress("head.ddpm", "missing.ckpt"), "head.ddpm: cut inside its header")
    away = ("file.ddpm", "last.ckpt", "--out", "x.png")
    refused(decompress("file.ddpm", "missing.ckpt", "--out", "x.png"), "missing.ckpt: no such")
    refused(
        decompress("file.ddpm", "other.ckpt", "--out", "x.png"), "file.ddpm: made with the", "ot"
    )
    refused(decompress(*away, "--bytes", 12), "file.ddpm: cut inside its header, after 12")
    refused(decompress(*away, "--bytes", -1), "--bytes must be at least 0, got -1")
    refused(decompress(*away[:3], "grey.png"), "--out grey.png: exists, and nothing is overwritten")

    refused(compress("grey.png", "last.ckpt", "--out", "file.ddpm"), "--out file.ddpm: exists")
    refused(compress("missing.png", "last.ckpt"), "missing.png: cannot be read (No such file")
    refused(compress("text.png", "last.ckpt"), "text.png: cannot be decoded: not an image in any")
    refused(compress("huge.png", "last.ckpt"), "huge.png: cannot be decoded: Image size")
    refused(compress("narrow.png", "last.ckpt"), "narrow.png: 1x8x6 (channels, height, width)")
    refused(compress("colour.png", "last.ckpt"), "colour.png: 3x8x8", "the model draws 1x8x8")
    refused(compress("grey.png", "grey.png"), "grey.png: not a whole checkpoint file")
    refused(compress("grey.png", "last.ckpt", "--num_steps", 21), "num_steps must lie in 1..20")
    refused(compress("grey.png", "last.ckpt", "--num_steps", 0), "num_steps must lie in 1..20")
    refused(compress("grey.png", "last.ckpt", "--seed", 2**32), "--seed must lie in 0..")
    refused(compress("grey.png", "last.ckpt", "--weights", "best"), "weights: ", "ema")
    assert sorted(folder.iterdir()) == before
