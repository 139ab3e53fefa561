"""The audit: which rows it draws, what it says of them, and whether its intervals hold."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from comparison import normal

from jax_aat import audit, rows
from jax_aat.levels import Grid, pack_levels
from jax_aat.problem import Operands, Options, Slot
from jax_aat.reference import relative_error

B, T, S, N, K, H = 2, 100, 120, 4, 2, 8
GRID = Grid(T, S, N, K, query_tile=32, super_tile=256)

CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (20, 3)},
    "lengths": {"q_lengths": np.array([70, 100]), "kv_lengths": np.array([33, 120])},
    "segments": {
        "q_segments": np.arange(T)[None].repeat(B, 0) // 30,
        "kv_segments": np.arange(S)[None] // 35,
    },
    "mask": {"mask": np.random.default_rng(0).random((B, 1, T, S)) < 0.5},
    "mask of heads": {"mask": np.random.default_rng(0).random((1, N, 1, S)) < 0.5},
    "bias": {"bias": np.random.default_rng(0).normal(size=(1, N, T, S))},
    "bias of keys": {"bias": np.random.default_rng(0).normal(size=(B, 1, 1, S)), "causal": True},
    "soft cap": {"soft_cap": 2.0},
}


def problem(rng, **extra) -> tuple[Operands, Options, oracle.Problem]:
    q, k, v = (np.asarray(normal(rng, B, *shape)) for shape in ((T, N, H), (S, K, H), (S, K, H)))
    dense = oracle.Problem(q, k, v, scale=0.5, **extra)
    slots = {
        Slot.BIAS: dense.bias,
        Slot.MASK: dense.mask,
        Slot.Q_LENGTHS: dense.q_lengths,
        Slot.KV_LENGTHS: dense.kv_lengths,
        Slot.Q_SEGMENTS: dense.q_segments,
        Slot.KV_SEGMENTS: dense.kv_segments,
    }
    operands = {Slot.Q: q, Slot.K: k, Slot.V: v} | slots
    operands = {slot: jnp.asarray(x) for slot, x in operands.items() if x is not None}
    return operands, Options(0.5, dense.causal, dense.window, dense.soft_cap), dense


def spoil(operands: Operands) -> None:
    """Puts NaN beyond the lengths."""
    lengths = {Slot.Q: Slot.Q_LENGTHS, Slot.K: Slot.KV_LENGTHS, Slot.V: Slot.KV_LENGTHS}
    for slot, length in lengths.items():
        if length in operands:
            x = operands[slot]
            valid = jnp.arange(x.shape[1]) < operands[length][:, None]
            operands[slot] = jnp.where(valid[..., None, None], x, jnp.nan)


@pytest.mark.parametrize("name", CASES)
def test_of_every_row_is_the_truth(name, rng, monkeypatch):
    """Several chunks of rows, all rows: errors, norms and masses are those of a dense oracle."""
    monkeypatch.setattr(audit, "LOGITS_AT_ONCE", 7 * B * N * S)
    operands, options, dense = problem(rng, **CASES[name])
    spoil(operands)
    exact = oracle.Attention(dense)
    out = exact.out + 0.1 * rng.normal(size=exact.out.shape)
    level = rng.integers(0, 3, (B, GRID.lists, GRID.tiles, GRID.granules))
    positions = np.arange(T)[None].repeat(B, 0)
    found = jax.jit(audit.audit, static_argnums=(1, 4))(
        operands,
        options,
        jnp.asarray(out, jnp.float32),
        pack_levels(jnp.asarray(level)),
        GRID,
        jnp.asarray(positions),
        np.ones(T),
    )
    axes = (0, 1, 3)
    np.testing.assert_allclose(found.error, ((out - exact.out) ** 2).sum(axes), 1e-4)
    np.testing.assert_allclose(found.norm, (exact.out**2).sum(axes), 1e-4)
    true = np.sqrt(((out - exact.out) ** 2).sum(axes) / (exact.out**2).sum(axes))
    np.testing.assert_allclose(found.relative_error, true, 1e-4)
    np.testing.assert_allclose(found.information_flow_quality, 1 - true**2, 1e-3, 1e-4)

    pad = GRID.granules * 16 - S
    mass = np.pad(exact.p, [(0, 0)] * 3 + [(0, pad)]).reshape(B, N, T, -1, 16).sum(-1)
    seen = np.pad(oracle.visible(dense), [(0, 0)] * 3 + [(0, pad)])
    fine = (level == 0).repeat(GRID.tile_heads, 1).repeat(GRID.positions, 2)[:, :, :T]
    fine = fine & seen.reshape(B, N, T, -1, 16).any(-1)
    ranks = np.argsort(np.argsort(-mass, -1), -1)
    best = np.where(ranks < fine.sum(-1, keepdims=True), mass, 0)
    np.testing.assert_allclose(found.held, np.where(fine, mass, 0).sum((0, 2, 3)), 1e-4)
    np.testing.assert_allclose(found.best, best.sum((0, 2, 3)), 1e-4)
    assert (found.adaptation_efficiency <= 1 + 1e-5).all()


def test_rows_are_drawn_one_a_stretch_by_counter():
    choose = jax.jit(audit.choose_rows, static_argnums=(2, 3, 4))
    positions, weights = audit.choose_rows(3, 5, 4, 150, 1 / 64)
    assert positions.shape == (4, 3)
    np.testing.assert_array_equal(weights, [64, 64, 22])
    np.testing.assert_array_equal(positions // 64, [[0, 1, 2]] * 4)
    assert (positions < 150).all()
    np.testing.assert_array_equal(positions, choose(jnp.uint32(3), jnp.int32(5), 4, 150, 1 / 64)[0])
    draws = np.stack([audit.choose_rows(3, step, 4, 150, 1 / 64)[0] for step in range(200)])
    counts = np.bincount(draws[..., 0].ravel(), minlength=64)
    assert counts.min() > 0
    assert counts.max() < 40


def test_of_exact_attention_finds_no_error(rng):
    operands, options, dense = problem(rng, causal=True)
    out = jnp.asarray(oracle.Attention(dense).out, jnp.float32)
    levels = pack_levels(jnp.zeros((1, GRID.lists, GRID.tiles, GRID.granules), int))
    positions, weights = audit.choose_rows(0, 0, B, T, 1 / 16)
    found = audit.audit(operands, options, out, levels, GRID, positions, weights)
    assert (found.relative_error < 1e-6).all()
    np.testing.assert_allclose(found.adaptation_efficiency, 1, 1e-6)
    np.testing.assert_allclose(found.information_flow_quality, 1, 1e-6)


def test_has_no_gradient_and_vmaps(rng):
    operands, options, dense = problem(rng)
    out = jnp.asarray(oracle.Attention(dense).out, jnp.float32)
    levels = pack_levels(jnp.zeros((1, GRID.lists, GRID.tiles, GRID.granules), int))
    positions, weights = audit.choose_rows(0, 0, B, T, 1 / 16)

    def error(shift):
        return audit.audit(
            operands, options, out + shift, levels, GRID, positions, weights
        ).relative_error

    shifts = jnp.array([0.0, 0.1, 1.0])
    np.testing.assert_allclose(jax.vmap(error)(shifts), [error(x) for x in shifts], 1e-6, 1e-7)
    assert (jax.jacobian(error)(0.1) == 0).all()


def heavy_tailed(rng, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors and norms of rows: early ones large and exact."""
    norm = rng.gamma(2.0, size=rows) * (1 + 300 * np.exp(-np.arange(rows) / 20))
    error = norm * rng.lognormal(0, 1, rows) * (np.arange(rows) > 100)
    return error, norm


def test_interval_covers_the_truth(rng):
    """1,000 audits of each of five populations of 2,048 rows with errors of heavy tails."""

    def summed(errors, total):
        y = 64.0 * errors
        fields = (len(y), (y > 0).sum(), y.sum(), (y**2).sum(), y.max(), total, 0.0, 1.0)
        return audit.Audit(*(jnp.float32(x) for x in fields))

    covered = []
    for _ in range(5):
        error, norm = heavy_tailed(rng, 2048)
        draws = rng.integers(0, 64, (1000, 32)) + 64 * np.arange(32)
        audits = jax.tree.map(
            lambda *x: jnp.stack(x), *[summed(error[d], norm.sum()) for d in draws]
        )
        low, high = np.asarray(audits.interval).T
        true = np.sqrt(error.sum() / norm.sum())
        covered.append(((low <= true) & (true <= high)).mean())
        assert np.median(high / low) < 20
    assert min(covered) >= 0.95, covered


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounding_says_nothing_of_rows_that_were_not_audited(rng, dtype):
    """An interval that rests on rounding alone holds what so few rows could have missed."""
    operands, options, dense = problem(rng)
    exact = oracle.Attention(dense).out
    levels = pack_levels(jnp.zeros((1, GRID.lists, GRID.tiles, GRID.granules), int))

    def audited(out):
        positions = jnp.arange(T)[None].repeat(B, 0)
        return audit.audit(operands, options, out, levels, GRID, positions, np.ones(T))

    rounded = jnp.asarray(exact, dtype)
    found = audited(rounded)
    np.testing.assert_array_equal(found.erring, 0)
    assert (found.interval[:, 0] == 0).all()
    np.testing.assert_allclose(found.interval[:, 1], np.sqrt(3 / (B * T)), 1e-6)

    wrong = audited(rounded.at[0, jnp.array([5, 40])].multiply(1.05))
    np.testing.assert_array_equal(wrong.erring, 2)
    assert (wrong.interval[:, 0] > 0).all()
    assert (wrong.interval[:, 1] > wrong.relative_error).all()


@pytest.mark.parametrize("row", [5, 40], ids=["audited", "other row"])
def test_an_output_that_is_not_finite_is_not_called_exact(rng, row):
    operands, options, dense = problem(rng)
    out = jnp.asarray(oracle.Attention(dense).out, jnp.float32).at[0, row, 1].set(jnp.nan)
    levels = pack_levels(jnp.zeros((1, GRID.lists, GRID.tiles, GRID.granules), int))
    positions = jnp.array([[5, 20]]).repeat(B, 0)
    found = audit.audit(operands, options, out, levels, GRID, positions, np.full(2, T / 2))
    assert np.isnan(found.relative_error).tolist() == [n == 1 for n in range(N)]
    np.testing.assert_array_equal(
        np.isnan(found.information_flow_quality), np.isnan(found.relative_error)
    )
    np.testing.assert_array_equal(
        np.isfinite(found.interval[:, 1]), np.isfinite(found.relative_error)
    )


def test_heads_are_judged_together(rng):
    operands, options, dense = problem(rng)
    exact = oracle.Attention(dense).out
    out = jnp.asarray(exact + 0.1 * rng.normal(size=exact.shape), jnp.float32)
    levels = pack_levels(jnp.zeros((1, GRID.lists, GRID.tiles, GRID.granules), int))
    found = audit.audit(operands, options, out, levels, GRID, *audit.choose_rows(0, 0, B, T, 1 / 4))
    together = found.joined(N)
    true = np.linalg.norm(out - exact) / np.linalg.norm(exact)
    low, high = together.interval[0]
    assert low < together.relative_error[0] < high
    assert low < true < high


def weights_of(operands, scale):
    """Of a causal call, and its logits."""
    alone = {slot: x[0] for slot, x in operands.items()}
    options = Options(scale, causal=True)
    attend = jax.jit(lambda some: rows.softmax_weights(some, options, GRID, jnp.arange(T))[0])
    q = np.float64(alone[Slot.Q]).reshape(T, K, N // K, -1)
    logits = scale * np.einsum("tkgh,skh->kgts", q, alone[Slot.K]).reshape(N, T, -1)
    return np.asarray(attend(alone)), np.where(np.tri(T, S, dtype=bool), logits, -np.inf)


def test_weights_of_large_logits(rng):
    found, logits = weights_of(problem(rng)[0], 0.3e9)
    assert (found.max(-1) == 1).all()
    assert (found.argmax(-1) == logits.argmax(-1)).mean() > 0.99


@pytest.mark.parametrize("scale", [0.3, -0.7, 0.0])
def test_weights_are_those_of_softmax(scale, rng):
    found, logits = weights_of(problem(rng)[0], scale)
    right = np.exp(logits - logits.max(-1, keepdims=True))
    assert relative_error(found, right) < 1e-5


def test_sum_of_largest(rng):
    x = np.float32(rng.uniform(size=(7, 300)) ** 20)
    x[1], x[2, ::2], x[3, :40], x[4], x[5, 3] = 0, 0, 1, 1 / 300, 1
    for count in (0, 1, 17, 299, 300):
        found = audit._sum_of_largest(jnp.asarray(x), jnp.full(7, count))
        right = np.sort(x, -1)[:, 300 - count :].sum(-1, dtype=np.float64)
        np.testing.assert_allclose(found, right, rtol=2e-6)
