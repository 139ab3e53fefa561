"""The attentions whose speed is compared: this package's, JAX's and PyTorch's."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from pallas_contender import mosaic
from passes import Array, Maker, Measured, SkippedError, device_room, watch_memory
from torch_contenders import flex, sdpa

from jax_aat import vulkan
from jax_aat.adaptation import Adaptation
from jax_aat.attention import Implementation, tiled_attention
from jax_aat.commands.contenders import Case, Direction, Pass, jax_nn, ours
from jax_aat.problem import count_pairs

_PLANNING = ("plan_", "cross_tile_router", "tile_processor")
"""Kernels that only choose levels and make lists; coarse rows and state are part of attention."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What adaptive attention may spend.

    Attributes:
      amount: A fraction of the FLOPs of exact attention or, with `per_query`, a number of keys.
      per_query: Whether it is what reading so many keys costs each query, whatever the length.
      settings: Other attributes of the `Adaptation`.
    """

    amount: float
    per_query: bool = False
    settings: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        words = [f"{self.amount:g}" + (" keys" if self.per_query else "")]
        return " ".join([*words, *(f"{name}={value}" for name, value in self.settings)])

    def fraction(self, case: Case) -> float:
        """The budget for a case, as `Adaptation` has it.

        Raises:
          SkippedError: It is all of exact attention and more.
        """
        if not self.per_query:
            return self.amount
        mean = count_pairs(case.queries, case.keys, case.causal) / case.queries
        if self.amount >= mean:
            raise SkippedError(f"a query sees {mean:g} keys on average, so nothing can be saved")
        return self.amount / mean


def by_jax(
    make: Callable[[Case, list[Array], Direction], Pass], uses_vulkan: bool = False
) -> Maker:
    """A contender of JAX whose memory is watched."""

    def made(case: Case, arrays: list[Array], direction: Direction) -> Measured:
        read = watch_memory()
        found = make(case, arrays, direction)
        run = (lambda: found.wait(found.start())) if uses_vulkan else None
        memory = partial(read, found.memory_bytes, run)
        measured = Measured(**vars(found), memory=memory)
        if not uses_vulkan:
            return measured
        facts = partial(_kernel_facts, measured)
        return dataclasses.replace(measured, facts=lambda: {"relative_flops": 1.0} | facts())

    return made


def adaptive(
    budget: Budget,
    case: Case,
    arrays: list[Array],
    direction: Direction,
    implementation: Implementation = "vulkan",
) -> Measured:
    """This package's adaptive attention; every call makes its own plan."""
    adaptation = Adaptation(budget=budget.fraction(case), **dict(budget.settings))
    make = partial(ours, implementation=implementation, adaptation=adaptation)
    made = by_jax(make, implementation == "vulkan")(case, arrays, direction)
    kernel_facts = made.facts if implementation == "vulkan" else dict

    def facts() -> dict[str, Any]:
        return kernel_facts() | _report(adaptation, case, arrays, implementation)

    return dataclasses.replace(made, facts=facts)


def xla(case: Case, arrays: list[Array], direction: Direction) -> Pass:
    """`jax.nn` by XLA, which holds the scores of all pairs: left out where they would not fit."""
    scores = case.batch * case.heads * case.queries * case.keys
    # In float32, and their probabilities once more in the dtype; so are gradients and tangents.
    needed = scores * (4 + jnp.dtype(case.dtype).itemsize) * (1 if direction == "forward" else 2)
    room = device_room() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    if needed > room:
        gib = needed / 2**30, room / 2**30
        raise SkippedError("its scores need about {:.3g} GiB of {:.3g} GiB".format(*gib))
    return jax_nn("xla", case, arrays, direction)


DENSE: dict[str, Maker] = {
    "jax_aat exact": by_jax(ours, uses_vulkan=True),
    "jax.nn cudnn": by_jax(partial(jax_nn, "cudnn")),
    "jax.nn xla": by_jax(xla),
    "pallas mosaic": by_jax(mosaic),
    "torch flash": partial(sdpa, "FLASH_ATTENTION"),
    "torch cudnn": partial(sdpa, "CUDNN_ATTENTION"),
}
ADAPTIVE, FLEX = "jax_aat adaptive", "torch flex"
NAMES = ("jax_aat exact", ADAPTIVE, *list(DENSE)[1:], FLEX)


def chosen(
    names: Sequence[str], budgets: Sequence[Budget], block_sizes: Sequence[int]
) -> dict[str, Maker]:
    """The contenders of some names; adaptive and block-sparse ones once for each budget."""
    found: dict[str, Maker] = {}
    for name in names:
        if name in DENSE:
            found[name] = DENSE[name]
        for budget in budgets if name == ADAPTIVE else ():
            found[f"{name} {budget}"] = partial(adaptive, budget)
        # Its blocks are those of the plan that is made by default.
        plain = dict.fromkeys(dataclasses.replace(budget, settings=()) for budget in budgets)
        for budget in plain if name == FLEX else ():
            for size in block_sizes:
                found[f"{name} {size} at {budget}"] = partial(_flex, size, budget)
    return found


def _flex(
    size: int, budget: Budget, case: Case, arrays: list[Array], direction: Direction
) -> Measured:
    return flex(size, budget.fraction(case), case, arrays, direction)


def _report(
    adaptation: Adaptation, case: Case, arrays: list[Array], implementation: Implementation
) -> dict[str, Any]:
    """What the report of the first batch entry says; the entries are planned one by one."""
    attention = partial(
        tiled_attention,
        is_causal=case.causal,
        implementation=implementation,
        adaptation=dataclasses.replace(adaptation, audit_rate=0.0),
        return_report=True,
    )
    operands = [jnp.asarray(x[:1], case.dtype) for x in arrays[:3]]
    report = jax.jit(lambda *xs: attention(*xs)[1])(*operands)
    return {
        "relative_flops": float(report.relative_flops.mean()),
        "budget": adaptation.budget,
        "budget_spent": float(report.budget_spent),
    }


def _kernel_facts(made: Pass) -> dict[str, Any]:
    """Milliseconds by kernel, one call; without the forward pass that is before another one."""
    vulkan.set_timing(True)
    try:
        made.wait(made.start())
    finally:
        vulkan.set_timing(False)
    last = vulkan.last_dispatch()
    if last is None or last.kernel_milliseconds is None:
        return {}
    total: dict[str, float] = {}
    for kernel, milliseconds in zip(last.kernels, last.kernel_milliseconds, strict=True):
        total[kernel] = total.get(kernel, 0.0) + milliseconds
    facts: dict[str, Any] = {"kernel_milliseconds": total}
    if any(kernel.startswith(_PLANNING) for kernel in total):
        facts["planning"] = sum(
            milliseconds for kernel, milliseconds in total.items() if kernel.startswith(_PLANNING)
        )
    return facts
