"""Many adapters on one base: trained together, served together, combined.

An adapter is a small tree, so several are one tree whose arrays have an axis more: `stack`, `unstack`, `select`, `mix`,
`axes`. `batched` gives each row of a batch its own, and a `Pool` holds those that are served. `activated` lets one act
at some tokens only. `weighted` is PEFT's ``add_weighted_adapter``, as a function of wrapped trees. `extract` takes a
LoRA out of a full fine-tune, `resize` gives an adapter another rank.
"""

from jlora.adapters.activated import activated, invoked
from jlora.adapters.axes import axes
from jlora.adapters.choose import mix, select
from jlora.adapters.extract import Extracted, extract
from jlora.adapters.pool import Pool
from jlora.adapters.resize import resize
from jlora.adapters.rows import batched
from jlora.adapters.stack import stack, unstack
from jlora.adapters.stacked import StackedParam
from jlora.adapters.weighted import weighted

__all__ = [
    "Extracted",
    "Pool",
    "StackedParam",
    "activated",
    "axes",
    "batched",
    "extract",
    "invoked",
    "mix",
    "resize",
    "select",
    "stack",
    "unstack",
    "weighted",
]
