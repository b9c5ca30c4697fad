"""Triton kernels for the neuron experts' elementwise work: one for the forward, one for the backward.

Each program handles one token. It reads the base's gate and up values at the neurons of the token's experts and the
shifts that the deltas add, and writes what changes there. Only the base's own values and gradients are dense.

Shifts are in the X slots of `products.ExpertProducts`. All arithmetic is in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activation(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """phi(x)."""
    if KIND == 0:
        return x * tl.sigmoid(x)
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * tl.sigmoid(2 * inner)


@triton.jit
def activation_slope(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The derivative of phi at x."""
    if KIND == 0:
        s = tl.sigmoid(x)
        return s * (1 + x * (1 - s))
    s = tl.sigmoid(2 * 0.7978845608028654 * (x + 0.044715 * x * x * x))
    return s + 2 * x * s * (1 - s) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)


@triton.jit
def experts_forward(  # type: ignore[no-untyped-def]
    gate,
    up,
    shift,
    weights,
    index,
    neurons,
    hidden,
    weighted,
    F,
    m,
    X: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the experts' change to hidden `[T, F]`, in place, and write the weighted hidden values `[T, X, m]`.

    gate, up `[T, F]`; shift `[T, X, 2, m]`; weights, index `[T, K]`; neurons `[m]` if SHARED, else `[E, m]`. Slots of
    experts that a token does not use (if BY_EXPERT) become zero.
    """
    t = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < m
    if BY_EXPERT:
        for slot in range(X):
            tl.store(weighted + (t * X + slot) * m + column, tl.zeros([BLOCK], tl.float32), inside)
        tl.debug_barrier()  # other threads may fill the slots of the token's experts
    change = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        expert = tl.load(index + t * K + k).to(tl.int64)
        p = tl.load(weights + t * K + k).to(tl.float32)
        slot = expert if BY_EXPERT else k
        place = t * F + tl.load(neurons + (0 if SHARED else expert * m) + column, inside, 0).to(tl.int64)
        g = tl.load(gate + place, inside, 0).to(tl.float32)
        u = tl.load(up + place, inside, 0).to(tl.float32)
        own = shift + ((t * X + slot) * 2) * m + column
        g_e = g + tl.load(own, inside, 0).to(tl.float32)
        u_e = u + tl.load(own + m, inside, 0).to(tl.float32)
        h = activation(g_e, KIND) * u_e
        tl.store(weighted + (t * X + slot) * m + column, p * h, inside)
        change += p * (h - activation(g, KIND) * u)
        if not SHARED or k == K - 1:
            tl.store(hidden + place, tl.load(hidden + place, inside, 0).to(tl.float32) + change, inside)
            change = tl.zeros([BLOCK], tl.float32)
            tl.debug_barrier()  # the next expert may share neurons


@triton.jit
def experts_backward(  # type: ignore[no-untyped-def]
    gate,
    up,
    shift,
    weights,
    index,
    neurons,
    of_hidden,
    of_weighted,
    of_gate,
    of_up,
    of_shift,
    of_weights,
    F,
    m,
    X: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    DENSE: tl.constexpr,
):
    """Turn the gradients of hidden and weighted into those of gate, up, shift and weights, in the forward's shapes.

    Where an expert replaces a neuron with weight p, the base's own value counts less by p.
    """
    t = tl.program_id(0).to(tl.int64)
    for first in range(0, F, DENSE):
        place = t * F + first + tl.arange(0, DENSE)
        here = first + tl.arange(0, DENSE) < F
        d = tl.load(of_hidden + place, here, 0).to(tl.float32)
        g = tl.load(gate + place, here, 0).to(tl.float32)
        u = tl.load(up + place, here, 0).to(tl.float32)
        tl.store(of_gate + place, d * u * activation_slope(g, KIND), here)
        tl.store(of_up + place, d * activation(g, KIND), here)
    column = tl.arange(0, BLOCK)
    inside = column < m
    if BY_EXPERT:
        for half in range(2 * X):
            tl.store(of_shift + (t * X * 2 + half) * m + column, tl.zeros([BLOCK], tl.float32), inside)
        tl.debug_barrier()
    more_g = tl.zeros([BLOCK], tl.float32)
    more_u = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        expert = tl.load(index + t * K + k).to(tl.int64)
        p = tl.load(weights + t * K + k).to(tl.float32)
        slot = expert if BY_EXPERT else k
        place = t * F + tl.load(neurons + (0 if SHARED else expert * m) + column, inside, 0).to(tl.int64)
        g = tl.load(gate + place, inside, 0).to(tl.float32)
        u = tl.load(up + place, inside, 0).to(tl.float32)
        d = tl.load(of_hidden + place, inside, 0).to(tl.float32)
        own = ((t * X + slot) * 2) * m + column
        g_e = g + tl.load(shift + own, inside, 0).to(tl.float32)
        u_e = u + tl.load(shift + own + m, inside, 0).to(tl.float32)
        w = tl.load(of_weighted + (t * X + slot) * m + column, inside, 0).to(tl.float32)
        a, a_e = activation(g, KIND), activation(g_e, KIND)
        tl.store(of_weights + t * K + k, tl.sum(d * (a_e * u_e - a * u) + w * a_e * u_e))
        of_g = p * (d + w) * u_e * activation_slope(g_e, KIND)
        of_u = p * (d + w) * a_e
        tl.store(of_shift + own, of_g, inside)
        tl.store(of_shift + own + m, of_u, inside)
        more_g += of_g - p * d * u * activation_slope(g, KIND)
        more_u += of_u - p * d * a
        if not SHARED or k == K - 1:
            tl.debug_barrier()  # other threads wrote the dense gradients, or those of an expert that shares neurons
            if SHARED:  # recomputed, so that the sum is rounded only once
                now_g = d * u * activation_slope(g, KIND)
                now_u = d * a
            else:
                now_g = tl.load(of_gate + place, inside, 0).to(tl.float32)
                now_u = tl.load(of_up + place, inside, 0).to(tl.float32)
            tl.store(of_gate + place, now_g + more_g, inside)
            tl.store(of_up + place, now_u + more_u, inside)
            more_g = tl.zeros([BLOCK], tl.float32)
            more_u = tl.zeros([BLOCK], tl.float32)
