"""A build in many small parts, for the test that kills it: `python -m tests.killable_build FOLDER PROCESSES`."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import patch

from srde_ds.data.build import source_records
from srde_ds.data.build.from_sources import build_from_sources
from srde_ds.data.build.options import BuildOptions
from srde_ds.data.sources import supply
from srde_ds.data.sources.registry import Source
from tests.data_helpers import tiny_tokenizer

ROWS_A_PART = 40
SOURCES = [Source(f"{domain}_tasks", domain, tasks=domain, near_duplicates=False) for domain in ("logic", "abstract")]
OPTIONS = BuildOptions(SOURCES, 400, 512, "drop", 3, 0.05, 0.05)

if __name__ == "__main__":
    for module in (supply, source_records):
        patch.object(module, "GENERATED_AT_ONCE", ROWS_A_PART).start()
    build_from_sources(OPTIONS, work_dir=Path(sys.argv[1]), tokenizer=tiny_tokenizer(), num_processes=int(sys.argv[2]))
