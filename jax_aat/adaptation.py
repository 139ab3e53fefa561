"""`Adaptation`: how much of attention is computed exactly, and how that is decided."""

import dataclasses
import math
import numbers
from typing import Any

from jax_aat.arguments import is_integer
from jax_aat.levels import EXACT, MEAN, SUPER_MEAN, Grid
from jax_aat.problem import Operands, extents

_LEVELS = ((EXACT,), (EXACT, MEAN), (EXACT, MEAN, SUPER_MEAN))
_QUERY_TILES = (16, 32, 64, 128, 256)
_SUPER_TILES = (256, 512, 1024)
_SHORT = 4096
"""Keys up to which a sequence is short: what a tile must read of it weighs more than what tiles
cost."""
_LONG = 32768
"""Keys from which a causal sequence is long: for the same loss one stage and a larger budget take
less time than two stages (docs/adaptation.md)."""
_MUCH = 0.25
"""Fraction of the FLOPs beyond which it is not time that a budget saves: on a GPU that cuDNN serves
its dense attention takes less. Two stages then spend the budget better."""
_AUDIT_RATE, _AUDITED_ROWS = 1 / 64, 64
"""Of a sequence an audit computes the lesser of both: from 32 rows on it tells enough, and each row
costs as much as the sequence is long."""


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """How adaptive attention chooses its levels; exactly one of the first three is given.

    Attributes:
      budget: Fraction of the FLOPs of exact attention that a call may spend, planning included;
        1 is exact attention. One lambda serves all heads and tiles of a batch entry, so that those
        that need more get more.
      tolerance: Relative error of the output, kept by audit and controller; needs a state.
      threshold: Lambda itself, the predicted squared error (in units of the mean squared norm of
        a value) that one row read must save; 0 is exact attention. Compute then moves freely
        between calls, so between the layers of a model.
      levels: Levels in use: (0,) drops what is not exact, (0, 1) reads means of granules for it,
        (0, 1, 2) those of super-tiles as well, corrected by the state.
      query_tile: Rows of a query tile, which share one list of granules: 16, 32, 64, 128 or 256;
        None: 64 where there are up to 4,096 keys, else 128.
      super_tile: Keys of a super-tile, the unit of level 2 and of the state: 256, 512 or 1,024;
        None: 256 where there are up to 4,096 keys, else 1,024.
      stages: 1: importance is judged by means of 16 queries and 16 keys only; 2: that of the
        foremost granules also by means of 4; None: 1 in causal calls of at least 32,768 keys
        without a budget of more than 0.25, else 2.
      audit_rate: Fraction of the query rows that an audit computes exactly as well; above 0 with a
        tolerance; None: 1/64, of long sequences fewer, 64 rows.
      replan_every: Calls that a plan carried in a state serves; without a state every call plans.

    Raises:
      TypeError: A field has a wrong type.
      ValueError: A field is out of range, or not exactly one goal is given.
    """

    budget: float | None = None
    tolerance: float | None = None
    threshold: float | None = None
    levels: tuple[int, ...] = (EXACT, MEAN, SUPER_MEAN)
    query_tile: int | None = None
    super_tile: int | None = None
    stages: int | None = None
    audit_rate: float | None = None
    replan_every: int = 1

    def __post_init__(self) -> None:
        goals = {
            name: getattr(self, name)
            for name in ("budget", "tolerance", "threshold")
            if getattr(self, name) is not None
        }
        if len(goals) != 1:
            given = " and ".join(goals) or "none"
            raise ValueError(
                f"Adaptation: got {given}, expected exactly one of budget, tolerance and threshold"
            )
        # Python's own numbers, so that plans can be written whichever kind was given.
        rate = {} if self.audit_rate is None else {"audit_rate": self.audit_rate}
        for name, value in (goals | rate).items():
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                raise TypeError(f"{name}: got {value!r}, expected a Python number")
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name}: got {value}, expected a finite number of at least 0")
            object.__setattr__(self, name, float(value))
        for name in ("budget", "tolerance"):
            if goals.get(name) == 0:
                raise ValueError(f"{name}: got 0, expected a number above 0")
        if self.budget is not None and self.budget > 1:
            raise ValueError(f"budget: got {self.budget}, expected a fraction of at most 1")
        if self.tolerance is not None and self.audit_rate == 0:
            raise ValueError(
                "audit_rate: got 0, expected a fraction above 0: audits keep a tolerance"
            )
        if self.audit_rate is not None and self.audit_rate > 1:
            raise ValueError(f"audit_rate: got {self.audit_rate}, expected a fraction of at most 1")
        sizes = {"query_tile": _QUERY_TILES, "super_tile": _SUPER_TILES, "stages": (1, 2)}
        for name, allowed in sizes.items():
            if getattr(self, name) is None:
                continue
            expected = " or ".join(map(str, allowed))
            value = _integer(name, getattr(self, name), expected)
            if value not in allowed:
                raise ValueError(f"{name}: got {value}, expected {expected}")
            object.__setattr__(self, name, value)
        expected = " or ".join(map(str, _LEVELS))
        if not isinstance(self.levels, tuple):
            raise TypeError(f"levels: got {self.levels!r}, expected {expected}")
        levels = tuple(_integer("levels", level, expected) for level in self.levels)
        if levels not in _LEVELS:
            raise ValueError(f"levels: got {levels}, expected {expected}")
        object.__setattr__(self, "levels", levels)
        expected = "an integer of at least 1"
        replan_every = _integer("replan_every", self.replan_every, expected)
        if replan_every < 1:
            raise ValueError(f"replan_every: got {replan_every}, expected {expected}")
        object.__setattr__(self, "replan_every", replan_every)

    def grid(self, queries: int, keys: int, heads: int, kv_heads: int) -> Grid:
        """How a call of T queries and S keys, N query and K key/value heads is cut."""
        query_tile, super_tile = (64, 256) if keys <= _SHORT else (128, 1024)
        query_tile, super_tile = self.query_tile or query_tile, self.super_tile or super_tile
        return Grid(queries, keys, heads, kv_heads, query_tile, super_tile)

    def audit_rate_for(self, queries: int) -> float:
        """Fraction of the rows of a call of T queries that an audit computes."""
        if self.audit_rate is not None:
            return self.audit_rate
        return min(_AUDIT_RATE, _AUDITED_ROWS / queries)

    def stages_for(self, keys: int, causal: bool) -> int:
        """Stages by which a call of S keys is judged."""
        saves_time = self.budget is None or self.budget <= _MUCH
        return self.stages or (1 if causal and keys >= _LONG and saves_time else 2)


def grid_of(operands: Operands, adaptation: Adaptation) -> Grid:
    """How an adaptive call is cut.

    Raises:
      ValueError: A length is symbolic.
    """
    sizes = extents(operands)
    for name, size in (("query", sizes.queries), ("key", sizes.keys)):
        if not isinstance(size, int):
            raise ValueError(f"{name}: got symbolic length {size}, adaptation needs a known one")
    return adaptation.grid(sizes.queries, sizes.keys, sizes.heads, sizes.kv_heads)


def _integer(name: str, value: Any, expected: str) -> int:
    """An integer of Python, of NumPy or the like as one of Python."""
    if not is_integer(value):
        raise TypeError(f"{name}: got {value!r}, expected {expected}")
    return int(value)
