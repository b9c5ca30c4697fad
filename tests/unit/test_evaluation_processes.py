"""The processes of an evaluation: each takes the GPU of its number, or says why it cannot."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from srde_ds.errors import SRDEError
from srde_ds.evaluation.processes import launched_processes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_PORT": None}, "MASTER_ADDR and MASTER_PORT are not set by the launcher"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK is not set by the launcher: .*0 with one process on each"),
        ({"LOCAL_RANK": "2"}, "local rank 2: this process sees 2 of its host's GPUs .CUDA_VISIBLE_DEVICES="),
    ],
)
def test_a_launcher_that_does_not_say_enough_is_refused(
    changes: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    monkeypatch.delenv("OMPI_COMM_WORLD_LOCAL_RANK", raising=False)
    for name, value in (launched | changes).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("joined"))
    with pytest.raises(SRDEError, match=message), launched_processes():
        pass
