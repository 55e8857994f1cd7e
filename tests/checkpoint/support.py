"""The back ends that are installed."""

import importlib.util

from jlora.checkpoint import backend


def _is_there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


APIS = [*filter(_is_there, backend.V1), "orbax.checkpoint"]
