"""The public names, no more and no less."""

import inspect
import pathlib

import jlora

NAMES = """
AdaptedParam Axes DenseFallbackError DenseFallbackWarning LoraParam LoraSpec MergePrecisionWarning TrainableParam apply
combine explain fold_and_restart grad labels merge merge_error optimizer partition sites summary to_plain_lora unwrap
value_and_grad wrap
""".split()
PEFT_NAMES = "NAMES Layout from_safetensors load low_rank push resize_tables save to_safetensors".split()
NAMESPACES = ["adapters", "checkpoint", "init", "nnx", "optim", "peft", "quant", "sharding", "variants"]


def test_public_names():
    assert sorted(jlora.__all__) == sorted([*NAMES, *NAMESPACES])
    assert all(callable(getattr(jlora, name)) for name in NAMES)
    assert all(inspect.ismodule(getattr(jlora, name)) for name in NAMESPACES)


def test_public_names_of_files():
    assert sorted(jlora.peft.__all__) == sorted(PEFT_NAMES)
    assert not [name for name in jlora.peft.__all__ if not getattr(jlora.peft, name).__doc__]


def test_no_private_jax():
    """Only public names of JAX are used."""
    sources = pathlib.Path(jlora.__file__).parent.rglob("*.py")
    assert not [path.name for path in sources if "jax._src" in path.read_text()]
