"""What of a wrapped tree is adapted, and how a function uses it: `summary` and `explain`, as text and as HTML."""

from jlora.report.explain import Explanation, Use, explain
from jlora.report.summary import Summary, summary
from jlora.report.text import Table

__all__ = ["Explanation", "Summary", "Table", "Use", "explain", "summary"]
