"""A sweep's folder: what it is a sweep of, a record of each row, and all rows as a table."""

import csv
import io
import json
from collections.abc import Sequence
from contextlib import suppress
from os.path import commonpath
from pathlib import Path
from typing import Any

from ddpm_lightning.commands.rows import Row
from ddpm_lightning.commands.told import Guide
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import write_atomically
from ddpm_lightning.metrics.record import (
    Record,
    protocol_differences,
    read_record,
    unusual_options,
    write_record,
)
from ddpm_lightning.samplers import Guidance

CURVES = "curves"
"""The subfolder of RUN/fid_sweep that TensorBoard's curves go to, whatever OUT is."""


_GUIDANCE = {"scale": "guidance", "rescale": "guidance_rescale"}
"""What records call guidance, and a table's columns."""


class SweepFolder:
    """Keeps sweep.json, sweep.csv, records/ and, for a single row, record.json.

    Args:
        root: The folder, OUT.
        settings: What all its rows share: `protocol`, `metrics` and `num_repeats`.
        titles: What each metric is called with its number of images, by its name in records.
    """

    def __init__(self, root: Path, settings: dict[str, Any], titles: dict[str, str]) -> None:
        self.root = root
        self.titles = titles
        self._settings = settings

    def claim(self) -> None:
        """Note what the folder holds; refuse one that holds something else.

        Raises:
            InputError: It holds a sweep of other settings, or other files.
        """
        file = self.root / "sweep.json"
        if file.exists():
            self._check(file)
        elif self.root.exists() and not self.root.is_dir():
            raise InputError(f"--out {self.root}: a file; choose a folder")
        elif self.root.exists() and {path.name for path in self.root.iterdir()} - {CURVES}:
            raise InputError(
                f"--out {self.root}: not empty, and nothing is overwritten; choose another"
            )
        else:
            self.root.mkdir(parents=True, exist_ok=True)
            self.write([])

    def finished(self, row: Row) -> Record | None:
        """Give the record of a row that has been judged."""
        # one of another protocol is none of this sweep's, whoever put it there
        with suppress(InputError):
            record = read_record(self._path(row))
            if not protocol_differences(record, self._settings):
                return record
        return None

    def keep(self, row: Row, record: Record) -> None:
        """Write a row's record."""
        write_record(self._path(row), record)

    def write(self, records: Sequence[Record]) -> None:
        """Write sweep.json, sweep.csv and, for one row, record.json."""
        write_record(self.root / "sweep.json", {"settings": self._settings, "rows": list(records)})
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        rows = [self._flat(record) for record in records]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        writer.writerow(columns)
        writer.writerows([[row.get(column, "") for column in columns] for row in rows])
        content = text.getvalue().encode()
        write_atomically(self.root / "sweep.csv", lambda file: file.write(content))
        single = self.root / "record.json"
        if len(records) == 1:
            write_record(single, records[0])
        else:
            single.unlink(missing_ok=True)  # of a command with one row

    def table(self, records: Sequence[Record]) -> str:
        """Lay the rows out for the screen."""
        subjects = short_names([record["subject"]["path"] for record in records])
        head = ["subject", "weights", "sampler", "steps", *self._columns.values()]
        lines = [head]
        for record, subject in zip(records, subjects, strict=True):
            lines.append([subject, *settings_of(record["subject"]), *self._texts(record)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = (zip(line, widths, strict=True) for line in lines)
        text = "\n".join("  ".join(f"{t:<{w}}" for t, w in line).rstrip() for line in padded)
        count = records[0]["repeats"]["count"]
        if count > 1:
            return f"{text}\nmean ± standard deviation of {count} repeats"
        return text + ("\n± over subsets or splits of the images" if "±" in text else "")

    def line(self, name: str, record: Record) -> str:
        """Say what a row has given."""
        texts = zip(self._columns.values(), self._texts(record), strict=True)
        return f"{name}: " + ", ".join(f"{metric} {text}" for metric, text in texts)

    def _texts(self, record: Record) -> list[str]:
        """Give the values as text, with their spread over the repeats, else their own."""
        texts = []
        for name in self._columns:
            spread = record["repeats"]["std"][name]
            if spread is None:
                spread = record["metrics"].get(f"{name}_std")
            value = f"{record['metrics'][name]:.5g}"
            texts.append(value if spread is None else f"{value} ± {spread:.2g}")
        return texts

    @property
    def _columns(self) -> dict[str, str]:
        return {name: title for name, title in self.titles.items() if not name.endswith("_std")}

    def _flat(self, record: Record) -> dict[str, Any]:
        subject, repeats = record["subject"], record["repeats"]
        count = repeats["count"]
        row = {
            "subject": subject["path"],
            "sha256": subject["sha256"],
            "step": subject.get("step", ""),
            "images_seen": subject.get("images_seen", ""),
            **dict(zip(("weights", "sampler", "num_steps"), settings_of(subject), strict=True)),
            **{key: subject.get("sampler", {}).get(key, "") for key in ("eta", "spacing", "clip")},
            **{_GUIDANCE[key]: value for key, value in guidance_of(subject).items()},
            **_guide_columns(guide_of(subject)),
            "nfe": subject.get("nfe", ""),
            "num_images": record["num_images"],
            "num_repeats": count,
        }
        for name, title in self.titles.items():
            row[title] = record["metrics"][name]
            if count > 1:
                row[f"{title} standard deviation of {count}"] = repeats["std"][name]
            if name in repeats["best_of_k"]:
                row[f"{title} best of {count}"] = repeats["best_of_k"][name]
        return row | {"seconds": record["environment"]["seconds"]}

    def _path(self, row: Row) -> Path:
        return self.root / "records" / f"{row.key}.json"

    def _check(self, file: Path) -> None:
        try:
            there = json.loads(file.read_text())["settings"]
            differing = protocol_differences(there, self._settings)
            for key in ("metrics", "num_repeats"):
                if there[key] != self._settings[key]:
                    differing.append(f"{key}: {there[key]}, {self._settings[key]}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{file}: cannot be read ({error}); choose another --out") from error
        if differing:
            raise InputError(
                f"--out {self.root}: holds another sweep; its settings and these differ in "
                f"{'; '.join(differing)}; choose another"
            )


def guidance_of(subject: dict[str, Any]) -> dict[str, float]:
    """Give how strongly samples were guided; nothing, where there was nothing to guide them."""
    guidance = subject.get("guidance", "none")
    return {} if guidance == "none" else {key: guidance[key] for key in _GUIDANCE}


def guide_of(subject: dict[str, Any]) -> Guide | None:
    """Give which checkpoint guided samples; None, where none did."""
    guidance = subject.get("guidance", "none")
    if guidance == "none" or "guide" not in guidance:
        return None
    guide = guidance["guide"]
    return Guide(Path(guide["path"]), guide["sha256"], guide["step"])


def _guide_columns(guide: Guide | None) -> dict[str, str]:
    return {} if guide is None else {"guide": str(guide.path), "guide_sha256": guide.sha256}


def short_names(paths: Sequence[str]) -> list[str]:
    """Leave out of paths the folders that they all have in common, and .ckpt."""
    parents = {str(Path(path).absolute().parent) for path in paths}
    if not parents:
        return []
    common = commonpath(parents)
    names = [Path(path).absolute().relative_to(common) for path in paths]
    return [str(name.with_suffix("") if name.suffix == ".ckpt" else name) for name in names]


def settings_of(subject: dict[str, Any], with_guidance: bool = True) -> list[str]:
    """Give weights, sampler and steps; images from the disk have none."""
    sampler = subject.get("sampler")
    if sampler is None:
        return ["", "", ""]
    words = [sampler["name"], *unusual_options(sampler)]
    words += Guidance(**guidance_of(subject)).words if with_guidance else []
    if guide := guide_of(subject):
        words.append(guide.word)
    return [subject["weights"], " ".join(words), str(sampler["num_steps"])]
