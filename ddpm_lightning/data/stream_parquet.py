"""Parquet files of images: one column of each row group is read at once."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ddpm_lightning.data.items import Item
from ddpm_lightning.data.stream_files import (
    START_DELAYS,
    File,
    RangeFile,
    Stamp,
    StreamError,
    patiently,
)
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import Pixels

_PREFERRED_COLUMNS = ("image", "img")
_EXPECTED = (
    "a column of encoded images (binary, or with a field `bytes`), or of uint8 pixels (Array2D, "
    "Array3D, or of a fixed size)"
)


@dataclass(frozen=True)
class Column:
    """The images' column.

    Attributes:
        name: Its name.
        field: Below it, the field with the images' bytes; None where it holds them itself.
        shape: Of the pixels, (H, W) or (H, W, C) or (C, H, W); None for encoded images.
    """

    name: str
    field: str | None
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class RowGroup:
    """A row group.

    Attributes:
        file: The file that it is in.
        stamp: The version of that file.
        metadata: The file's.
        column: The images' column.
        number: Of the group in the file.
    """

    file: File
    stamp: Stamp
    metadata: pq.FileMetaData
    column: Column
    number: int

    @property
    def num_images(self) -> int:
        """Its rows."""
        return int(self.metadata.row_group(self.number).num_rows)

    @property
    def num_bytes(self) -> int:
        """Of the images' column, uncompressed."""
        return _column_bytes(self.metadata, self.number, self.column)

    def read(self, start: int, stop: int, delays: Sequence[float]) -> list[Item] | Pixels:
        """Read rows [start, stop); the others of the group are read too.

        Raises:
            StreamError: A row has no image, or the file is damaged.
        """
        leaf = f"{self.column.name}.{self.column.field}" if self.column.field else self.column.name
        try:
            file = pq.ParquetFile(RangeFile(self.file, self.stamp, delays), metadata=self.metadata)
            table = file.read_row_group(self.number, columns=[leaf], use_threads=False)
        except pa.ArrowException as error:
            raise StreamError(f"{self.file.name}: {_one_line(error)}; copy it anew") from error
        rows = table.column(0).slice(start, stop - start).combine_chunks()
        if self.column.field:
            rows = pc.struct_field(rows, self.column.field)
        if rows.null_count:
            row = start + rows.is_null().to_pylist().index(True)
            raise StreamError(f"{self.name(row)} has no image; leave such rows out of the file")
        if self.column.shape is None:
            encoded: list[Item] = rows.to_pylist()
            return encoded
        return _pixels(rows, self.column.shape, self.name(start))

    def name(self, index: int) -> str:
        """The row, its group and the file."""
        return f"row {index} of row group {self.number} in {self.file.name}"


def open_parquet(file: File) -> tuple[Stamp, list[RowGroup]]:
    """Read the footer of a file; its row groups.

    Raises:
        InputError: It is no Parquet file, or has no column of images.
    """
    stamp = patiently(file.stat, START_DELAYS)
    try:
        metadata = pq.read_metadata(RangeFile(file, stamp, START_DELAYS))
        column = find_column(metadata.schema.to_arrow_schema(), file.name)
    except pa.ArrowException as error:
        raise InputError(f"{file.name}: not a whole Parquet file ({_one_line(error)})") from error
    groups = [
        RowGroup(file, stamp, metadata, column, number)
        for number in range(metadata.num_row_groups)
        if metadata.row_group(number).num_rows
    ]
    return stamp, groups


def find_column(schema: pa.Schema, name: str) -> Column:
    """Find the column of images.

    Args:
        schema: The file's.
        name: The file's, for messages.

    Raises:
        InputError: There is none, or there are several and none is called image or img.
    """
    shapes = _declared_shapes(schema)
    columns = [
        column
        for field in schema
        if (column := _as_images(field, shapes.get(field.name))) is not None
    ]
    if not columns:
        raise InputError(
            f"{name}: no column of images, but {', '.join(schema.names)}; it needs {_EXPECTED}"
        )
    preferred = [column for column in columns if column.name in _PREFERRED_COLUMNS]
    if len(columns) > 1 and len(preferred) != 1:
        names = ", ".join(column.name for column in columns)
        raise InputError(f"{name}: several columns of images ({names}); keep one, or name it image")
    return (columns if len(columns) == 1 else preferred)[0]


def _as_images(field: pa.Field, shape: tuple[int, ...] | None) -> Column | None:
    kind = field.type.storage_type if isinstance(field.type, pa.BaseExtensionType) else field.type
    types = pa.types
    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        if index >= 0 and _is_binary(kind.field(index).type):
            return Column(field.name, "bytes", None)
        return None
    if _is_binary(kind):
        return Column(field.name, None, None)
    if types.is_fixed_size_binary(kind):
        shape = shape or _square(kind.byte_width)
    elif types.is_fixed_size_list(kind) and kind.value_type == pa.uint8():
        shape = shape or _square(kind.list_size)
    elif not (_is_list(kind) and _values_of(kind) == pa.uint8()):
        return None
    return None if shape is None else Column(field.name, None, shape)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _values_of(kind: pa.DataType) -> pa.DataType:
    while _is_list(kind):
        kind = kind.value_type
    return kind


def _declared_shapes(schema: pa.Schema) -> dict[str, tuple[int, ...]]:
    """Shapes that `datasets` noted, and those under the key "shape" of a field: "32,32,3"."""
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features: dict[str, Any] = info.get("info", {}).get("features", {})
        for name, feature in features.items():
            if feature.get("_type") in ("Array2D", "Array3D"):
                shapes[name] = tuple(map(int, feature["shape"]))
        for field in schema:
            if text := (field.metadata or {}).get(b"shape"):
                shapes[field.name] = tuple(map(int, text.decode().strip("[]()").split(",")))
    except (ValueError, TypeError, KeyError, AttributeError):
        return shapes  # a column whose shape stays unknown is no column of images
    return {name: shape for name, shape in shapes.items() if len(shape) in (2, 3)}


def _square(num_bytes: int) -> tuple[int, ...] | None:
    """The shape of a square image of so many bytes, grey or RGB with the colours last."""
    for channels in (1, 3):
        side = math.isqrt(num_bytes // channels)
        if side * side * channels == num_bytes and side:
            return (side, side, channels)
    return None


def _pixels(rows: Any, shape: tuple[int, ...], name: str) -> Pixels:
    """Make uint8 [n, H, W] or [n, H, W, C] of an arrow array."""
    num_images = len(rows)
    if isinstance(rows, pa.ExtensionArray):
        rows = rows.storage
    if pa.types.is_fixed_size_binary(rows.type):
        width = rows.type.byte_width
        data = np.frombuffer(rows.buffers()[1], np.uint8)[rows.offset * width :]
        values = data[: num_images * width]
    else:
        while _is_list(rows.type):
            rows = rows.flatten()
        values = rows.to_numpy(zero_copy_only=False)
    if values.dtype != np.uint8 or values.size != num_images * math.prod(shape):
        raise StreamError(f"{name}: its pixels are not {' x '.join(map(str, shape))} of uint8")
    pixels: Pixels = values.reshape(num_images, *shape)
    channels_first = len(shape) == 3 and shape[2] not in (1, 3) and shape[0] in (1, 3)
    return pixels.transpose(0, 2, 3, 1) if channels_first else pixels


def _column_bytes(metadata: pq.FileMetaData, group: int, column: Column) -> int:
    """The uncompressed size of the column's chunks in a row group."""
    chunks = metadata.row_group(group)
    prefix = f"{column.name}.{column.field}" if column.field else column.name
    paths = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
    return sum(
        int(chunks.column(index).total_uncompressed_size)
        for index, path in enumerate(paths)
        if path == prefix or path.startswith(f"{prefix}.")
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
