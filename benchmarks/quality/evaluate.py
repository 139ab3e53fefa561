r"""Puts other attentions into every layer of trained models and measures what that does.

    python benchmarks/quality/evaluate.py --weights build/quality --seeds 0 1 --seconds 280
    python benchmarks/quality/evaluate.py --weights build/quality --seeds 0 --lengths 512 \
        --fractions 0.5 0.25 --texts 4 --fidelity-texts 1                  # on a processor

For every length, attention and fraction of the operations: the loss of every held-out text, in all
and by the place in a tile of the queries that choose together, and on some texts, layer by layer,
the relative error of the output for the exact queries, keys and values.
The most important cases come first, and the file is rewritten after each, so that a run that is cut
short by ``--seconds`` has them. `summary.py` makes tables and pictures of the files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contenders import BASELINES, EXACT, Contender, Sizes
from facts import surroundings
from library import LIBRARY, SETTINGS
from model import Shape, default_dtype, losses
from ours import OURS, SHARED, VARIANTS, calibrate
from storage import load_held_out, load_weights, windows_of
from tqdm import tqdm

CONTENDERS = {x.name: x for x in [EXACT, OURS, LIBRARY, *SETTINGS, *VARIANTS, *BASELINES]}
MAIN = [LIBRARY.name, "block top-k", "MRA"]


@dataclass(frozen=True)
class Job:
    """One attention in every layer, or (`fidelity`) beside exact attention, on some texts."""

    length: int
    name: str
    fraction: float
    texts: int
    fidelity: bool


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=Path("build/quality"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.125, 0.25, 0.0625, 0.5])
    parser.add_argument(
        "--texts", type=int, nargs="+", default=[32, 8], help="windows of each length"
    )
    parser.add_argument("--fidelity-texts", type=int, default=2)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing after them")
    parser.add_argument("--output", type=Path, default=Path("build/quality/evaluation.json"))
    args = parser.parse_args(arguments)
    args.texts = (args.texts * len(args.lengths))[: len(args.lengths)]
    return args


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """What is measured, the most important first; fractions are in the order of importance."""
    counts = dict(zip(args.lengths, args.texts, strict=True))

    def block(names: list[str], fractions: list[float]) -> Iterator[Job]:
        for fraction in fractions:
            for length, texts in counts.items():
                for name in names:
                    if name in args.contenders:
                        yield Job(length, name, fraction, texts, False)

    settings = [contender.name for contender in SETTINGS]
    others = [name for name in CONTENDERS if name not in (*MAIN, *settings, "exact")]
    yield from (Job(length, "exact", 1.0, texts, False) for length, texts in counts.items())
    yield from block(MAIN, args.fractions[:2])
    yield from block([OURS.name, *SHARED], args.fractions[:1])
    yield from block(MAIN, args.fractions[2:])
    yield from block(settings, args.fractions)
    for fraction, length in itertools.product(args.fractions, args.lengths):
        for name in [name for name in CONTENDERS if name in args.contenders and name != "exact"]:
            yield Job(length, name, fraction, args.fidelity_texts, True)
    yield from block(others, args.fractions)


class Evaluator:
    """Models of several seeds, the held-out text, and the compiled ways to run them."""

    def __init__(self, folder: Path, seeds: Sequence[int]) -> None:
        loaded = [load_weights(folder, seed) for seed in seeds]
        self.seeds = seeds
        self.params = [params for params, _ in loaded]
        self.shape: Shape = loaded[0][1]
        self.text = load_held_out(folder)
        self.calibrations: dict[tuple[str, int, int, float], np.float32] = {}

    def sizes(self, length: int) -> Sizes:
        """What costs at a length depend on."""
        return Sizes(length, self.shape.heads, self.shape.kv_heads, self.shape.head_dim)

    def compiled(self, job: Job) -> Callable[..., Any]:
        """Compiles (parameters, window [T + 1], the contender's) -> losses [T], besides."""
        fraction = job.fraction if CONTENDERS[job.name].static else None
        return self._compiled(job.length, job.name, job.fidelity, fraction)

    @cache  # noqa: B019, one evaluator a run
    def _compiled(
        self, length: int, name: str, fidelity: bool, fraction: float | None
    ) -> Callable[..., Any]:
        contender = CONTENDERS[name]
        example = contender.parameters(self.sizes(length), fraction or 0.5)
        run = partial(beside_exact if fidelity else in_place, contender)

        @jax.jit
        def evaluate(params: Any, window: jax.Array, parameters: Any) -> tuple[jax.Array, Any]:
            def layer(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
                numbers = example if contender.static else parameters
                out, besides = run(q[0], k[0], v[0], numbers)
                return out[None], besides

            loss, besides = losses(self.shape, default_dtype(), layer, params, window[None])
            return loss[0], besides

        window = jax.ShapeDtypeStruct((length + 1,), jnp.uint8)
        return evaluate.lower(self.params[0], window, example).compile()

    def parameters(self, job: Job, index: int) -> Any:
        """The numbers of a contender; for a shared lambda, found on a text that no job reads."""
        if job.name not in SHARED:
            return CONTENDERS[job.name].parameters(self.sizes(job.length), job.fraction)
        case = (job.name, job.length, index, job.fraction)
        if case not in self.calibrations:
            params, window = self.params[index], self.text[-1][: job.length + 1]
            routing = SHARED[job.name]
            self.calibrations[case] = calibrate(self.shape, params, window, job.fraction, routing)
        return np.float32(job.fraction), self.calibrations[case]

    def by_place(self, job: Job, losses: jax.Array) -> dict[str, jax.Array]:
        """Losses by the place in a contender's tiles; under exact attention, in those of all."""
        contenders = CONTENDERS.values() if job.name == "exact" else [CONTENDERS[job.name]]
        tiles = {contender.tile(self.sizes(job.length)) for contender in contenders}
        # Fewer positions have no quarters.
        return {str(tile): at_places(losses, tile) for tile in sorted(tiles) if tile >= 4}

    def run(self, job: Job) -> list[dict[str, Any]]:
        """Measures one case on every seed."""
        evaluate = self.compiled(job)
        rows = []
        for index, seed in enumerate(self.seeds):
            parameters, began = self.parameters(job, index), time.monotonic()
            windows = windows_of(self.text[:-1], job.length)[: job.texts]
            results = [evaluate(self.params[index], window, parameters) for window in windows]
            results = [
                (loss.mean(), self.by_place(job, loss), besides) for loss, besides in results
            ]
            loss, places, besides = jax.device_get(jax.tree.map(lambda *x: jnp.stack(x), *results))
            row = {"seed": seed, **vars(job), "losses": loss.tolist()}
            if not job.fidelity:
                row["losses_by_place"] = {
                    tile: np.round(x.astype(float), 6).tolist() for tile, x in places.items()
                }
            row |= {name: x.mean(0).tolist() for name, x in besides.items()}
            row["spent"] = float(np.mean(row["spent_by_layer"]))
            row["seconds"] = time.monotonic() - began
            rows.append(row)
        return rows


def at_places(losses: jax.Array, tile: int) -> jax.Array:
    """Mean losses at the first place of all tiles, in their quarters, at the last place, [6].

    Args:
      losses: [T], those of the bytes that the queries of a text predict.
      tile: Its positions.
    """
    of_place = losses.reshape(-1, tile).mean(0)
    return jnp.concatenate([of_place[:1], of_place.reshape(4, -1).mean(1), of_place[-1:]])


def in_place(
    contender: Contender, query: jax.Array, key: jax.Array, value: jax.Array, parameters: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A layer's attention by a contender; besides, the fraction that it spent."""
    out, spent = contender.attend(query, key, value, parameters)
    return out, {"spent_by_layer": spent}


def beside_exact(
    contender: Contender, query: jax.Array, key: jax.Array, value: jax.Array, parameters: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A layer's exact attention; besides, the errors of a contender on the same operands.

    `error_by_head` is the mean of ||o - o_exact|| / ||o_exact|| over queries, [N]; `ifq_by_head`
    is 1 - sum ||o - o_exact||^2 / sum ||o_exact||^2.
    """
    exact, _ = EXACT.attend(query, key, value, ())
    out, besides = in_place(contender, query, key, value, parameters)
    exact32 = exact.astype(jnp.float32)
    error = ((out.astype(jnp.float32) - exact32) ** 2).sum(-1)
    norm = jnp.maximum((exact32**2).sum(-1), 1e-20)
    besides["error_by_head"] = jnp.sqrt(error / norm).mean(0)
    besides["ifq_by_head"] = 1 - error.sum(0) / norm.sum(0)
    return exact, besides


def describe(row: dict[str, Any], exact: dict[tuple[int, int], list[float]]) -> str:
    """One line about a measured row."""
    line = f"seed {row['seed']}  {row['length']:6d}  {row['name']:22s} {row['fraction']:7.4f} "
    line += f"spent {row['spent']:.4f}  {row['seconds']:5.1f} s  "
    if row["fidelity"]:
        return line + f"error of o {np.mean(row['error_by_head']):.4f}"
    baseline = exact[row["seed"], row["length"]][: len(row["losses"])]
    change = np.mean(np.subtract(row["losses"], baseline))
    return line + f"loss {np.mean(row['losses']):.4f}  change {change:+.5f}"


def compile_ahead(pool: Executor, evaluator: Evaluator, wanted: list[Job]) -> dict[Job, Future]:
    """Starts to compile what jobs need, each thing once: a future of each job."""
    started: dict[tuple[Any, ...], Future] = {}
    ahead = {}
    for job in wanted:
        fraction = job.fraction if CONTENDERS[job.name].static else None
        case = (job.length, job.name, job.fidelity, fraction)
        if case not in started:
            started[case] = pool.submit(evaluator.compiled, job)
        ahead[job] = started[case]
    return ahead


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the jobs until they or the seconds are over."""
    began, args = time.monotonic(), parse_arguments(arguments)
    evaluator = Evaluator(args.weights, args.seeds)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    facts = surroundings()
    wanted, rows, exact = list(dict.fromkeys(jobs(args))), [], {}
    with ThreadPoolExecutor(4) as pool:
        # Compiled ahead, in the order of need, while the device works.
        ahead = compile_ahead(pool, evaluator, wanted)
        for job in tqdm(wanted, unit="case"):
            if time.monotonic() - began > args.seconds:
                print(f"out of time before {job}")
                break
            ahead[job].result()
            for row in evaluator.run(job):
                if job.name == "exact":
                    exact[row["seed"], row["length"]] = row["losses"]
                rows.append(row)
                tqdm.write(f"{time.monotonic() - began:6.1f} s  {describe(row, exact)}")
            args.output.write_text(json.dumps({**facts, "rows": rows}) + "\n")
        pool.shutdown(cancel_futures=True)
    print(f"written {args.output}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
