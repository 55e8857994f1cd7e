"""Tables of a wrapped tree, as text and as a foldable page in a notebook: `summary` and `explain`."""

from jlora.report.explain import Explanation, Use, explain
from jlora.report.summary import Summary, summary
from jlora.report.text import Table

__all__ = ["Explanation", "Summary", "Table", "Use", "explain", "summary"]
