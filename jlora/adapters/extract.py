"""`extract`: the nearest LoRA between two models."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.adapters.combine import check_rank
from jlora.adapters.nearest import nearest
from jlora.interpret.compat import is_traced
from jlora.interpret.sites import Site
from jlora.nodes import placement
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import TrainableParam, is_node, is_unit
from jlora.nodes.qarray import codes, dense, is_qarray
from jlora.spec import LoraSpec
from jlora.targets.paths import flatten_named
from jlora.targets.plan import Adapted, Becomes, InFull, resolve
from jlora.variants.lora import LoraParam

NAME = "adapters.extract"


class Extracted(NamedTuple):
    """What `extract` returns.

    Args:
      tree: the wrapped tree on the base.
      error: for the path of each adapted kernel the norm of what its factors lack of the difference, over the norm of
        the difference (Frobenius): 0 where there is nothing to lack, 1 where they have nothing of it.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> base, tuned = {"kernel": jnp.zeros((4, 3))}, {"kernel": jnp.ones((4, 3))}  # they differ by rank 1
      >>> found = jlora.adapters.extract(base, tuned, rank=1)
      >>> found.tree["kernel"].rank, found.error["kernel"] < 1e-5
      (1, True)
    """

    tree: Any
    error: dict[str, float]


def extract(
    base: Any, tuned: Any, rank: int, *, spec: LoraSpec | None = None, sites: Mapping[str, Site] | None = None
) -> Extracted:
    """Takes a LoRA out of a full fine-tune: the best update of a rank for the difference of each kernel.

    The differences are computed and decomposed in float32, stacked kernels place by place. A leaf that differs and is
    no target is not lost: it becomes one that trains in full, with its tuned value. So at the full rank
    ``jlora.merge(extract(base, tuned, rank).tree)`` is `tuned` up to rounding.

    Args:
      base: a plain tree, with values; its kernels may be quantised.
      tuned: a plain tree of the same structure and shapes.
      rank: of the updates; of a smaller kernel as much as it has. Overrides in `spec` win.
      spec: which kernels are targets, with ``axes``, ``layers``, ``overrides``, the scale and so on; None: every linear
        layer, at scale 1.
      sites: what `jlora.sites` found, as in `jlora.wrap`.

    Returns:
      An `Extracted`: the base wrapped with a `jlora.LoraParam` for each target and a `jlora.TrainableParam` for each
      other leaf that differs, and the error of each target.

    Raises:
      ValueError: if the trees differ in structure or shape, `spec` asks for what is no LoRA, a leaf differs that can't
        train, or as `jlora.wrap` does.
      TypeError: if a tree is wrapped, or its values are not known, as under `jax.jit`; or if `spec` is no
        `jlora.LoraSpec`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> base = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
      >>> tuned = {"dense": {"kernel": jnp.ones((4, 3)).at[1].add(0.5), "bias": jnp.ones(3)}}
      >>> tree, error = jlora.adapters.extract(base, tuned, rank=1)
      >>> error["dense/kernel"] < 1e-5, type(tree["dense"]["bias"]).__name__
      (True, 'TrainableParam')
    """
    check_rank(NAME, "rank", rank)
    spec = LoraSpec(alpha=rank) if spec is None else spec
    _check_spec(spec)
    paths, leaves, treedef = _leaves("base", base)
    others, tuned_leaves, structure = _leaves("tuned", tuned)
    _check_alike(dict(zip(paths, leaves, strict=True)), dict(zip(others, tuned_leaves, strict=True)))
    if structure != treedef:
        raise ValueError(f"{NAME}: base and tuned have the same paths, but differ in structure: {treedef}, {structure}")
    plan = _plan(base, dict(zip(paths, leaves, strict=True)), spec, sites)
    ranked, errors = dataclasses.replace(spec, rank=int(rank)), {}
    made = [
        _become(path, leaf, other, plan.get(path), ranked.at(path), errors)
        for path, leaf, other in zip(paths, leaves, tuned_leaves, strict=True)
    ]
    return Extracted(treedef.unflatten(made), errors)


def _check_spec(spec: LoraSpec) -> None:
    if not isinstance(spec, LoraSpec):
        raise TypeError(f"{NAME}: spec must be a jlora.LoraSpec, found {type(spec).__name__}")
    for name in ("lora_bias", "train_tokens"):
        if getattr(spec, name):
            raise ValueError(
                f"{NAME}: {name} is not taken here: what is no kernel and differs trains in full. Leave it out of spec"
            )
    kinds = {spec.variant_name: spec.node} | {
        str(given["variant"]): dataclasses.replace(spec, variant=given["variant"], overrides={}).node
        for given in spec.overrides.values()
        if "variant" in given
    }
    for name, node in kinds.items():
        if node is not LoraParam:
            raise ValueError(f"{NAME}: what is extracted is plain LoRA, variant='lora'; spec has {name}")


def _leaves(name: str, tree: Any) -> tuple[list[str], list[Any], Any]:
    paths, leaves, treedef = flatten_named(f"{NAME}: {name}", tree, is_unit)
    for path, leaf in zip(paths, leaves, strict=True):
        if is_node(leaf):
            raise TypeError(f"{NAME}: {path} of {name} is wrapped; give plain trees, such as jlora.merge(tree)")
        if is_traced(codes(leaf)) or isinstance(codes(leaf), jax.ShapeDtypeStruct):
            raise TypeError(
                f"{NAME}: the values of {path} of {name} are not known: which leaves differ is seen in them. Call it "
                "outside of jit, on arrays"
            )
        if is_qarray(leaf) and name == "tuned":
            raise ValueError(f"{NAME}: {path} of tuned is quantised; give the numbers, jlora.quant.dequantize(tuned)")
    return paths, leaves, treedef


def _check_alike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    if lone := sorted({*ours} ^ {*theirs}):
        raise ValueError(
            f"{NAME}: only {'base' if lone[0] in ours else 'tuned'} has {lone[0]}; give trees of one model"
        )
    for path, x in ours.items():
        shapes = jnp.shape(codes(x)) if not is_qarray(x) else tuple(x.shape), jnp.shape(theirs[path])
        if shapes[0] != shapes[1]:
            raise ValueError(f"{NAME}: {path} has the shape {shapes[0]} in base and {shapes[1]} in tuned")


def _plan(
    base: Any, leaves: Mapping[str, Any], spec: LoraSpec, sites: Mapping[str, Site] | None
) -> Mapping[str, Becomes]:
    """What becomes of each leaf; ranks are none of it, since a small kernel may have all of its own."""
    overrides = {p: {k: v for k, v in given.items() if k != "rank"} for p, given in spec.overrides.items()}
    return resolve(base, leaves, dataclasses.replace(spec, rank=1, overrides=overrides), sites)


def _become(path: str, leaf: Any, tuned: Any, becomes: Becomes | None, spec: LoraSpec, errors: dict[str, float]) -> Any:
    """The leaf or the node that takes its place; the error of a kernel is put down."""
    match becomes:
        case Adapted(kernel=kernel):
            node, errors[path] = _between(leaf, tuned, kernel, spec)
            return node
        case InFull():
            return TrainableParam(tuned)
    return leaf if _is_same(leaf, tuned) else _in_full(path, tuned)


def _is_same(leaf: Any, tuned: Any) -> bool:
    x, y = jnp.asarray(dense(leaf)), jnp.asarray(tuned)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x, y = jax.random.key_data(x), jax.random.key_data(y)
    return bool(jnp.array_equal(x, y, equal_nan=jnp.issubdtype(x.dtype, jnp.floating)))


def _in_full(path: str, tuned: Any) -> TrainableParam:
    if not jnp.issubdtype(jnp.asarray(tuned).dtype, jnp.floating):
        raise ValueError(
            f"{NAME}: {path} differs, and is of type {jnp.asarray(tuned).dtype}, which can't train; give both trees "
            "the same one"
        )
    return TrainableParam(tuned)


def _between(base: Any, tuned: Any, kernel: Kernel, spec: LoraSpec) -> tuple[LoraParam, float]:
    """The node, and its error."""
    if not spec.scale:
        raise ValueError(f"{NAME}: the scale of {kernel.path} is 0, at which an update is none; give alpha in spec")
    adapted, left_out = _differences(base, tuned, kernel)
    rank = min(spec.rank, *adapted.shape[-2:])
    (a, b), lost = _program(len(kernel.axes.batch_axis), rank)(adapted)
    batch, ins, outs = map(kernel.sizes, ("batch", "in", "out"))
    lora_a = a.reshape(*batch, *ins, rank).astype(kernel.dtype)
    lora_b = (b / spec.scale).reshape(*batch, rank, *outs).astype(kernel.dtype)
    settings = {**kernel.settings, "scale": spec.scale}
    square = float(jnp.square(adapted).sum() + left_out)
    error = math.sqrt(min(float(lost.sum() + left_out) / square, 1.0)) if square else 0.0
    return _placed(LoraParam(None, lora_a, lora_b, **settings), base), error


def _differences(base: Any, tuned: Any, kernel: Kernel) -> tuple[jax.Array, jax.Array]:
    """The difference of the adapted layers, (batch..., in, out), and the squared norm of that of the others."""
    whole = dataclasses.replace(kernel, layers=None)
    difference = whole.matrix(tuned) - whole.matrix(base)
    if not bool(jnp.isfinite(difference).all()):
        raise ValueError(f"{NAME}: {kernel.path} differs by values that are NaN or infinite; mend it, or exclude it")
    if kernel.layers is None:
        return difference, jnp.zeros(())
    others = jnp.asarray([i for i in range(len(difference)) if i not in kernel.layers], int)
    return difference[jnp.asarray(kernel.layers)], jnp.square(difference[others]).sum()


@functools.lru_cache(maxsize=256)
def _program(count: int, rank: int) -> Callable[..., Any]:
    """One program for all kernels that are alike, of so many batch axes."""
    fn = lambda matrix: nearest(matrix, rank)
    for _ in range(count):
        fn = jax.vmap(fn)
    return jax.jit(fn)


def _placed(node: LoraParam, base: Any) -> LoraParam:
    """The node on its base, its factors where the base lies."""
    where = placement.of_node(node, base)
    return dataclasses.replace(node if where is None else jax.device_put(node, where), base=base)
