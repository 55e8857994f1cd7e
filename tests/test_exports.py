"""The public names, no more and no less."""

import pathlib

import jlora

NAMES = """
AdaptedParam Axes DenseFallbackError DenseFallbackWarning LoraParam LoraSpec MergePrecisionWarning TrainableParam apply
combine explain grad labels merge optimizer partition sites summary unwrap value_and_grad wrap
""".split()


def test_public_names():
    assert sorted(jlora.__all__) == sorted(NAMES)
    assert all(callable(getattr(jlora, name)) for name in NAMES)


def test_no_private_jax():
    """Only public names of JAX are used."""
    sources = pathlib.Path(jlora.__file__).parent.rglob("*.py")
    assert not [path.name for path in sources if "jax._src" in path.read_text()]
