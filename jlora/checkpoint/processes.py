"""What several processes say to each other about a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def gather(value: Any) -> list[Any]:
    """What each process gives, in their order, on all of them.

    It is for what each process has of its own, such as its place in its part of the data. All processes must call it.

    Args:
      value: JSON: numbers, strings, lists and dicts with strings as keys.

    Returns:
      A list with the value of each process; of one alone, a list of one.

    Raises:
      TypeError: if the value is no JSON.

    Example:
      >>> import jlora
      >>> jlora.checkpoint.gather({"next_index": 7})  # of a single process
      [{'next_index': 7}]
    """
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    if jax.process_count() == 1:
        return [json.loads(text.tobytes())]
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    rows = multihost_utils.process_allgather(np.pad(text, (0, sizes.max() - text.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def agreed(look: Callable[[], Any]) -> Any:
    """What the first process sees or does on the disk, on all of them: the others might look before it or after.

    Raises:
      OSError: in all of them, if it could not.
    """
    seen, fault = None, None
    if jax.process_index() == 0:
        try:
            seen = look()
        except OSError as error:
            fault = f"{type(error).__name__}: {error}"
    seen, fault = gather([seen, fault])[0]
    if fault:
        raise OSError(fault)
    return seen
