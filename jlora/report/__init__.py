"""How a function uses a tree, and what of one is adapted: `sites`, `summary` and `explain`."""

from jlora.report.explain import Explanation, Use, explain
from jlora.report.merging import MergeError, merge_error
from jlora.report.sites import Sites, sites
from jlora.report.summary import Summary, summary
from jlora.report.text import Table

__all__ = [
    "Explanation",
    "MergeError",
    "Sites",
    "Summary",
    "Table",
    "Use",
    "explain",
    "merge_error",
    "sites",
    "summary",
]
