"""Promotion of ranks and dtypes inside this package, whatever users forbid in their own code."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

_P = ParamSpec("_P")
_R = TypeVar("_R")


def may_promote(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Lets arrays of other ranks and dtypes meet in a function.

    Also under `jax_numpy_rank_promotion` and a strict `jax_numpy_dtype_promotion`.
    """

    @functools.wraps(function)
    def lenient(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return lenient
