"""The uses of a kernel that every variant is tried on, and the pairs that it does not have.

Sizes are multiples of four, so that a butterfly of two factors with blocks of two fits.
"""

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jlora
from jlora.variants import VARIANTS


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of a tree of kernels, and inputs; no kernel of it has a convention to go by."""

    fn: Callable
    params: dict[str, Any]
    args: tuple

    @property
    def sites(self):
        return jlora.sites(self.fn, self.params, *self.args)


CASES: dict[str, Case] = {}


def noise(*shape: int) -> jax.Array:
    return jnp.asarray(0.5 * np.random.default_rng(shape).standard_normal(shape), jnp.float32)


def case(kernels: dict[str, tuple[int, ...]], *args):
    """Registers the decorated function; each of `args` is an array, or the shape of one."""

    def register(fn):
        params = {name: noise(*shape) for name, shape in kernels.items()}
        CASES[fn.__name__] = Case(fn, params, tuple(noise(*x) if isinstance(x, tuple) else x for x in args))
        return fn

    return register


@case({"up": (8, 16), "down": (16, 8)}, (5, 8))
def dense(p, x):
    return x @ p["up"] @ p["down"]


@case({"w": (12, 8)}, (5, 8))
def out_in(p, x):
    return x @ p["w"].T


@case({"query": (8, 2, 4), "out": (2, 4, 8)}, (5, 8))
def multi_axis(p, x):
    heads = jnp.tanh(jnp.einsum("td,dhk->thk", x, p["query"]))
    return jnp.einsum("thk,hkd->td", heads, p["out"])


@case({"w": (8, 3, 12)}, (5, 8))
def stacked(p, x):
    """The layers lie inside; `stacked_experts` has them at the front."""
    return lax.scan(lambda x, w: (x + jnp.tanh(x @ w)[:, :8], None), x, jnp.moveaxis(p["w"], 1, 0))[0]


@case({"up": (3, 2, 8, 12)}, (2, 5, 8))
def stacked_experts(p, x):
    return lax.scan(lambda x, w: (jnp.einsum("etd,edf->etf", x, w)[..., :8], None), x, p["up"])[0]


@case({"w": (3, 8, 12)}, (3, 5, 8))
def expert(p, x):
    return jnp.einsum("etd,edf->etf", x, p["w"])


@case({"w": (3, 8, 12)}, (7, 8), jnp.asarray([2, 0, 5]))
def ragged(p, x, sizes):
    return lax.ragged_dot(x, p["w"], sizes)


@case({"w": (3, 2, 8, 12)}, (2, 6, 5, 8))
def conv(p, x):
    return lax.conv_general_dilated(x, p["w"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@case({"table": (12, 8)}, jnp.asarray([[3, 0, 11], [1, 1, 2]]))
def embedding(p, tokens):
    return jnp.take(p["table"], tokens, axis=0)


@case({"table": (12, 8)}, jnp.asarray([[3, 0, 11], [1, 1, 2]]))
def tied(p, tokens):
    return jnp.tanh(jnp.take(p["table"], tokens, axis=0)) @ p["table"].T


OPTIONS = {
    "lokr": {"factor": 2},
    "oft": {"block_size": 4},
    "boft": {"block_size": 2, "factors": 2},
    "road": {"group_size": 2},
}
INITS = ("orthogonal", "pissa", "pissa_niter_8", "olora", "milora")


def from_guide() -> Any:
    """The variant that the guide writes."""
    page = Path(__file__).parents[2] / "docs" / "guides" / "own_variant.md"
    (block,) = (
        code for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if "(AdaptedParam):" in code
    )
    assert len([line for line in block.splitlines() if line.strip()]) < 60
    namespace = {"jax": jax, "jnp": jnp, "jlora": jlora, "LoraSpec": jlora.LoraSpec}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(block, page.name, "exec"), namespace)
    return namespace["LoraXsParam"]


OWN = from_guide()
# Variants, with an initialiser or another setting behind the plus.
KINDS = (*VARIANTS, "own", *(f"lora+{init}" for init in INITS), "dora+pissa", "lora_fa+olora", "ia3+in", "lora+layers")

# A rotation of the vocabulary would need every row for each token; nothing turns what a lookup gives.
UNSUPPORTED = {(kind, use) for kind in ("oft", "boft", "road") for use in ("embedding", "tied", "ragged")}
SPARSE = ("c3a", "fourierft", "waveft", "shira", "randlora")
UNSUPPORTED |= {("hira", use) for use in ("embedding", "tied")}  # the whole table would be computed for each lookup
UNSUPPORTED |= {(kind, use) for kind in SPARSE for use in ("embedding", "tied", "ragged", "conv")}
# The kernel is computed, at the cost of a merged one, and the warning says so: none of these is unsupported.
DENSE = {("ia3+in", "conv")}


def spec_of(kind: str, case: Case, **settings: Any) -> jlora.LoraSpec:
    variant, _, extra = kind.partition("+")
    given: dict[str, Any] = {
        "variant": OWN if variant == "own" else variant,
        "options": OPTIONS.get(variant, {}),
        "rank": 2,
        "alpha": 3,
    }
    if extra == "in":
        given["options"] = {"on": "in"}
    elif extra == "layers":
        given["layers"] = [0, 2]
    elif extra:
        given["init"] = extra
    return jlora.LoraSpec(targets=tuple(case.params), **(given | settings))


def wrapped(kind: str, case: Case, dtype: Any = jnp.float32, **settings: Any) -> Any:
    params = jax.tree.map(lambda x: x.astype(dtype), case.params)
    return jlora.wrap(params, spec_of(kind, case, **settings), sites=case.sites)


def moved(tree: Any, std: float = 0.3) -> Any:
    """The wrapped tree, some way from its start."""
    trainable, frozen = jlora.partition(tree)
    leaves, treedef = jax.tree.flatten(trainable)
    rng = np.random.default_rng(0)
    changed = [jnp.asarray(np.asarray(x) + rng.normal(scale=std, size=x.shape).astype(x.dtype)) for x in leaves]
    return jlora.combine(treedef.unflatten(changed), frozen)
