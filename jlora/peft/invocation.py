"""Activated adapters (aLoRA): the tokens from which on they act. A file that has some is read by who names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SETTING = "alora_invocation_tokens"
Tokens = Sequence[int] | None
ANY: Any = object()  # for who neither runs nor merges an adapter


def tokens_of(settings: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The invocation of an adapter's settings; None: it acts at all tokens.

    Raises:
      ValueError: if it is no list of token ids.
    """
    given = settings.get(SETTING)
    if given is None:
        return None
    if not isinstance(given, list) or not given or not all(type(i) is int and i >= 0 for i in given):
        raise ValueError(f"{SETTING} must be a list of token ids, found {given!r}")
    return tuple(given)


def check_given(path: Path | str, found: tuple[int, ...] | None, given: Tokens) -> None:
    """Refuses an adapter that acts at other tokens than the caller says; None is all of them."""
    if given is ANY:
        return
    expected = None if given is None else ids_of("peft.load", given)
    if found == expected:
        return
    if found is None:
        raise ValueError(f"{path} has no {SETTING}: its adapter acts at all tokens; leave out invocation_tokens")
    told = [*found]
    if expected is None:
        raise ValueError(
            f"{path} is activated (aLoRA): it acts from the last {told} in a row on, and at no token before. Load it "
            f"with jlora.peft.load(..., invocation_tokens={told}), and run the tree by "
            f"jlora.adapters.activated(fn)(tree, jlora.adapters.invoked(ids, {told}), ids). It has no merged form"
        )
    raise ValueError(f"{path} acts from the tokens {told} on, and invocation_tokens are {[*expected]}")


def ids_of(caller: str, given: Any) -> tuple[int, ...]:
    """Token ids that a caller gives.

    Raises:
      ValueError: if they are none.
    """
    ids = np.asarray(given)
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu" or ids.min() < 0:
        raise ValueError(
            f"{caller}: invocation_tokens are the ids of an invocation, such as [49152, 12], found {given!r}"
        )
    return tuple(ids.tolist())


def settings_with(settings: dict[str, Any], kinds: set[str], tokens: Tokens) -> dict[str, Any]:
    """The settings of an adapter's file, with its invocation.

    Raises:
      ValueError: if PEFT has no such adapter.
    """
    if tokens is None:
        return settings
    ids = ids_of("peft.save", tokens)
    wrong = {
        "another method than LoRA": settings["peft_type"] != "LORA",
        "DoRA": settings.get("use_dora"),
        "biases": settings.get("bias") != "none" or settings.get("lora_bias"),
        "leaves that are trained in full": settings.get("modules_to_save"),
        "tables with trained rows": settings.get("trainable_token_indices"),
        "other kernels than those of linear layers": kinds - {"linear"},
        f"the task {settings['task_type']}, not CAUSAL_LM": settings["task_type"] not in (None, "CAUSAL_LM"),
    }
    if found := next((what for what, is_so in wrong.items() if is_so), None):
        raise ValueError(f"peft.save: with invocation_tokens, PEFT takes LoRA of linear layers alone; this has {found}")
    return settings | {SETTING: [*ids], "task_type": "CAUSAL_LM"}
