"""A step on a mesh moves what the frozen model moves, and factors: on eight CPU devices, and compiled for TPU pods."""

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks.pod_programs import RANKS, Case, copies, extra_moves, low_rank_flops, run

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jax[tpu]'"
)
CPU = [Case("small", "cpu", 4, 2, 8, 128), pytest.param(Case("small", "cpu", 8, 1, 8, 128), marks=pytest.mark.slow)]
FSDP = [
    pytest.param(Case("small", "v5e:4x4", 16, 1, 16, 128), marks=NEEDS_LIBTPU),
    pytest.param(Case("1B", "v5e:4x4", 16, 1, 16), marks=[NEEDS_LIBTPU, pytest.mark.slow]),
    pytest.param(Case("1B", "v5e:16x16", 256, 1, 256), marks=[NEEDS_LIBTPU, pytest.mark.slow]),
]
TENSOR = [
    pytest.param(Case("small", "v5e:4x4", 8, 2, 16, 128), marks=NEEDS_LIBTPU),
    pytest.param(Case("1B", "v5e:4x4", 8, 2, 8), marks=[NEEDS_LIBTPU, pytest.mark.slow]),
]


@functools.cache
def found(case):
    """What the compiler makes of floor and step; for a TPU in a process of its own: libtpu reads the environment."""
    if case.topology == "cpu":
        return run(case)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        sizes = [str(size) for size in (case.fsdp, case.tensor, case.batch, case.length)]
        command = [sys.executable, "-m", "benchmarks.pod_programs", "--json", str(file), "--case"]
        subprocess.run([*command, case.model, case.topology, *sizes], cwd=ROOT, env=ENVIRONMENT, check=True)
        return json.loads(file.read_text())[case.name]


@pytest.mark.parametrize("case", [*CPU, *FSDP, *TENSOR], ids=str)
def test_a_step_fits_and_multiplies_what_the_floor_and_the_factors_need(case):
    one = found(case)
    assert one["floor"]["fits"] and one["step"]["fits"]
    assert one["floor"]["flops"] < one["step"]["flops"] <= 1.01 * (one["floor"]["flops"] + low_rank_flops(case))


@pytest.mark.parametrize("case", [*CPU, *FSDP, *TENSOR], ids=str)
def test_a_step_moves_nothing_beyond_the_floor_but_factors(case):
    assert not extra_moves(found(case))


@pytest.mark.parametrize("case", [*CPU, *FSDP, *TENSOR], ids=str)
def test_a_step_copies_no_kernel_more_often_than_the_floor(case):
    one = found(case)
    assert one["step"]["copies of kernels"] <= one["floor"]["copies of kernels"]


def test_copies_are_counted():
    lines = ("%a = bf16[4,8]{1,0} copy(%x)", "%b = bf16[8,4]{0,1:T(8,128)} transpose(%x)", "%c = f32[4,8] copy(%x)",
             "%d = bf16[4,9]{1,0} copy(%x)", "%e = bf16[4,8]{1,0} add(%x, %x)")  # fmt: skip
    assert copies("\n".join(lines), {32}) == 2


@pytest.mark.parametrize("case", [*CPU, *FSDP, *TENSOR], ids=str)
def test_what_moves_for_the_factors_is_small(case):
    """Factors and their gradients, (size, rank), and the products with a, (tokens of a device, rank)."""
    one = found(case)
    tokens = case.batch * case.length // case.fsdp
    small = [math.prod(dims) // max(RANKS & {*dims}) for _, dims, _ in one["step"]["moves"] if RANKS & {*dims}]
    assert small and max(small) <= max(tokens, 14_336)
    bytes_of = lambda totals: sum(size for _, size in totals.values())
    assert bytes_of(one["step"]["of factors"]) < 0.5 * bytes_of(one["floor"]["collectives"])


PLAN = r"""
import pathlib, re, jax, jax.numpy as jnp, jlora
from benchmarks.pod_programs import MODELS, RANK, wrapped
model = MODELS["70B"]
scanned = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8), jnp.int32))["params"]
tree = wrapped(model, scanned)
layer = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
layers = {f"layers_{i}": jax.tree.map(layer, scanned["layers"]) for i in range(model.layers)}
unrolled = jlora.wrap(layers, jlora.LoraSpec(rank=RANK))
is_lora = lambda x: isinstance(x, jlora.LoraParam)
count = lambda tree: sum(is_lora(x) for x in jax.tree.leaves(tree, is_leaf=is_lora))
peak = re.search(r"VmHWM:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]
print(count(tree), count(unrolled), peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_a_plan_of_70b_takes_little_memory():
    done = subprocess.run([sys.executable, "-c", PLAN], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scanned, unrolled, kilobytes = map(int, done.stdout.split())
    assert (scanned, unrolled) == (7, 560)
    assert kilobytes < 1e6
