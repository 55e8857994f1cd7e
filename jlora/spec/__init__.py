"""What the user asks for: `LoraSpec`, what its settings may be, and those of PEFT, Axolotl and LLaMA-Factory.

Each tool's function takes its settings under its own names and returns the arguments of a `LoraSpec`. What can't be
honoured is an error that says why; Axolotl's and LLaMA-Factory's come down to PEFT's, as they do in those tools.
"""

from jlora.spec.spec import LoraSpec

__all__ = ["LoraSpec"]
