"""GramMuon and AdamW in one optimizer: Muon for matrices whose long side is divided among processes.

Muon (Keller Jordan; the scale is that of "Muon is Scalable for LLM Training", arXiv 2502.16982) moves a matrix W along
its momentum, with all singular values made about equal. With gradient G, momentum M, learning rate lr, weight decay wd
and momentum decay beta, for W of height h and width w:

    M <- beta M + (1 - beta) G
    X  = beta M + (1 - beta) G                                       (Nesterov)
    W <- (1 - lr wd) W - lr 0.2 sqrt(max(h, w)) NewtonSchulz(X)

Newton-Schulz divides X by its Frobenius norm and then takes five times X <- a X + b X A + c X A^2 with A = X^T X. Each
step is X <- X P with the small matrix P = a I + b A + c A^2, and makes A <- P A P. So NewtonSchulz(X) = X Q, and Q
follows from the Gram matrix X^T X alone. If the long side of X is cut into slices, X^T X is the sum of the slices' Gram
matrices: processes that hold slices need one all-reduce of `[w, w]` values, and then each updates its own slice.
The layout of the tensors is in docs/design.md, "GramMuon".

What the Gram form loses: X^T X squares the singular values, so in fp32 those below about 3e-4 of the Frobenius norm are
only noise. The slope of the polynomial at zero is at most 3.4445^5 = 485, which bounds the error at any condition
number. Relative error of an update of [576, 15] against float64: 3e-7 at condition number 1, 2e-6 at 10, at most 1e-3
at 1e2 to 1e6; torch.optim.Muon, which works in bfloat16, is at 8e-3 and up to 4e-1 (benchmarks/results/gram_muon.json).
TF32 would ruin this and is switched off here. The Frobenius norm must stay below 1.8e19, where its square would exceed
fp32.

`optim/reference.py` has the same updates in plain float64, with which tests compare this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from srde_ds.errors import SRDEError
from srde_ds.optim.groups import is_hidden_matrix
from srde_ds.optim.shards import MatrixShard, UpdatedBlock

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5

RULE_DEFAULTS: dict[str, dict[str, Any]] = {
    "muon": {"momentum": 0.95, "weight_decay": 0.0, "eps": 1e-7, "step": 0},
    "adamw": {"betas": (0.9, 0.95), "weight_decay": 0.0, "eps": 1e-8, "step": 0},
}


@dataclass(frozen=True)
class _Layout:
    """The shards of a flat Muon parameter, and the group that holds the rest of their matrices (None: no rest)."""

    shards: tuple[MatrixShard, ...]
    process_group: dist.ProcessGroup | None


@dataclass(frozen=True)
class _MuonUpdate:
    """A shard in an update, with the flat tensors that contain it and the settings of its parameter group."""

    shard: MatrixShard
    param: Tensor
    grad: Tensor
    momentum_buffer: Tensor
    group: dict[str, Any]

    def nesterov(self) -> Tensor:
        """X, `[updated, height, width]`; computed twice rather than kept, so that only one shard's exists at a time."""
        grad, buffer = self.shard.view(self.grad), self.shard.view(self.momentum_buffer)
        return grad.lerp(buffer, self.group["momentum"])


class GramMuonAdamW(torch.optim.Optimizer):
    """Muon for parameter groups with rule "muon", AdamW for groups with rule "adamw".

    In one process it is an ordinary optimizer. Its results do not depend on how matrices are divided among processes.
    Under ZeRO-3 `step` sees flat partitions, and `register_layout` says which matrices they contain.

    Args:
        params: parameter groups, each a dict with

            params: the parameters. For rule "muon": `[rows, columns]`, or `[height, count, width]` for `count` matrices
                at once with their long side first, or 1-D with a registered layout; contiguous. For rule "adamw": any
                shape.
            rule: "muon" or "adamw".
            lr: learning rate, the size of an update of a typical value. Muon's is on the scale of AdamW's.
            weight_decay: decoupled weight decay: a step multiplies the values by 1 - lr * weight_decay. Default 0.
            momentum: (muon) decay of the gradient's running mean, from 0 to 1. Default 0.95.
            betas: (adamw) decays of the running means of the gradient and of its square. Default (0.9, 0.95).
            eps: (muon) smallest Frobenius norm that the momentum is divided by, default 1e-7; (adamw) added to the root
                of the second moment, default 1e-8.
            step: number of the coming update, from 1 on. With 0 (the default) `step()` only creates the state.
            name: name for messages. Optional.
            count_steps: raise each group's `step` by one in each call of `step()`. False if others set it
                (`optim.schedule.set_step`), since DeepSpeed calls `step()` once for each sub-group of parameters.

    State of a parameter, fp32: `momentum_buffer` (muon), `exp_avg` and `exp_avg_sq` (adamw).

    Raises:
        SRDEError: a group has no known rule or no learning rate.

    Examples:
        >>> import torch
        >>> from srde_ds import GramMuonAdamW
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> optimizer = GramMuonAdamW.from_named_parameters(model.named_parameters(), muon_lr=0.02, lr=1e-3)
        >>> [(group["name"], group["rule"], len(group["params"])) for group in optimizer.param_groups]
        [('matrices', 'muon', 2), ('vectors', 'adamw', 2)]
        >>> loss = model(torch.ones(3, 8)).square().sum()
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, count_steps: bool = False) -> None:
        self._layouts: dict[Tensor, _Layout] = {}
        self._updated_blocks: dict[Tensor, tuple[UpdatedBlock, ...]] = {}
        self.count_steps = count_steps
        super().__init__(params, defaults={})

    @classmethod
    def from_named_parameters(
        cls,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        muon_lr: float = 0.02,
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        is_matrix: Callable[[str, Tensor], bool] = is_hidden_matrix,
    ) -> GramMuonAdamW:
        """An optimizer that counts its steps, for all parameters of a model that have gradients.

        Args:
            named_parameters: `model.named_parameters()`.
            muon_lr: learning rate of the matrices, on AdamW's scale.
            lr: learning rate of all others.
            momentum: Muon's momentum.
            betas: AdamW's betas.
            weight_decay: decoupled weight decay; parameters with fewer than two dimensions get none.
            is_matrix: decides which parameters Muon updates; default: weights of hidden layers, and in a model with
                experts their delta matrices (`groups.is_hidden_matrix`).

        Raises:
            SRDEError: no parameter has a gradient.
        """
        muon = {"rule": "muon", "lr": muon_lr, "momentum": momentum, "weight_decay": weight_decay}
        adamw = {"rule": "adamw", "lr": lr, "betas": betas}
        groups: dict[str, dict[str, Any]] = {
            "matrices": muon | {"params": []},
            "others": adamw | {"params": [], "weight_decay": weight_decay},
            "vectors": adamw | {"params": []},
        }
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                group = "matrices" if is_matrix(name, parameter) else "others" if parameter.ndim > 1 else "vectors"
                groups[group]["params"].append(parameter)
        used = [group | {"name": name} for name, group in groups.items() if group["params"]]
        if not used:
            raise SRDEError("named_parameters: none of them requires a gradient; give a model that is to be trained.")
        return cls(used, count_steps=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with the defaults of its rule; errors as in the constructor."""
        rule, name = param_group.get("rule"), param_group.get("name", "parameter group")
        if rule not in RULE_DEFAULTS:
            raise SRDEError(f"{name}: rule={rule!r}: must be one of {', '.join(RULE_DEFAULTS)}.")
        if "lr" not in param_group:
            raise SRDEError(f"{name}: lr is missing: give each parameter group its learning rate.")
        super().add_param_group(RULE_DEFAULTS[rule] | param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but the state stays fp32 where the parameters are not."""
        super().load_state_dict(state_dict)
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, param in zip(numbers, params, strict=True):
            for name, given in state_dict["state"].get(number, {}).items():
                self.state[param][name] = given.to(param.device, torch.float32, copy=True)

    def register_layout(
        self, flat_param: Tensor, shards: Sequence[MatrixShard], process_group: dist.ProcessGroup | None
    ) -> None:
        """Say which slices of which matrices a flat muon parameter contains.

        Args:
            flat_param: the 1-D tensor that `step()` will find in a muon group, recognised by identity.
            shards: the same names in the same order on every rank of `process_group`. A rank that has no part of a
                tensor gives a shard of height 0. Elements outside of all shards are padding.
            process_group: the ranks that hold the other slices; None: the matrices are whole here.

        Raises:
            SRDEError: shards overlap, exceed the parameter, or contain no matrix.
        """
        if flat_param.ndim != 1 or not flat_param.is_contiguous():
            raise SRDEError(f"flat parameter of shape {list(flat_param.shape)}: a layout needs it contiguous and 1-D.")
        end, previous = 0, None
        for shard in sorted(shards, key=lambda shard: (shard.offset, shard.first)):
            if shard.height < 0 or min(shard.count, shard.width, shard.full_height) < 1:
                raise SRDEError(
                    f"{shard.name}: {shard} holds no matrix: check its height, count, width and full_height."
                )
            if shard.height == 0:
                continue
            # Several shards may cover disjoint ranges of matrices of the same slice.
            beside = previous is not None and previous == replace(shard, first=previous.first, stop=previous.stop)
            if beside and previous is not None and (previous.stop or 0) <= shard.first:
                previous = shard
                continue
            if shard.offset < end or shard.end > flat_param.numel():
                raise SRDEError(
                    f"{shard.name}: elements {shard.offset} to {shard.end} must follow {end} and stay within "
                    f"{flat_param.numel()}: give shards that lie inside the flat parameter without overlap."
                )
            end, previous = shard.end, shard
        self._layouts[flat_param] = _Layout(tuple(shards), process_group)

    def restrict(self, flat_param: Tensor, blocks: Sequence[UpdatedBlock] | None) -> None:
        """From now on, update only these blocks of a flat AdamW parameter; the rest keeps values and state. None: all.

        A muon parameter is restricted by the `first` and `stop` of its shards.
        """
        if blocks is None:
            self._updated_blocks.pop(flat_param, None)
        else:
            self._updated_blocks[flat_param] = tuple(blocks)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that are in the groups now, with one all-reduce per process group, if any.

        Raises:
            SRDEError: a muon parameter is not a matrix and has no layout, or has a layout but no gradient, for which
                the other ranks would wait.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates: dict[tuple[dist.ProcessGroup | None, torch.device], list[_MuonUpdate]] = {}
        for group in self.param_groups:
            group["step"] += self.count_steps
            for param in group["params"]:
                self.allocate_state(param, group["rule"])
                if group["step"] == 0:
                    continue
                if group["rule"] == "muon":
                    layout = self._layout(param)
                    if param.grad is not None and (begun := self._begin_muon(param, layout, group)):
                        updates.setdefault((layout.process_group, param.device), []).extend(begun)
                elif param.grad is not None:
                    self._adamw(param, param.grad, group)
        for (process_group, _), members in updates.items():
            _finish_muon(members, process_group)
        return loss

    def allocate_state(self, param: Tensor, rule: str) -> None:
        """Create the rule's state of a parameter, as zeros, unless it exists."""
        for name in ("momentum_buffer",) if rule == "muon" else ("exp_avg", "exp_avg_sq"):
            if name not in self.state[param]:
                self.state[param][name] = torch.zeros_like(param, dtype=torch.float32)

    def _layout(self, param: Tensor) -> _Layout:
        if param in self._layouts:
            layout = self._layouts[param]
            if param.grad is None:
                names = ", ".join(shard.name for shard in layout.shards)
                raise SRDEError(f"{names}: no gradient: run backward before step() on every rank.")
            return layout
        if param.ndim not in (2, 3) or not param.is_contiguous():
            raise SRDEError(
                f"muon parameter of shape {list(param.shape)}: give a contiguous [rows, columns] or "
                "[height, count, width], or register_layout."
            )
        return _Layout((MatrixShard.whole(param.shape),), None)

    def _adamw(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if param not in self._updated_blocks:
            adamw_(param, grad.float(), state, group)
            return
        for block in self._updated_blocks[param]:
            moments = {name: block.view(tensor) for name, tensor in state.items()}
            adamw_(block.view(param), block.view(grad).float(), moments, group)

    def _begin_muon(self, param: Tensor, layout: _Layout, group: dict[str, Any]) -> list[_MuonUpdate]:
        """Apply momentum and weight decay, which are elementwise; returns the remaining updates, shard by shard."""
        assert param.grad is not None
        grad, buffer = param.grad.float(), self.state[param]["momentum_buffer"]
        flat = param.view(-1), grad.reshape(-1), buffer.view(-1)
        updates = [_MuonUpdate(shard, *flat, group) for shard in layout.shards if shard.updated]
        if all(shard.updated == shard.count for shard in layout.shards):
            parts = [(param, grad, buffer)]  # one kernel for all
        else:
            parts = [(u.shard.view(u.param), u.shard.view(u.grad), u.shard.view(u.momentum_buffer)) for u in updates]
        for values, gradients, momentum in parts:
            momentum.lerp_(gradients, 1 - group["momentum"])
            values.mul_(1 - group["lr"] * group["weight_decay"])
        return updates


def _finish_muon(updates: list[_MuonUpdate], process_group: dist.ProcessGroup | None) -> None:
    """Put all shards' Gram matrices into a buffer, all-reduce it once, and update the slices by Newton-Schulz."""
    sizes = [update.shard.updated * update.shard.width**2 for update in updates]
    grams = torch.empty(sum(sizes), device=updates[0].param.device)
    with _exact_fp32_matmul():
        for update, gram in zip(updates, grams.split(sizes), strict=True):
            x = update.nesterov()
            torch.matmul(x.mT, x, out=gram.view(update.shard.updated, update.shard.width, update.shard.width))
        if process_group is not None:
            dist.all_reduce(grams, group=process_group)
        start = 0
        # Consecutive shards of equal width share a Newton-Schulz call.
        for (width, eps), run in groupby(updates, key=lambda update: (update.shard.width, update.group["eps"])):
            members = list(run)
            counts = [update.shard.updated for update in members]
            end = start + sum(counts) * width**2
            factors = newton_schulz_factor(grams[start:end].view(-1, width, width), eps)
            start = end
            for update, factor in zip(members, factors.split(counts), strict=True):
                scale = 0.2 * math.sqrt(max(update.shard.full_height, width))
                update.shard.view(update.param).add_(update.nesterov() @ factor, alpha=-update.group["lr"] * scale)


def newton_schulz_factor(gram: Tensor, eps: float) -> Tensor:
    """Q with X Q = five Newton-Schulz steps on X, from X^T X alone; see the module's docstring.

    Args:
        gram: `[count, width, width]`, X^T X of each matrix; zero gives X Q = 0.
        eps: smallest Frobenius norm that X is divided by.

    Returns:
        `[count, width, width]` in the dtype of `gram`.
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
    """Update number `group["step"]` of torch.optim.AdamW, in place and in torch's order of operations."""
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
    """Compute fp32 products in fp32, whatever the caller allows for the model (TF32 on CUDA, bf16 in oneDNN)."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
