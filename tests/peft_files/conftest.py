"""The oracle's models are imported only where PEFT is installed."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("peft") else ["torch_models.py"]
