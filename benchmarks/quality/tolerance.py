r"""Whether the controller keeps a tolerance: true errors over 200 calls, from any lambda.

    python benchmarks/quality/tolerance.py

Of synthetic streams; with `--weights` of all layers of a trained model, each with its state, on one
held-out window after the other:

    python benchmarks/quality/tolerance.py --weights build/quality --starts 1e-12 1e6
    python benchmarks/quality/tolerance.py --weights build/quality --starts 1e-12 1e6 \
        --windows 60 --window-length 512                                   # on a processor
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import model_streams
import numpy as np
from model import Shape
from synthetic_streams import KINDS, draw
from tqdm import tqdm

import jax_aat

State = jax_aat.ResolutionState
Figures = tuple[jax.Array, ...]
"""Of a call: true relative errors [N + 1] of every head and of all of them together, FLOPs over
those of exact attention, and the share of lists that rest, which are exact."""


def controlled(
    state: State,
    operands: tuple[jax.Array, ...],
    adaptation: jax_aat.Adaptation,
    implementation: str | None,
) -> tuple[State, Figures]:
    """One call; returns the next state."""
    attend = partial(
        jax_aat.tiled_attention, *operands, is_causal=True, implementation=implementation
    )
    out, state, report = attend(adaptation=adaptation, state=state, return_report=True)
    exact = model_streams.attend_exactly(operands, implementation)
    errors = model_streams.relative_errors(out, exact)
    return state, (errors, report.spent.mean(), (report.log_lambda == -jnp.inf).mean())


@partial(jax.jit, static_argnames=("kind", "calls", "batch", "length", "adaptation"))
def of_stream(
    state: State,
    kind: str,
    calls: int,
    batch: int,
    length: int,
    adaptation: jax_aat.Adaptation,
) -> Figures:
    """The figures of all calls."""

    def call(state: State, i: jax.Array) -> tuple[State, Figures]:
        operands = draw(kind, jax.random.fold_in(jax.random.key(2), i), i, batch, length)
        return controlled(state, operands, adaptation, "xla")

    return jax.lax.scan(call, state, jnp.arange(calls))[1]


@partial(jax.jit, static_argnames=("shape", "adaptation", "implementation"))
def of_window(
    states: State,
    shape: Shape,
    params: Any,
    window: jax.Array,
    adaptation: jax_aat.Adaptation,
    implementation: str | None,
) -> tuple[State, Figures]:
    """The next states and the figures of all layers of a model on a window [T + 1]."""
    operands = model_streams.operands_by_layer(shape, params, window)
    call = partial(controlled, adaptation=adaptation, implementation=implementation)
    return jax.lax.map(lambda x: call(*x), (states, operands))


def initial(operands: tuple[jax.Array, ...], adaptation: jax_aat.Adaptation, start: float) -> State:
    """A state whose lambda is `start`."""
    return State.init(*operands[:2], adaptation, is_causal=True, threshold=start)


def of_model(
    loaded: tuple[Shape, Any, np.ndarray],
    adaptation: jax_aat.Adaptation,
    start: float,
    implementation: str | None,
) -> Figures:
    """The figures of calls [windows, layers], in numpy."""
    shape, params, windows = loaded

    @jax.jit
    def begin(window: jax.Array) -> State:
        operands = model_streams.operands_by_layer(shape, params, window)
        return jax.lax.map(lambda x: initial(x, adaptation, start), operands)

    states, calls = begin(windows[0]), []
    for window in tqdm(windows, unit="window"):
        states, figures = of_window(states, shape, params, window, adaptation, implementation)
        calls.append(figures)
    return tuple(np.stack(x) for x in zip(*jax.device_get(calls), strict=True))


def print_row(inputs: str, tolerance: float, start: float, settled: int, figures: Figures) -> None:
    """Prints a row of the table; some columns leave out the calls before it has settled.

    Figures are of calls, or of calls [calls, layers]: then of all layers what is a mean, and of the
    worst layer what is the largest or of the worst head.
    """
    errors, spent, resting = (np.asarray(x) for x in figures)
    ratio = errors / tolerance
    print(
        f"| {inputs} | {tolerance} | {start:g} | {ratio[..., -1].mean():.2f} "
        f"| {ratio[settled:, ..., -1].max():.2f} | {ratio[..., :-1].mean(0).max():.2f} "
        f"| {spent[settled:].mean():.1%} | {resting[settled:].mean():.0%} |",
        flush=True,
    )


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=200, help="of a synthetic stream")
    parser.add_argument("--batch", type=int, default=1, help="of a synthetic stream")
    parser.add_argument("--length", type=int, default=512, help="of a synthetic stream")
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.03, 0.1])
    parser.add_argument("--starts", type=float, nargs="+", default=[1e-12, 1e-4, 1.0, 1e6])
    parser.add_argument("--settled", type=int, default=20, help="calls until it is judged")
    model_streams.add_arguments(parser)
    args = parser.parse_args()
    model_streams.print_surroundings()
    print("| inputs | tolerance | first lambda | mean true error / tolerance", end=" ")
    print(f"| its largest in a call after {args.settled} | its mean in the worst head", end=" ")
    print("| FLOPs / exact | lists that rest |")
    print("|---|---|---|---|---|---|---|---|")
    settings = [(tolerance, start) for tolerance in args.tolerances for start in args.starts]
    if args.weights is None:
        for kind in KINDS:
            for tolerance, start in settings:
                adaptation = jax_aat.Adaptation(tolerance=tolerance, query_tile=32)
                first = draw(kind, jax.random.key(0), jnp.int32(0), args.batch, args.length)
                state = initial(first, adaptation, start)
                shape = (kind, args.calls, args.batch, args.length, adaptation)
                print_row(kind, tolerance, start, args.settled, of_stream(state, *shape))
        return
    loaded = model_streams.load(args)
    for tolerance, start in settings:
        adaptation = jax_aat.Adaptation(tolerance=tolerance)
        figures = of_model(loaded, adaptation, start, args.implementation)
        for layer in range(loaded[0].layers):
            of_layer = tuple(x[:, layer] for x in figures)
            print_row(f"layer {layer}", tolerance, start, args.settled, of_layer)
        print_row("all layers", tolerance, start, args.settled, figures)


if __name__ == "__main__":
    main()
