"""Arrow files between the passes of a build."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa


def write_table(path: Path, table: pa.Table) -> None:
    """Write an Arrow file that can be memory-mapped."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def read_table(path: Path | str) -> pa.Table:
    """Memory-map a table that `write_table` has written."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
