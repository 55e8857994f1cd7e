"""Runs the benchmarks, one after the other: ``python -m benchmarks``, or those that are named.

Each runs in a process of its own. One that needs what is not installed says so, and is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys

ALL = ("residuals", "temporaries", "tpu_cycles", "fused_kernel", "step_time", "tracing", "merge", "adapters")
NEEDS = {"tpu_cycles": "libtpu", "fused_kernel": "libtpu"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*ALL], metavar="name", help=", ".join(ALL))
    parser.add_argument("--peft", default="", metavar="PYTHON", help="a Python that has torch and peft, for step_time")
    args = parser.parse_args()
    if unknown := {*args.names} - {*ALL}:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    failed = []
    for name in args.names:
        if name in NEEDS and not importlib.util.find_spec(NEEDS[name]):
            print(f"\n{name} is left out: it needs {NEEDS[name]} (pip install {NEEDS[name]})")
            continue
        flags = ["--peft", args.peft] if name == "step_time" and args.peft else []
        failed += [name] * bool(subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *flags]).returncode)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
