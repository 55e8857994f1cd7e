"""LoKr: the Kronecker product of a small matrix and a low-rank one, kept factored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.interpret.factored import Factored, low_rank
from jlora.interpret.manual import check_size
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, sizes_of, static, trained
from jlora.nodes.form import Form, plain_number
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam


class _Form(Form):
    """C and A B transposed. PEFT keeps a factor whole where the rank is at least half of its larger size."""

    def write(self, fields: dict[str, np.ndarray], node: Any) -> dict[str, np.ndarray]:
        fields = dict(fields)
        if "lokr_b" in fields and _is_whole(node.rank, fields["lokr_a"].shape[0], fields["lokr_b"].shape[1]):
            fields["lokr_a"] = fields["lokr_a"] @ fields.pop("lokr_b")
        whole = {"lokr_c": "lokr_c_whole", "lokr_a": "lokr_whole"}
        pairs = {"lokr_c": "lokr_c2", "lokr_a": "lokr_b"}
        is_alone = lambda name: name in whole and pairs[name] not in fields
        return {whole[n] if is_alone(n) else n: x.T if is_alone(n) else x for n, x in fields.items()}

    def read(self, fields: dict[str, np.ndarray], spec: Any) -> dict[str, Any]:
        pairs = (("lokr_c", "lokr_c2", "lokr_c_whole"), ("lokr_a", "lokr_b", "lokr_whole"))
        there = [[name in fields for name in names] for names in pairs]
        if not all(of in ([True, True, False], [False, False, True]) for of in there):
            raise ValueError(
                "peft.load: of LoKr's tensors w1 and w2 each is there whole, or as the two w1_a and w1_b, w2_a and w2_b"
            )
        whole = {"lokr_c_whole": "lokr_c", "lokr_whole": "lokr_a"}
        made: dict[str, Any] = {whole.get(name, name): x.T if name in whole else x for name, x in fields.items()}
        return {"lokr_c2": (), "lokr_b": (), **made, "whole_rank": 0 if "lokr_b" in made else spec.rank}

    def sizes(self, tensors: Mapping[str, Any]) -> tuple[int | None, int | None]:
        shape = lambda name, axis: tensors[name].shape[axis] if name in tensors else None
        outs = [shape("lokr_w1", 0) or shape("lokr_w1_a", 0), shape("lokr_w2", 0) or shape("lokr_w2_a", 0)]
        ins = [shape("lokr_w1", 1) or shape("lokr_w1_b", 1), shape("lokr_w2", 1) or shape("lokr_w2_b", 1)]
        return math.prod(n or 0 for n in ins) or None, math.prod(n or 0 for n in outs) or None

    def settings_of(self, node: Any) -> dict[str, Any]:
        p, q = node.small
        sizes = [math.prod(sizes_of(node, word)) for word in ("in", "out")]
        both = not isinstance(node.lokr_c2, tuple)
        alpha = plain_number(node.scale * node.rank)
        return {
            "r": node.rank,
            "alpha": alpha,
            "decompose_both": both,
            "decompose_factor": ((sizes[0], p), (sizes[1], q)),
        }

    def together(self, settings: Mapping[str, dict[str, Any]]) -> Mapping[str, dict[str, Any]]:
        """The one factor by which PEFT parts all sizes so."""
        wanted = {pair for of in settings.values() for pair in of["decompose_factor"]}
        tried = [-1, *sorted({part for _, part in wanted}), *range(1, max(size for size, _ in wanted) + 1)]
        found = next((f for f in tried if all(_parted(size, f) == part for size, part in wanted)), None)
        if found is None:
            raise ValueError(
                f"peft.save: no decompose_factor of PEFT's parts all of {sorted(wanted)[:4]} (sizes, and their parts) "
                "so; wrap with another options={'factor': ...}, such as -1, or merge the adapter"
            )
        return {name: of | {"decompose_factor": found} for name, of in settings.items()}


def _parted(size: int, factor: int) -> int:
    """The first of the two parts of a size, as PEFT takes it."""
    if factor > 0 and size % factor == 0:
        return factor
    limit, m = size if factor == -1 else factor, 1
    while m < size // m:
        after = next(n for n in range(m + 1, size + 1) if size % n == 0)
        if after + size // after > m + size // m or after > limit:
            break
        m = after
    return min(m, size // m)


def _is_whole(rank: int, *sizes: int) -> bool:
    """Whether PEFT keeps a factor of such sizes whole."""
    return rank >= max(sizes) / 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LokrParam(AdaptedParam):
    """``W + scale * C (x) (A B)``, the Kronecker product with a small C of shape (p, q), axes flattened.

    It is computed as one low-rank product of rank ``r * min(p, q)``. p and q are the largest divisors of the kernel's
    sizes up to the option ``factor``, or up to their roots if it is -1. With the option ``decompose_both`` C is a
    product too, and with ``whole`` a factor is one matrix where the rank is at least half of its larger size, as in
    PEFT.

    Args:
      base, axes, scale, dropout, layers: as in `jlora.LoraParam`.
      lokr_c: C, of shape (batch..., p, q), trained; zero at the start. Or the left of its factors, (batch..., p, r).
      lokr_a: A, of shape (batch..., in / p, r), trained; or all of A B, (batch..., in / p, out / q).
      lokr_b: B, of shape (batch..., r, out / q), trained; or ().
      lokr_c2: the right of C's factors, (batch..., r, q), trained; or ().
      whole_rank: r where A B is one matrix; 0 otherwise.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> spec = jlora.LoraSpec(variant="lokr", rank=2, options={"factor": 4})
      >>> node = jlora.wrap({"kernel": jnp.ones((8, 12))}, spec)["kernel"]
      >>> node.lokr_c.shape, node.lokr_a.shape, node.lokr_b.shape
      ((4, 4), (2, 2), (2, 3))

    References:
      Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
      arXiv:2309.14859.
    """

    SETTINGS = ("rank", "alpha", "scaling", "dropout")
    OPTIONS = {"factor": 8, "decompose_both": False, "whole": False}
    LINEAR = ("lokr_c",)
    FORM = _Form(
        "LOKR",
        {
            "lokr_w1": "lokr_c_whole: q p", "lokr_w1_a": "lokr_c2: last small", "lokr_w1_b": "lokr_c: q p",
            "lokr_w2": "lokr_whole: beyond within",
            "lokr_w2_a": "lokr_b: beyond rank", "lokr_w2_b": "lokr_a: rank within",
        },
        {"r": ("rank", 8), "alpha": ("alpha", 8), "decompose_factor": ("options.factor", -1)},
        {"r": "rank_pattern", "alpha": "alpha_pattern"},
        optional=True,
        orders_outputs=True,
    )  # fmt: skip

    base: Any = frozen()
    lokr_c: Any = trained("batch p q")
    lokr_a: Any = trained("batch within rank")
    lokr_b: Any = trained("batch rank beyond", optional=True)
    axes: Axes = static()
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)
    layers: tuple[int, ...] | None = static(default=None)
    lokr_c2: Any = trained("batch small last", optional=True, default=())
    whole_rank: int = static(default=0)

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> LokrParam:
        rank, (key_a, key_b) = kernel.spec.rank, jax.random.split(key)
        p, q = _small(kernel)
        within, beyond = kernel.size("in") // p, kernel.size("out") // q
        std = rank**-0.5
        if kernel.option("whole") and _is_whole(rank, within, beyond):
            lokr_a, lokr_b = kernel.normal(key_a, "batch within beyond", within**-0.5, within=within, beyond=beyond), ()
        else:
            lokr_a = kernel.normal(key_a, "batch within rank", within**-0.5, within=within, rank=rank)
            lokr_b = kernel.normal(key_b, "batch rank beyond", std, rank=rank, beyond=beyond)
        is_pair = kernel.option("decompose_both") and not _is_whole(rank, p, q)
        lokr_c = jnp.zeros(kernel.sizes("batch p q", p=p, q=rank if is_pair else q), kernel.dtype)
        pair = kernel.normal(jax.random.fold_in(key, 2), "batch small last", std, small=rank, last=q) if is_pair else ()
        return cls(
            base,
            lokr_c,
            lokr_a,
            lokr_b,
            **kernel.settings,
            lokr_c2=pair,
            whole_rank=rank if isinstance(lokr_b, tuple) else 0,
        )

    @property
    def rank(self) -> int:
        """r, which of a whole factor no shape tells."""
        return self.whole_rank or self.lokr_a.shape[-1]

    @property
    def small(self) -> tuple[int, int]:
        """The sizes of C."""
        last = self.lokr_c if isinstance(self.lokr_c2, tuple) else self.lokr_c2
        return self.lokr_c.shape[-2], last.shape[-1]

    @property
    def settings(self) -> dict[str, Any]:
        both = {} if isinstance(self.lokr_c2, tuple) else {"decompose_both": True}
        whole = {"whole": True} if isinstance(self.lokr_b, tuple) else {}
        return super().settings | {"rank": self.rank, "options": {"factor": max(self.small), **both, **whole}}

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        c = self.lokr_c if isinstance(self.lokr_c2, tuple) else self.lokr_c @ self.lokr_c2
        lokr_a, lokr_b = self.lokr_a, self.lokr_b
        if isinstance(lokr_b, tuple):
            lokr_b = jnp.broadcast_to(
                jnp.eye(lokr_a.shape[-1], dtype=lokr_a.dtype), (*lokr_a.shape[:-2], *lokr_a.shape[-1:] * 2)
            )
        (p, q), batch = self.small, c.shape[:-2]
        left, right = (jnp.eye(p, dtype=c.dtype), c) if p <= q else (c, jnp.eye(q))
        a = jnp.einsum("...ij,...kr->...ikjr", jnp.broadcast_to(left, (*batch, p, min(p, q))), lokr_a)
        b = jnp.einsum("...jo,...rk->...jrok", jnp.broadcast_to(right, (*batch, min(p, q), q)), lokr_b)
        rank = min(p, q) * lokr_a.shape[-1]
        shape = lambda axes: [self.shape[axis] for axis in axes]
        sizes = {"in": p * lokr_a.shape[-2], "out": q * lokr_b.shape[-1]}
        for word, size in sizes.items():
            check_size(name, "the Kronecker product", size, math.prod(sizes_of(self, word)))
        a = a.reshape(*batch, *shape(self.axes.in_axis), rank)
        b = b.reshape(*batch, rank, *shape(self.axes.out_axis))
        factors = self.beside(a, "batch in rank"), self.beside(b, "batch rank out")
        key = key if self.dropout else None
        return low_rank(self.base, *factors, key=key, name=name, scale=self.scale, dropout=self.dropout)


def _small(kernel: Kernel) -> tuple[int, int]:
    """The sizes of C by the option ``factor``."""
    factor = kernel.option("factor")
    if not isinstance(factor, int) or (factor < 1 and factor != -1):
        kernel.refuse("options['factor']", "it is an integer of at least 1, or -1", factor)
    p, q = (_divisor(kernel.size(word), factor) for word in ("in", "out"))
    return p, q


def _divisor(size: int, factor: int) -> int:
    """The largest divisor of `size` up to the factor, or up to the root of the size if that is -1."""
    limit = math.isqrt(size) if factor == -1 else factor
    return max(n for n in range(1, min(limit, size) + 1) if size % n == 0)
