"""What is checked when `tiled_attention` is traced, and the words in which it is refused."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_close

from jax_aat import tiled_attention

F32, I32, BOOL = jnp.float32, jnp.int32, jnp.bool_
B, T, S, N, K, H = 2, 5, 7, 4, 2, 8


def array(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


FITTING = {"query": array(B, T, N, H), "key": array(B, S, K, H), "value": array(B, S, K, H)}


def trace(**changes):
    """Traces a call; arrays given as shapes become tracers, everything else is passed as it is."""
    given = FITTING | changes
    traced = {k: x for k, x in given.items() if isinstance(x, jax.ShapeDtypeStruct)}
    fixed = {k: x for k, x in given.items() if k not in traced}
    return jax.eval_shape(lambda t: tiled_attention(**t, **fixed), traced)


REFUSED = [
    ({"query": array(T, H)}, ValueError, r"query: got shape \(5, 8\), expected \[B, T, N, H\]"),
    ({"query": array(1, 1, T, N, H)}, ValueError, "query: got shape"),
    ({"query": array(T, N, H)}, ValueError, r"key: got shape .* expected \[S, K, H\]"),
    ({"key": array(S, K, H)}, ValueError, r"key: got shape .* expected \[B, S, K, H\]"),
    ({"query": array(3, T, N, H)}, ValueError, "key: .* expected query's B=3"),
    ({"query": array(B, T, N, 4)}, ValueError, "key: .* expected query's H=4"),
    ({"value": array(B, S + 1, K, H)}, ValueError, "value: .* expected key's shape"),
    ({"value": array(B, S, 1, H)}, ValueError, "value: .* expected key's shape"),
    ({"query": array(B, T, 3, H)}, ValueError, "query: got N=3 heads, expected a multiple .* K=2"),
    (
        {"key": array(B, S, 0, H), "value": array(B, S, 0, H)},
        ValueError,
        "query: got N=4 heads, expected a multiple .* K=0",
    ),
    (
        {"query": array(B, T, N, 0), "key": array(B, S, K, 0), "value": array(B, S, K, 0)},
        ValueError,
        "H=0, expected H of at least 1",
    ),
    ({"query": array(B, T, N, H, dtype=I32)}, TypeError, "query: got dtype int32, expected one of"),
    ({"query": "text"}, TypeError, "query: got 'text'"),
    ({"query": None}, TypeError, "query: got None"),
    ({"key": array(B, S, K, H, dtype=jnp.bfloat16)}, TypeError, "key: got dtype bfloat16"),
    ({"value": array(B, S, K, H, dtype=jnp.float16)}, TypeError, "value: got dtype float16"),
    ({"mask": array(B, N, T, S)}, TypeError, "mask: got dtype float32, expected bool"),
    ({"mask": array(B, 3, T, S, dtype=BOOL)}, ValueError, r"mask: .* \(2, 4, 5, 7\)"),
    ({"mask": array(S, T, dtype=BOOL)}, ValueError, "mask: got shape"),
    ({"mask": array(1, B, N, T, S, dtype=BOOL)}, ValueError, "mask: got shape"),
    ({"bias": array(B, N, T, S, dtype=I32)}, TypeError, "bias: got dtype int32"),
    ({"bias": array(B, N, T, S, dtype=BOOL)}, TypeError, "bias: .* pass a boolean mask as mask"),
    ({"bias": array(B, K, T, S)}, ValueError, r"bias: got shape .* \[B, N, T, S\]"),
    ({"scale": "1"}, TypeError, "scale: got '1'"),
    ({"scale": True}, TypeError, "scale: got True"),
    ({"scale": array()}, TypeError, "scale: got .* expected a Python number"),
    ({"scale": array()}, TypeError, "scale: got .* multiply query by it instead"),
    ({"scale": np.ones(1)}, TypeError, "scale: got .* expected a Python number"),
    ({"scale": np.array(True)}, TypeError, "scale: got .* expected a Python number"),
    ({"scale": jnp.complex64(1)}, TypeError, "scale: got .* expected a Python number"),
    ({"scale": float("nan")}, ValueError, "scale: got nan, expected a finite number"),
    ({"scale": jnp.float32(np.inf)}, ValueError, "scale: got inf, expected a finite number"),
    ({"scale": -1e300}, ValueError, r"scale: got -1e\+300, .* that float32 holds, .* 3.4e\+38"),
    ({"scale": 10**400}, ValueError, "scale: got a number beyond float64, expected a smaller one"),
    ({"is_causal": 1}, TypeError, "is_causal: got 1"),
    ({"is_causal": array(dtype=BOOL)}, TypeError, "is_causal: got"),
    ({"local_window_size": -1}, ValueError, "local_window_size: got -1"),
    ({"local_window_size": (2, -3)}, ValueError, r"local_window_size: got \(2, -3\)"),
    ({"local_window_size": (1, 2, 3)}, TypeError, "local_window_size: got .* pair of ints"),
    ({"local_window_size": 2.0}, TypeError, "local_window_size: got 2.0"),
    ({"query_seq_lengths": array(B)}, TypeError, "query_seq_lengths: got dtype float32"),
    ({"query_seq_lengths": array(3, dtype=I32)}, ValueError, r"query_seq_lengths: .* \[B\] = \(2,"),
    ({"query_seq_lengths": np.array([0, T + 1])}, ValueError, "query_seq_lengths: .* from 0 to 6"),
    ({"key_value_seq_lengths": np.array([-1, S])}, ValueError, "key_value_seq_lengths: .* -1 to 7"),
    ({"query_segment_ids": array(B, T, dtype=I32)}, ValueError, "key_value_segment_ids: got None"),
    (
        {
            "query_segment_ids": array(B, S, dtype=I32),
            "key_value_segment_ids": array(B, S, dtype=I32),
        },
        ValueError,
        r"query_segment_ids: got shape \(2, 7\), expected .* \[B, T\] = \(2, 5\)",
    ),
    (
        {"query_segment_ids": array(B, T), "key_value_segment_ids": array(B, S, dtype=I32)},
        TypeError,
        "query_segment_ids: got dtype float32",
    ),
    ({"logits_soft_cap": 0}, ValueError, "logits_soft_cap: got 0.0, expected a positive number"),
    ({"logits_soft_cap": 1e300}, ValueError, r"logits_soft_cap: got 1e\+300, .* 1e-30 to 1e\+30"),
    ({"logits_soft_cap": 1e-50}, ValueError, "logits_soft_cap: got 1e-50, .* a positive number"),
    ({"logits_soft_cap": array()}, TypeError, "logits_soft_cap: got .* a Python number"),
    ({"logits_soft_cap": "x"}, TypeError, "logits_soft_cap: got 'x'"),
    ({"return_residual": "x"}, TypeError, "return_residual: got 'x' .* expected True or False"),
    ({"return_residual": 1}, TypeError, "return_residual: got 1"),
    (
        {
            "query_segment_ids": np.full(T, 2**32),
            "key_value_segment_ids": np.zeros(S, np.int64),
        },
        ValueError,
        "query_segment_ids: got ids from 4294967296 to 4294967296, .* to 2147483647",
    ),
    ({"implementation": "cudnn"}, ValueError, "implementation: got 'cudnn', expected 'vulkan'"),
    ({"implementation": 3}, ValueError, "implementation: got 3"),
]


@pytest.mark.parametrize(("changes", "error", "words"), REFUSED)
def test_refuses_in_words(changes, error, words):
    with pytest.raises(error, match=words):
        trace(**changes)


ACCEPTED = [
    {},
    {"mask": array(S, dtype=BOOL)},
    {"mask": array(T, S, dtype=BOOL)},
    {"mask": array(N, 1, S, dtype=BOOL)},
    {"bias": array(1, 1, T, 1, dtype=jnp.bfloat16)},
    {"scale": np.float32(0.5), "is_causal": np.bool_(True)},
    {"scale": 0},
    {"scale": jnp.float32(0.5)},
    {"scale": np.array(2)},
    {"scale": jnp.bfloat16(0.5), "logits_soft_cap": jnp.float32(3)},
    {"local_window_size": 0},
    {"local_window_size": (np.int64(3), 2**40)},
    {"query_seq_lengths": array(B, dtype=jnp.uint8), "key_value_seq_lengths": np.array([0, S])},
    {"query_seq_lengths": array(1, dtype=I32)},
    {
        "query_segment_ids": array(1, T, dtype=I32),
        "key_value_segment_ids": array(B, S, dtype=I32),
    },
]


@pytest.mark.parametrize("changes", ACCEPTED)
def test_accepts(changes):
    assert trace(**changes) == array(B, T, N, H)


def test_accepts_a_call_without_a_batch_axis():
    out, residual = trace(
        query=array(T, N, H),
        key=array(S, K, H),
        value=array(S, K, H),
        bias=array(N, T, S),
        mask=array(1, 1, 1, S, dtype=BOOL),
        query_seq_lengths=array(1, dtype=I32),
        query_segment_ids=array(T, dtype=I32),
        key_value_segment_ids=array(S, dtype=I32),
        return_residual=True,
    )
    assert (out, residual) == (array(T, N, H), array(T, N))


def test_vulkan_refuses_what_it_does_not_serve():
    wide = {name: array(*x.shape[:-1], 257) for name, x in FITTING.items()}
    with pytest.raises(ValueError, match="query: got a head_dim of 257, expected at most 256"):
        trace(**wide, implementation="vulkan")
    with jax.enable_x64(True):
        double = {name: array(*x.shape, dtype=jnp.float64) for name, x in FITTING.items()}
        with pytest.raises(TypeError, match="query: got float64, expected float32, bfloat16 or"):
            trace(**double, implementation="vulkan")
        assert trace(**double).dtype == jnp.float64


@pytest.mark.parametrize(
    ("switch", "words"),
    [
        ("1", "JAX_AAT_DISABLE=1 switches Vulkan off"),
        ("true", "JAX_AAT_DISABLE=true switches Vulkan off"),
        pytest.param(
            "maybe",
            "JAX_AAT_DISABLE=maybe is none of 1, true, 0 and false",
            marks=pytest.mark.filterwarnings("ignore:jax_aat leaves attention to XLA"),
        ),
    ],
)
def test_environment_switches_vulkan_off(switch, words, monkeypatch):
    monkeypatch.setenv("JAX_AAT_DISABLE", switch)
    with pytest.raises(RuntimeError, match=words):
        trace(implementation="vulkan")
    assert trace() == array(B, T, N, H)


@pytest.mark.parametrize("switch", ["", "0", "False"])
def test_environment_leaves_vulkan_on(switch, monkeypatch):
    monkeypatch.setenv("JAX_AAT_DISABLE", switch)
    assert trace(implementation="vulkan") == array(B, T, N, H)


def test_scale_of_float64_by_xla():
    """It may be as large as float64 allows."""
    with jax.enable_x64(True):
        double = {name: array(*x.shape, dtype=jnp.float64) for name, x in FITTING.items()}
        assert trace(**double, scale=1e300).dtype == jnp.float64


@pytest.mark.parametrize("traced", [False, True])
def test_integers_wider_than_int32(traced, implementation):
    """Small ids and lengths are what they are; a length beyond int32 is no small one."""
    x = jnp.linspace(-1, 1, T * N * H).reshape(1, T, N, H)
    ids = np.array([[0, 0, 1, 1, 2]])

    def attend(lengths, ids, far):
        options = {"key_value_seq_lengths": lengths, "implementation": implementation}
        near = tiled_attention(x, x, x, query_segment_ids=ids, key_value_segment_ids=ids, **options)
        if far is None:
            return near
        apart = {"query_segment_ids": far, "key_value_segment_ids": ids}
        return near, tiled_attention(x, x, x, **apart, **options)

    expected = attend(np.array([T], np.int32), ids.astype(np.int32), None)
    with jax.enable_x64(True):
        if not traced:
            wide = attend(np.array([T], np.int64), ids, None)
        else:
            given = np.array([2**32 + 1]), ids, ids + 2**32
            wide, apart = jax.jit(attend)(*given)
            assert not apart.any()
        assert_close(wide, expected, 1e-6)


WITHOUT_NATIVE = """
import sys
sys.modules["jax_aat._native"] = None
import jax.numpy as jnp
import jax_aat
x = jnp.ones((1, 3, 2, 4))
assert jax_aat.devices() == () and jax_aat.default_device() is None
assert jax_aat.last_dispatch() is None
assert jax_aat.tiled_attention(x, x, x).shape == x.shape
try:
    jax_aat.tiled_attention(x, x, x, implementation="vulkan")
except RuntimeError as error:
    print(error)
"""


def test_works_by_xla_without_the_native_module():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NATIVE], capture_output=True, text=True, check=True
    )
    assert "the native module of jax_aat is missing" in done.stdout
