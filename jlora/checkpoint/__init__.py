"""Adapters as Orbax checkpoints: what `wrap` and training added to a tree, without the base.

`save` and `load` are for one adapter in one directory; `Checkpoints` for those of a training run, with the optimizer's
state, written in the background. Both work on arrays of many processes, and load on another mesh than they saved from.
"""

from jlora.checkpoint.adapter import ABOUT, describe, load, load_abstract, save
from jlora.checkpoint.processes import gather
from jlora.checkpoint.run import Checkpoints, Saved

__all__ = ["ABOUT", "Checkpoints", "Saved", "describe", "gather", "load", "load_abstract", "save"]
