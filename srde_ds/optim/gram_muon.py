"""GramMuon beside AdamW in one optimizer, for matrices whose rows are spread over ranks.

Muon (Keller Jordan; its scale 0.2·√max(rows, cols) from "Muon is Scalable for LLM Training", arXiv 2502.16982)
replaces the momentum X of a matrix by X·p(XᵀX), a polynomial whose values at X's singular values lie near one. The
polynomial needs only the small Gram matrix XᵀX, and that is the sum of the Gram matrices of X's blocks of rows: ranks
that hold blocks of rows agree on it by one all-reduce, and then update their rows alone.

What the Gram form loses: XᵀX squares the singular values, so fp32 keeps those below about 3e-4 of the Frobenius norm
only as noise. The polynomial's slope at zero is at most 3.4445^5 = 485, which bounds the harm at any condition number.
Relative error of an update of [576, 15] against float64: 3e-7 at condition number 1, 2e-6 at 10, at most 1e-3 at
1e2 to 1e6; torch.optim.Muon, which works in bfloat16, is at 8e-3 and up to 4e-1 (benchmarks/results/gram_muon.json).
TF32 would spoil it and is switched off around it.
The Frobenius norm must stay below 1.8e19, where its square leaves fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from srde_ds.errors import SRDEError

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5

RULE_DEFAULTS: dict[str, dict[str, Any]] = {
    "muon": {"momentum": 0.95, "weight_decay": 0.0, "eps": 1e-7, "step": 0},
    "adamw": {"betas": (0.9, 0.95), "weight_decay": 0.0, "eps": 1e-8, "step": 0},
}


@dataclass(frozen=True)
class Piece:
    """A block of rows of one Muon tensor inside a flat partition.

    `rows` (zero is allowed) of [rows, batch, cols], row-major, from element `offset` on; `full_rows`: the tensor's rows
    over all ranks, without padding; `first` and `stop`: the matrices that are updated, None: all from `first` on.
    """

    name: str
    offset: int
    rows: int
    batch: int
    cols: int
    full_rows: int
    first: int = 0
    stop: int | None = None

    @property
    def end(self) -> int:
        """The element after the block's last one in the flat partition."""
        return self.offset + self.rows * self.batch * self.cols

    @property
    def matrices(self) -> int:
        """How many are updated."""
        return (self.batch if self.stop is None else self.stop) - self.first

    def view(self, flat: Tensor) -> Tensor:
        """The matrices that are updated: a [matrices, rows, cols] view of `flat`."""
        whole = flat[self.offset : self.end].view(self.rows, self.batch, self.cols)
        return whole[:, self.first : self.stop].transpose(0, 1)


@dataclass(frozen=True)
class Window:
    """A block of a flat AdamW parameter to update: columns `first` to `stop` of [rows, row_length] at `offset`."""

    offset: int
    rows: int
    row_length: int
    first: int
    stop: int

    def view(self, flat: Tensor) -> Tensor:
        """[rows, stop - first] view of `flat`."""
        block = flat[self.offset : self.offset + self.rows * self.row_length]
        return block.view(self.rows, self.row_length)[:, self.first : self.stop]


@dataclass(frozen=True)
class _Layout:
    pieces: tuple[Piece, ...]
    process_group: dist.ProcessGroup | None


@dataclass(frozen=True)
class _Block:
    """One piece in an update: flat tensors of its parameter, the piece, and where to reduce."""

    piece: Piece
    param: Tensor
    grad: Tensor
    momentum_buffer: Tensor
    group: dict[str, Any]

    def momentum(self) -> Tensor:
        """Nesterov momentum [batch, rows, cols]; computed twice rather than kept, so that only one piece's exists."""
        grad, buffer = self.piece.view(self.grad), self.piece.view(self.momentum_buffer)
        return grad.lerp(buffer, self.group["momentum"])


class GramMuonAdamW(torch.optim.Optimizer):
    """Muon through Gram matrices for groups with rule "muon", AdamW for groups with rule "adamw".

    `group["step"]` is the number of the update (1 for the first), set from outside with `schedule.set_step`, never
    counted by calls: DeepSpeed calls `step()` once per sub-group. With 0, `step()` allocates state and changes nothing.

    Args:
        params: groups as `groups.build_groups` makes them; each needs "rule" and "lr". A muon parameter is
            [rows, batch, cols] (`batch` matrices, long side first), or 1-D with a registered layout.

    Raises:
        SRDEError: a group without a known rule or without a learning rate.

    Example:
        >>> import torch
        >>> from srde_ds import GramMuonAdamW
        >>> matrices = torch.nn.Parameter(torch.zeros(8, 2, 4))  # two matrices of 8 x 4
        >>> optimizer = GramMuonAdamW([{"params": [matrices], "rule": "muon", "lr": 0.02, "step": 1}])
        >>> matrices.sum().backward()
        >>> optimizer.step()
        >>> bool((matrices != 0).all())
        True
    """

    def __init__(self, params: Iterable[dict[str, Any]]) -> None:
        self._layouts: dict[Tensor, _Layout] = {}
        self._windows: dict[Tensor, tuple[Window, ...]] = {}
        super().__init__(params, defaults={})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with the defaults of its rule; raises as the constructor does."""
        rule, name = param_group.get("rule"), param_group.get("name", "parameter group")
        if rule not in RULE_DEFAULTS:
            raise SRDEError(f"{name}: rule={rule!r}: must be one of {', '.join(RULE_DEFAULTS)}.")
        if "lr" not in param_group:
            raise SRDEError(f"{name}: lr is missing: give each parameter group its learning rate.")
        super().add_param_group(RULE_DEFAULTS[rule] | param_group)

    def register_layout(
        self, flat_param: Tensor, pieces: Sequence[Piece], process_group: dist.ProcessGroup | None
    ) -> None:
        """Say how a flat muon parameter is cut into blocks of rows.

        Args:
            flat_param: the 1-D tensor that `step()` will find in a muon group; recognised by identity.
            pieces: the same names in the same order on every rank of `process_group`; a rank without rows of a tensor
                gives a piece of zero rows. Elements outside all pieces are padding.
            process_group: the ranks that hold the other rows; None: all rows are here.

        Raises:
            SRDEError: pieces that overlap, leave the parameter, or have no columns.
        """
        if flat_param.ndim != 1 or not flat_param.is_contiguous():
            raise SRDEError(f"flat parameter of shape {list(flat_param.shape)}: a layout needs it contiguous and 1-D.")
        end, previous = 0, None
        for piece in sorted(pieces, key=lambda p: (p.offset, p.first)):
            if piece.rows < 0 or min(piece.batch, piece.cols, piece.full_rows) < 1:
                raise SRDEError(f"{piece.name}: {piece} holds no matrix: check its rows, batch, cols and full_rows.")
            if piece.rows == 0:
                continue
            # Several pieces may stand for disjoint matrices of the same rows.
            beside = previous is not None and previous == replace(piece, first=previous.first, stop=previous.stop)
            if beside and previous is not None and (previous.stop or 0) <= piece.first:
                previous = piece
                continue
            if piece.offset < end or piece.end > flat_param.numel():
                raise SRDEError(
                    f"{piece.name}: elements {piece.offset} to {piece.end} must follow {end} and stay within "
                    f"{flat_param.numel()}: give pieces that lie inside the flat parameter without overlap."
                )
            end, previous = piece.end, piece
        self._layouts[flat_param] = _Layout(tuple(pieces), process_group)

    def restrict(self, flat_param: Tensor, windows: Sequence[Window] | None) -> None:
        """Update only these blocks of a flat AdamW parameter from now on; the rest keeps values and state. None: all.

        A muon parameter is restricted by the `first` and `stop` of its pieces.
        """
        if windows is None:
            self._windows.pop(flat_param, None)
        else:
            self._windows[flat_param] = tuple(windows)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that the groups hold at this moment; one all-reduce per process group, if any.

        Raises:
            SRDEError: a muon parameter that is not [rows, batch, cols] and has no layout, or has a layout but no
                gradient (the other ranks would wait for it).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        blocks: dict[tuple[dist.ProcessGroup | None, torch.device], list[_Block]] = {}
        for group in self.param_groups:
            for param in group["params"]:
                self.allocate_state(param, group["rule"])
                if group["step"] == 0:
                    continue
                if group["rule"] == "muon":
                    layout = self._layout(param)
                    if param.grad is not None and (updated := self._begin_muon(param, layout, group)):
                        blocks.setdefault((layout.process_group, param.device), []).extend(updated)
                elif param.grad is not None:
                    self._adamw(param, param.grad, group)
        for (process_group, _), members in blocks.items():
            _finish_muon(members, process_group)
        return loss

    def allocate_state(self, param: Tensor, rule: str) -> None:
        """Make the rule's state of a parameter, zeros, unless it is there already."""
        for name in ("momentum_buffer",) if rule == "muon" else ("exp_avg", "exp_avg_sq"):
            if name not in self.state[param]:
                self.state[param][name] = torch.zeros_like(param, dtype=torch.float32)

    def _layout(self, param: Tensor) -> _Layout:
        if param in self._layouts:
            layout = self._layouts[param]
            if param.grad is None:
                names = ", ".join(piece.name for piece in layout.pieces)
                raise SRDEError(f"{names}: no gradient: run backward before step() on every rank.")
            return layout
        if param.ndim != 3 or not param.is_contiguous():
            shape = list(param.shape)
            raise SRDEError(f"muon parameter of shape {shape}: give contiguous [rows, batch, cols] or register_layout.")
        rows, batch, cols = param.shape
        return _Layout((Piece("parameter", 0, rows, batch, cols, full_rows=rows),), None)

    def _adamw(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if param not in self._windows:
            adamw_(param, grad.float(), state, group)
            return
        for window in self._windows[param]:
            blocks = {name: window.view(tensor) for name, tensor in state.items()}
            adamw_(window.view(param), window.view(grad).float(), blocks, group)

    def _begin_muon(self, param: Tensor, layout: _Layout, group: dict[str, Any]) -> list[_Block]:
        """Momentum and weight decay, elementwise; then the pieces."""
        assert param.grad is not None
        grad, buffer = param.grad.float(), self.state[param]["momentum_buffer"]
        flat = param.view(-1), grad.reshape(-1), buffer.view(-1)
        blocks = [_Block(piece, *flat, group) for piece in layout.pieces if piece.matrices]
        if all(piece.matrices == piece.batch for piece in layout.pieces):
            updated = [(param, grad, buffer)]  # one kernel for all
        else:
            updated = [(b.piece.view(b.param), b.piece.view(b.grad), b.piece.view(b.momentum_buffer)) for b in blocks]
        for values, gradients, momentum in updated:
            momentum.lerp_(gradients, 1 - group["momentum"])
            values.mul_(1 - group["lr"] * group["weight_decay"])
        return blocks


def _finish_muon(blocks: list[_Block], process_group: dist.ProcessGroup | None) -> None:
    """Gram matrices of all blocks into one buffer, one all-reduce, Newton-Schulz, update of the local rows."""
    sizes = [block.piece.matrices * block.piece.cols**2 for block in blocks]
    grams = torch.empty(sum(sizes), device=blocks[0].param.device)
    with _exact_fp32_matmul():
        for block, gram in zip(blocks, grams.split(sizes), strict=True):
            x = block.momentum()
            torch.matmul(x.mT, x, out=gram.view(block.piece.matrices, block.piece.cols, block.piece.cols))
        if process_group is not None:
            dist.all_reduce(grams, group=process_group)
        start = 0
        # Neighbours of equal width share their Newton-Schulz calls.
        for (cols, eps), run in groupby(blocks, key=lambda b: (b.piece.cols, b.group["eps"])):
            members = list(run)
            batches = [block.piece.matrices for block in members]
            end = start + sum(batches) * cols**2
            factors = newton_schulz_factor(grams[start:end].view(-1, cols, cols), eps)
            start = end
            for block, factor in zip(members, factors.split(batches), strict=True):
                scale = 0.2 * math.sqrt(max(block.piece.full_rows, cols))
                block.piece.view(block.param).add_(block.momentum() @ factor, alpha=-block.group["lr"] * scale)


def newton_schulz_factor(gram: Tensor, eps: float) -> Tensor:
    """Q with X·Q = five Newton-Schulz steps on X, from XᵀX alone.

    Args:
        gram: [batch, cols, cols], XᵀX of each matrix; zero gives X·Q = 0.
        eps: smallest Frobenius norm that X is divided by.

    Returns:
        [batch, cols, cols] in `gram`'s dtype.
    """
    a, b, c = NS_COEFFICIENTS
    squared_norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=eps**2)[:, None, None]
    gram = gram / squared_norm
    factor = squared_norm.rsqrt()
    for step in range(NS_STEPS):
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        poly.diagonal(dim1=-2, dim2=-1).add_(a)
        factor = factor * poly if step == 0 else factor @ poly
        if step < NS_STEPS - 1:
            gram = poly @ gram @ poly
    return factor


def adamw_(param: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """torch.optim.AdamW's update number `group["step"]`, in place and in its order of operations."""
    beta1, beta2 = group["betas"]
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    param.mul_(1 - group["lr"] * group["weight_decay"])
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    correction1, correction2 = 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]
    denominator = (square.sqrt() / math.sqrt(correction2)).add_(group["eps"])
    param.addcdiv_(mean, denominator, value=-group["lr"] / correction1)


@contextmanager
def _exact_fp32_matmul() -> Iterator[None]:
    """fp32 products in fp32, whatever the caller allows for the model's own (TF32 on CUDA, bf16 in oneDNN)."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
