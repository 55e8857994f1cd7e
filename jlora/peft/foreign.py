"""Whose adapter lies at a path, and the adapter: PEFT's, MLX-LM's, that of kohya's scripts or of diffusers."""

from __future__ import annotations

from pathlib import Path

from jlora.peft import mlx
from jlora.peft.adapter import Adapter
from jlora.peft.diffusion import DIFFUSERS, KOHYA, kind_of_names, read_diffusion
from jlora.peft.invocation import Tokens, check_given
from jlora.peft.keys import PREFIX
from jlora.peft.pickled import PickledFile
from jlora.peft.read import PICKLE, check_finite, read
from jlora.peft.settings import CONFIG, WEIGHTS
from jlora.peft.tensors import TensorFile, read_json

PEFT, MLX = "peft", "mlx"
SINGLE = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")  # diffusers' files in a directory


def read_any(
    path: str | Path,
    *,
    component: str | None = None,
    allow_nonfinite: bool = False,
    allow_edited: bool = False,
    invocation: Tokens = None,
) -> Adapter:
    """Reads the adapter at a path, whose tool is told by the files and by the names in them.

    Args:
      path: a directory of PEFT's or MLX-LM's, or a file (or its directory) of kohya's scripts or diffusers.
      component: which of the adapters in such a file.
      allow_nonfinite: as of `read`.
      allow_edited: as of `read`.
      invocation: as of `read`.

    Raises:
      FileNotFoundError: if there is no such adapter.
      ValueError: if it is not what one of the tools writes, or of several.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind in (PEFT, MLX) and component is not None:
        raise ValueError(f"{path} has a single adapter; component={component!r} is for files of kohya's and diffusers'")
    if kind == PEFT:
        return read(path, allow_nonfinite=allow_nonfinite, allow_edited=allow_edited, invocation=invocation)
    check_given(path, None, invocation)
    adapter = mlx.read_mlx(path) if kind == MLX else read_diffusion(_opened(weights_of(path)), kind, component)
    if not allow_nonfinite:
        check_finite(path, adapter)
    return adapter


def kind_of(path: Path) -> str:
    """Whose adapter lies at a path: ``"peft"``, ``"mlx"``, ``"kohya"`` or ``"diffusers"``.

    A directory with no adapter is said to be PEFT's, of which `read` then tells what is missing.

    Raises:
      ValueError: if it may be of several, or of none of these.
    """
    if path.is_file():
        return _kind_of_file(path)
    single = [name for name in SINGLE if (path / name).is_file()]
    kinds = {
        PEFT: any((path / name).is_file() for name in (WEIGHTS, PICKLE)),
        MLX: (path / mlx.WEIGHTS).is_file(),
        "diffusers or kohya": bool(single),
    }
    there = [kind for kind, is_there in kinds.items() if is_there]
    if {PEFT, MLX} <= {*there} and (path / CONFIG).is_file():  # the settings are of one of the two
        theirs = MLX if mlx.is_mlx(read_json(path / CONFIG)) else PEFT
        there = [kind for kind in there if kind == theirs or kind not in (PEFT, MLX)]
    if len(there) > 1:
        raise ValueError(
            f"{path} has the adapters of several tools, {' and '.join(there)}; give one of them, in a directory of its "
            "own, or a single file by its path"
        )
    if there == [MLX] and not (path / CONFIG).is_file():
        raise FileNotFoundError(f"{path} has MLX-LM's {mlx.WEIGHTS}, but no {CONFIG}, which tells the scale")
    return _kind_of_file(path / single[0]) if there and single else there[0] if there else PEFT


def weights_of(path: Path) -> Path:
    """The file of kohya's, or of diffusers', at a path: itself, or in the directory."""
    return path if path.is_file() else next(path / name for name in SINGLE if (path / name).is_file())


def _kind_of_file(path: Path) -> str:
    names = list(_opened(path))
    kind = kind_of_names(names)
    if kind is not None:
        return kind
    if any(name.startswith(PREFIX) for name in names):
        raise ValueError(f"{path} is a file of PEFT's: give its directory, which has {CONFIG} too")
    if any(name.endswith((".lora_a", ".lora_b")) for name in names):
        raise ValueError(f"{path} is a file of MLX-LM's: give its directory, which has {CONFIG} too")
    raise ValueError(
        f"{path} has no adapter that is read, with names such as {sorted(names)[:2]}: expected is a directory of "
        f"PEFT's or MLX-LM's, or a file of {KOHYA}'s scripts or {DIFFUSERS}'"
    )


def _opened(path: Path) -> TensorFile:
    return PickledFile(path) if path.suffix in (".bin", ".pt", ".pth", ".ckpt") else TensorFile(path)
