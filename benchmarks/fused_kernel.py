"""Pallas kernels of a product with a low-rank part, beside what XLA makes of the same formulas; no TPU is needed.

Three kernels: ``y = x W + (x A) B`` in one pass over x and W, the same for dx, and one pass over dy for ``dy B^T`` and
``h^T dy``. Each is checked against float64 on shapes that no block divides, and compiled ahead of time by libtpu
(``pip install libtpu``, of JAX's version). The cycles are a model and no clock: of each operation the larger one of
the compiler's cycles of its instructions and of the time that its bytes take at the published bandwidth. Beside it
stands what the compiler's scheduler expects of XLA's programs, with writes at 3 to 4 times that; it has none for
kernels. What would make the kernels look worse: few tokens, where XLA keeps what it hands on in VMEM; what is left of
XLA's fusions when a kernel stands in their way, which is not counted.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from benchmarks import told
from benchmarks.tpu_cycles import CHIPS

CLOCK = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}  # what the published FLOP/s are of the compiler's FLOPs a cycle
BANDWIDTH = {"v5e": 819e9, "v5p": 2765e9, "v6e": 1640e9}  # bytes a second, published
BLOCKS = {"v5e": (1024, 512, 4096), "v5p": (1024, 512, 4096), "v6e": (1024, 1024, 4096)}  # the best of those tried
ROWS = 512  # of dy, in one step
VMEM = 60 << 20
Blocks = tuple[int, int, int]  # of tokens, of the result's features, of the features that are summed over


def inside(block: jax.Array, axis: int, step: Any, size: int) -> jax.Array:
    """A block with zeros for what lies outside of an array; as it is where blocks divide the array."""
    if not size % block.shape[axis]:
        return block
    place = step * block.shape[axis] + lax.broadcasted_iota(jnp.int32, block.shape, axis)
    return jnp.where(place < size, block, jnp.zeros_like(block))


def dot(x: jax.Array, y: jax.Array, over: tuple[int, int]) -> jax.Array:
    """A product that is summed in float32, over these axes of x and y."""
    return lax.dot_general(x, y, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)


def compiling(*axes: str) -> Any:
    """What the compiler is told: the kinds of the grid's axes, and how much VMEM a kernel may take."""
    return pltpu.CompilerParams(dimension_semantics=axes, vmem_limit_bytes=VMEM)


def _product(
    x_ref: Any, w_ref: Any, a_ref: Any, b_ref: Any, y_ref: Any, h_ref: Any, sums: Any, middle: Any, *, m: int, over: int
) -> None:
    """One block of W: its product with a block of x, that with A on the first way along x, that with B on the last."""
    j, k, last = pl.program_id(1), pl.program_id(2), pl.num_programs(2) - 1
    x = inside(x_ref[...], 1, k, m)
    part = dot(x, inside(w_ref[...], over, k, m), (1, over))
    sums[...] = jnp.where(k == 0, part, sums[...] + part) if pl.num_programs(2) != 1 else part

    @pl.when(j == 0)
    def _() -> None:
        part = dot(x, inside(a_ref[...], over, k, m), (1, over))
        middle[...] = jnp.where(k == 0, part, middle[...] + part)

    @pl.when((j == 0) & (k == last))
    def _() -> None:
        h_ref[...] = middle[...].astype(h_ref.dtype)

    @pl.when(k == last)
    def _() -> None:
        h = middle[...].astype(x.dtype)
        y_ref[...] = (sums[...] + dot(h, b_ref[...], (1, over))).astype(y_ref.dtype)


def product(
    x: jax.Array,
    w: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    blocks: Blocks,
    transposed: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """x W + (x A) B and x A in one pass; with `transposed`, x W^T + (x B^T) A^T and x B^T for the same W, A and B.

    Args:
      x: (T, m), or (T, n) if transposed.
      w, a, b: (m, n), (m, r) and (r, n).
      blocks: how much of T, of the result's features and of those summed over one step takes.
      transposed: whether the product is that of the backward pass.
      interpret: whether Pallas computes it without a TPU.
    """
    over = int(transposed)
    if transposed:
        a, b = b, a  # the first and the second factor of x
    (tokens, m), n, rank = x.shape, w.shape[1 - over], a.shape[1 - over]
    bt, bn, bm = (min(block, size) for block, size in zip(blocks, (tokens, n, m), strict=True))
    turn = (lambda shape: shape[::-1]) if transposed else (lambda shape: shape)
    spec = lambda shape, index: pl.BlockSpec(turn(shape), lambda i, j, k: turn(index(i, j, k)))
    steps = pl.cdiv(m, bm)
    first = lambda i, j, k: (jnp.where(j == 0, k, steps - 1), 0)  # is not fetched again once it is used
    return pl.pallas_call(
        functools.partial(_product, m=m, over=over),
        grid=(pl.cdiv(tokens, bt), pl.cdiv(n, bn), steps),
        in_specs=[
            pl.BlockSpec((bt, bm), lambda i, j, k: (i, k)),
            spec((bm, bn), lambda i, j, k: (k, j)),
            spec((bm, rank), first),
            spec((rank, bn), lambda i, j, k: (0, j)),
        ],
        out_specs=[pl.BlockSpec((bt, bn), lambda i, j, k: (i, j)), pl.BlockSpec((bt, rank), lambda i, j, k: (i, 0))],
        out_shape=[jax.ShapeDtypeStruct((tokens, n), x.dtype), jax.ShapeDtypeStruct((tokens, rank), x.dtype)],
        scratch_shapes=[pltpu.VMEM((bt, bn), jnp.float32), pltpu.VMEM((bt, rank), jnp.float32)],
        compiler_params=compiling("parallel", "arbitrary", "arbitrary"),
        interpret=interpret,
        name="lora_dx" if transposed else "lora_y",
    )(x, w, a, b)


def _backward(dy_ref: Any, h_ref: Any, b_ref: Any, g_ref: Any, db_ref: Any, sums: Any, *, tokens: int) -> None:
    """One block of rows of dy: its product with B^T, and what it adds to h^T dy."""
    part, step, last = pl.program_id(0), pl.program_id(1), pl.num_programs(1) - 1
    row = part * pl.num_programs(1) + step
    dy, h = inside(dy_ref[...], 0, row, tokens), inside(h_ref[...], 0, row, tokens)
    g_ref[...] = dot(dy, b_ref[...], (1, 1)).astype(g_ref.dtype)
    own = dot(h, dy, (0, 0))
    sums[...] = jnp.where(step == 0, own, sums[...] + own)

    @pl.when(step == last)
    def _() -> None:
        db_ref[...] = sums[...][None]


def backward(
    dy: jax.Array, h: jax.Array, b: jax.Array, *, rows: int, parts: int = 1, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """dy B^T and h^T dy in one pass over dy, the second in float32.

    Args:
      dy, h, b: (T, n), (T, r) and (r, n).
      rows: how many rows of dy one step takes, all of their features at once.
      parts: among how many cores T is split, where its blocks are a multiple; each core sums its own part.
      interpret: as in `product`.
    """
    (tokens, n), rank = dy.shape, b.shape[0]
    rows = min(rows, tokens)
    blocks = pl.cdiv(tokens, rows)
    parts = 1 if blocks % parts else parts
    steps = blocks // parts
    at = lambda i, j: (i * steps + j, 0)
    g, db = pl.pallas_call(
        functools.partial(_backward, tokens=tokens),
        grid=(parts, steps),
        in_specs=[
            pl.BlockSpec((rows, n), at),
            pl.BlockSpec((rows, rank), at),
            pl.BlockSpec((rank, n), lambda i, j: (0, 0)),
        ],
        out_specs=[pl.BlockSpec((rows, rank), at), pl.BlockSpec((1, rank, n), lambda i, j: (i, 0, 0))],
        out_shape=[
            jax.ShapeDtypeStruct((tokens, rank), dy.dtype),
            jax.ShapeDtypeStruct((parts, rank, n), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((rank, n), jnp.float32)],
        compiler_params=compiling("parallel", "arbitrary"),
        interpret=interpret,
        name="lora_db",
    )(dy, h, b)
    return g, db.sum(0)


# The same by XLA, and what is compiled.


def by_xla(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    h = x @ a
    return x @ w + h @ b, h


def in_order(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same where (x A) B comes first, so that it is added in the large product, which hides that it is read."""
    h = x @ a
    return x @ w + lax.optimization_barrier(h @ b), h


def backward_by_xla(dy: jax.Array, h: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    return dy @ b.T, dot(h, dy, (0, 0))


def program(chip: str, kind: str, form: str, tokens: int, m: int, n: int, rank: int) -> tuple[Callable[..., Any], Any]:
    """A function and the types of its arguments: of a kind of product, in one of four forms."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    w, a, b, dy = array(m, n), array(m, rank), array(rank, n), array(tokens, n)
    if kind == "dB":
        kernel = functools.partial(backward, rows=ROWS, parts=2 if chip == "v5p" else 1)
        return kernel if form == "kernel" else backward_by_xla, (dy, array(tokens, rank), b)
    is_back = kind == "dx"
    args = (dy if is_back else array(tokens, m), w, a, b)
    if form == "kernel":
        return functools.partial(product, blocks=BLOCKS[chip], transposed=is_back), args
    if form == "frozen":
        return lambda x, w: x @ w.T if is_back else x @ w, args[:2]
    plain = in_order if form == "in order" else by_xla
    return (lambda x, w, a, b: plain(x, w.T, b.T, a.T)) if is_back else plain, args


def moved(chip: str, kind: str, tokens: int, m: int, n: int) -> int:
    """The bytes that a kernel moves to and from the chip's memory, without those of A, B and h."""
    if kind == "dB":
        return 2 * tokens * n
    m, n = (n, m) if kind == "dx" else (m, n)
    bt, bn, bm = BLOCKS[chip]
    return 2 * (tokens * m * (pl.cdiv(n, bn) if m > bm else 1) + m * n * pl.cdiv(tokens, bt) + tokens * n)


# The model: the compiler's report of instructions, and bytes.

SHAPE = r"[a-z]+\d*\[[\d,]*\](?:\{[^}]*\})?"
FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "copy-done"}


def in_memory(shape: str) -> int:
    """The bytes of an array as HLO writes its type and layout; 0 of one in VMEM."""
    found = re.match(r"([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?", shape)
    kind, sizes, layout = found.groups("") if found else ("", "", "S(")
    if "S(" in layout:
        return 0
    dims = [int(size) for size in sizes.split(",") if size]
    order = [int(axis) for axis in layout.split(":")[0].split(",") if axis]
    if (tile := re.search(r"T\((\d+),(\d+)\)", layout)) and len(dims) > 1:
        for axis, extent in zip(order, (int(tile[2]), int(tile[1])), strict=False):  # the minor axis comes first
            dims[axis] = pl.cdiv(dims[axis], extent) * extent
    return math.prod(dims) * int(re.sub("[a-z]", "", kind) or 8) // 8


def operations(text: str) -> dict[str, tuple[int, int]]:
    """Of each operation of a compiled program: the bytes of its operands and results, and the scheduler's cycles."""
    types: dict[str, str] = {}
    found = {}
    for line in text[text.index("\nENTRY") :].splitlines():
        if not (parts := re.match(r"\s+(?:ROOT )?%(\S+) = (.*?) ([a-z\-]+)\((.*)", line)):
            continue
        name, kind, opcode, rest = parts.groups()
        types[name] = kind
        if opcode in FREE:
            continue
        operands = [types.get(name, "") for name in re.findall(r"%([\w.\-]+)", rest.split("), ")[0])]
        shapes = [shape for one in (kind, *operands) for shape in re.findall(SHAPE, one)]
        if opcode == "copy-start":  # its type has both ends
            shapes = re.findall(SHAPE, kind)[:2]
        cycles = re.search(r'"window_config".*?"estimated_cycles":"(\d+)"', line)
        found[name] = sum(map(in_memory, shapes)), int(cycles[1]) if cycles else 0
    return found


def compiled(chip: str, kind: str, form: str, sizes: list[int], to: pathlib.Path) -> tuple[dict[str, int], str]:
    """The cycles of each operation's instructions, and the program's text, by a process of its own.

    libtpu writes its report of a kernel with a rank below 128, and aborts when it checks a copy of it afterwards; the
    text is empty then.
    """
    (to / "cycles").mkdir()
    flags = os.environ.get("LIBTPU_INIT_ARGS", "") + f" --xla_jf_dump_static_llo_profile_to={to / 'cycles'}"
    program = ["-m", "benchmarks.fused_kernel", "--compile", json.dumps([chip, kind, form, *sizes])]
    command, env = [sys.executable, *program, "--to", str(to / "text")], os.environ | {"LIBTPU_INIT_ARGS": flags}
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    pattern = r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)\s+num_equivalent_hlos: (\d+)'
    reports = [path.read_text() for path in (to / "cycles").iterdir()]
    cycles = {name: int(n) * int(alike) for one in reports for name, n, alike in re.findall(pattern, one)}
    if not cycles:
        raise RuntimeError(f"{kind} by {form} for {chip} did not compile: {ran.stderr[-1000:]}")
    return cycles, (to / "text").read_text() if (to / "text").exists() else ""


def compile_one(chip: str, kind: str, form: str, *sizes: int) -> str:
    device = topologies.get_topology_desc(CHIPS[chip], platform="tpu").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    fn, args = program(chip, kind, form, *sizes)
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in args]
    return jax.jit(fn).lower(*placed).compile().as_text()


def modelled(chip: str, tokens: int, m: int, n: int, rank: int, kind: str, form: str) -> tuple[int, int]:
    """The model's cycles of a program, and the scheduler's (0 of a kernel).

    Copies to VMEM are overlapped with all else, so that they count only where the program's bytes take longer than it.
    """
    with tempfile.TemporaryDirectory() as to:
        cycles, text = compiled(chip, kind, form, [tokens, m, n, rank], pathlib.Path(to))
    if form == "kernel":
        found = {name: (moved(chip, kind, tokens, m, n), 0) for name in cycles if name.startswith("lora")}
    else:
        found = operations(text)
    time = {name: int(size * CLOCK[chip] / BANDWIDTH[chip]) for name, (size, _) in found.items()}
    total = sum(max(n, time.get(name, 0)) for name, n in cycles.items())
    return max(total, sum(time.values())), sum(scheduled for _, scheduled in found.values())


def worst(found: Any, *wanted: Any) -> float:
    """The largest error over the largest number."""
    pairs = [(np.asarray(one, np.float64), other) for one, other in zip(found, wanted, strict=True)]
    return max(float(np.abs(one - other).max() / np.abs(other).max()) for one, other in pairs)


def checked(tokens: int, m: int, n: int, rank: int, blocks: Blocks) -> float:
    """The largest error of the three kernels, interpreted, over float64: what bfloat16's rounding makes."""
    rng = np.random.default_rng(0)
    shapes = (tokens, m), (m, n), (m, rank), (rank, n), (tokens, n), (tokens, rank)
    arrays = [jnp.asarray(rng.standard_normal(shape) / shape[0] ** 0.5, jnp.bfloat16) for shape in shapes]
    x, w, a, b, dy, h = (np.asarray(one, np.float64) for one in arrays)
    forward = product(*arrays[:4], blocks=blocks, interpret=True)
    back = product(arrays[4], *arrays[1:4], blocks=blocks, transposed=True, interpret=True)
    errors = [worst(forward, x @ w + x @ a @ b, x @ a), worst(back, dy @ w.T + dy @ b.T @ a.T, dy @ b.T)]
    for parts in (1, 2):
        found = backward(arrays[4], arrays[5], arrays[3], rows=blocks[0], parts=parts, interpret=True)
        errors.append(worst(found, dy @ b.T, h.T @ dy))
    return max(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="*", choices=CHIPS, default=[*CHIPS])
    parser.add_argument("--kinds", nargs="*", choices=("y", "dx", "dB"), default=["y", "dx", "dB"])
    parser.add_argument("--tokens", nargs="*", type=int, default=[4096, 16384])
    for name, default in {"m": 4096, "n": 4096, "rank": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--to", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        args.to.write_text(compile_one(*args.compile))
        return
    error = max(checked(200, 300, 260, 16, (64, 128, 128)), checked(70, 130, 50, 64, (32, 32, 32)))
    print(f"The kernels' largest error, interpreted, over the largest number: {error:.4f}")
    rows = []
    for chip in args.chips:
        for tokens in args.tokens:
            found = functools.lru_cache(functools.partial(modelled, chip, tokens, args.m, args.n, args.rank))
            for kind in args.kinds:
                floor, scheduled = found("dx" if kind == "dx" else "y", "frozen")
                forms = ("XLA", "in order", "kernel") if kind != "dB" else ("XLA", "kernel")
                over = {form: found(kind, form)[0] / floor for form in forms}
                xla, first, kernel = map(over.get, ("XLA", "in order", "kernel"))
                cells = floor / 1e6, xla, found(kind, "XLA")[1] / scheduled, first, kernel, over["kernel"] / over["XLA"]
                rows.append((f"{chip} {kind}, {tokens} tokens", *cells))
    header = "", "x W, Mcycles", "XLA", "XLA, scheduler's", "XLA, in order", "kernel", "kernel / XLA"
    told(f"Modelled cycles over those of x W, {args.m} to {args.n}, rank {args.rank}, bfloat16", header, rows)


if __name__ == "__main__":
    main()
