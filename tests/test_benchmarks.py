"""The benchmark of speed: what its figures rest on, and a run of it in a tiny size."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import attention
import inputs
import jax
import jax.numpy as jnp
import numpy as np
import passes
import pytest
import report_overhead
import sampling
import tables
from blocks import blocks_of
from capture import capture_qkv
from model import LanguageModel, Shape, exact_attention, rotate
from passes import Measured, SkippedError
from speed_contenders import ADAPTIVE, DENSE, Budget, adaptive, chosen, xla
from storage import load_weights, save_held_out, save_weights

import jax_aat
from jax_aat.commands.contenders import Case, with_gradients, with_tangent
from jax_aat.levels import EXACT, GRANULE, HIDDEN, MEAN, Grid, pack_levels, unpack_levels
from jax_aat.reference import dense_attention, relative_error

CAUSAL = pytest.mark.parametrize("causal", [False, True])


def case_of(length: int, causal: bool = True, **sizes: int) -> Case:
    shape = {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 16} | sizes
    return Case(**shape, queries=length, keys=length, causal=causal, dtype="float32")


def noisy(x: np.ndarray) -> np.ndarray:
    return x + 0.1 * np.random.default_rng(1).standard_normal(x.shape).astype(x.dtype)


def made_of(results: tuple[np.ndarray, ...]) -> Measured:
    return Measured(lambda: results, lambda x: x, np.asarray, lambda: "", lambda: None)


@CAUSAL
def test_the_tangent_of_drawn_rows_is_that_of_the_whole(causal: bool) -> None:
    case = case_of(150, causal)
    arrays = case.arrays(seed=0)
    operands = case.operands(arrays, "tangent")
    assert [x.shape for x in operands] == [x.shape for x in [*arrays[:3], *arrays[:3]]]
    dense = with_tangent(lambda *x: dense_attention(*x, is_causal=causal)[0])
    right = [np.asarray(x) for x in jax.jit(dense)(*operands)]
    expected = sampling.expect(case, arrays, "tangent")
    assert expected.parts.keys() == {"out", "tangent"}
    for name, x in zip(("out", "tangent"), right, strict=True):
        assert relative_error(expected.parts[name], x[0, expected.rows]) < 2e-6
    wrong = right[0], noisy(right[1])
    judged = sampling.judge(expected, made_of(wrong), wrong)
    exact = right[1][0, expected.rows]
    off = relative_error(wrong[1][0, expected.rows], exact)
    assert judged["errors"]["tangent"] == pytest.approx(off, rel=1e-3)
    assert judged["errors"]["out"] < 2e-6


@CAUSAL
def test_errors_of_drawn_rows_are_those_against_the_whole(causal: bool, monkeypatch) -> None:
    monkeypatch.setattr(sampling, "_CHUNK", 2 * 150 * 7)  # so that the last chunk is ragged
    case = case_of(150, causal)
    arrays = case.arrays(seed=0)
    dense = with_gradients(lambda *x: dense_attention(*x, is_causal=causal)[0])
    right = [np.asarray(x) for x in jax.jit(dense)(*arrays)]
    expected = sampling.expect(case, arrays, direction="backward")
    rows = expected.rows
    for name, x in zip(("out", "dq", "dk", "dv"), right, strict=True):
        part = x[0, rows] if name in ("out", "dq") else x[0, :, 0]
        assert relative_error(expected.parts[name], part) < 2e-6
    wrong = tuple(noisy(x) for x in right)
    judged = sampling.judge(expected, made_of(wrong), wrong)
    off, exact = wrong[0][0, rows] - right[0][0, rows], right[0][0, rows]
    assert judged["ifq"] == pytest.approx(1 - (off**2).sum() / (exact**2).sum(), abs=1e-5)
    for name, x, y in zip(("dk", "dv"), wrong[2:], right[2:], strict=True):
        assert judged["errors"][name] == pytest.approx(
            relative_error(x[0, :, 0], y[0, :, 0]), rel=1e-3
        )


def test_rows_are_drawn_from_every_part_and_what_is_left_out_is_said() -> None:
    rows = sampling.draw_rows(100_000)
    assert (rows // (100_000 / 64)).astype(int).tolist() == list(range(64))
    assert sampling.draw_rows(5).tolist() == list(range(5))
    case = case_of(32)
    arrays = case.arrays(seed=0)
    expected = sampling.expect(case, arrays, direction="backward", most=1000)
    assert expected.parts.keys() == {"out", "dq"}
    results = (arrays[0], *arrays[:3])
    judged = sampling.judge(expected, made_of(results), results)
    assert judged["errors"].keys() == {"out", "dq"}
    assert judged["not_checked"].startswith("dk and dv: ")


def plan_of(case: Case) -> jax_aat.TilePlan:
    """Levels at random, few of them exact, as far as blocks look at a plan."""
    grid = Grid(case.queries, case.keys, case.heads, case.kv_heads, 64, 1024)
    generator = np.random.default_rng(0)
    shape = (case.batch, grid.lists, grid.tiles, grid.granules)
    level = generator.choice([EXACT, MEAN, HIDDEN], shape, p=[0.03, 0.4, 0.57])
    last = np.minimum((np.arange(grid.tiles) + 1) * grid.positions, case.keys) - 1
    if case.causal:
        beyond = np.arange(grid.granules) > last[:, None] // GRANULE
        level = np.where(beyond, HIDDEN, level)
    level[..., np.arange(grid.tiles), last // GRANULE] = EXACT
    adaptation = jax_aat.Adaptation(budget=0.25, query_tile=64)
    plan = jax_aat.TilePlan.unfilled(grid, adaptation, case.causal, (-1, -1), case.batch)
    counts = jnp.asarray((level == EXACT).sum(-1), jnp.uint32)
    headers = plan.list_headers.at[..., 2].set(counts)
    return dataclasses.replace(plan, levels=pack_levels(jnp.asarray(level)), list_headers=headers)


def of_pairs(blocks: np.ndarray, size: int, length: int) -> np.ndarray:
    """Whether a pair of positions is in a block, [B, L, T, S]."""
    return np.repeat(np.repeat(blocks, size, 2), size, 3)[:, :, :length, :length]


@CAUSAL
@pytest.mark.parametrize(("size", "kv_heads"), [(128, 4), (128, 1), (32, 4), (32, 1)])
def test_blocks_hold_every_exact_granule_and_little_else(
    causal: bool, size: int, kv_heads: int
) -> None:
    length = 600
    plan = plan_of(case_of(length, causal, kv_heads=kv_heads))
    blocks = blocks_of(plan, size)
    level = np.asarray(unpack_levels(plan.levels, plan.grid.granules))
    pairs = np.repeat(np.repeat(level == EXACT, plan.grid.positions, 2), GRANULE, 3)
    pairs = pairs[:, :, :length, :length]
    seen = np.tri(length, dtype=bool) if causal else np.ones((length, length), bool)
    used = blocks.full | blocks.cut
    covered = of_pairs(used, size, length)
    assert covered[pairs & seen].all()
    for entry, row, column in np.argwhere(used)[:, [0, 2, 3]]:
        assert pairs[entry, :, row * size :, column * size :][:, :size, :size].any()
    assert seen[of_pairs(blocks.full, size, length).any((0, 1))].all()
    assert not (blocks.full & blocks.cut).any()
    everything = seen.sum() * np.prod(used.shape[:2])
    assert blocks.relative_flops == pytest.approx((covered & seen).sum() / everything)
    read = used.sum() * size**2 / ((level == EXACT).sum() * GRANULE * plan.grid.positions)
    assert blocks.times_the_plan == pytest.approx(read)
    assert blocks.heads_of_list * used.shape[1] == 4


@CAUSAL
def test_block_mask_lists_the_blocks_for_every_head(causal: bool) -> None:
    pytest.importorskip("torch")
    from torch_contenders import block_mask

    blocks = blocks_of(plan_of(case_of(300, causal)), 128)
    mask = block_mask(blocks, case_of(300, causal), "cpu")
    expected = np.repeat(blocks.full | blocks.cut, blocks.heads_of_list, 1)
    np.testing.assert_array_equal(mask.to_dense(), expected)
    np.testing.assert_array_equal(mask.full_kv_num_blocks, np.repeat(blocks.full, 2, 1).sum(-1))
    assert mask.shape == (2, 4, 300, 300)


@pytest.mark.parametrize("kind", ["noise", "clustered"])
def test_inputs_have_the_shapes_of_the_case(kind: str) -> None:
    case = case_of(100)
    arrays = inputs.make(kind, case)
    assert [x.shape for x in arrays] == [x.shape for x in case.arrays(seed=0)]
    assert {x.dtype for x in arrays} == {np.dtype(np.float32)}
    again = inputs.make(kind, case)
    assert all((x == y).all() for x, y in zip(arrays, again, strict=True))


def test_a_model_reads_its_held_out_text_from_even_distances(tmp_path: Path) -> None:
    shape = Shape(layers=2, width=16, hidden=16, heads=4, kv_heads=2, head_dim=16)
    model = LanguageModel(shape, jnp.float32, exact_attention)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    save_weights(tmp_path, 7, params, shape, {})
    text = np.random.default_rng(0).integers(0, 256, (4, 15), np.uint8)
    save_held_out(tmp_path, text)
    case = case_of(50)
    found = inputs.make("model", case, tmp_path, layer=1)
    assert [x.shape for x in found] == [x.shape for x in case.arrays(seed=0)]
    for entry, start in enumerate((0, 30)):
        window = np.resize(np.roll(text.reshape(-1), -start), 51)
        captured = capture_qkv(shape, load_weights(tmp_path, 7)[0], window)
        for x, y in zip(found, captured, strict=False):
            np.testing.assert_allclose(x[entry], y[1], atol=1e-3)


def test_captured_operands_are_repeated_at_positions_of_their_own(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    plain = {"q": (40, 4, 16), "k": (40, 2, 16), "v": (40, 2, 16)}
    plain = {name: generator.standard_normal(shape, np.float32) for name, shape in plain.items()}
    turned = {name: np.asarray(rotate(plain[name][None], 1e4))[0] for name in "qk"}
    path = tmp_path / "qkv.npz"
    np.savez(path, **(plain | turned), rope_base=1e4)
    case = case_of(100, batch=1)
    found = dict(zip("qkv", inputs.make("model", case, path), strict=False))
    for name in "qkv":
        repeated = np.resize(plain[name], (100, *plain[name].shape[1:]))[None]
        expected = repeated if name == "v" else rotate(jnp.asarray(repeated), 1e4)
        np.testing.assert_allclose(found[name], expected, atol=1e-4)
    np.savez(path, **(plain | turned))
    with pytest.raises(ValueError, match="capture it again"):
        inputs.make("model", case, path)
    with pytest.raises(ValueError, match="4 heads over 2 of size 16, the case 4 over 4"):
        inputs.make("model", case_of(32, kv_heads=4), path)


def test_a_budget_of_keys_is_a_smaller_fraction_of_longer_sequences() -> None:
    budget = Budget(64, per_query=True)
    assert budget.fraction(case_of(511)) == pytest.approx(64 / 256)
    assert budget.fraction(case_of(512, causal=False)) == pytest.approx(64 / 512)
    with pytest.raises(SkippedError, match="nothing can be saved"):
        budget.fraction(case_of(100))
    found = chosen([ADAPTIVE, "torch flex"], [Budget(0.25), budget], [64, 128])
    assert len(found) == 2 + 4


def test_settings_are_contenders_of_their_own() -> None:
    settings = attention.settings_of("stages=1,query_tile=256")
    assert attention.settings_of("default") == ()
    with pytest.raises(ValueError, match="levels"):
        attention.settings_of("levels=2")
    budgets = [Budget(0.25, settings=x) for x in ((), settings)]
    found = chosen([ADAPTIVE, "torch flex"], budgets, [128])
    names = ["jax_aat adaptive 0.25", "jax_aat adaptive 0.25 stages=1 query_tile=256"]
    assert list(found) == [*names, "torch flex 128 at 0.25"]


def test_scores_that_do_not_fit_are_not_tried() -> None:
    case = case_of(2**20)
    with pytest.raises(SkippedError, match=r"its scores need about .* GiB of .* GiB"):
        xla(case, [], "forward")


def test_a_row_says_what_ran_and_a_failure_is_a_row(monkeypatch, tmp_path: Path) -> None:
    def failing(*_):
        raise RuntimeError("out of memory\nat the device")

    def makers(*_):
        adaptively = partial(adaptive, Budget(0.5), implementation="xla")
        return {"jax_aat exact": DENSE["jax_aat exact"], "jax_aat adaptive 0.5": adaptively,
                "jax.nn xla": DENSE["jax.nn xla"], "torch flex 128 at 0.5": failing}  # fmt: skip

    monkeypatch.setattr(attention, "chosen", makers)
    flags = "--batch 1 --heads 4 --kv-heads 1 --head-dims 16 --causal yes --dtype float32"
    flags += f" --lengths 256 --inputs clustered --output {tmp_path} --name found --repeats 3"
    assert attention.main([*flags.split(), "--passes", "forward"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    exact, adapted, dense, failed = found["rows"]
    for row in (exact, adapted, dense):
        assert {"keys", "head_dim", "causal", "pass", "contender", "inputs"} <= row.keys()
        assert row["ifq"] == pytest.approx(1 - row["errors"]["out"] ** 2)
        assert min(row[name] for name in ("memory", "latency", "pipelined", "tflops")) > 0
        assert row["memory_from"]
    assert exact["path"].startswith("Vulkan ")
    assert exact["relative_flops"] == dense["relative_flops"] == 1
    assert exact["kernel"] > 0
    assert {name.partition(".")[0] for name in exact["kernel_milliseconds"]} >= {"attend_forward"}
    assert adapted["path"] == "jax_aat xla"
    assert adapted["relative_flops"] == pytest.approx(0.5, abs=0.05)
    assert 0.9 < adapted["budget_spent"] < 1.001
    assert dense["path"] == "jax.nn xla"
    assert dense["kernel"] is None
    assert failed["failed"] == "RuntimeError: out of memory"
    assert [x["keys"] for x in found["speedups"]] == [256]
    assert "failed: RuntimeError: out of memory" in (tmp_path / "found.md").read_text()
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_of_tangents_says_what_ran(tmp_path: Path) -> None:
    flags = "--batch 1 --heads 2 --head-dims 16 --causal yes --dtype float32 --lengths 128"
    flags += f" --output {tmp_path} --name found --repeats 3 --passes forward+tangent --contenders"
    names = ["jax_aat exact", "jax.nn xla", "pallas mosaic"]
    assert attention.main([*flags.split(), *names]) == 0
    exact, dense, mosaic = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert "attend_tangent.f32" in exact["path"]
    assert exact["kernel"] > 0
    for row in (exact, dense):
        assert row["pass"] == "forward+tangent"
        assert row["errors"].keys() == {"out", "tangent"}
        assert max(row["errors"].values()) < 1e-5
    products = 6 * 2 * 2 * 16 * 128 * 129 / 2  # of 2 heads
    assert exact["tflops"] == pytest.approx(products / exact["kernel"] * 1e-9)
    assert mosaic["failed"].startswith("skipped: ")


def test_what_a_report_costs_is_told_with_its_interval(tmp_path: Path) -> None:
    flags = "--lengths 64 --budgets 0.5 --heads 2 --kv-heads 1 --head-dim 8 --dtype float32"
    flags += f" --implementation xla --pairs 2 --output {tmp_path / 'found'}"
    report_overhead.main(flags.split())
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["report"] for row in rows] == ["with audit", "no audit"]
    for row in rows:
        low, high = row["interval"]
        assert low <= row["overhead"] <= high
        assert min(row["without ms"], row["with ms"]) > 0
    assert "| no audit" in (tmp_path / "found.md").read_text()


def test_memory_counts_what_xla_lends(monkeypatch) -> None:
    """Which neither XLA's analysis nor Vulkan's pools know of: the most of the calls of a pass."""
    ran: list[int] = []

    @contextlib.contextmanager
    def profile():
        yield SimpleNamespace(calls=[SimpleNamespace(lent_bytes=x) for x in (300, 500, 0)])

    monkeypatch.setattr(passes, "_allocator", lambda: {"bytes_in_use": 7, "peak_bytes_in_use": 70})
    monkeypatch.setattr(passes.jax_aat, "profile", profile)
    read = passes.watch_memory()
    pools = jax_aat.memory_stats().total.reserved_bytes
    counted, source = read(1000, lambda: ran.append(1))
    assert counted == 1000 + 500 + pools
    assert source == "XLA's analysis, scratch lent and Vulkan's pools"
    assert ran
    assert read(1000, None) == (1000, "XLA's analysis")
    peaks = iter(({"bytes_in_use": 7, "peak_bytes_in_use": 70}, {"peak_bytes_in_use": 9007}))
    monkeypatch.setattr(passes, "_allocator", lambda: next(peaks))
    assert passes.watch_memory()(1000, None) == (9000, "peak of XLA's allocator")


def test_times_stand_where_the_rest_cannot_be_told() -> None:
    case = case_of(32)
    arrays = case.arrays(seed=0)

    def failing():
        raise MemoryError("no room")

    made = dataclasses.replace(made_of(arrays[0]), facts=failing)
    expected = sampling.expect(case, arrays, direction="forward")
    row = attention.run_row(case, lambda *_: made, False, arrays, expected, 3, 0.1)
    assert row["facts_failed"] == "MemoryError: no room"
    assert row["pipelined"] > 0
    assert "failed" not in row
    row |= dict.fromkeys(tables.GROUP, 1) | {"keys": 32, "contender": "jax_aat adaptive 1"}
    dense = row | {"contender": "torch flash", "relative_flops": 1.0}
    assert "FLOPs not known: MemoryError" in tables.render({}, [row, dense])


def test_speedup_is_over_the_fastest_dense_contender() -> None:
    common = dict.fromkeys(tables.GROUP, 0) | {"ifq": 1.0, "relative_flops": 0.5}
    times = {"jax_aat adaptive 0.1": 2.0, "torch flex 128 at 0.1": 1.0, "a": 5.0, "b": 4.0}
    rows = [
        common | {"contender": name, "keys": keys, "pipelined": x * keys**2, "latency": x}
        for keys in (2, 8)
        for name, x in times.items()
    ]
    for found in tables.speedups(rows):
        assert found["pipelined"]["times_as_fast"] == pytest.approx(2)
        assert found["pipelined"]["fastest"] == "b"
    assert tables.crossover(tables.speedups(rows)) == "faster from 2 keys on"
    assert [x["exponent"] for x in tables.exponents(rows)] == pytest.approx([2] * 4)
