"""A `LoraSpec` as the Python code that makes it."""

from __future__ import annotations

import pprint
import textwrap

from jlora.spec.spec import LoraSpec


def source(spec: LoraSpec) -> str:
    """The code of a call that evaluates to a spec, with what differs from the defaults.

    Args:
      spec: of plain data, as `LoraSpec.to_dict` has it.

    Raises:
      TypeError: if a setting is a function, a class or a tree, which no code here tells.

    Example:
      >>> print(source(LoraSpec(rank=4, train=["norm"])))
      LoraSpec(
          rank=4,
          train=['norm'],
      )
    """
    defaults = LoraSpec().to_dict()
    given = {name: x for name, x in spec.to_dict().items() if name not in defaults or x != defaults[name]}
    lines = [f"{name}={pprint.pformat(value, width=100, sort_dicts=False)}," for name, value in given.items()]
    return f"LoraSpec(\n{textwrap.indent(chr(10).join(lines), ' ' * 4)}\n)" if lines else "LoraSpec()"
