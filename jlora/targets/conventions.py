"""What a leaf's name and shape tell of it, by Flax's conventions; `jlora.sites` knows better where it was asked.

A kernel of two axes is (in, out), an embedding table (vocabulary, features). Of the kernels with more axes only those
of Flax's attention (query, key, value, out) and of its convolutions are certain.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jlora.interpret.sites import LINEAR, Site
from jlora.nodes.axes import Axes, of_conv, of_use
from jlora.targets.paths import module_of
from jlora.targets.patterns import matcher

KERNELS, EMBEDDINGS = ("kernel", "w"), ("embedding", "embeddings")
OUTPUT_LAYERS = ("lm_head", "embed_out", "logits_dense")
_TABLES = re.compile(r"\w*embed\w*|\w*embs?|wte|wpe|shared")
Sites = Mapping[str, Site]


def is_bias(path: str, leaf: Any) -> bool:
    """Whether a leaf is a bias: by its name, and for Haiku's one letter by its shape too."""
    name = path.rpartition("/")[2]
    return name == "bias" or name.endswith("_bias") or (name == "b" and len(getattr(leaf, "shape", ())) == 1)


def is_table(path: str) -> bool:
    """Whether a leaf is a table of embeddings, by its own name or its module's."""
    *_, module, leaf = ("", *path.split("/"))
    is_named = _TABLES.fullmatch(module) is not None and not module.endswith("proj")
    return leaf in EMBEDDINGS or (is_named and leaf not in KERNELS)


def is_output_layer(path: str) -> bool:
    """Whether a leaf belongs to a language model's output layer, which ``"all-linear"`` leaves out as PEFT does."""
    return any(name in OUTPUT_LAYERS for name in path.split("/"))


def is_kernel(path: str, leaf: Any, sites: Sites | None) -> bool:
    """Whether a leaf is one that low-rank factors are for."""
    if sites is not None and path in sites and sites[path].uses:
        return sites[path].kind != "other"
    is_scale = path.rpartition("/")[2] == "scale"  # of a norm
    return len(getattr(leaf, "shape", ())) >= 2 and not is_bias(path, leaf) and not is_scale


def is_linear(path: str, leaf: Any, sites: Sites | None) -> bool:
    """Whether a leaf is the kernel of a linear layer, as ``"all-linear"`` means it."""
    if sites is not None:
        return path in sites and sites[path].kind in LINEAR
    return path.rpartition("/")[2] in (*KERNELS, "weight") and not is_conv(path, len(leaf.shape))


def kernel_axes(
    path: str, leaves: Mapping[str, Any], given: Mapping[str, Axes], sites: Sites | None
) -> tuple[Axes, str]:
    """A kernel's axes and kind: those that are given for a pattern, else from the sites, else by convention.

    Raises:
      ValueError: if none of them tells.
    """
    leaf = leaves[path]
    kind = _kind(path, len(leaf.shape), sites)
    for pattern, axes in given.items():
        if matcher(pattern)(path):
            return axes, kind
    if sites is not None:
        return _site_axes(path, leaf, sites)
    axes = _by_convention(path, leaf, leaves)
    if axes is None or not _fits_bias(axes, leaf, leaves.get(f"{module_of(path)}/bias")):
        raise ValueError(
            f"wrap: the axes of {path} of shape {tuple(leaf.shape)} are ambiguous: name and shape do not tell which "
            "are in, out or stacked. Trace the function, jlora.wrap(params, spec, sites=jlora.sites(fn, params, "
            f"*args)), or say it: LoraSpec(axes={{{path!r}: jlora.Axes(in_axis=..., out_axis=..., batch_axis=...)}}). "
            f"Where it is no kernel to adapt, as a convolution may be, exclude=[{path!r}]"
        )
    return axes, kind


def _kind(path: str, ndim: int, sites: Sites | None) -> str:
    if sites is not None and path in sites and sites[path].kind != "other":
        return sites[path].kind
    return "embedding" if path.rpartition("/")[2] in EMBEDDINGS else "conv" if is_conv(path, ndim) else "dot"


def _site_axes(path: str, leaf: Any, sites: Sites) -> tuple[Axes, str]:
    site = sites.get(path)
    if site is None or site.axes is None:
        why = "the function does not use it" if site is None or not site.uses else f"it is used as {site.describe()}"
        raise ValueError(
            f"wrap: sites do not tell the axes of {path} of shape {tuple(leaf.shape)}: {why}. Exclude it, or give its "
            f"axes: LoraSpec(axes={{{path!r}: jlora.Axes(...)}})"
        )
    if site.kind == "conv" and len(site.axes.in_axis) == 2 and not is_conv(path, len(leaf.shape)):
        return of_conv(site.axes), site.kind
    is_looked_up = site.kind == "embedding"
    is_told = len(leaf.shape) != 2 or is_table(path) == is_looked_up
    return (site.axes if is_told else of_use(site.axes, is_looked_up)), site.kind


def _by_convention(path: str, leaf: Any, leaves: Mapping[str, Any]) -> Axes | None:
    name, layer, ndim = path.rpartition("/")[2], module_of(path).rpartition("/")[2], len(leaf.shape)
    if name == "weight":  # PyTorch's and Equinox's linear layers are (out, in), their tables (vocabulary, features)
        return None
    if ndim == 2:
        return Axes((0,), (1,))
    if is_conv(path, ndim) and name in KERNELS:
        return Axes(tuple(range(ndim - 1)), (ndim - 1,))
    if ndim == 3 and layer in ("query", "key", "value") and _heads(path, "out", 0, leaves) in (None, leaf.shape[1:]):
        return Axes((0,), (1, 2))
    if ndim == 3 and layer == "out" and _heads(path, "query", 1, leaves) in (None, leaf.shape[:2]):
        return Axes((0, 1), (2,))
    return None


def _heads(path: str, sibling: str, first: int, leaves: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The axes of the heads in the kernel beside this one, if there is one: in stacked layers they do not agree."""
    attention, _, _ = module_of(path).rpartition("/")
    leaf = leaves.get("/".join(filter(None, (attention, sibling, path.rpartition("/")[2]))))
    return None if leaf is None or len(leaf.shape) != 3 else tuple(leaf.shape[first : first + 2])


def _fits_bias(axes: Axes, leaf: Any, bias: Any) -> bool:
    """Whether the bias beside a kernel of many axes has its out axes; that of scanned layers has others."""
    return bias is None or len(leaf.shape) < 3 or tuple(bias.shape) == tuple(leaf.shape[axis] for axis in axes.out_axis)


def is_conv(path: str, ndim: int) -> bool:
    return ndim >= 3 and re.search("conv", module_of(path).rpartition("/")[2], re.IGNORECASE) is not None
