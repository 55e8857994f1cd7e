"""Many adapters on one base: trained together, served together, combined.

An adapter is a small tree, so several are one tree whose arrays have an axis more.
"""

from jlora.adapters.axes import axes
from jlora.adapters.choose import mix, select
from jlora.adapters.pool import Pool
from jlora.adapters.rows import batched
from jlora.adapters.stack import stack, unstack
from jlora.adapters.stacked import StackedParam

__all__ = ["Pool", "StackedParam", "axes", "batched", "mix", "select", "stack", "unstack"]
