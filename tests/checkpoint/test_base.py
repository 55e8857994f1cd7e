"""The fingerprint of a base: the same wherever it lies, and another for other values."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jlora.checkpoint import base

RNG = np.random.default_rng(0)
DTYPES = "float32 bfloat16 float16 float8_e4m3fn int32 uint8 int4 bool complex64".split()
HOST = {
    **{name: (5 * RNG.normal(size=(16, 8, 4))).astype(jnp.dtype(name)) for name in DTYPES},
    "zeros": np.full((32, 4), -0.0, np.float32),
    "nans": np.full((8, 8), np.nan, np.float32),
    "one": np.float32(3),
    "few": np.arange(8, dtype=np.float32),
    "none": np.zeros((0, 8), np.float32),
}
KEYS = jax.random.wrap_key_data(np.arange(16, dtype=np.uint32).reshape(8, 2))
ARRAYS = jax.device_put(HOST) | {"keys": KEYS}
SPECS = [(), ("a",), (("a", "b"), "c"), ("c", ("b", "a")), (None, "b", "a"), (("c", "a", "b"),)]


def by_definition(x):
    """Sixteen elements, evenly spread over the array, as they lie in memory."""
    flat = np.unique(np.linspace(0, x.size - 1, min(x.size, 16)).astype(np.int64)) if x.size else []
    host = np.asarray(jax.random.key_data(x)) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)
    picked = host.reshape(max(x.size, 1) if x.size else 0, *host.shape[x.ndim :])[flat]
    return hashlib.sha256(np.ascontiguousarray(picked).tobytes()).hexdigest()[:16]


EXPECTED = {name: by_definition(x) for name, x in ARRAYS.items()}


def test_on_one_device_and_off_it():
    assert base.sampled(ARRAYS) == EXPECTED
    assert base.sampled(HOST) == {name: EXPECTED[name] for name in HOST}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind):
    """Each of the arrays in some of the places, every place with arrays of every width, in one program."""
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(kind,) * 3)
    placed, expected = {}, {}
    for i, spec in enumerate(SPECS):
        for name in [name for j, name in enumerate(ARRAYS) if i % 3 == j % 3 or name in ("float32", "keys")]:
            if (x := ARRAYS[name]).ndim >= len(spec) and x.size:
                placed[f"{name} {spec}"] = jax.device_put(HOST.get(name, x), NamedSharding(mesh, PartitionSpec(*spec)))
                expected[f"{name} {spec}"] = EXPECTED[name]
    assert {key.split(" ")[0] for key in placed} >= {*DTYPES, "zeros", "nans", "few", "keys"}
    assert base.sampled(placed) == expected


def test_arrays_of_several_places_at_once():
    mesh = jax.make_mesh((8,), ("a",))
    other = jax.make_mesh((4, 2), ("a", "b"))
    x = HOST["float32"]
    placed = {
        "on a mesh": jax.device_put(x, NamedSharding(mesh, PartitionSpec("a"))),
        "on another": jax.device_put(x, NamedSharding(other, PartitionSpec("b", "a"))),
        "here": jax.device_put(x, jax.devices()[1]),
        "off": x,
    }
    assert base.sampled(placed) == dict.fromkeys(placed, EXPECTED["float32"])


def test_any_value_that_is_sampled_counts():
    for place in (0, ARRAYS["float32"].size - 1):
        changed = HOST["float32"].copy()
        changed.flat[place] += 1
        assert base.sampled({"x": jax.device_put(changed)})["x"] != EXPECTED["float32"]


def test_what_trains_or_is_abstract_has_no_sample():
    import jlora

    leaves = {
        "full": jlora.TrainableParam(jnp.ones(3)),
        "plan": jax.ShapeDtypeStruct((2,), jnp.float32),
        "name": "text",
    }
    assert base.told(leaves) == {
        "full": {"shape": [3], "dtype": "float32"},
        "plan": {"shape": [2], "dtype": "float32"},
    }
