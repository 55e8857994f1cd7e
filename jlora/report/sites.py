"""How a function uses each leaf of its parameters, as a mapping that prints as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jlora.interpret.sites import Site, observe
from jlora.report.groups import grouped, name_of, title
from jlora.report.text import as_text, with_counts

HEADER = ("path", "shape", "kind", "uses", "in", "out", "batch")


class Sites(Mapping[str, Site]):
    """What `sites` found, by path. As text, leaves that are alike but for numbers in their paths are one row."""

    def __init__(self, found: Mapping[str, Site]) -> None:
        self._found = found

    def __getitem__(self, path: str) -> Site:
        return self._found[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __repr__(self) -> str:
        found: Any = grouped((name_of(path), 1, _cells(site)) for path, site in self.items())
        rows = [(title(name), *cells) for name, _, cells in found]
        return as_text(with_counts(HEADER, rows, [count for _, count, _ in found]), [""] * (1 + len(rows)))


def sites(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Sites:
    """Finds how a function uses each leaf of its parameters, by tracing it once, abstractly.

    Args:
      fn: a function of a parameter tree and more arguments, such as ``model.apply``.
      params: the tree, of arrays or of `jax.ShapeDtypeStruct`.
      *args, **kwargs: the other arguments; arrays may be of type `jax.ShapeDtypeStruct`.

    Returns:
      For each leaf's path its `Site`: kind, axes and uses. It prints as a table, and `jlora.wrap` takes it.

    Raises:
      ValueError: if two leaves of `params` have the same path.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"query": jnp.ones((8, 2, 4)), "scale": jnp.ones(8)}
      >>> fn = lambda p, x: jnp.einsum("td,dhk->thk", x * p["scale"], p["query"])
      >>> jlora.sites(fn, params, jnp.ones((5, 8)))
      path   shape      kind   uses  in    out
      query  (8, 2, 4)  dot    1     (0,)  (1, 2)
      scale  (8,)       other  1
    """
    return Sites(observe(fn, params, args, kwargs))


def _cells(site: Site) -> tuple[str, ...]:
    axes = (site.axes.in_axis, site.axes.out_axis, site.axes.batch_axis) if site.axes else ()
    groups = [str(group) if group else "" for group in axes] or [""] * 3
    return str(site.shape), site.kind, str(len(site.uses)), *groups
