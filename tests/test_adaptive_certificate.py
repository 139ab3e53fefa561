"""The certified bound: never violated, in float64, whatever the keys, values and judged output."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from certificate_cases import KINDS, climb, evaluate, make

from jax_aat import certificate

EVALUATE = jax.jit(evaluate, static_argnums=(1, 2))


def judged(case, soft_cap=0.0, dtype=None, evaluate=EVALUATE):
    return tuple(np.asarray(x) for x in evaluate(case, soft_cap, dtype))


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_never_violated(kind, rng):
    """1,250 cases of two rows a kind: 11,250 with those of all kinds."""
    error, bound, _ = judged(make(kind, rng, 1250))
    assert np.isfinite(error).all()
    assert (error <= bound).all()


def test_hill_climbing_finds_no_violation(rng):
    starts = [make(kind, rng, 60) for kind in KINDS]
    case = climb(jax.tree.map(lambda *x: jnp.concatenate(x), *starts), rng, 40)
    error, bound, _ = judged(case)
    assert (error <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
def test_never_violated_under_a_soft_cap(kind, rng):
    error, bound, _ = judged(make(kind, rng, 500), 5.0)
    assert (error <= bound).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "huge"])
def test_rounding_in_float32_is_covered(kind, rng):
    case = make(kind, rng, 500)
    for name in ("q", "k", "v", "bias"):
        case[name] = case[name].astype(jnp.float32).astype(jnp.float64)
    error, bound, _ = judged(case, 0.0, jnp.float32)
    assert (error <= bound).all()


def test_tight_enough_to_mean_something(rng):
    """Close keys give a small bound; exact groups none but that of rounding."""
    case = make("clustered", rng, 200)
    case["shift"] = jnp.zeros_like(case["shift"])
    _, bound, norm = judged(case)
    assert np.quantile(bound / norm, 0.25) < 0.01
    _, bound, norm = judged(case | {"exact": jnp.ones_like(case["exact"])})
    assert (bound < 1e-11 * (1 + norm)).all()


def test_cases_would_reveal_a_wrong_bound(rng, monkeypatch):
    """The same cases break a bound that takes variances for half of what they are."""
    right = certificate._log_bennett
    monkeypatch.setattr(certificate, "_log_bennett", lambda r, s2: right(r, s2 / 2))
    evaluate_wrongly = jax.jit(lambda *args: evaluate(*args), static_argnums=(1, 2))
    broken = 0
    for kind in KINDS:
        error, bound, _ = judged(make(kind, rng, 500), evaluate=evaluate_wrongly)
        broken += int((error > bound).sum())
    assert broken > 0


def test_a_rounded_mean_lies_between_what_it_is_the_mean_of(rng):
    """Of equal keys it may not; a GPU adds groups of 16, too, in an order where it does not."""
    with jax.enable_x64(False):
        keys = jnp.asarray(np.repeat(rng.normal(size=(2000, 1, 1)), 13, 1), jnp.float32)
        groups = certificate.group_statistics(keys, keys, size=13)
        assert (groups.key_high >= 0).all()
        assert (groups.key_low <= 0).all()


def test_statistics_of_a_ragged_last_group(rng):
    k, v = rng.normal(size=(2, 3, 21, 4))
    groups = certificate.group_statistics(jnp.asarray(k), jnp.asarray(v))
    np.testing.assert_array_equal(groups.count, [[16, 5]] * 3)
    np.testing.assert_allclose(groups.key_mean[:, 1], k[:, 16:].mean(1))
    last = k[:, 16:] - k[:, 16:].mean(1, keepdims=True)
    np.testing.assert_allclose(groups.key_high[:, 1], last.max(1))
    np.testing.assert_allclose(groups.key_radius[:, 1], np.linalg.norm(last, axis=-1).max(1))
    largest = np.asarray([np.sqrt(np.linalg.eigvalsh(np.cov(x.T, bias=True))[-1]) for x in last])
    ratio = np.asarray(groups.key_spread[:, 1]) / largest
    assert (ratio >= 1).all()
    assert (ratio <= 1.05).all()
