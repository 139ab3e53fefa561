"""Attention and its derivatives in float64, dense, by the formulas of docs/architecture.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

EMPTY_LOGSUMEXP = float(np.float32(-0.7) * np.finfo(np.float32).max)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Problem:
    """Operands and options of a call, with the shapes of docs/architecture.md."""

    q: Array
    k: Array
    v: Array
    bias: Array | None = None
    mask: Array | None = None
    q_lengths: Array | None = None
    kv_lengths: Array | None = None
    q_segments: Array | None = None
    kv_segments: Array | None = None
    scale: float = 1.0
    soft_cap: float = 0.0
    causal: bool = False
    window: tuple[int, int] = (-1, -1)

    @property
    def batch(self) -> tuple[int, ...]:
        """The broadcast batch axes."""
        axes = self.q.ndim - 3
        given = (
            *(self.q, self.k, self.v, self.bias, self.mask, self.q_lengths, self.kv_lengths),
            *(self.q_segments, self.kv_segments),
        )
        return np.broadcast_shapes(*(x.shape[:axes] for x in given if x is not None))

    @property
    def logits_shape(self) -> tuple[int, ...]:
        """[*batch, N, T, S]."""
        queries, heads, _ = self.q.shape[-3:]
        return (*self.batch, heads, queries, self.k.shape[-3])


def visible(problem: Problem) -> Array:
    """Which query attends to which key, [*batch, N, T, S]."""
    t = np.arange(problem.q.shape[-3])[:, None]
    s = np.arange(problem.k.shape[-3])
    result = np.ones(problem.logits_shape, bool)
    left, right = problem.window
    if problem.causal:
        result &= s <= t
    if left >= 0:
        result &= s >= t - left
    if right >= 0:
        result &= s <= t + right
    if problem.q_lengths is not None:
        result &= t < problem.q_lengths[..., None, None, None]
    if problem.kv_lengths is not None:
        result &= s < problem.kv_lengths[..., None, None, None]
    if problem.q_segments is not None and problem.kv_segments is not None:
        same = problem.q_segments[..., :, None] == problem.kv_segments[..., None, :]
        result &= same[..., None, :, :]
    if problem.mask is not None:
        result &= problem.mask
    return result


class Attention:
    """The forward pass, and what its derivatives need."""

    def __init__(self, problem: Problem):
        self.groups = problem.q.shape[-2] // problem.k.shape[-2]
        self.q = problem.q.astype(np.float64)
        self.k = self._spread(problem.k)
        self.v = self._spread(problem.v)
        logits = problem.scale * np.einsum("...tnh,...snh->...nts", self.q, self.k)
        self.slope = np.full(logits.shape, problem.scale)  # d logits / d (q . k)
        if problem.soft_cap:
            bent = np.tanh(logits / problem.soft_cap)
            logits = problem.soft_cap * bent
            self.slope = problem.scale * (1 - bent**2)
        if problem.bias is not None:
            logits = logits + problem.bias.astype(np.float64)
        logits = np.where(visible(problem), logits, -np.inf)
        largest = logits.max(-1, keepdims=True)
        empty = largest == -np.inf
        shift = np.where(empty, 0, largest)
        weights = np.exp(logits - shift)
        total = np.where(empty, 1, weights.sum(-1, keepdims=True))
        self.p = weights / total
        logsumexp = np.where(empty, EMPTY_LOGSUMEXP, shift + np.log(total))
        self.logsumexp = np.swapaxes(logsumexp[..., 0], -1, -2)
        self.out = np.einsum("...nts,...snh->...tnh", self.p, self.v)

    def _spread(self, x: Array) -> Array:
        return np.repeat(x.astype(np.float64), self.groups, axis=-2)

    def _gather(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-2], -1, self.groups, x.shape[-1]).sum(-2)

    def tangent(
        self,
        dq: Array | None = None,
        dk: Array | None = None,
        dv: Array | None = None,
        dbias: Array | None = None,
    ) -> tuple[Array, Array]:
        """Tangents of out and logsumexp."""
        ds = np.zeros(self.p.shape)
        if dq is not None:
            ds += self.slope * np.einsum("...tnh,...snh->...nts", dq.astype(np.float64), self.k)
        if dk is not None:
            ds += self.slope * np.einsum("...tnh,...snh->...nts", self.q, self._spread(dk))
        if dbias is not None:
            ds += dbias.astype(np.float64)
        mean = np.swapaxes((self.p * ds).sum(-1), -1, -2)
        out = np.einsum("...nts,...snh->...tnh", self.p * ds, self.v) - mean[..., None] * self.out
        if dv is not None:
            out += np.einsum("...nts,...snh->...tnh", self.p, self._spread(dv))
        return out, mean

    def backward(
        self, dout: Array | None = None, dlogsumexp: Array | None = None
    ) -> tuple[Array, Array, Array, Array]:
        """Gradients of q, k, v and bias, the last one not summed."""
        dout = np.zeros(self.out.shape) if dout is None else dout.astype(np.float64)
        delta = (dout * self.out).sum(-1)
        if dlogsumexp is not None:
            delta = delta - dlogsumexp
        products = np.einsum("...tnh,...snh->...nts", dout, self.v)
        ds = self.p * (products - np.swapaxes(delta, -1, -2)[..., None])
        bent = self.slope * ds
        return (
            np.einsum("...nts,...snh->...tnh", bent, self.k),
            self._gather(np.einsum("...nts,...tnh->...snh", bent, self.q)),
            self._gather(np.einsum("...nts,...tnh->...snh", self.p, dout)),
            ds,
        )


def sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sums over the axes along which `shape` has size 1."""
    return x.sum(tuple(i for i, size in enumerate(shape) if size == 1), keepdims=True)


def relative_error(x: Any, expected: Array) -> float:
    """||x - expected|| / ||expected||, or ||x|| where nothing is expected."""
    x = np.asarray(x).astype(np.float64)
    norm = float(np.linalg.norm(expected))
    return float(np.linalg.norm(x - expected)) / (norm or 1.0)
