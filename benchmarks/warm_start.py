"""Time and memory of the warm start's clustering for the 14 B shape: 40 layers, D 5120, 4,096 tokens each, 6 experts.

    python -m benchmarks.warm_start      # prints a table, writes benchmarks/results/warm_start.json

Two processes on one machine, each with half of the sample in bfloat16, run what training runs after the forwards:
gather a layer, cluster it on rank 0, send the weights to all. The states are synthetic: token types that cross the
domains and a broad cloud, so that k-means goes on to its last iteration (SmolLM2's inputs take half as many), a weaker
trace of the domain, a direction that all share, and three dimensions that hold a large part of the length. Memory: rank
0's peak during that, without what the process held before its share of the sample and without the share.
"""

import json
import os
import socket
import time
from pathlib import Path

import numpy as np
import sklearn
import torch
import torch.distributed as dist
import torch.multiprocessing
from sklearn.cluster import KMeans
from torch import Tensor

from benchmarks.tables import measured_on
from srde_ds.config import Config
from srde_ds.distributed.processes import Topology
from srde_ds.model.seeding import seeded_generator
from srde_ds.training.warm_start.routers import cluster_layers
from srde_ds.training.warm_start.token_sample import TokenSample
from srde_ds.utils.units import GIB

LAYERS, HIDDEN, TOKENS, DOMAINS, TOKENS_A_ROW, RANKS = 40, 5120, 4096, 6, 32, 2
TOKEN_TYPES, LATENT = 512, 24
METHODS = ("kmeans", "domain_means", "random", "discriminant")


def sample() -> TokenSample:
    row = np.arange(TOKENS) // TOKENS_A_ROW
    return TokenSample(np.arange(row[-1] + 1), row, np.arange(TOKENS) % TOKENS_A_ROW, row % DOMAINS)


def states(layer: int, domain: np.ndarray, owned: np.ndarray) -> Tensor:
    """[n, D] bf16: the owned rows of a layer's states; the same whatever else is owned."""
    generator = seeded_generator(0, "states", layer)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    types, latent, domains = normal(TOKEN_TYPES, HIDDEN), normal(LATENT, HIDDEN), normal(DOMAINS, HIDDEN)
    common = normal(HIDDEN)
    frequency = 1 / torch.arange(1, TOKEN_TYPES + 1)  # as words have it
    type_of = torch.multinomial(frequency, TOKENS, replacement=True, generator=generator)
    coordinates = 2 * normal(TOKENS, LATENT) / LATENT**0.5
    loud = torch.randperm(HIDDEN, generator=generator)[:3]
    own = torch.from_numpy(owned)
    noise = torch.randn(len(owned), HIDDEN, generator=seeded_generator(0, "noise", layer, int(owned[0])))
    x = types[type_of[own]] + coordinates[own] @ latent + 0.2 * domains[torch.from_numpy(domain)[own]] + common + noise
    x[:, loud] *= torch.tensor([40.0, 20.0, 10.0])
    return (x / x.square().mean(1, keepdim=True).sqrt()).bfloat16()


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field + ":")))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def process(rank: int, port: int, results: "torch.multiprocessing.Queue[dict[str, object]]") -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    topology = Topology(rank, RANKS, torch.device("cpu"))
    tokens, config, imports = sample(), Config(), memory("VmRSS")
    config.adapter.num_experts = DOMAINS
    owned = np.flatnonzero(tokens.owners(config.training.batch_size, RANKS) == rank)
    own = [states(layer, tokens.domain, owned) for layer in range(LAYERS)]
    share = sum(x.nbytes for x in own)
    unit = torch.nn.functional.normalize(own[0].float(), dim=1)
    results.put(
        {
            "mean_cosine": float(unit.mean(0).square().sum()),
            "length_in_the_loudest_dimension": float(unit.square().mean(0).max()),
            "rank_0_share_gib": share / GIB,
        }
    )
    del unit
    iterations: list[int] = []
    original = KMeans.fit

    def fit(self: KMeans, *args: object) -> KMeans:
        fitted = original(self, *args)
        iterations.append(fitted.n_iter_)
        return fitted

    KMeans.fit = fit
    for method in METHODS:
        config.curriculum.warm_start_method = method  # type: ignore[assignment]
        iterations.clear()
        dist.barrier()
        forget_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        fits = cluster_layers(own, tokens, config, topology)
        results.put(
            {
                "wall_seconds": time.perf_counter() - wall,
                "cpu_seconds": time.process_time() - cpu,
                "peak_above_share_gib": (memory("VmHWM") - imports - share) / GIB,
                "normalized_mutual_information": float(np.mean([fit.normalized_mutual_information for fit in fits])),
                "own_domain_share": float(np.mean([fit.own_domain_share for fit in fits])),
                "iterations_a_layer": float(np.mean(iterations)) if iterations else 0.0,
            }
        )
    dist.barrier()
    dist.destroy_process_group()


def measure() -> list[dict[str, object]]:
    """What rank 0 reports: the states, then each method."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    context = torch.multiprocessing.get_context("spawn")
    results: list[torch.multiprocessing.Queue[dict[str, object]]] = [context.Queue() for _ in range(RANKS)]
    processes = [context.Process(target=process, args=(rank, port, results[rank])) for rank in range(RANKS)]
    for started in processes:
        started.start()
    for started in processes:
        started.join()
        if started.exitcode:
            raise SystemExit(f"a process failed with code {started.exitcode}")
    return [results[0].get() for _ in range(1 + len(METHODS))]


def main() -> None:
    load = os.getloadavg()[0]
    states_found, *rows = measure()
    found = dict(zip(METHODS, rows, strict=True))
    print(
        "| Method | Wall | CPU time | Rank 0's memory above its share | NMI | Own domain |\n|---|---|---|---|---|---|"
    )
    for method, row in found.items():
        print(
            f"| {method} | {row['wall_seconds']:.1f} s | {row['cpu_seconds']:.1f} s "
            f"| {row['peak_above_share_gib']:.2f} GiB | {row['normalized_mutual_information']:.2f} "
            f"| {row['own_domain_share']:.0%} |"
        )
    print(f"load of the machine before the start: {load:.1f}")
    kept = measured_on()
    kept["versions"]["scikit-learn"] = sklearn.__version__
    record = {
        "shape": {"layers": LAYERS, "hidden": HIDDEN, "tokens": TOKENS, "experts": DOMAINS, "processes": RANKS},
        "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "load_before": load,
        "environment": kept,
        "states": states_found,
        "rank_0": found,
    }
    target = Path(__file__).resolve().parent / "results/warm_start.json"
    target.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
