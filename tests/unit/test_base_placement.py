"""`--base_placement`: which one a plan chooses and what it says, and when a run is refused."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from srde_ds.config import Config, resolve
from srde_ds.distributed.workload import Workload
from srde_ds.errors import SRDEError
from srde_ds.model.base_shape import base_shape
from srde_ds.planner import settle as settling
from srde_ds.planner.base_placement import settle_base_placement
from srde_ds.planner.describe import describe_plan, describe_run
from srde_ds.planner.machines import Machines
from srde_ds.planner.memory import largest_memory, memory
from srde_ds.planner.plan import make_plan
from srde_ds.planner.settle import settle, settle_together
from srde_ds.planner.traffic import step_traffic
from srde_ds.utils.together import Collectives
from srde_ds.utils.units import GIB

MINISTRAL = Path(__file__).parents[2] / "benchmarks/ministral_3_14b"
BASE_GIB = 2 * 13_506_073_600 / 2**30


def run(choice: str = "auto", **options: object) -> Config:
    asked = {"model_name": str(MINISTRAL), "max_length": 4096, "recompute": "full", "base_placement": choice}
    return resolve({}, asked | options)


def work(choice: str = "auto", processes: int = 8, **options: object) -> Workload:
    return Workload.of(run(choice, **options), processes)


def at_hand(monkeypatch: pytest.MonkeyPatch, gib: float, processes: int = 8) -> None:
    """Let this be a machine with so many GiB for each of so many processes."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(settling, "available_memory", lambda: gib * GIB)


def test_a_process_holds_all_of_it_and_gathers_nothing_of_it() -> None:
    shape = base_shape(run())
    whole, shard = (memory(work(choice), shape) for choice in ("resident", "sharded"))
    assert whole.states["whole base"] == pytest.approx(BASE_GIB * GIB)
    assert shard.states["base shard"] == pytest.approx(BASE_GIB * GIB / 8)
    kinds = [{found.kind for found in step_traffic(work(choice), shape)} for choice in ("sharded", "resident")]
    assert kinds[0] - kinds[1] == {"base gathered"} and "trainables gathered" in kinds[1]
    # A trainable's gathers do not depend on the base's placement, nor does what ZeRO holds of it.
    assert {k: v for k, v in whole.states.items() if k not in ("whole base", "persistent weights")} == {
        k: v for k, v in shard.states.items() if k not in ("base shard", "persistent weights")
    }


def test_one_process_holds_it_whole_whatever_is_asked() -> None:
    shape = base_shape(run())
    found = [memory(work(choice, 1), shape) for choice in ("sharded", "resident", "auto")]
    assert found[0] == found[1] == found[2] and "whole base" in found[0].states
    chosen, why = settle_base_placement(run(), shape, 1, 0)
    assert chosen.parallel.base_placement == "resident" and "alone" in why


def test_resident_where_it_fits() -> None:
    shape = base_shape(run())
    total = memory(work("resident"), shape).total
    for room, expected in ((total, "resident"), (total - 1, "sharded")):
        chosen, why = settle_base_placement(run(), shape, 8, room)
        assert chosen == run(expected)
        assert why.startswith(f"base_placement=auto: {expected}, for {room / GIB:.1f} GiB")
        assert f"resident {total / GIB:.1f}, sharded {memory(work('sharded'), shape).total / GIB:.1f}" in why


def test_supports_count_at_their_largest() -> None:
    denser = run(initial_density=0.04, density_warmup_steps=100)
    shape = base_shape(denser)
    room = memory(work("resident"), shape).total
    assert largest_memory(Workload.of(denser, 8), shape).total == pytest.approx(memory(work(density=0.04), shape).total)
    assert settle_base_placement(denser, shape, 8, room)[0].parallel.base_placement == "sharded"


def test_the_plan_says_which_and_why() -> None:
    large, small = (make_plan(run(), Machines(gpus=8, gpu_memory_gib=gib)) for gib in (72.0, 24.0))
    for plan, expected in ((large, "resident"), (small, "sharded")):
        assert plan.config.parallel.base_placement == expected
        assert f"base_placement=auto: {expected}, for {plan.machines.gpu_memory_gib:.1f} GiB" in describe_plan(plan)
    received = next(found.received for found in small.traffic if found.kind == "base gathered")
    assert f"sharded gathers {received / 1e9:.2f} GB of the base in a step" in describe_plan(small)
    assert "\nwhole base " in describe_plan(large) and "\nbase shard " in describe_plan(small)
    assert large.times.step_in_turn < small.times.step_in_turn
    asked = describe_plan(make_plan(run("resident"), Machines(gpus=8, gpu_memory_gib=24.0)))
    assert "base_placement=resident (GiB at the peak: " in asked
    assert "no micro-batch fits: give more GPUs, --base_placement sharded, " in asked
    assert not make_plan(run("sharded"), Machines()).placement_reason


def test_training_settles_it_by_the_memory_at_hand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for gib, expected in ((72, "resident"), (24, "sharded")):
        at_hand(monkeypatch, gib)
        settled = settle(run())
        assert settled.parallel.base_placement == expected
        assert f"base_placement=auto: {expected}, for {gib}.0 GiB" in capsys.readouterr().out
        assert ("whole base" in describe_run(settled, base_shape(settled), 8)) == (expected == "resident")
    monkeypatch.setenv("RANK", "1")
    settle(run())
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {"memory.max": "max"}, math.inf),
        ("0::/job/step\n", {"memory.max": "900", "job/memory.max": "700", "job/step/memory.max": "max"}, 700),
        ("0::/../outside\n", {"memory.max": "900", "outside/memory.max": "1"}, 900),  # seen from within a container
        ("5:cpu:/x\n4:hugetlb,memory:/job\n", {"memory/job/memory.limit_in_bytes": "800", "x/memory.max": "1"}, 800),
        ("4:memory:/docker/f7\n", {"memory/memory.limit_in_bytes": "600"}, 600),
        (None, {}, math.inf),
    ],
)
def test_a_containers_limit_bounds_the_memory(
    groups: str | None, limits: dict[str, str], expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in limits.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(value + "\n")
    if groups is not None:
        (tmp_path / "own").write_text(groups)
    assert settling.control_group_limit(tmp_path / "groups", tmp_path / "own") == expected
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(settling, "control_group_limit", lambda: 1000.0)
    assert settling.available_memory() == settling.USABLE * 1000


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"])
def test_the_processes_of_a_host_share_its_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launcher says in its own way how many there are."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(settling, "control_group_limit", lambda: 1000.0)
    monkeypatch.setenv(name, "4")
    for processes, share in ((8, 250), (1, 1000)):  # a process may be alone on a host of four
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        assert settling.available_memory() == settling.USABLE * share


@pytest.mark.parametrize(("processes", "gib"), [(1, 24), (2, 16), (3, 2), (4, 2)])
def test_a_gpu_that_the_run_does_not_use_does_not_count(
    processes: int, gib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [24, 16, 2]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(sizes))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda n: SimpleNamespace(total_memory=sizes[n] * GIB))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(processes))
    assert settling.available_memory() == settling.USABLE * gib * GIB


def test_unlike_hosts_choose_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By the least memory of all; a rank 0 that has more says what they agree on."""
    asked, rooms = run(recompute="auto"), [80.0, 24.0]
    chosen = []
    for rank, gib in enumerate(rooms):
        at_hand(monkeypatch, gib)
        ranks = Collectives(rank, 2, lambda value: value, lambda _: [room * GIB for room in rooms])
        chosen.append((settle(asked), settle_together(asked, ranks)))
    assert chosen[0][0].parallel.base_placement == "resident" != chosen[1][0].parallel.base_placement
    assert chosen[0][1] == chosen[1][1] == chosen[1][0]
    assert capsys.readouterr().out.count("for 24.0 GiB") == 4
    ranks = Collectives(0, 2, lambda value: value, lambda _: [80.001 * GIB, 80.0 * GIB])
    at_hand(monkeypatch, 80.001)
    assert settle(asked) == settle_together(asked, ranks)
    assert capsys.readouterr().out.count("base_placement=auto") == 1  # the same choice is not told twice


def test_a_whole_base_never_costs_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """What could be kept beside a shard is not computed again to make room for the whole base; unless asked."""
    shape = base_shape(run())
    enough = memory(work("sharded", recompute="selective"), shape).total / GIB
    at_hand(monkeypatch, max(enough, memory(work("resident"), shape).total / GIB - 1))
    both = settle(run(recompute="auto"))
    assert (both.model.recompute, both.parallel.base_placement) == ("selective", "sharded")
    at_hand(monkeypatch, memory(work("resident"), shape).total / GIB)
    asked = settle(run("resident", recompute="auto"))
    assert (asked.model.recompute, asked.parallel.base_placement) == ("full", "resident")


def test_a_whole_base_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    at_hand(monkeypatch, 24)
    with pytest.raises(
        SRDEError, match=r"base_placement=resident: .* 25\.2 of them .* room for 24\.0\. Give --base_pl"
    ):
        settle(run("resident"))
    assert settle(run("sharded")).parallel.base_placement == "sharded"
    at_hand(monkeypatch, 24, processes=1)
    with pytest.raises(SRDEError, match="Give --recompute full, or"):
        settle(run("resident"))
