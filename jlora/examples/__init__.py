"""Whole jobs on real models and data, each run as `python -m jlora.examples.<name>`."""

from importlib.util import find_spec

_missing = [name for name in ("matplotlib", "tokenizers", "tqdm") if find_spec(name) is None]
if _missing:
    raise ImportError(f"jlora.examples needs {', '.join(_missing)}: pip install 'jlora[examples]'")
