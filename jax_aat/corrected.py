"""Attention's passes where coarse rows and what corrects them are made of q, k and v on the way.

Each pass of `jax_aat.tiled_xla` has its twin here. With a plan and without coarse rows among the
operands it makes these, with `options.corrects` also the state (`jax_aat.pyramid`), and leaves the
rest to a pass that is given them: by default that of `jax_aat.tiled_xla`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jax_aat import tiled_xla
from jax_aat.problem import (
    PRIMAL_OF,
    TANGENT_OF,
    Operands,
    Options,
    Slot,
    broadcast_batch,
    over_batch,
)
from jax_aat.pyramid import Correction, coarse_rows, correction

Pass = Callable[..., Sequence[jax.Array]]
"""(operands, options, ...) -> results."""

_SOURCES = (Slot.Q, Slot.K, Slot.V)
_INPUTS = (*_SOURCES, Slot.KV_LENGTHS)


def makes_means(operands: Operands) -> bool:
    """Whether a pass of these operands makes its coarse rows itself."""
    return Slot.LEVELS in operands and Slot.COARSE_K not in operands


def forward(
    operands: Operands, options: Options, attend: Pass | None = None, differentiable: bool = False
) -> tuple[jax.Array, ...]:
    """(out, logsumexp) and, with a plan, shares; `attend`: the pass that is given coarse rows."""
    attend = attend or functools.partial(tiled_xla.forward, differentiable=differentiable)
    if not makes_means(operands):
        return tuple(attend(operands, options))
    means, state = _made(operands, options)
    out, lse, shares = attend(operands | means, _given(options))
    return _applied(state, out, shares), lse, shares


def tangent(
    operands: Operands, options: Options, attend: Pass | None = None, differentiable: bool = False
) -> tuple[jax.Array, ...]:
    """(dout, dlogsumexp) and, with a plan, dshares."""
    attend = attend or functools.partial(tiled_xla.tangent, differentiable=differentiable)
    if not makes_means(operands):
        return tuple(attend(operands, options))
    operands = _over_batch(operands)
    moving = {s: operands[TANGENT_OF[s]] for s in _SOURCES if TANGENT_OF[s] in operands}
    primals = {slot: operands[slot] for slot in moving}
    (means, state), (dmeans, dstate) = jax.jvp(
        lambda some: _made(operands | some, options), (primals,), (moving,)
    )
    out, shares = _removed(state, operands), operands[Slot.SHARES]
    along = {TANGENT_OF[slot]: t for slot, t in dmeans.items()} if moving else {}
    known = operands | means | along | {Slot.OUT: out}
    dout, dlse, dshares = attend(known, _given(options))
    _, dout = jax.jvp(_applied, (state, out, shares), (dstate, dout, dshares))
    return dout, dlse, dshares


def backward(
    operands: Operands,
    options: Options,
    results: Sequence[Slot],
    dbias_shape: tuple[int, ...] | None = None,
    attend: Pass | None = None,
    differentiable: bool = False,
) -> tuple[jax.Array, ...]:
    """The wanted gradients, with all batch axes."""
    attend = attend or functools.partial(tiled_xla.backward, differentiable=differentiable)
    if not makes_means(operands):
        return tuple(attend(operands, options, results=results, dbias_shape=dbias_shape))
    operands = _over_batch(operands)
    sources = {slot: operands[slot] for slot in _SOURCES}
    (means, state), pull = jax.vjp(lambda some: _made(operands | some, options), sources)
    out, shares = _removed(state, operands), operands[Slot.SHARES]
    known = operands | means | {Slot.OUT: out}
    dstate = jax.tree.map(jnp.zeros_like, state)
    if Slot.DOUT in operands and state is not None:
        dstate, known[Slot.DOUT], dshares = jax.vjp(_applied, state, out, shares)[1](
            operands[Slot.DOUT]
        )
        known[Slot.DSHARES] = dshares + operands.get(Slot.DSHARES, 0)
    inner = tuple(dict.fromkeys((*results, *(TANGENT_OF[slot] for slot in means))))
    found = attend(known, _given(options), results=inner, dbias_shape=dbias_shape)
    gradients = dict(zip(inner, found, strict=True))
    (more,) = pull(({slot: gradients[TANGENT_OF[slot]] for slot in means}, dstate))
    return tuple(
        gradients[slot] + more[PRIMAL_OF[slot]] if PRIMAL_OF[slot] in more else gradients[slot]
        for slot in results
    )


def _over_batch(operands: Operands) -> Operands:
    """Those that the state is differentiated in broadcast to all batch axes of the call."""
    batch = broadcast_batch(operands)
    moved = (*_SOURCES, Slot.OUT, Slot.SHARES)
    named = (*moved, *(TANGENT_OF[slot] for slot in moved))
    return {s: over_batch(s, x, batch) if s in named else x for s, x in operands.items()}


def _made(operands: Operands, options: Options) -> tuple[Operands, Correction | None]:
    """Coarse rows, biases of levels if there is a state, and the state."""
    inputs = {slot: x for slot, x in operands.items() if slot in _INPUTS}
    batch = broadcast_batch(inputs)
    for slot, x in inputs.items():
        whole = over_batch(slot, x, batch)
        inputs[slot] = whole.reshape(math.prod(batch), *whole.shape[len(batch) :])
    rows = coarse_rows(inputs, options.super_tile)
    means = dict(zip((Slot.COARSE_K, Slot.COARSE_V), rows, strict=True))
    state = None
    if options.corrects:
        state = correction(inputs, options)
        means[Slot.LEVEL_BIAS] = state.level_bias
    restored: tuple[Operands, Correction | None] = jax.tree.map(
        lambda x: x.reshape(*batch, *x.shape[1:]), (means, state)
    )
    return restored


def _given(options: Options) -> Options:
    """Those of a pass that is given coarse rows."""
    return dataclasses.replace(options, corrects=False)


def _applied(state: Correction | None, out: jax.Array, shares: jax.Array) -> jax.Array:
    return out if state is None else state.applied(out, shares)


def _removed(state: Correction | None, operands: Operands) -> jax.Array:
    """The output before it was corrected."""
    if state is None:
        return operands[Slot.OUT]
    return state.removed(operands[Slot.OUT], operands[Slot.SHARES])
