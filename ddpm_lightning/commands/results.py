"""The records of a sweep, as they come in."""

from collections.abc import Sequence

from ddpm_lightning.commands.rows import Row
from ddpm_lightning.commands.shell import announce
from ddpm_lightning.commands.sweep import SweepFolder
from ddpm_lightning.commands.sweep_charts import RunCurves, draw
from ddpm_lightning.metrics.record import Record


class Results:
    """The records of a sweep's rows, as they come in; rank 0's go to the disk.

    Args:
        folder: Where to.
        draws_each: Draw the curves with each row, not only at the end.
    """

    def __init__(self, folder: SweepFolder, draws_each: bool) -> None:
        self._folder = folder
        self._draws_each = draws_each
        self._curves = RunCurves(folder.titles)
        self._keys: list[str] = []
        self._records: dict[str, Record] = {}

    def expect(self, rows: Sequence[Row]) -> list[Row]:
        """Add rows to the sweep; gives those that have not been judged yet."""
        todo = []
        for row in rows:
            self._keys.append(row.key)
            record = self._folder.finished(row)
            if record is None:
                todo.append(row)
            else:
                self._records[row.key] = record
        return todo

    def keep(self, row: Row, record: Record) -> None:
        """Keep a row's record, and say what it is."""
        self._curves.add(record)  # first: a row with a record is not judged again
        self._folder.keep(row, record)
        self._records[row.key] = record
        self._folder.write(self._in_order())
        if self._draws_each:
            draw(self._folder.root / "sweep.png", self._in_order(), self._folder.titles)
        announce(self._folder.line(row.name, record))

    def finish(self) -> None:
        """Draw the curves and print the table of what there is."""
        self._curves.close()
        records = self._in_order()
        self._folder.write(records)
        if not records:
            return
        draw(self._folder.root / "sweep.png", records, self._folder.titles)
        for warning in dict.fromkeys(text for record in records for text in record["warnings"]):
            announce(f"warning: {warning}")
        announce(self._folder.table(records))
        announce(f"records and curves: {self._folder.root}")

    def _in_order(self) -> list[Record]:
        return [self._records[key] for key in self._keys if key in self._records]
