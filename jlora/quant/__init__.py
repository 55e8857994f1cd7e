"""Quantised bases (QLoRA): a few bits a weight in memory, numbers made where they are used, adapters beside them.

Leaves are of Qwix's type `QArray` (``pip install 'jlora[quant]'``). `jlora.wrap` takes them as bases; `jlora.apply`
runs a function on them, adapted or not, and keeps no dense kernel: it is made anew in the forward and in the backward
pass.
"""

from jlora.quant.start import loftq, qera, qpissa
from jlora.quant.tree import Error, bits, dequantize, fill, prepare, quantize, requantize

__all__ = ["Error", "bits", "dequantize", "fill", "loftq", "prepare", "qera", "qpissa", "quantize", "requantize"]
