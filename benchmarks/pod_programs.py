"""Training steps of Llama-like models with LoRA, compiled for pods that are not there: memory, products, collectives.

    python -m benchmarks.pod_programs --tpu --json found.json           (an environment with jax[tpu])
    python -m benchmarks.pod_programs --gpu --json found.json           (with jax-cuda13-pjrt and jax-cuda13-plugin)
    python -m benchmarks.pod_programs --json found.json                 prints the table

No accelerator is needed. The base is bfloat16 and frozen, factors are float32, layers are scanned and recomputed in
the backward pass. The floor is the same model without LoRA, with gradients of its norms alone, so that dx passes all
layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jlora
from benchmarks import hlo
from jlora.examples.smollm2 import SmolLM2, next_token_losses

RANK = 24
RANKS = {RANK, 2 * RANK, 3 * RANK}  # of one kernel, of gate and up, of q, k and v: no other axis has these sizes
LLAMA = {"vocab": 128_256, "kv_heads": 8, "dtype": jnp.bfloat16, "remat": True}
MODELS = {
    "small": SmolLM2(width=512, heads=8, hidden=1_536, layers=3, **LLAMA | {"vocab": 2_048}),
    "1B": SmolLM2(width=2_048, heads=32, hidden=8_192, layers=16, **LLAMA),
    "8B": SmolLM2(width=4_096, heads=32, hidden=14_336, layers=32, tied=False, **LLAMA),
    "70B": SmolLM2(width=8_192, heads=64, hidden=28_672, layers=80, tied=False, **LLAMA),
}
COLUMNS, ROWS = PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "tensor", "fsdp")
PLACES = {f"{name}_proj": COLUMNS for name in ("q", "k", "v", "gate", "up")} | {
    "o_proj": ROWS,
    "down_proj": ROWS,
    "embed": PartitionSpec("tensor", "fsdp"),
    "lm_head": PartitionSpec("fsdp", "tensor"),
}
# So that floor and step can be compared: no products by windows, whose gathers are steps of loops and which floor and
# step would take for different kernels, and no sums of arrays laid end to end, which no longer show what they are of.
OPTIONS = {
    "cpu": {},
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000},
    "cuda": {"xla_gpu_all_reduce_combine_threshold_bytes": 0, "xla_gpu_reduce_scatter_combine_threshold_bytes": 0},
}
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
H200_BYTES = 150_055_952_384
H200 = (
    "gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 "
    "shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 "
    "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4916000000000 "
    f"l2_cache_size: 62914560 clock_rate_ghz: 1.98 device_memory_size: {H200_BYTES} "
    "shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 "
    'registers_per_block_limit: 65536 } platform_name: "CUDA" device_description_str: "NVIDIA H200"'
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a mesh: fsdp x tensor, with `batch` sequences of `length` tokens."""

    model: str
    topology: str
    fsdp: int
    tensor: int
    batch: int
    length: int = 2_048
    spread: bool = False  # the moments, over what of the mesh their factors don't use

    @property
    def platform(self) -> str:
        return "cpu" if self.topology == "cpu" else "cuda" if self.topology.startswith("H200") else "tpu"

    @property
    def name(self) -> str:
        spread = " spread" * self.spread
        return f"{self.model} {self.topology} {self.fsdp}x{self.tensor} {self.batch}x{self.length}{spread}"


TPU = [
    Case("1B", "v5e:4x4", 16, 1, 16),
    Case("1B", "v5e:4x4", 8, 2, 8),
    Case("8B", "v5e:4x4", 16, 1, 16),
    Case("8B", "v6e:4x4", 4, 4, 8),
    Case("70B", "v5e:16x16", 256, 1, 256),
    Case("70B", "v5e:16x16", 256, 1, 256, spread=True),
    Case("70B", "v5e:16x16", 32, 8, 32),
    Case("70B", "v5p:4x4x4", 16, 4, 64),
]
GPU = [Case("8B", "H200 x8", 8, 1, 8), Case("8B", "H200 x8", 2, 4, 8), Case("70B", "H200 x8", 8, 1, 8)]


def mesh_of(case: Case) -> Mesh:
    if case.platform == "cpu":
        devices = jax.devices()
    elif case.platform == "cuda":
        devices = topologies.get_topology_desc("h200", platform="cuda", topology="1x1x8", target_config=H200).devices
    else:
        devices = topologies.get_topology_desc(case.topology, platform="tpu").devices
    return Mesh(np.array(devices).reshape(case.fsdp, case.tensor), ("fsdp", "tensor"))


def placed_params(model: SmolLM2, mesh: Mesh) -> Any:
    """The model's parameters: shapes alone, bfloat16, with their places on the mesh."""

    def place(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        spec = next((PLACES[key.key] for key in path if key.key in PLACES), PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8), jnp.int32))
    return jax.tree.map_with_path(place, shapes["params"])


def placed_ids(mesh: Mesh, batch: int, length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))


def wrapped(model: SmolLM2, params: Any) -> Any:
    forward = lambda params, ids: model.apply({"params": params}, ids)
    sites = jlora.sites(forward, params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    return jlora.wrap(params, jlora.LoraSpec(rank=RANK, alpha=2 * RANK), sites=sites)


def loss(model: SmolLM2, params: Any, ids: jax.Array) -> jax.Array:
    """The mean loss, with each sequence's activations between layers on the devices of its part of the batch."""
    model = model.clone(activations=PartitionSpec("fsdp"))
    return next_token_losses(model.apply({"params": params}, ids), ids).mean()


def lora_step(model: SmolLM2, params: Any, ids: Any, spread: bool) -> Any:
    """The lowered step of training the adapters with AdamW, its arrays placed as the base is."""
    tree = wrapped(model, params)
    tx = jlora.optimizer(optax.adamw(1e-4), tree)
    shapes = jax.eval_shape(tx.init, tree)
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    state = jax.tree.map(place, shapes, jlora.sharding.of_state(shapes, tree, spread=spread))

    def step(tree: Any, state: Any, ids: jax.Array) -> Any:
        value, grads = jlora.value_and_grad(jlora.apply(lambda params, ids: loss(model, params, ids)))(tree, ids)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, value

    places = jax.tree.map(lambda x: x.sharding, (tree, state))
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=(*places, None)).lower(tree, state, ids)


def floor(model: SmolLM2, params: Any, ids: Any) -> Any:
    """The lowered gradient of the frozen model's norms."""
    is_norm = lambda path: path[-1].key == "scale"
    norms = jax.tree.map_with_path(lambda path, x: x if is_norm(path) else None, params)
    frozen = jax.tree.map_with_path(lambda path, x: None if is_norm(path) else x, params)

    def gradient(norms: Any, frozen: Any, ids: jax.Array) -> Any:
        return jax.value_and_grad(lambda norms: loss(model, jlora.combine(norms, frozen), ids))(norms)

    return jax.jit(gradient).lower(norms, frozen, ids)


def kernel_sizes(params: Any) -> set[int]:
    """The numbers of elements of the stacked kernels' layers, whole and as a device has them."""
    stacked = [x for x in jax.tree.leaves(params) if len(x.shape) == 3]
    return {math.prod(shape[1:]) for x in stacked for shape in (x.shape, x.sharding.shard_shape(x.shape))}


def copies(text: str, sizes: set[int]) -> int:
    """How many copies and transposes a program has of bfloat16 arrays of these sizes."""
    found = re.findall(r"= bf16\[([\d,]+)\]\S* (?:copy|copy-start|transpose)\(", text)
    return sum(math.prod(map(int, dims.split(","))) in sizes for dims in found)


def measured(lowered: Any, options: dict[str, Any], sizes_of_kernels: set[int]) -> dict[str, Any]:
    """What a compiled program takes on one device, how often it moves which arrays, and how often it copies kernels."""
    start = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = re.search(r"Used [\d.]+\w of [\d.]+\w", str(error))
        return {"fits": False, "needs": needed[0] if needed else str(error)[:200]}
    memory, text = compiled.memory_analysis(), compiled.as_text()
    found = hlo.collectives(text)
    sizes = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "temp", "output", "alias")}
    total = sizes["argument"] + sizes["temp"] + sizes["output"] - sizes["alias"]
    return {
        "fits": total <= H200_BYTES,  # the compiler for TPUs has checked theirs, which are less
        "needs": f"{total / 2**30:.1f} GiB",
        "seconds": round(time.perf_counter() - start),
        **sizes,
        "total": total,
        "flops": hlo.flops(text),
        "collectives": hlo.totals(found),
        "of factors": hlo.totals(of_rank(found)),
        "copies of kernels": copies(text, sizes_of_kernels),
        "moves": [[kind, dims, times] for (kind, dims), times in sorted(hlo.moves(found).items())],
    }


def of_rank(found: list[hlo.Collective]) -> list[hlo.Collective]:
    """The collectives of arrays with an axis of the rank: factors, their gradients, and what passes between them."""
    kept = [dataclasses.replace(c, arrays=tuple(a for a in c.arrays if RANKS & {*a.shape})) for c in found]
    return [collective for collective in kept if collective.arrays]


def extra_moves(one: dict[str, Any]) -> Counter[tuple[str, int]]:
    """What a step moves more often than its floor, beside arrays with an axis of the rank: kind, elements, how often.

    A gather may come before or after a reshape, so elements are counted, not axes.
    """
    step, base = Counter(), Counter()
    for counts, program in ((step, "step"), (base, "floor")):
        for kind, dims, times in one[program]["moves"]:
            counts[kind, math.prod(dims)] += times * (not RANKS & {*dims})
    return step - base


def low_rank_flops(case: Case) -> float:
    """The products with the factors in a step, on one device: forward, recomputed, and two for each backward.

    The side of a factor that is not on the tensor axis is multiplied on each of its devices.
    """
    one = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tensor"))
    tree = wrapped(MODELS[case.model], placed_params(MODELS[case.model], one))
    sides = 0.0
    for path, node in jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, jlora.LoraParam)):
        if isinstance(node, jlora.LoraParam):
            layers, ins, outs = node.shape
            is_columns = PLACES[path[-2].key] == COLUMNS
            sides += layers * (ins + outs / case.tensor if is_columns else ins / case.tensor + outs)
    return 8 * RANK * case.batch * case.length / case.fsdp * sides


def run(case: Case) -> dict[str, Any]:
    """Compiles floor and step of a case."""
    model, mesh = MODELS[case.model], mesh_of(case)
    params, ids = placed_params(model, mesh), placed_ids(mesh, case.batch, case.length)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        programs = {"floor": floor(model, params, ids), "step": lora_step(model, params, ids, case.spread)}
    return dataclasses.asdict(case) | {
        name: measured(lowered, OPTIONS[case.platform], kernel_sizes(params)) for name, lowered in programs.items()
    }


HEADS = (
    "model | devices | mesh: fsdp x tensor | batch x length | fits",
    "GiB a device: arguments + temporaries = total (floor)",
    "FLOPs over floor | floor: collectives (GB) | step: collectives (GB) | of factors | beyond floor and factors",
)


def table(found: list[dict[str, Any]]) -> str:
    """A row for each case, in Markdown."""
    rows = [" | ".join(HEADS), " | ".join(["---"] * 11), *map(_row, found)]
    return "\n".join(f"| {row} |" for row in rows)


def _row(one: dict[str, Any]) -> str:
    step, base = one["step"], one["floor"]
    head = [
        one["model"],
        one["topology"],
        f"{one['fsdp']} x {one['tensor']}{', moments spread' * one.get('spread', False)}",
        f"{one['batch']} x {one['length']}",
    ]
    if not step["fits"] or not base["fits"]:
        return " | ".join([*head, f"no: step {step.get('needs')}, floor {base.get('needs')}", *["-"] * 6])
    arguments, temporaries, total = (step[name] / 2**30 for name in ("argument", "temp", "total"))
    cells = [
        f"{arguments:.2f} + {temporaries:.2f} = {total:.2f} ({base['total'] / 2**30:.2f})",
        f"{step['flops'] / base['flops']:.3f}",
        _kinds(base["collectives"]),
        _kinds(step["collectives"]),
        _kinds(step["of factors"]),
        "; ".join(f"{times} {kind} of {size:,}" for (kind, size), times in extra_moves(one).items()) or "none",
    ]
    return " | ".join([*head, "yes", *cells])


def _kinds(totals: dict[str, Any]) -> str:
    return "; ".join(f"{kind} {count} ({size / 1e9:.2f})" for kind, (count, size) in totals.items()) or "-"


def main() -> None:
    """Compiles cases, adds what it finds to a file, and prints the table of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tpu", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--case", nargs=6, metavar=("MODEL", "TOPOLOGY", "FSDP", "TENSOR", "BATCH", "LENGTH"))
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    os.environ.update(TPU_ENVIRONMENT, XLA_FLAGS="--xla_gpu_autotune_level=0" if given.gpu else "")
    jax.config.update("jax_platforms", "cpu")
    found = json.loads(given.json.read_text()) if given.json.exists() else {}
    asked = [Case(*given.case[:2], *map(int, given.case[2:]))] if given.case else []
    for case in [*asked, *(TPU if given.tpu else []), *(GPU if given.gpu else [])]:
        found[case.name] = run(case)
        given.json.write_text(json.dumps(found, indent=1))
        print(case.name, flush=True)
    print(table(list(found.values())))


if __name__ == "__main__":
    main()
