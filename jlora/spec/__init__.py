"""What the user asks for: `LoraSpec`, what its settings may be, and those of PEFT and of tools that train with it.

Each tool's function takes its settings under its own names and returns the arguments of a `LoraSpec`. What can't be
honoured is an error that says why; Axolotl's, LLaMA-Factory's and FastChat's come down to PEFT's, as they do there.
"""

from jlora.spec.spec import LoraSpec

__all__ = ["LoraSpec"]
