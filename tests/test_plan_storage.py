"""Plans as data: written and read, checked, refused where they are corrupted."""

import dataclasses
import functools
import io
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_same_bits, normal
from flax import serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_adaptive_plan import (
    SHORTER,
    TILE,
    clustered,
    plan_tiles,
    tiled_attention,
    untraced_attention,
)

import jax_aat
from jax_aat import Adaptation
from jax_aat.levels import unpack_levels


@pytest.fixture(scope="module")
def stored():
    q, k, v = clustered(np.random.default_rng(3), 256)
    return plan_tiles(q, k, v, Adaptation(budget=0.5, query_tile=16), is_causal=True)


def test_plans_are_stored(stored):
    assert "exact" in str(stored)
    leaves, structure = jax.tree.flatten(stored)
    blob = serialization.to_bytes(dict(enumerate(leaves)))
    read = serialization.from_bytes(dict(enumerate(leaves)), blob)
    restored = jax.tree.unflatten(structure, [jnp.asarray(read[i]) for i in range(len(leaves))])
    assert_same_bits(restored.validate(), stored)
    assert_same_bits(pickle.loads(pickle.dumps(stored)).validate(), stored)


NAMES = ("levels", "list_headers", "list_entries", "key_list_headers", "key_list_entries")


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_corrupted_plan_is_an_error(stored, data):
    name = data.draw(st.sampled_from(NAMES))
    x = np.array(getattr(stored, name))
    at = data.draw(st.integers(0, x.size - 1))
    value = data.draw(st.integers(0, 2**32 - 1))
    # A header may call fewer granules full than are: the keys of the others are tested in vain.
    is_fewer_full = name == "list_headers" and at % 4 == 1 and value < x.flat[at]
    if x.flat[at] == value or is_fewer_full:
        return
    x.flat[at] = value
    broken = dataclasses.replace(stored, **{name: jnp.asarray(x)})
    with pytest.raises(ValueError, match=r"plan\..*corrupted"):
        broken.validate()
    # Attention with it is wrong, but reads nothing that is not there.
    q = jnp.ones((1, 256, 4, 16))
    assert (
        tiled_attention(q, q[:, :, :2], q[:, :, :2], plan=broken, is_causal=True).shape == q.shape
    )


@pytest.mark.parametrize(
    "options",
    [{"is_causal": True}, {"local_window_size": (40, 20)}, {"is_causal": True, **SHORTER}],
)
def test_granules_that_are_cut_cannot_be_called_full(options, rng):
    """Shaders test no key of a granule that a plan calls full."""
    q, k, v = (normal(rng, 1, 128, n, 8) for n in (4, 2, 2))
    plan = plan_tiles(q, k, v, Adaptation(budget=1.0, query_tile=TILE), **options).validate()
    headers = np.array(plan.list_headers)
    assert (headers[..., 1] < headers[..., 2]).any()
    headers[..., 1] = headers[..., 2]
    broken = dataclasses.replace(plan, list_headers=jnp.asarray(headers))
    with pytest.raises(ValueError, match=r"plan\.list_.*corrupted"):
        broken.validate()


def test_a_price_that_is_no_number_is_an_error(stored, tmp_path):
    broken = dataclasses.replace(stored, log_lambda=stored.log_lambda * jnp.nan)
    broken.save(tmp_path / "plan")
    with pytest.raises(ValueError, match=r"plan\.log_lambda: the plan is corrupted"):
        jax_aat.TilePlan.load(tmp_path / "plan")


@pytest.mark.parametrize(
    ("goal", "price"), [({"budget": 1e-4}, np.inf), ({"threshold": 0}, -np.inf)]
)
def test_prices_may_be_infinite(goal, price, rng, tmp_path):
    """Where a budget leaves no room a row is priceless, where everything is exact it is free."""
    q, k, v = (normal(rng, 1, 128, n, 8) for n in (4, 2, 2))
    plan = plan_tiles(q, k, v, Adaptation(**goal, query_tile=TILE), is_causal=True)
    assert (np.asarray(plan.log_lambda) == price).all()
    plan.save(tmp_path / "plan")
    assert_same_bits(jax_aat.TilePlan.load(tmp_path / "plan"), plan)


POSITIVE = "expected positive integers, heads a multiple of kv_heads"
OF_ADAPTATION = "expected that of its adaptation"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grid", {"query_tile": 0}, POSITIVE),
        ("grid", {"super_tile": 0}, POSITIVE),
        ("grid", {"kv_heads": 0}, POSITIVE),
        ("grid", {"kv_heads": 3}, POSITIVE),
        ("grid", {"queries": 0}, POSITIVE),
        ("grid", {"keys": -256}, POSITIVE),
        ("grid", {"keys": "256"}, POSITIVE),
        ("grid", {"query_tile": 16.0}, POSITIVE),
        ("grid", {"query_tile": 1}, OF_ADAPTATION),
        ("grid", {"query_tile": 32}, OF_ADAPTATION),
        ("grid", {"super_tile": 512}, OF_ADAPTATION),
        # Sizes of which not even the lists could be counted.
        (
            "grid",
            {"queries": 2**60},
            r"plan\.levels: got shape \[1, 2, 32, 1\], expected it to end",
        ),
        ("grid", {"keys": 2**60, "super_tile": 1024}, r"plan\.levels: got shape"),
        ("window", (1,), "expected two integers from -1"),
        ("window", (-5, 3), "expected two integers from -1"),
        ("window", (0, 2**31), "expected two integers from -1"),
        ("window", (1.5, 3), "expected two integers from -1"),
        ("window", (True, 3), "expected two integers from -1"),
        ("causal", "no", "expected True or False"),
        ("causal", 1, "expected True or False"),
        ("hides", None, "expected True or False"),
    ],
)
def test_what_is_no_array_is_checked(name, value, message, stored, tmp_path):
    """Before anything is computed of it."""
    if name == "grid":
        value = dataclasses.replace(stored.grid, **value)
    broken = dataclasses.replace(stored, **{name: value})
    with pytest.raises(ValueError, match=message) as raised:
        broken.validate()
    assert str(raised.value).startswith((f"plan.{name}: got", "plan.levels: got"))
    broken.save(tmp_path / "plan")
    with pytest.raises(ValueError, match=f"is not a plan that TilePlan.save wrote: .*{message}"):
        jax_aat.TilePlan.load(tmp_path / "plan")


@pytest.mark.parametrize(
    ("levels", "used", "first"), [((0, 1, 2), (0, 1), 2), ((0, 1, 2), (0,), 2), ((0, 1), (0,), 1)]
)
@pytest.mark.parametrize("stacked", [False, True], ids=["", "stacked"])
def test_levels_are_those_in_use(levels, used, first, stacked, rng):
    q, k, v = (normal(rng, 1, 512, n, 8) for n in (4, 2, 2))
    adaptation = Adaptation(threshold=1e9, levels=levels, query_tile=64)
    plan = plan_tiles(q, k, v, adaptation)
    if stacked:
        plan = jax.tree.map(lambda x: jnp.stack([x, x]), plan)
    level = np.asarray(unpack_levels(plan.validate().levels, plan.grid.granules))
    assert (level == first).any()
    others = dataclasses.replace(adaptation, levels=used)
    with pytest.raises(ValueError, match="a level that its adaptation does not use"):
        dataclasses.replace(plan, adaptation=others).validate()


def with_member(content: bytes, name: str, member: bytes) -> bytes:
    """An archive in which a member holds something else."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        for other in old.namelist():
            new.writestr(other, member if other == name else old.read(other))
    return made.getvalue()


def with_bit(content: bytes, at: int) -> bytes:
    return content[: at // 8] + bytes([content[at // 8] ^ 1 << at % 8]) + content[at // 8 + 1 :]


def npy(x: np.ndarray) -> bytes:
    made = io.BytesIO()
    np.save(made, x)
    return made.getvalue()


def array_file(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


DIRECTORY = b"PK\x01\x02"
"""What the entry of a file in the directory of an archive begins with."""


@pytest.mark.parametrize(
    "broken",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        # Made by a later version, encrypted, compressed in another way.
        lambda content: with_bit(content, 8 * (content.index(DIRECTORY) + 6) + 6),
        lambda content: with_bit(content, 8 * (content.index(DIRECTORY) + 8)),
        lambda content: with_bit(content, 8 * (content.index(DIRECTORY) + 10)),
        lambda content: with_member(content, "levels.npy", array_file("{'descr': (")),
        lambda content: with_member(
            content,
            "levels.npy",
            array_file(f"{{'descr': '<u4', 'fortran_order': False, 'shape': ({2**60},)}}"),
        ),
        lambda content: with_member(content, "fixed.npy", npy(np.array("[" * 10**5))),
        lambda content: with_member(content, "fixed.npy", npy(np.array("{}"))),
        lambda content: with_member(content, "fixed.npy", npy(np.array(1))),
    ],
    ids=[
        *("empty", "cut", "version", "encrypted", "compression"),
        *("header", "size", "nested", "no fields", "a number"),
    ],
)
def test_a_broken_file_is_an_error(broken, stored, tmp_path):
    path = tmp_path / "plan"
    stored.save(path)
    path.write_bytes(broken(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path}: is not a plan that TilePlan.save wrote: .+"):
        jax_aat.TilePlan.load(path)


def test_any_flipped_bit_is_an_error_or_means_nothing(stored, rng, tmp_path):
    path = tmp_path / "plan"
    stored.save(path)
    content = path.read_bytes()
    refused = 0
    for at in rng.integers(0, 8 * len(content), 300):
        path.write_bytes(with_bit(content, int(at)))
        try:
            read = jax_aat.TilePlan.load(path)
        except ValueError:
            refused += 1
        else:
            assert_same_bits(read, stored)
            assert jax.tree.structure(read) == jax.tree.structure(stored)
    assert 0 < refused < 300


def test_a_file_that_cannot_be_read_is_none_that_is_broken(tmp_path):
    with pytest.raises(FileNotFoundError):
        jax_aat.TilePlan.load(tmp_path / "plan")


def test_a_plan_that_cannot_be_written_leaves_the_file(stored, tmp_path):
    stored.save(tmp_path / "plan")
    abstract = jax.eval_shape(lambda: stored)
    with pytest.raises(ValueError, match="plan: its arrays have no values"):
        abstract.save(tmp_path / "plan")
    assert_same_bits(jax_aat.TilePlan.load(tmp_path / "plan"), stored)


def test_numbers_of_numpy_are_those_of_python(stored, tmp_path):
    adaptation = Adaptation(
        budget=np.float32(0.5),
        levels=(np.int32(0), np.int64(1), 2),
        query_tile=np.int64(16),
        stages=np.uint8(2),
        audit_rate=np.float64(0.5),
        replan_every=np.int64(1),
    )
    plan = dataclasses.replace(stored, adaptation=adaptation)
    plan.save(tmp_path / "plan")
    assert jax_aat.TilePlan.load(tmp_path / "plan").adaptation == adaptation
    assert type(adaptation.budget) is float
    assert type(adaptation.query_tile) is int


def test_a_plan_without_values_has_a_name(stored):
    q = jnp.ones((1, 256, 4, 16))
    call = functools.partial(tiled_attention, q, q[:, :, :2], q[:, :, :2], is_causal=True)
    report = jax.eval_shape(lambda: call(plan=stored, return_report=True)[1])
    for x in (jax.eval_shape(lambda: stored), report):
        assert "no values" in str(x)
        assert repr(x)

    def traced(x):
        plan = dataclasses.replace(stored, log_lambda=x)
        assert "no values" in str(plan)
        with pytest.raises(ValueError, match="plan: its arrays have no values here"):
            plan.validate()
        return x

    jax.make_jaxpr(traced)(stored.log_lambda)


def test_a_plan_of_another_size_is_an_error(stored):
    q = jnp.ones((1, 256, 4, 16))
    wrong = dataclasses.replace(stored, list_entries=stored.list_entries[..., :-1])
    with pytest.raises(ValueError, match=r"plan\.list_entries: got"):
        wrong.validate()
    for name, broken in (
        ("list_entries", stored.list_entries[..., :-1]),
        ("list_headers", stored.list_headers.astype(jnp.float32)),
        ("key_list_headers", stored.key_list_headers[:, :, :1]),
        ("log_lambda", stored.log_lambda[0]),
    ):
        with pytest.raises(ValueError, match=rf"plan\.{name}: got .*, expected (uint|float)32\["):
            untraced_attention(
                *(q, q[:, :, :2], q[:, :, :2]),
                plan=dataclasses.replace(stored, **{name: broken}),
                is_causal=True,
            )
    for arrays, options in (
        ((q[:, :255], q[:, :, :2], q[:, :, :2]), {"is_causal": True}),
        ((q, q[:, :, :2], q[:, :, :2]), {}),
        ((q, q, q), {"is_causal": True}),
        ((jnp.repeat(q, 2, 0), *(jnp.ones((2, 256, 2, 16)),) * 2), {"is_causal": True}),
    ):
        with pytest.raises(ValueError, match="plan: was made for"):
            untraced_attention(*arrays, plan=stored, **options)


def test_a_plan_says_what_it_may_hide(stored, tmp_path):
    """Hidden keys that nothing hides are an error, unless lengths and the like may have."""
    hidden = stored.grid, stored.adaptation, True, (-1, -1), 1
    jax_aat.TilePlan.unfilled(*hidden, hides=True).validate()
    unfilled = jax_aat.TilePlan.unfilled(*hidden)
    assert jax.tree.structure(unfilled) == jax.tree.structure(stored)
    with pytest.raises(ValueError, match="a level that causality or window forbids"):
        unfilled.validate()
    plan = dataclasses.replace(stored, hides=True)
    plan.save(tmp_path / "plan")
    read = jax_aat.TilePlan.load(tmp_path / "plan")
    assert jax.tree.structure(read) == jax.tree.structure(plan)
