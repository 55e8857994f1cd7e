"""Settings of other tools (PEFT, Axolotl, LLaMA-Factory) as those of `jlora.LoraSpec`.

Each function takes a tool's settings under its own names and returns the arguments of a `LoraSpec`. What can't be
honoured is an error that says why; Axolotl's and LLaMA-Factory's come down to PEFT's, as they do in those tools.
"""

from jlora.settings.axolotl import from_axolotl
from jlora.settings.llamafactory import from_llamafactory
from jlora.settings.peft import from_peft

__all__ = ["from_axolotl", "from_llamafactory", "from_peft"]
