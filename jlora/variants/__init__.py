"""One variant a file: a node that says how it starts and which factored weight it stands for.

A variant knows nothing of primitives. `VARIANTS` has those that `jlora.LoraSpec` knows by name; a class of one's own
goes to ``LoraSpec(variant=...)`` as it is. What such a class is written with is here too: its fields (`trained`,
`frozen`, `static`), what it is told (`Kernel`), and what it stands for (`Factored`, made by `low_rank`, `gained`,
`turned_by`, `plain`).
"""

from jlora.interpret.factored import Factored, gained, low_rank, plain, turned_by
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, static, trained
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam
from jlora.variants.adalora import AdaLoraParam, orthogonality
from jlora.variants.c3a import C3aParam
from jlora.variants.delora import DeloraParam
from jlora.variants.dora import DoraParam
from jlora.variants.fourierft import FourierFtParam
from jlora.variants.gralora import GraloraParam
from jlora.variants.hira import HiraParam
from jlora.variants.hra import HraParam
from jlora.variants.ia3 import Ia3Param
from jlora.variants.loha import LohaParam
from jlora.variants.lokr import LokrParam
from jlora.variants.lora import LoraParam
from jlora.variants.lora_fa import LoraFaParam
from jlora.variants.miss import MissParam
from jlora.variants.oft import BoftParam, OftParam
from jlora.variants.pvera import PveraParam
from jlora.variants.randlora import RandLoraParam
from jlora.variants.road import RoadParam
from jlora.variants.shira import ShiraParam
from jlora.variants.vera import VeraParam
from jlora.variants.waveft import WaveFtParam

#: The classes by the names that ``LoraSpec(variant=...)`` takes: ``{"lora": LoraParam, ...}``.
VARIANTS: dict[str, type[AdaptedParam]] = {
    "lora": LoraParam,
    "dora": DoraParam,
    "lora_fa": LoraFaParam,
    "vera": VeraParam,
    "adalora": AdaLoraParam,
    "loha": LohaParam,
    "lokr": LokrParam,
    "ia3": Ia3Param,
    "oft": OftParam,
    "boft": BoftParam,
    "miss": MissParam,
    "hra": HraParam,
    "road": RoadParam,
    "c3a": C3aParam,
    "gralora": GraloraParam,
    "hira": HiraParam,
    "delora": DeloraParam,
    "fourierft": FourierFtParam,
    "waveft": WaveFtParam,
    "shira": ShiraParam,
    "randlora": RandLoraParam,
    "pvera": PveraParam,
}

__all__ = [
    "VARIANTS",
    "AdaLoraParam",
    "AdaptedParam",
    "Axes",
    "BoftParam",
    "C3aParam",
    "GraloraParam",
    "HiraParam",
    "DeloraParam",
    "FourierFtParam",
    "WaveFtParam",
    "ShiraParam",
    "PveraParam",
    "RandLoraParam",
    "DoraParam",
    "Factored",
    "HraParam",
    "Ia3Param",
    "Kernel",
    "LohaParam",
    "LokrParam",
    "LoraFaParam",
    "LoraParam",
    "MissParam",
    "OftParam",
    "RoadParam",
    "VeraParam",
    "frozen",
    "gained",
    "low_rank",
    "orthogonality",
    "plain",
    "static",
    "trained",
    "turned_by",
]
