"""Adapter files of Hugging Face's PEFT: read onto any tree, written from any tree; and whole models.

Adapters of MLX-LM, of kohya's scripts and of diffusers are read too: the same arrays under other names. All of them may
lie in a directory, or on the Hugging Face Hub.

References:
  https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora.interpret.sites import Site
from jlora.peft.collect import collect
from jlora.peft.foreign import read_any
from jlora.peft.maps import NAMES
from jlora.peft.models import from_safetensors, to_safetensors
from jlora.peft.names import Entry, Layout
from jlora.peft.place import place, resize
from jlora.peft.portable import low_rank
from jlora.peft.portable import portable as _portable
from jlora.peft.read import check_finite, read
from jlora.peft.remote import adapter_at, push
from jlora.peft.write import write

__all__ = [
    "NAMES", "Layout", "from_safetensors", "load", "low_rank", "push", "resize_tables", "save", "to_safetensors"
]  # fmt: skip


def load(
    directory: str | Path,
    params: Any,
    *,
    names: str | Sequence[Entry] | None = None,
    sites: Mapping[str, Site] | None = None,
    prefix: str | None = None,
    component: str | None = None,
    fan_in_fan_out: bool | Sequence[str] | None = None,
    allow_nonfinite: bool = False,
    allow_edited: bool = False,
    invocation_tokens: Sequence[int] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Any:
    """Wraps a tree with an adapter that PEFT has written: LoRA, rsLoRA or DoRA, with all that goes along.

    Files of other methods become the nodes of their variants: AdaLoRA, VeRA, LoHa, LoKr, IA3, OFT, BOFT and others of
    `jlora.variants` that have a `FORM`. LN tuning gives leaves that train in full.

    Or with one of another tool, which the files and the names in them tell: MLX-LM's (a directory with
    ``adapters.safetensors``), that of kohya's scripts or of diffusers (one ``.safetensors`` file).

    Nothing in the files is trusted: names and shapes are checked against the settings and the tree before anything is
    made, base weights are never overwritten, no pickle is run, and no name is a path. The tree stays as it is.

    Args:
      directory: with ``adapter_config.json`` and ``adapter_model.safetensors``, or ``adapter_model.bin`` where that is
        not there; with ``adapters.safetensors`` of MLX-LM; or the path of a file of kohya's scripts or diffusers. Where
        no such path exists, ``"org/name"`` is a repository on the Hugging Face Hub; a `Path` is never one. Of that the
        settings and the safetensors are downloaded, pickles never.
      params: any tree of arrays, placed or abstract. With PyTorch's names (a model's safetensors, nested by the dots,
        or the parameters of Transformers' Flax models) it needs no `names`.
      names: from PyTorch's names to the tree's: one of `NAMES`, or an ordered list of pairs such as
        ``("model.layers.{i}.self_attn.{p}_proj", "layers/attn/{p}/kernel[{i}]")``, ``[{i}]`` being the place on the
        stacked axis. A third entry, a `Layout`, says what sizes do not tell.
      sites: what `jlora.sites` found, for kernels whose axes neither names nor sizes tell.
      prefix: where in the tree the adapted model is, as in ``"text_model"``, where that is not to be seen. None: the
        adapter's names are the tree's, but for known wrappers around the model, such as ``bert.`` or ``model.``.
      component: which of the adapters in a file of kohya's scripts or diffusers is that of the tree: ``"unet"``,
        ``"transformer"``, ``"text_encoder"``, ``"text_encoder_2"``. Kohya's names have underscores for dots; they are
        told by the tree's.
      fan_in_fan_out: whether matrices of a tree lie (in, out), as those of Transformers' ``Conv1D`` in GPT-2: True or
        False for all, or the ends of the names of those that do. None: as their sizes, their biases, other modules of
        the tree and their names tell. Of a file the setting of this name tells little: it is that of one module.
      allow_nonfinite: take NaN and infinite values as they are.
      allow_edited: take an ``adapter_config.json`` under which the weights mean something else than when `save` wrote
        both, as after an edit of ``lora_alpha``.
      invocation_tokens: of an activated adapter (aLoRA), which acts from their last occurrence in a row on: the same as
        in the file. The tree is to be run by `jlora.adapters.activated`. None: adapters that act at all tokens.
      revision: a branch, a tag or a commit of the repository; None: its main branch.
      token: for the Hub; None: that of the login (``hf auth login``), or of ``HF_TOKEN``; False: none.
      cache_dir: where downloads are kept; None: where ``huggingface_hub`` keeps them. Its offline mode is heeded.

    Returns:
      The tree with a `jlora.LoraParam` or a DoRA node for each adapted kernel, factors in float32, and a
      `jlora.TrainableParam` for each leaf of ``modules_to_save`` and each trained bias. A table that a model uses as
      its head too has one update, for both uses.

    Raises:
      FileNotFoundError: if there are no such files, neither here nor on the Hub.
      PermissionError: if the Hub does not give them: the repository is gated, or private.
      ConnectionError: if the Hub can't be asked, and its cache does not have them.
      ImportError: if the Hub is to be asked, and ``huggingface_hub`` is not installed: ``pip install ".[hub]"``.
      TypeError: if the tree is wrapped already.
      ValueError: if the files are not what these tools write, or do not fit the tree, or fit in several places of it;
        or the adapter is activated, and not by `invocation_tokens`.

    Example:
      >>> import tempfile, jax.numpy as jnp, jlora
      >>> params = {"layers": {"0": {"q_proj": {"weight": jnp.ones((4, 3))}}}}  # (out, in), as in PyTorch
      >>> axes = {"q_proj": jlora.Axes(in_axis=1, out_axis=0)}
      >>> tree = jlora.wrap(params, jlora.LoraSpec(targets="q_proj", rank=2, axes=axes))
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     jlora.peft.save(directory, tree)
      ...     again = jlora.peft.load(directory, params)
      >>> again["layers"]["0"]["q_proj"]["weight"].lora_a.shape
      (3, 2)
    """
    at = adapter_at(directory, revision=revision, token=token, cache_dir=cache_dir)
    adapter = read_any(
        at,
        component=component,
        allow_nonfinite=allow_nonfinite,
        allow_edited=allow_edited,
        invocation=invocation_tokens,
    )
    try:
        return place(adapter, params, names, sites, prefix, fan_in_fan_out)
    except ValueError as error:
        told = "" if str(directory) in str(error) else f" (the adapter in {directory})"
        raise ValueError(f"{error}{told}") from None


def resize_tables(
    params: Any,
    directory: str | Path,
    *,
    names: str | Sequence[Entry] | None = None,
    prefix: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Any:
    """Gives a tree the vocabulary of an adapter that was trained with more tokens: its tables, and its head.

    The rows that the tree lacks are those of the tables that PEFT saved beside the adapter; rows of which the adapter
    trains each are zero, since it replaces them. Then `load` takes the adapter.

    Args:
      params: any tree of arrays, or abstract, as of `load`.
      directory: with ``adapter_config.json`` and ``adapter_model.safetensors``, or a name of the Hub, as of `load`.
      names: as in `load`.
      prefix: as in `load`.
      revision: as in `load`.
      token: as in `load`.
      cache_dir: as in `load`.

    Returns:
      The tree, with other tables where the adapter has more rows, or fewer.

    Raises:
      ValueError: if the adapter does not fit the tree otherwise, or does not have the values of the new rows.
      FileNotFoundError, PermissionError, ConnectionError, ImportError: of files and the Hub, as of `load`.

    Example:
      >>> import tempfile, jax.numpy as jnp, jlora
      >>> model = lambda rows: {"embed_tokens": {"embedding": jnp.ones((rows, 4))}, "q": {"kernel": jnp.ones((4, 4))}}
      >>> larger = jlora.wrap(model(12), jlora.LoraSpec(targets=["q"], rank=2, train=["embed_tokens"]))
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     jlora.peft.save(directory, larger)
      ...     tree = jlora.peft.load(directory, jlora.peft.resize_tables(model(10), directory))
      >>> tree["embed_tokens"]["embedding"].shape
      (12, 4)
    """
    at = adapter_at(directory, revision=revision, token=token, cache_dir=cache_dir)
    return resize(read(at, allow_nonfinite=True), params, names, prefix)


def save(
    directory: str | Path,
    tree: Any,
    *,
    names: str | Sequence[Entry] | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
    portable: bool = False,
    allow_nonfinite: bool = False,
    invocation_tokens: Sequence[int] | None = None,
) -> None:
    """Writes the adapter of a wrapped tree as PEFT does: a few MB, without the base.

    A variant that PEFT has is written as what it is, with its settings, if all kernels have the same one and PEFT's
    method takes such layers. Other low-rank variants are written as plain LoRA of the same function (those that started
    from parts of the kernel with twice the rank). Norms alone are LN tuning. Beside the files lies a card,
    ``README.md``, which says what the adapter is and how it is loaded.

    Args:
      directory: for ``adapter_config.json``, ``adapter_model.safetensors`` and ``README.md``; each appears whole or not
        at all. A ``README.md`` that somebody else wrote, or edited, is left as it is.
      tree: a wrapped tree.
      names: as in `load`.
      base_model: the model's name, for ``base_model_name_or_path`` and the card.
      task_type: PEFT's, by which it opens the base: ``"CAUSAL_LM"``, ``"SEQ_CLS"``, ``"SEQ_2_SEQ_LM"``,
        ``"TOKEN_CLS"``, ``"QUESTION_ANS"`` or ``"FEATURE_EXTRACTION"``; None: not said.
      portable: write what vLLM, SGLang, llama.cpp and TGI read alike: every scale folded into B, one rank, no patterns,
        all layers.
      allow_nonfinite: write NaN and infinite values as they are.
      invocation_tokens: write an activated adapter (aLoRA), which acts from the last occurrence of these token ids in a
        row on: one that was trained by `jlora.adapters.activated`. It is of the task ``"CAUSAL_LM"``. A tree does not
        know its tokens: name them at each save.

    Raises:
      TypeError: if nothing in the tree is wrapped.
      ValueError: if a leaf has no name in PyTorch, or its adapter no form in PEFT, or with `portable` none there; the
        message says what to do. Or if PEFT has no such task, or takes no such adapter with `invocation_tokens`.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jlora
      >>> params = {"layers": {"0": {"q_proj": {"kernel": jnp.ones((4, 3))}}}}
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     jlora.peft.save(directory, jlora.wrap(params, jlora.LoraSpec(rank=2)))
      ...     sorted(os.listdir(directory))
      ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    if portable and invocation_tokens is not None:
        raise ValueError("peft.save: not all readers of portable files know invocation_tokens: give one of the two")
    collected = collect(tree, names, as_lora=portable)
    if not allow_nonfinite:
        check_finite("peft.save", collected.adapter)
    write(Path(directory), _portable(collected) if portable else collected, base_model, task_type, invocation_tokens)
