"""The machines that a run is planned for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from srde_ds.config.values import option
from srde_ds.errors import SRDEError

# Dense TFLOP/s of an H100 SXM in the training dtype, from NVIDIA's data sheet. That of fp32 is without TF32, which
# torch leaves off.
H100_TFLOPS = {"bf16": 989.0, "fp32": 67.0}


@dataclass(frozen=True)
class Machines:
    """Number, speed and price of the machines.

    Their memory is what tensors may take, without what the driver, NCCL and fragmentation take.
    """

    gpus: int = option(1, "GPUs in each node", metavar="N")
    nodes: int = option(1, "nodes that share a network", metavar="N")
    gpu_memory_gib: float = option(72.0, "memory of a GPU that tensors may take, in GiB", metavar="GIB")
    peak_tflops: float | None = option(
        None,
        "dense TFLOP/s of a GPU in the training dtype (default: those of an H100 SXM, 989 in bf16 and 67 in fp32)",
        metavar="TFLOPS",
    )
    utilisation: float = option(0.4, "share of that peak which computation reaches", metavar="SHARE")
    intra_node_gb_s: float = option(450.0, "GB/s into a GPU from its node", metavar="GB_S")
    inter_node_gbit_s: float = option(400.0, "Gbit/s into a node from the others", metavar="GBIT_S")
    labelled_share: float = option(1.0, "share of the positions that carry a label", metavar="SHARE")
    hourly_price: float | None = option(None, "price of a GPU for an hour, in any currency", metavar="PRICE")

    def __post_init__(self) -> None:
        """Raise an SRDEError for a value that is not a number above zero, or a share above one."""
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and not value > 0:
                raise SRDEError(f"{item.name}={value}: must be above 0.")
        for name in ("utilisation", "labelled_share"):
            if getattr(self, name) > 1:
                raise SRDEError(f"{name}={getattr(self, name)}: must be at most 1.")

    def peak(self, dtype: str) -> float:
        """Dense TFLOP/s of a GPU in a training dtype, "bf16" or "fp32"."""
        return H100_TFLOPS[dtype] if self.peak_tflops is None else self.peak_tflops

    @property
    def processes(self) -> int:
        """Number of processes, one per GPU."""
        return self.gpus * self.nodes
