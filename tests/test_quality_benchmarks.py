"""The benchmarks of quality: what their figures rest on, and a run of them in a tiny size."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import audit_coverage
import jax
import jax.numpy as jnp
import model_streams
import needles
import numpy as np
import pytest
import router_emulation as router
import tolerance
from changes import bootstrap, changes_by_place, shares
from comparison import relative_error
from contenders import BASELINES, EXACT, Contender, Sizes
from dense_engine import attend
from evaluate import CONTENDERS, at_places
from library import levels_of as levels_of_plan
from model import LanguageModel, Shape, default_dtype, exact_attention, losses
from ours import BOUND, OURS, by_budget, of_levels
from storage import load_held_out, load_weights, windows_of

import jax_aat
from jax_aat.reference import dense_attention

FOLDER = Path(__file__).parents[1] / "benchmarks" / "quality"
SIZES = Sizes(length=2048, heads=4, kv_heads=1, head_dim=16)
Operands = tuple[jax.Array, jax.Array, jax.Array]


@pytest.fixture
def operands(rng: np.random.Generator) -> Operands:
    """Query, key and value whose keys drift, so that neighbours resemble each other."""
    heads = (SIZES.heads, SIZES.kv_heads, SIZES.kv_heads)
    q, k, v = (rng.standard_normal((SIZES.length, n, SIZES.head_dim)) for n in heads)
    k = np.cumsum(k, axis=0) / np.sqrt(np.arange(1, SIZES.length + 1))[:, None, None]
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v))


def run(contender: Contender, operands: Operands, fraction: float) -> tuple[jax.Array, float]:
    parameters = contender.parameters(SIZES, fraction)

    @jax.jit
    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return contender.attend(q, k, v, parameters)

    out, spent = attention(*operands)
    return out, float(spent)


def test_engine_is_exact_attention_where_nothing_is_left_out(operands: Operands) -> None:
    out, spent = run(EXACT, operands, 1.0)
    expected, _ = dense_attention(*(x[None] for x in operands), is_causal=True)
    assert relative_error(out, expected[0]) < 2e-5
    assert spent == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("contender", [OURS, *BASELINES], ids=lambda x: x.name)
def test_contender_spends_its_budget_and_no_more(contender: Contender, operands: Operands) -> None:
    _, spent = run(contender, operands, 0.5)
    assert 0.47 < spent <= 0.501


@jax.jit
def attend_under(operands: Operands, levels: jax.Array, planning: Any) -> tuple[jax.Array, Any]:
    return attend(*operands, of_levels(*operands, levels, planning))


@jax.jit
def levels_of(operands: Operands, log_lambda: float) -> tuple[router.Prediction, jax.Array]:
    q, k, v = operands
    prediction = router.predict(q / 4, k, v, jnp.float32(0.25), router.Routing())
    return prediction, router.choose_levels(prediction, jnp.float32(log_lambda))


def test_router_makes_everything_exact_at_no_price(operands: Operands) -> None:
    _, levels = levels_of(operands, -60.0)
    assert set(np.unique(levels)) == {router.EXACT, router.HIDDEN}
    out, _ = attend_under(operands, levels, 0.0)
    assert relative_error(out, run(EXACT, operands, 1.0)[0]) < 1e-6


def test_no_level_lets_a_query_see_the_future(operands: Operands) -> None:
    _, levels = levels_of(operands, -8.0)
    assert set(np.unique(levels)) == {0, 1, 2, 3}
    out, _ = attend_under(operands, levels, 0.0)
    # Half of a super-tile changes: its mean row must be out of sight of the other half.
    later = tuple(x.at[1536:].add(1.0) for x in operands)
    changed, _ = attend_under(later, levels, 0.0)
    np.testing.assert_array_equal(out[:1536], changed[:1536])
    assert float(jnp.abs(out[1536:] - changed[1536:]).max()) > 0.1


def test_operations_of_levels_equal_those_the_engine_counts(operands: Operands) -> None:
    prediction, levels = levels_of(operands, -8.0)
    _, spent = attend_under(operands, levels, prediction.operations)
    dense = 4 * SIZES.heads * SIZES.head_dim * SIZES.length * (SIZES.length + 1) / 2
    counted = router.operations(prediction, levels, operands[0].shape) / dense
    assert float(spent) == pytest.approx(float(counted), rel=1e-5)


@pytest.mark.parametrize("tile", [16, 32])
def test_foresight_for_nothing_spends_its_budget_on_rows_alone(
    tile: int, operands: Operands
) -> None:
    routing = dataclasses.replace(BOUND, tile=tile)
    selection = jax.jit(partial(by_budget, routing=routing))(*operands, np.float32(0.0625))
    assert selection.keep.shape[1] == SIZES.length // tile
    _, of_rows = jax.jit(attend)(*operands, dataclasses.replace(selection, planning=0.0))
    assert 0.99 * 0.0625 < float(of_rows) <= 0.0625001


def test_the_nearest_granules_are_exact_at_any_price(operands: Operands) -> None:
    q, k, v = operands
    routing = router.Routing(floor=0.0, near=0.5)
    prediction = router.predict(q / 4, k, v, jnp.float32(0.25), routing)
    levels = router.choose_levels(prediction, jnp.float32(20.0))
    tile = np.arange(levels.shape[1])[:, None] * routing.tile
    start = np.arange(levels.shape[2]) * router.GRANULE
    # An eighth of what is seen, rounded up.
    before = -(-(tile + routing.tile) // (8 * router.GRANULE)) * router.GRANULE
    near = (start >= tile - before) & (start < tile + routing.tile)
    expected = np.broadcast_to(near, levels.shape)
    np.testing.assert_array_equal(np.asarray(levels) == router.EXACT, expected)


def test_foresight_knows_the_masses_of_granules(operands: Operands) -> None:
    """What is forced, an eighth of what a tile sees, has the largest mean squares of masses."""
    q, k, v = operands
    routing = router.Routing(foresight=True, floor=0.5)
    prediction = router.predict(q / 4, k, v, jnp.float32(0.25), routing)
    length, kv_heads = SIZES.length, k.shape[1]
    logits = np.einsum("tkgh,skh->tkgs", q.reshape(length, kv_heads, -1, q.shape[-1]) / 4, k)
    logits = np.where(np.tri(length, dtype=bool)[:, None, None], logits, -np.inf)
    probability = np.asarray(jax.nn.softmax(logits))
    tiles, granules = prediction.coarse.shape
    mass = probability.reshape(tiles, routing.tile, kv_heads, -1, granules, router.GRANULE).sum(-1)
    importance = np.square(mass).mean((1, 3)).swapaxes(0, 1)
    for tile in (20, tiles - 1):
        seen = (tile + 1) * routing.tile // router.GRANULE
        # Of the tile's own two granules queries see a part, all of which counts as seen.
        earlier = np.argsort(-importance[:, tile, : seen - 2])[:, : seen // 16]
        forced = np.take_along_axis(np.asarray(prediction.forced[:, tile]), earlier, axis=1)
        assert forced.mean() > 0.99


def test_library_and_emulation_plan_alike_and_compute_the_same(operands: Operands) -> None:
    # The emulation knows the sizes of long sequences only.
    adaptation = jax_aat.Adaptation(budget=0.25, query_tile=128, super_tile=1024)
    batched = tuple(x[None] for x in operands)
    plan = jax.jit(partial(jax_aat.plan_tiles, adaptation=adaptation, is_causal=True))(*batched)
    levels = levels_of_plan(plan, SIZES.length // router.GRANULE)
    _, emulated = levels_of(operands, float(plan.log_lambda[0, 0]))
    assert float((levels == emulated).mean()) > 0.99
    expected, _ = attend_under(operands, levels, 0.0)
    attention = partial(jax_aat.tiled_attention, is_causal=True, implementation="xla")
    out = jax.jit(lambda q, k, v, plan: attention(q, k, v, plan=plan))(*batched, plan)
    assert relative_error(out[0], expected) < 2e-5


def logits_of(shape: Shape, tokens: np.ndarray) -> jax.Array:
    """Of a model that was not trained, [T, 256]."""
    model = LanguageModel(shape, jnp.float32, exact_attention)

    @jax.jit
    def run(tokens: jax.Array) -> jax.Array:
        return model.apply(model.init(jax.random.key(0), tokens), tokens)[0][0]

    return run(jnp.asarray(tokens, jnp.int32)[None])


TINY = Shape(layers=2, width=32, hidden=32, heads=4, kv_heads=2, head_dim=16)


@pytest.mark.parametrize(("unrotated_every", "sees_order"), [(2, True), (1, False)])
def test_a_layer_without_rotation_does_not_see_the_order_of_keys(
    unrotated_every: int, sees_order: bool, rng: np.random.Generator
) -> None:
    shape = dataclasses.replace(TINY, layers=1, unrotated_every=unrotated_every)
    tokens = rng.integers(0, 256, 64)
    swapped = np.concatenate([tokens[:-1][::-1], tokens[-1:]])
    change = jnp.abs(logits_of(shape, tokens)[-1] - logits_of(shape, swapped)[-1]).max()
    assert (float(change) > 1e-3) == sees_order


def test_convolution_and_scaling_let_no_byte_see_later_ones(rng: np.random.Generator) -> None:
    shape = dataclasses.replace(TINY, convolution=4, scaled_from=16)
    tokens = rng.integers(0, 256, 64)
    later = np.concatenate([tokens[:40], rng.integers(0, 256, 24)])
    before, after = logits_of(shape, tokens), logits_of(shape, later)
    np.testing.assert_array_equal(before[:40], after[:40])
    assert float(jnp.abs(before[40:] - after[40:]).max()) > 1e-2


def test_hidden_needles_come_twice_and_the_second_codes_are_marked() -> None:
    windows = np.zeros((4, 512), np.uint8)
    repeated = needles.hide(windows, 1.0, 3, np.random.default_rng(0))
    np.testing.assert_array_equal(repeated.sum(1), 3 * needles.CODE_BYTES)
    for window, marks in zip(windows, repeated, strict=True):
        for first in np.flatnonzero(np.diff(marks.astype(int)) == 1) + 1:
            start = first - needles.PROMPT_BYTES
            needle = window[start : start + needles.SENTENCE_BYTES].tobytes()
            assert window.tobytes().find(needle) < start
            assert window.tobytes().rfind(needle) == start
    assert not needles.hide(windows, 0.0, 3, np.random.default_rng(0)).any()


def call(script: str, *flags: str) -> str:
    command = [sys.executable, str(FOLDER / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


MODEL = ["--layers=2", "--width=32", "--hidden=32", "--heads=4", "--kv-heads=2", "--head-dim=16"]


def test_windows_of_short_lengths_come_from_everywhere_in_the_texts() -> None:
    texts = np.arange(3 * 23).reshape(3, 23)
    windows = windows_of(texts, 10)
    assert windows.shape == (6, 11)
    assert windows[:, 0].tolist() == [0, 23, 46, 10, 33, 56]
    assert (np.diff(windows) == 1).all()
    assert windows_of(texts, 22).shape == (3, 23)


def test_training_evaluation_and_summary_run(tmp_path: Path) -> None:
    sizes = [*MODEL, "--contexts", "64", "512", "--shares", "0.5", "0.5"]
    call("train.py", "--minutes=5", "--most-steps=20", *sizes, "--step-bytes=512", "--megabytes=1",
         "--qkv-layers", "1", "--qkv-length=512", f"--output={tmp_path}")  # fmt: skip
    with np.load(tmp_path / "qkv-0-layer1.npz") as saved:
        assert {name: saved[name].shape for name in "qkv"} == {
            "q": (512, 4, 16), "k": (512, 2, 16), "v": (512, 2, 16)
        }  # fmt: skip
    found = tmp_path / "evaluation.json"
    call("evaluate.py", f"--weights={tmp_path}", "--lengths=512", "--fractions=0.5", "--texts=2",
         "--fidelity-texts=1", "--contenders", "exact", "jax_aat", f"--output={found}")  # fmt: skip
    measured = json.loads(found.read_text())
    rows = measured["rows"]
    assert [(row["name"], row["fidelity"]) for row in rows] == [
        ("exact", False), ("jax_aat", False), ("jax_aat", True),
    ]  # fmt: skip
    assert all(len(row["spent_by_layer"]) == 2 for row in rows)
    # Tiles of 64 rows here, two query heads of a key/value head: 32 positions.
    assert set(rows[0]["losses_by_place"]) >= {"32", "64"}
    assert set(rows[1]["losses_by_place"]) == {"32"}
    assert "losses_by_place" not in rows[2]
    each = exact_losses(tmp_path, windows_of(load_held_out(tmp_path)[:-1], 512)[:2])
    within = {"float32": 2e-6, "bfloat16": 1e-2}[jnp.dtype(default_dtype()).name]
    assert relative_error(rows[0]["losses"], each.mean(1)) <= within
    for tile, places in rows[0]["losses_by_place"].items():
        place = np.arange(512) % int(tile)
        quarters = [each[:, place * 4 // int(tile) == i].mean(1) for i in range(4)]
        ends = [each[:, place == i].mean(1) for i in (0, int(tile) - 1)]
        assert relative_error(places, np.stack([ends[0], *quarters, ends[1]], 1)) <= within
    call("summary.py", str(found), "--name=quality", f"--output={tmp_path}")
    lines = (tmp_path / "quality.md").read_text()
    assert "| jax_aat" in lines
    assert f"commit: {measured['commit']}  \n" in lines
    assert f"command: {measured['command']}  \n" in lines
    (by_place,) = json.loads((tmp_path / "quality.json").read_text())["by_place"]
    change = np.subtract(*(x["losses_by_place"]["32"] for x in (rows[1], rows[0]))).mean(0)
    np.testing.assert_allclose(by_place["changes"], change, atol=1e-9)
    assert (tmp_path / "quality-loss.png").read_bytes().startswith(b"\x89PNG")

    of_model = [f"--weights={tmp_path}", "--windows=2", "--window-length=512"]
    out = call("audit_coverage.py", *of_model, "--draws=3")
    assert {"commit", "jax", "jax_device"} <= {line.partition(":")[0] for line in out.splitlines()}
    audits = table(out)
    assert [(row[0], row[2]) for row in audits] == [
        ("layer 0", "6"), ("layer 1", "6"), ("all layers", "12"),
    ]  # fmt: skip
    assert all(row[3] == "8" and 0 < float(row[4]) < 1 for row in audits)
    kept = table(call("tolerance.py", *of_model, "--tolerances=0.1", "--starts", "1e-12", "1e6",
                      "--settled=1"))  # fmt: skip
    assert [(row[0], row[2]) for row in kept] == [
        (inputs, start)
        for start in ("1e-12", "1e+06")
        for inputs in ("layer 0", "layer 1", "all layers")
    ]
    for first, second, both in (kept[:3], kept[3:]):
        assert float(both[3]) == pytest.approx((float(first[3]) + float(second[3])) / 2, abs=0.011)
        for column in (4, 5):
            assert float(both[column]) == max(float(first[column]), float(second[column]))
    # At the smallest price all is exact at first.
    assert float(kept[0][3]) < float(kept[3][3])


def table(out: str) -> list[list[str]]:
    """Rows of the table in Markdown, but for its head."""
    lines = [line for line in out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


@pytest.fixture
def stream(rng: np.random.Generator) -> tuple[Any, np.ndarray]:
    """Parameters of a model that was not trained, and two windows of 512 bytes."""
    windows = rng.integers(0, 256, (2, 513)).astype(np.uint8)
    model = LanguageModel(TINY, jnp.float32, exact_attention)
    return jax.jit(model.init)(jax.random.key(0), jnp.asarray(windows, jnp.int32)), windows


def true_errors(operands: tuple[jax.Array, ...], out: jax.Array) -> np.ndarray:
    """Relative, of every head, then of all of them."""
    wide = (x.astype(jnp.float32) for x in operands)
    exact = np.asarray(dense_attention(*wide, is_causal=True)[0], np.float64)
    differences = np.asarray(out, np.float64) - exact
    every = [np.s_[:, :, n] for n in range(TINY.heads)] + [np.s_[:]]
    return np.array([np.linalg.norm(differences[x]) / np.linalg.norm(exact[x]) for x in every])


def test_an_audit_of_all_rows_finds_the_errors_that_coverage_calls_true(
    stream: tuple[Any, np.ndarray],
) -> None:
    params, (window, _) = stream
    adaptation = jax_aat.Adaptation(budget=0.5, audit_rate=1.0)
    attend = partial(jax_aat.tiled_attention, is_causal=True, implementation="xla")
    steps = jnp.arange(2)
    found = audit_coverage.of_window(TINY, params, window, steps, adaptation, "xla")
    true, audited, interval, rows = (np.asarray(x) for x in found)
    operands = model_streams.operands_by_layer(TINY, params, window)
    outs = jax.jit(partial(jax.lax.map, lambda x: attend(*x, adaptation=adaptation)))(operands)
    for layer in range(TINY.layers):
        expected = true_errors(tuple(x[layer] for x in operands), outs[layer])
        assert (expected > 0.01).all()
        np.testing.assert_allclose(true[layer], np.tile(expected, (2, 1)), rtol=1e-3)
    np.testing.assert_allclose(audited, true, rtol=5e-3)
    assert (rows == 512).all()
    assert ((interval[..., 0] < true) & (true < interval[..., 1])).all()


def test_each_layer_carries_its_own_state_through_the_windows(
    stream: tuple[Any, np.ndarray],
) -> None:
    params, windows = stream
    adaptation = jax_aat.Adaptation(tolerance=0.1)
    errors, spent, _ = tolerance.of_model((TINY, params, windows), adaptation, 1e-4, "xla")
    assert errors.shape == (2, TINY.layers, TINY.heads + 1)

    @jax.jit
    def attend(operands: tuple[jax.Array, ...], state: Any) -> tuple[jax.Array, Any, Any]:
        return jax_aat.tiled_attention(
            *operands, is_causal=True, implementation="xla", adaptation=adaptation, state=state,
            return_report=True,
        )  # fmt: skip

    for layer in range(TINY.layers):
        state = None
        for i, window in enumerate(windows):
            stack = model_streams.operands_by_layer(TINY, params, window)
            operands = tuple(x[layer] for x in stack)
            if state is None:
                state = tolerance.initial(operands, adaptation, 1e-4)
                np.testing.assert_allclose(state.log_lambda, np.log(1e-4), rtol=1e-6)
            out, state, report = attend(operands, state)
            np.testing.assert_allclose(errors[i, layer], true_errors(operands, out), rtol=1e-3)
            assert spent[i, layer] == pytest.approx(float(report.spent.mean()), rel=1e-5)
    assert (np.abs(errors[0] - errors[1]) > 1e-4).any()


def test_a_width_without_a_lower_end_is_not_told_as_a_number(
    capsys: pytest.CaptureFixture[str],
) -> None:
    true = np.full((3, 2), 0.1)
    low, high = np.full((3, 2), 0.05), np.full((3, 2), 0.2)
    low[:2, 0], low[:, 1] = 0, 5e-5
    results = true, true, np.stack([low, high], -1), np.full(3, 8.0)
    audit_coverage.print_row("a", "b", tuple(map(jnp.asarray, results)))
    cells = [cell.strip() for cell in capsys.readouterr().out.split("|")[1:-1]]
    assert cells[6:] == ["100.0%", "unbounded", "100.0%", "4e+03"]


def exact_losses(folder: Path, windows: np.ndarray) -> np.ndarray:
    """Of every byte of windows [count, T + 1] under a saved model, [count, T]."""
    params, shape = load_weights(folder, 0)
    run = jax.jit(partial(losses, shape, default_dtype(), exact_attention))
    return np.asarray(run(params, windows)[0])


def test_losses_are_told_apart_by_their_place_in_a_tile() -> None:
    losses = jnp.asarray(10.0 * np.repeat([0, 1], 32) + np.tile(np.arange(32), 2))
    expected = np.array([0, 3.5, 11.5, 19.5, 27.5, 31]) + 5
    np.testing.assert_allclose(at_places(losses, 32), expected)


def test_tiles_are_of_as_many_positions_as_choose_together() -> None:
    bound = "emulation, foresight for nothing"
    names = (
        "jax_aat",
        "jax_aat, tiles of 256",
        "MRA",
        "block top-k",
        bound,
        f"{bound}, tiles of 16",
    )
    sizes = [Sizes(length, heads=8, kv_heads=2, head_dim=64) for length in (2048, 8192)]
    found = [[CONTENDERS[name].tile(x) for name in names] for x in sizes]
    assert found == [[16, 64, 32, 64, 32, 16], [32, 64, 32, 64, 32, 16]]


def test_intervals_draw_seeds_then_texts(rng: np.random.Generator) -> None:
    np.testing.assert_array_equal(bootstrap([np.full(5, 0.25)] * 3), [0.25, 0.25])
    # Two seeds of equal texts: both ends are drawn, each in a quarter of the cases.
    np.testing.assert_array_equal(bootstrap([np.zeros(9), np.ones(9)]), [0, 1])
    texts = rng.normal(size=(400, 2)) * [1, 3] + [0, 10]
    error = 1.96 * np.array([1, 3]) / 20
    expected = texts.mean(0) + np.stack([-error, error])
    np.testing.assert_allclose(bootstrap([texts]), expected, atol=0.05)


def rows_of(changes: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """What `evaluate.py` writes of attentions that change losses at the last place twice as much.

    Texts of exact attention are as many as the most of others.
    """
    count = max(map(len, changes.values()))
    changes = {"exact": np.zeros(count), **changes}
    at_places = np.array([0, 1, 1, 1, 1, 2])
    base = np.linspace(1, 2, count)
    return [
        dict(
            seed=0, length=64, name=name, fraction=0.5, fidelity=False, spent=0.5,
            losses=base[: len(x)] + x,
            losses_by_place={"32": base[: len(x), None] + np.outer(x, at_places)},
        )
        for name, x in changes.items()
    ]  # fmt: skip


def test_changes_by_place_are_paired_with_exact_attention(rng: np.random.Generator) -> None:
    change = 0.02 + 0.01 * rng.normal(size=30)
    (row,) = changes_by_place(rows_of({"jax_aat": change}))
    np.testing.assert_allclose(row["changes"], np.array([0, 1, 1, 1, 1, 2]) * change.mean())
    low, high = bootstrap([change])
    expected = np.outer([low, high], [0, 1, 1, 1, 1, 2])
    np.testing.assert_allclose(row["intervals"], expected, atol=1e-12)
    without = [
        {k: v for k, v in x.items() if k != "losses_by_place"} for x in rows_of({"MRA": change})
    ]
    assert not changes_by_place(without)


@pytest.mark.parametrize(
    ("ours", "spread", "kept"),
    [(0.02, 0.001, "yes"), (0.05, 0.001, "no"), (0.03, 0.2, "not told")],
)
def test_a_third_of_anothers_change_is_judged_by_an_interval(
    rng: np.random.Generator, ours: float, spread: float, kept: str
) -> None:
    # What both share, such as a text that is hard to change, tells nothing of a third.
    common = 0.02 * rng.normal(size=20)
    other = 0.1 + 3 * common
    change = ours + common + spread * rng.normal(size=20)
    rows = rows_of({"jax_aat": change, "MRA": np.append(other, 100.0)})
    (row,) = shares(rows)
    excess = change - other / 3
    assert row["all"]["kept"] == row["last"]["kept"] == kept
    assert row["all"]["excess"] == pytest.approx(excess.mean())
    assert row["all"]["share"] == pytest.approx(change.mean() / other.mean())
    np.testing.assert_allclose(row["all"]["interval"], bootstrap([excess]), atol=1e-12)
    np.testing.assert_allclose(row["last"]["interval"], bootstrap([2 * excess]), atol=1e-12)


def test_retrieval_is_trained_and_asked_for(tmp_path: Path) -> None:
    flags = [*MODEL, "--contexts", "128", "512", "--shares", "0.5", "0.5", "--step-bytes=512"]
    call("train_retrieval.py", "--minutes=5", "--most-steps=8", *flags, "--megabytes=1",
         f"--output={tmp_path}")  # fmt: skip
    found = tmp_path / "needles.json"
    attentions = ["exact", "jax_aat", "window + sinks"]
    out = call("needle_retrieval.py", f"--weights={tmp_path}", "--length=512", "--fraction=0.5",
               "--depths=2", "--texts=1", "--contenders", *attentions,
               f"--output={found}")  # fmt: skip
    assert [line.partition(" s  ")[2].split("  ")[0] for line in out.splitlines()] == attentions
    rows = json.loads(found.read_text())["rows"]
    assert [row["name"] for row in rows] == list(np.repeat(attentions, 2))
    assert all(0.3 < row["spent"] <= 0.51 for row in rows if row["name"] != "exact")
    assert found.with_suffix(".png").exists()


def test_training_with_adaptive_and_exact_attention_runs(tmp_path: Path) -> None:
    found = tmp_path / "training.json"
    call("train_adaptive.py", "--most-steps=3", *MODEL, "--context=512", "--step-bytes=1024",
         "--fraction=0.5", "--megabytes=1", "--held-out=1", "--seeds", "0", "1",
         f"--output={found}")  # fmt: skip
    measured = json.loads(found.read_text())
    assert len(measured["commit"]) == 40
    curves = {(run["seed"], run["trained_with"]): run["curve"] for run in measured["runs"]}
    assert {case: len(curve) for case, curve in curves.items()} == dict.fromkeys(
        [(0, "jax_aat"), (1, "jax_aat"), (0, "exact"), (1, "exact")], 3
    )
    for seed in (0, 1):
        # The same start, the same data.
        assert curves[seed, "jax_aat"][0] == pytest.approx(curves[seed, "exact"][0], abs=0.1)
    assert curves[0, "exact"] != curves[1, "exact"]
    assert found.with_suffix(".png").exists()
