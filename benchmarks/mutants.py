"""Do the quick tests notice a change of the code? Mutates lines of jlora and runs the tests that execute them.

    python benchmarks/mutants.py cover cover.json                            # which test executes which line
    python benchmarks/mutants.py sample sample.json --count 160 jlora        # a seeded sample of mutants
    python benchmarks/mutants.py run sample.json cover.json before.json      # can be stopped and taken up again
    python benchmarks/mutants.py report sample.json before.json after.json   # a table in Markdown, and the survivors

A mutant is found again by its line's text, its function and its file's name, so lines and files may move between two
runs; `cover` must be run again then. To try only the survivors again after new tests: `cover` again, copy before.json
to after.json, and ``run sample.json cover.json after.json --only-survivors``. Needs Python 3.12 and Linux.

What becomes of a mutant: killed (a test fails), timeout (a test takes far longer than without it, which counts as
killed), survived, uncovered (no test executes it), undecided (its tests take longer than --timeout), broken (pytest
could not run: see the message), gone (the checkout has no such line any more).
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import ctypes
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = "MUTANTS_PARTS"  # where the processes of `cover` leave what they saw
QUICK = ["-n", "2", "-m", "not slow", "-q"]
HEAVY = "jax flax flax.nnx flax.linen optax orbax.checkpoint haiku equinox chex numpy hypothesis qwix".split()
PACKAGES = ("interpret", "spec")  # one row each of the report
NEAR = 6  # so many test files are collected first
TOOL = 4  # of `sys.monitoring`
NO_TESTS = 5  # pytest's status where a mutant has changed the cases of a test
PR_SET_PDEATHSIG = 1  # of Linux
MEMORY = 8 << 30  # bytes of a mutant's process

# Operators: the pattern of an operator's text, and what stands in its place.
COMPARE = {
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Lt: ("<", "<=", ">="),
    ast.LtE: ("<=", "<", ">"),
    ast.Gt: (">", ">=", "<="),
    ast.GtE: (">=", ">", "<"),
    ast.In: (r"\bin\b", "not in"),
    ast.NotIn: (r"\bnot\s+in\b", "in"),
    ast.Is: (r"\bis\b", "is not"),
    ast.IsNot: (r"\bis\s+not\b", "is"),
}
PLAIN = (ast.Eq, ast.NotEq, ast.In, ast.NotIn, ast.Is, ast.IsNot)  # their swap is the condition's negation
BINARY = {
    ast.Add: (r"\+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: (r"\*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "//"),
    ast.Pow: (r"\*\*", "*"),
    ast.MatMult: ("@", "*"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: (r"\|", "&"),
    ast.BitXor: (r"\^", "&"),
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
NOT_SWAPPED = {"isinstance", "issubclass", "getattr", "hasattr", "min", "max", "cast"}
NOT_VISITED = {"annotation", "returns", "decorator_list", "type_params"}
QUIET = re.compile(r"warn|error|message|^(TypeVar|cast|NewType|print)$", re.IGNORECASE)  # their strings stay


# ------------------------------------------------------------------------------------------------ cover


class Recorder:
    """A pytest plugin that notes which lines of jlora each test executes.

    The bodies of modules and classes run once, and so do functions that these call: the lines of an import are those
    of every test that executes any line of the file. A fixture that several tests share counts for each of them.
    Caches of jlora are emptied before each test. Not seen are other processes, and what JAX itself keeps compiled.
    """

    def __init__(self, folder: str):
        self.folder, self.root = folder, f"{ROOT / 'jlora'}{os.sep}"
        self.hits, self.imported, self.failed = set(), set(), set()
        self.fixtures, self.tests, self.masks = {}, [], collections.defaultdict(int)
        sys.monitoring.use_tool_id(TOOL, "mutants")
        events = sys.monitoring.events
        sys.monitoring.register_callback(TOOL, events.PY_START, self.start)
        sys.monitoring.register_callback(TOOL, events.LINE, self.line)
        sys.monitoring.set_events(TOOL, events.PY_START)

    def start(self, code, _):
        if code.co_filename.startswith(self.root):
            sys.monitoring.set_local_events(TOOL, code, sys.monitoring.events.LINE)
        return sys.monitoring.DISABLE

    def line(self, code, line):
        is_function = code.co_flags & inspect.CO_OPTIMIZED
        (self.hits if is_function else self.imported).add((code.co_filename, line))
        return sys.monitoring.DISABLE

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.imported |= self.hits
        self.hits = set()
        empty_caches()
        sys.monitoring.restart_events()
        began = time.perf_counter()
        result = yield
        seconds = time.perf_counter() - began
        for definitions in item._fixtureinfo.name2fixturedefs.values():
            self.hits |= self.fixtures.get(definitions[-1], set())
        if item.nodeid not in self.failed:
            for place in self.hits:
                self.masks[place] |= 1 << len(self.tests)
            self.tests.append([item.nodeid, round(seconds, 3), len(self.hits)])
        self.hits = set()
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        if fixturedef.scope == "function":
            return (yield)
        outer, self.hits = self.hits, set()
        sys.monitoring.restart_events()
        try:
            return (yield)
        finally:
            self.fixtures[fixturedef] = set(self.hits)
            self.hits |= outer

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self):
        sys.monitoring.set_events(TOOL, 0)
        sys.monitoring.free_tool_id(TOOL)
        places = [[os.path.relpath(file, ROOT), line, hex(mask)] for (file, line), mask in self.masks.items()]
        imported = [[os.path.relpath(file, ROOT), line] for file, line in self.imported]
        part = {"tests": self.tests, "places": places, "imported": imported}
        Path(self.folder, f"{os.getpid()}.json").write_text(json.dumps(part))


def pytest_configure(config) -> None:
    """Makes this file a plugin of pytest (``-p benchmarks.mutants``)."""
    if PARTS in os.environ:
        config.pluginmanager.register(Recorder(os.environ[PARTS]))


def empty_caches() -> None:
    """Empties the caches of jlora's functions, so that each test executes what it needs."""
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "jlora"]
    for value in [value for module in modules for value in list(vars(module).values())]:
        for name in ("cache_clear", "clear_cache"):
            if not isinstance(value, type) and callable(clear := getattr(value, name, None)):
                clear()


def cover(args) -> None:
    """Runs the tests and joins what their processes saw."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-p", "benchmarks.mutants", *(args.pytest or QUICK)]
        subprocess.run(command, cwd=ROOT, env=os.environ | {PARTS: folder})
        tests, lines, imported = [], collections.defaultdict(collections.Counter), collections.defaultdict(set)
        for part in map(read, sorted(Path(folder).iterdir())):
            for file, line, mask in part["places"]:
                lines[file][line] |= int(mask, 16) << len(tests)
            for file, line in part["imported"]:
                imported[file].add(line)
            tests += part["tests"]
    masks = {file: {line: hex(mask) for line, mask in sorted(found.items())} for file, found in sorted(lines.items())}
    found = {"tests": tests, "lines": masks, "imported": {file: sorted(of) for file, of in imported.items()}}
    save(args.out, found | {"sums": {file: sum_of(file) for file in {*masks, *imported}}})
    print(f"{len(tests)} tests, {sum(seconds for _, seconds, _ in tests):.0f} s, {sum(map(len, masks.values()))} lines")


def sum_of(file: str) -> int:
    return zlib.crc32((ROOT / file).read_bytes()) if (ROOT / file).exists() else 0


class Cover:
    """What `cover` saw: a mask for each line, one bit for each test."""

    def __init__(self, path: str):
        data = read(path)
        self.tests = data["tests"]
        self.lines = {file: {int(n): int(m, 16) for n, m in of.items()} for file, of in data["lines"].items()}
        self.imported = {file: set(lines) for file, lines in data["imported"].items()}
        if changed := [file for file, of in data["sums"].items() if of != sum_of(file)]:
            print(f"changed since {path} was made, so that lines and tests may not fit: {', '.join(sorted(changed))}")

    def tests_of(self, mutant: dict) -> list[list]:
        """The tests that execute a mutant's lines, those first that may well fail soon."""
        lines, mask = self.lines.get(mutant["file"], {}), 0
        for line in mutant["lines"]:
            mask |= lines.get(line, 0)
        room, is_data = Path(mutant["file"]).parts[1].removesuffix(".py"), False
        if self.imported.get(mutant["file"], set()) & set(mutant["lines"]):
            mask, is_data = self.of_file(mutant["file"]), True  # a constant is read by tests that execute no line of it
        marked = zip(self.tests, reversed(f"{mask:b}".zfill(len(self.tests))), strict=True)
        return in_order([test for test, bit in marked if bit == "1" or (is_data and room in file_of(test))], room)

    def of_file(self, file: str) -> int:
        """The tests that execute any line of a file; all, if there are none."""
        mask = 0
        for of_line in self.lines.get(file, {}).values():
            mask |= of_line
        return mask or (1 << len(self.tests)) - 1


def in_order(tests: list[list], room: str = "") -> list[list]:
    """All of the room first; then short tests of few lines, one of each function, by turns of files; then the rest."""
    first, others, functions, turns = [], [], set(), collections.Counter()
    is_far = lambda test: room not in file_of(test)
    for test in sorted(tests, key=lambda test: (is_far(test), test[2] * (test[1] + 0.05))):
        file, function = file_of(test), function_of(test)
        if function in functions and (is_far(test) or not room):
            others.append(test)
        else:
            functions.add(function)
            first.append(((is_far(test), turns[file]), test))
            turns[file] += 1
    places = {file: i for i, file in enumerate(turns)}
    first = [test for _, test in sorted(first, key=lambda pair: pair[0])]
    return first + sorted(others, key=lambda test: places[file_of(test)])


def file_of(test: list) -> str:
    return test[0].partition("::")[0]


def function_of(test: list) -> str:
    return test[0].partition("[")[0]


def read(path: str | Path):
    return json.loads(Path(path).read_text())


def save(path: str, data) -> None:
    Path(f"{path}.new").write_text(json.dumps(data, indent=1 if isinstance(data, list) else None))
    os.replace(f"{path}.new", path)


# ------------------------------------------------------------------------------------------------ sample


class Finder:
    """Finds the mutants of a file: spans of its source, in bytes, and what stands in their place."""

    def __init__(self, file: str):
        self.file, self.data = file, (ROOT / file).read_bytes()
        self.starts = [0, *itertools.accumulate(map(len, self.data.splitlines(keepends=True)))]
        self.code_lines = lines_of(compile(self.data, file, "exec"))
        self.scope, self.quiet, self.statement, self.of_default = [], False, None, None
        self.mutants = []
        self.visit(ast.parse(self.data))

    def start(self, node) -> int:
        return self.starts[node.lineno - 1] + node.col_offset

    def end(self, node) -> int:
        return self.starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node) -> str:
        return self.data[self.start(node) : self.end(node)].decode()

    def add(self, operator: str, start: int, end: int, replacement: str) -> None:
        original = self.data[start:end].decode()
        line = self.data.count(b"\n", 0, start) + 1
        last = line + original.count("\n")
        replacement += "\n" * (original.count("\n") - replacement.count("\n"))  # the lines after it stay where they are
        mutant = {"file": self.file, "function": ".".join(self.scope) or "<module>", "line": line, "end_line": last}
        mutant |= {"span": [start - self.starts[line - 1], end - self.starts[last - 1]], "operator": operator}
        mutant |= {"original": original, "replacement": replacement, "lines": self.executed(line, last)}
        text = self.data[self.starts[line - 1] : self.starts[line]].decode().strip()
        self.mutants.append(mutant | {"text": text})

    def executed(self, line: int, last: int) -> list[int]:
        """The lines whose tests are asked: a default's are those of its function."""
        body = getattr(self.statement, "body", None)
        header = range(self.statement.lineno, body[0].lineno if body else self.statement.end_lineno + 1)
        choices = [range(line, last + 1), header, [line]]
        if (function := self.of_default) is not None:
            choices.insert(0, range(function.body[0].lineno, function.end_lineno + 1))
        return next((found for lines in choices if (found := sorted(self.code_lines & set(lines)))), [line])

    def replace(self, operator: str, node, text: str) -> None:
        self.add(operator, self.start(node), self.end(node), text)

    def between(self, operator: str, left, right, pattern: str, *replacements: str) -> None:
        """Replaces the operator between two operands."""
        gap = self.data[self.end(left) : self.start(right)].decode("latin-1")  # one character for each byte
        match = re.search(pattern, re.sub("#.*", lambda note: " " * len(note[0]), gap))
        for text in replacements if match else ():
            self.add(operator, self.end(left) + match.start(), self.end(left) + match.end(), text)

    def visit(self, node) -> None:
        if is_left_alone(node):
            return
        before = self.quiet, self.statement
        is_scope = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        self.scope += [node.name] if is_scope else []
        self.statement = node if isinstance(node, ast.stmt) else self.statement
        self.quiet |= isinstance(node, (ast.Raise, ast.JoinedStr)) or bool(QUIET.search(name_of(node)))
        self.statements(node)
        self.operators(node)
        self.values(node)
        for name, child in children(node):
            self.of_default = (node if name == "args" else None) if is_scope else self.of_default
            self.visit(child)
        self.scope = self.scope[:-1] if is_scope else self.scope
        self.quiet, self.statement = before

    def statements(self, node) -> None:
        match node:
            case ast.Raise() | ast.AugAssign():
                self.replace("raise" if isinstance(node, ast.Raise) else "statement", node, "pass")
            case ast.Expr(value=value) if not isinstance(value, (ast.Yield, ast.YieldFrom, ast.Await)):
                self.replace("statement", node, "pass")
            case ast.Return(value=ast.expr() as value) if self.text(value) != "None":
                self.replace("return", value, "None")
            case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
                self.negate(test)
            case ast.comprehension(ifs=tests):
                for test in tests:
                    self.negate(test)

    def negate(self, test) -> None:
        match test:
            case ast.UnaryOp(op=ast.Not()):
                return  # another operator's mutant
            case ast.Compare(ops=[only]) if isinstance(only, PLAIN):
                return
        self.replace("condition", test, f"not ({self.text(test)})")

    def operators(self, node) -> None:
        match node:
            case ast.Compare(left=left, ops=ops, comparators=rights):
                for first, op, right in zip([left, *rights], ops, rights, strict=False):
                    self.between("comparison", first, right, *COMPARE[type(op)])
            case ast.BinOp(left=left, op=op, right=right):
                is_text = any(isinstance(side, ast.JoinedStr) or is_string(side) for side in (left, right))
                if not is_text and (self.scope or not isinstance(op, ast.BitOr)):  # a type's name at the top
                    self.between("arithmetic", left, right, *BINARY[type(op)])
            case ast.AugAssign(target=left, op=op, value=right):
                self.between("arithmetic", left, right, *BINARY[type(op)])
            case ast.BoolOp(op=op, values=values):
                names = (r"\band\b", "or") if isinstance(op, ast.And) else (r"\bor\b", "and")
                for left, right in itertools.pairwise(values):
                    self.between("boolean", left, right, *names)
            case ast.UnaryOp(op=ast.Not()):
                self.add("not", self.start(node), self.start(node) + re.match(r"not\s*", self.text(node)).end(), "")

    def values(self, node) -> None:
        match node:
            case ast.Constant(value=bool()):
                self.replace("bool", node, str(not node.value))
            case ast.Constant(value=int() | float()):
                self.replace("number", node, repr(node.value + 1))
            case ast.Name(id=name) if name in NAMES:
                self.replace("name", node, NAMES[name])
            case ast.Slice(lower=lower, upper=upper):
                for bound in (lower, upper):
                    if bound and not isinstance(getattr(bound, "operand", bound), ast.Constant):
                        self.replace("slice", bound, f"({self.text(bound)}) + 1")
            case ast.Call(args=arguments, keywords=keywords):
                self.strings(*arguments, *[keyword.value for keyword in keywords])
                self.calls(node, arguments, sorted([*arguments, *keywords], key=self.start))
            case ast.Compare(left=left, comparators=rights):
                self.strings(left, *rights)
            case ast.Dict(keys=keys):
                self.strings(*filter(None, keys))
            case ast.Subscript(slice=value) | ast.MatchValue(value=value):
                self.strings(value)

    def calls(self, node, arguments: list, given: list) -> None:
        if name_of(node) == "sorted" and len(given) == 1:
            self.replace("name", node.func, "list")
        if len(arguments) == 2 and name_of(node) not in NOT_SWAPPED:
            (first, second), texts = arguments, list(map(self.text, arguments))
            if texts[0] != texts[1] and not any(isinstance(of, ast.Starred) for of in arguments):
                gap = self.data[self.end(first) : self.start(second)].decode()
                self.add("arguments", self.start(first), self.end(second), texts[1] + gap + texts[0])
        for before, argument in zip([None, *given], given, strict=False):
            if isinstance(argument, ast.keyword) and argument.arg:
                start, end = self.start(argument), self.end(argument)
                comma = re.match(rb"\s*,\s*", self.data[end:])
                start = self.end(before) if before and not comma else start
                self.add("keyword", start, end + (comma.end() if comma else 0), "")

    def strings(self, *nodes) -> None:
        for node in [part for of in nodes for part in getattr(of, "elts", [of])]:
            if is_string(node) and not self.quiet and node.lineno == node.end_lineno:
                self.replace("string", node, repr(node.value + "XX"))


def children(node):
    """The nodes below one that may be mutated, each with the name of its field."""
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in NOT_VISITED:
                yield name, child


def lines_of(code) -> set[int]:
    """The lines that have instructions."""
    inner = [lines_of(of) for of in code.co_consts if inspect.iscode(of)]
    return {line for *_, line in code.co_lines() if line}.union(*inner)


def is_string(node) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def name_of(node) -> str:
    """What is called, or how a name ends."""
    node = getattr(node, "func", node)
    return getattr(node, "id", getattr(node, "attr", ""))


def is_left_alone(node) -> bool:
    """Imports, docstrings, ``__all__`` and what only a type checker or a script runs."""
    match node:
        case ast.If(test=test):
            return any(name_of(of) in ("TYPE_CHECKING", "__name__") for of in ast.walk(test))
        case ast.Assign(targets=[ast.Name(id="__all__")]) | ast.Expr(value=ast.Constant()):
            return True
    return isinstance(node, (ast.Import, ast.ImportFrom))


def mutants_of(files: list[str]) -> list[dict]:
    """All mutants of some files, each with a key that holds where lines and files move."""
    seen, found = collections.Counter(), []
    for mutant in [mutant for file in files for mutant in Finder(file).mutants]:
        parts = [Path(mutant["file"]).name, mutant["function"], mutant["text"], mutant["operator"]]
        key = " | ".join(parts)
        found.append({"key": f"{key} | {seen[key]}"} | mutant)
        seen[key] += 1
    return found


def mutated(mutant: dict, source: bytes) -> bytes:
    """The source of a mutant's file, changed."""
    lines = source.splitlines(keepends=True)
    first, last = mutant["line"] - 1, mutant["end_line"] - 1
    start, end = mutant["span"]
    changed = lines[first][:start] + mutant["replacement"].encode() + lines[last][end:]
    return b"".join([*lines[:first], changed, *lines[last + 1 :]])


def is_sound(mutant: dict) -> bool:
    """Whether a mutant compiles and is another program."""
    source = (ROOT / mutant["file"]).read_bytes()
    with warnings.catch_warnings(), contextlib.suppress(SyntaxError, ValueError):
        warnings.simplefilter("ignore")
        compile(changed := mutated(mutant, source), mutant["file"], "exec")
        return ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    return False


def files_in(paths: list[str]) -> list[str]:
    inside = lambda path: [path] if path.is_file() else path.rglob("*.py")
    return sorted({str(file.relative_to(ROOT)) for path in paths for file in inside(ROOT / path)})


def shares(sizes: dict[str, int], count: int) -> dict[str, int]:
    """How many mutants of each file: in proportion, at least one."""
    exact = {file: count * size / sum(sizes.values()) for file, size in sizes.items()}
    given = {file: max(1, int(share)) for file, share in exact.items()}
    for file in sorted(exact, key=lambda file: int(exact[file]) - exact[file]):
        given[file] += sum(given.values()) < count
    while sum(given.values()) > max(count, len(given)):
        given[max(given, key=given.__getitem__)] -= 1
    return given


def sample(args) -> None:
    of_file = collections.defaultdict(list)
    for mutant in mutants_of(files_in(args.paths)):
        of_file[mutant["file"]].append(mutant)
    drawn = []
    for file, share in shares({file: len(found) for file, found in of_file.items()}, args.count).items():
        random.Random(f"{args.seed} {file}").shuffle(of_file[file])
        chosen = []
        while of_file[file] and len(chosen) < share:
            chosen += filter(is_sound, [of_file[file].pop()])
        drawn += sorted(chosen, key=lambda mutant: mutant["line"])
    save(args.out, drawn)
    print(f"{len(drawn)} mutants of {len(of_file)} files")


# ------------------------------------------------------------------------------------------------ run


class Chosen:
    """A pytest plugin that runs some tests in their order and writes what became of them."""

    def __init__(self, tests: list[list], out: Path):
        self.places = {test[0]: i for i, test in enumerate(tests)}
        self.seconds = {test[0]: test[1] for test in tests}
        self.out, self.found = out, {"test": None, "ran": 0, "message": ""} | (read(out) if out.exists() else {})

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((item for item in items if item.nodeid in self.places), key=lambda i: self.places[i.nodeid])
        if "jlora" in sys.modules:
            assert Path(sys.modules["jlora"].__file__).is_relative_to(Path.cwd())

    def write(self, **found) -> None:
        self.found |= found
        self.out.write_text(json.dumps(self.found))

    def pytest_runtest_logstart(self, nodeid):
        self.write(test=nodeid, ran=self.found["ran"] + 1)
        signal.alarm(int(60 + 10 * self.seconds[nodeid]))  # ends a test that a mutant makes endless

    def pytest_runtest_logfinish(self):
        signal.alarm(0)

    def pytest_collectreport(self, report):
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = crash.message if crash else report.longreprtext[-300:]
            when = getattr(report, "when", "collection")
            self.write(test=report.nodeid, when=when, message=text[:300], failed=True)

    pytest_runtest_logreport = pytest_collectreport


def import_heavy() -> None:
    """Imports what most tests do, so that a fork need not; no backend of JAX starts before the fork."""
    sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "benchmarks")]
    runpy.run_path(str(ROOT / "tests/conftest.py"))  # its variables
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert "jlora" not in sys.modules


def copy_checkout(folder: Path) -> None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for file in subprocess.check_output(command, cwd=ROOT, text=True).split("\0"):
        if file and (ROOT / file).is_file():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, folder / file)


def put(folder: Path, file: str, source: bytes) -> None:
    """Writes a source; what Python keeps compiled of it goes, since it may be of the same second and size."""
    Path(importlib.util.cache_from_source(str(folder / file))).unlink(missing_ok=True)
    (folder / file).write_bytes(source)


def in_fork(folder: Path, tests: list[list], last=lambda: 0) -> int:
    """Starts tests in a fork of this process, in a copy of the checkout; returns its id."""
    if pid := os.fork():
        return pid
    status = 70
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends where this process is ended
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = str(folder)
        with open(f"{folder}.log", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        status = run_tests(folder, tests) or last()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def run_tests(folder: Path, tests: list[list]) -> int:
    """Runs tests until one fails: first those of a few files, so that not all files must be collected."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", f"--basetemp={folder}.tmp"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins that are imported before the fork
    options += ["--hypothesis-seed=0"] if importlib.util.find_spec("hypothesis") else []
    near = list(dict.fromkeys(map(file_of, tests)))[:NEAR]
    heads = [test for test in tests[: len({function_of(test) for test in tests})] if file_of(test) in near]
    for part in (heads, [test for test in tests if test not in heads]):
        files, plugin = dict.fromkeys(map(file_of, part)), Chosen(part, Path(f"{folder}.json"))
        if part and (status := pytest.main([*options, *files], plugins=[plugin])) not in (0, NO_TESTS):
            return status
    return 0


def has_devices() -> int:
    import jax

    return 0 if jax.device_count() == 8 else 71


def limit_of(tests: list[list], timeout: float) -> float:
    """Seconds that a mutant has."""
    return min(timeout, 60 + 4 * seconds_of(tests))


def seconds_of(tests: list[list]) -> float:
    return sum(test[1] for test in tests)


def outcome(folder: Path, status: int | None, tests: list[list], timeout: float) -> dict:
    """What became of a mutant; `status` is None where its time was over."""
    out = Path(f"{folder}.json")
    found = read(out) if out.exists() else {"test": None, "ran": 0, "message": ""}
    failed = found.pop("failed", False)
    if status == -signal.SIGALRM:
        kind = "timeout"
    elif status is None:
        kind = "timeout" if seconds_of(tests) < limit_of(tests, timeout) / 2 else "undecided"
    elif status == 0:
        kind, found["test"] = "survived", None
    elif (status > 0 and failed) or status < 0:
        kind, found["message"] = "killed", found["message"] or f"signal {-status}"
    else:
        kind, found["message"] = "broken", f"status {status}: {Path(f'{folder}.log').read_text()[-500:]}"
    return {"status": kind, **found, "chosen": len(tests)}


def present(drawn: list[dict]) -> dict[str, dict]:
    """The mutants as they are in the checkout now: by their keys, else by their keys without the file."""
    now = mutants_of(files_in(["jlora"]))
    whole = {mutant["key"]: mutant for mutant in now}
    part = collections.defaultdict(list)
    for mutant in now:
        part[mutant["key"].partition(" | ")[2]].append(mutant)
    found = {}
    for key in [mutant["key"] for mutant in drawn]:
        others = part[key.partition(" | ")[2]]
        if key in whole or len(others) == 1:
            found[key] = whole.get(key) or others[0]
    return found


def check_unmutated(folder: Path, tests: list[list]) -> None:
    """Some tests pass in a fork, on eight devices."""
    some = sorted((test for test in tests if test[1] < 1), key=lambda test: test[0])
    _, status = os.waitpid(in_fork(folder, in_order(some[:: max(1, len(some) // 20)]), has_devices), 0)
    if status or not read(f"{folder}.json")["ran"]:
        sys.exit(f"the tests fail without a mutant: {status}\n" + Path(f"{folder}.log").read_text()[-3000:])


def run(args) -> None:
    drawn, seen = read(args.sample), Cover(args.cover)
    done = read(args.out) if Path(args.out).exists() else {}
    if args.only_survivors:
        done = {key: of for key, of in done.items() if of["status"] in ("killed", "timeout")}
    keys = [mutant["key"] for mutant in drawn if (mutant["key"] in args.only if args.only else True)]
    done = {key: of for key, of in done.items() if key not in (args.only or [])}
    mutants, queue = present(drawn), [key for key in keys if key not in done]
    if not queue:
        return
    import_heavy()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, str(i)) for i in range(args.jobs)]
        for folder in folders:
            copy_checkout(folder)
        check_unmutated(folders[0], seen.tests)
        known = {key: of["test"] for key, of in (read(args.first) if args.first else {}).items()}
        for key, found in try_all(queue, mutants, seen, known, folders, args.timeout):
            done[key] = found
            save(args.out, done)
            print(f"{len(done)}: {found['status']} after {found['ran']} tests, {found['seconds']} s: {key}", flush=True)


def with_first(tests: list[list], killer: str | None) -> list[list]:
    """The tests, those first that are the one that killed the mutant before, or other cases of its function."""
    function = killer and function_of([killer])
    return sorted(tests, key=lambda test: (test[0] != killer, function_of(test) != function) if killer else 0)


def try_all(queue: list[str], mutants: dict, seen: Cover, known: dict, folders: list[Path], timeout: float):
    """Yields each mutant's key and what became of it, one process in each folder at a time."""
    running, free = {}, list(folders)
    while queue or running:
        while queue and free:
            key = queue.pop(0)
            mutant = mutants.get(key)
            tests = with_first(seen.tests_of(mutant) if mutant else [], known.get(key))
            if not tests:
                yield key, {"status": "uncovered" if mutant else "gone", "test": None, "ran": 0, "seconds": 0}
                continue
            folder = free.pop()
            Path(f"{folder}.json").unlink(missing_ok=True)
            source = (folder / mutant["file"]).read_bytes()
            put(folder, mutant["file"], mutated(mutant, source))
            running[in_fork(folder, tests)] = key, folder, source, tests, time.monotonic()
        for pid, (key, folder, source, tests, began) in list(running.items()):
            is_late = time.monotonic() - began > limit_of(tests, timeout)
            if is_late:
                os.killpg(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, 0 if is_late else os.WNOHANG)
            if ended:
                del running[pid]
                free.append(folder)
                put(folder, mutants[key]["file"], source)
                shutil.rmtree(folder / ".hypothesis", ignore_errors=True)
                found = outcome(folder, None if is_late else os.waitstatus_to_exitcode(status), tests, timeout)
                yield key, found | {"seconds": round(time.monotonic() - began, 1)}
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------ report


def row_of(mutant: dict) -> str:
    folder = Path(mutant["file"]).parent
    return str(folder) if folder.name in PACKAGES else mutant["file"]


def report(args) -> None:
    drawn = read(args.sample)
    results = [read(path) for path in (args.before, args.after) if path]
    is_killed = lambda result, mutant: result.get(mutant["key"], {}).get("status") in ("killed", "timeout")
    rows = collections.defaultdict(list)
    for mutant in drawn:
        rows[row_of(mutant)].append(mutant)
    names = ["killed"] if len(results) == 1 else ["killed before", "killed after"]
    print(f"| file | mutants | {' | '.join(names)} |\n|---|{'--:|' * (1 + len(names))}")
    for name, mutants in [*sorted(rows.items()), ("all", drawn)]:
        counts = [sum(is_killed(result, mutant) for mutant in mutants) for result in results]
        print(f"| {name} | {len(mutants)} | {' | '.join(map(str, counts))} |")
    print("\nNot killed:\n")
    for mutant in drawn:
        if not is_killed(results[-1], mutant):
            status = results[-1].get(mutant["key"], {}).get("status", "not run")
            change = f"`{short(mutant['original'])}` -> `{short(mutant['replacement'])}`"
            place = f"{mutant['file']}:{mutant['line']}"
            print(f"- {place}, {mutant['function']}: {change} ({mutant['operator']}, {status})")


def short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser("cover", help="runs the tests; what stands after -- is for pytest")
    command.add_argument("out")
    command.add_argument("pytest", nargs="*", help=f"by default {QUICK}")
    command = commands.add_parser("sample", help="draws mutants of files and folders")
    command.add_argument("out")
    command.add_argument("paths", nargs="+")
    command.add_argument("--count", type=int, default=160)
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("run", help="runs the tests of each mutant that has no result yet")
    for name in ("sample", "cover", "out"):
        command.add_argument(name)
    command.add_argument("--jobs", type=int, default=2)
    command.add_argument("--timeout", type=float, default=600, help="seconds of a mutant")
    command.add_argument("--first", metavar="BEFORE", help="an earlier run, whose killing tests come first")
    command.add_argument("--only", nargs="+", metavar="KEY", help="these again")
    command.add_argument("--only-survivors", action="store_true", help="again, those that were not killed")
    command = commands.add_parser("report", help="prints what was killed, and what survived")
    command.add_argument("sample")
    command.add_argument("before")
    command.add_argument("after", nargs="?")
    args = parser.parse_args()
    {"cover": cover, "sample": sample, "run": run, "report": report}[args.command](args)


if __name__ == "__main__":
    main()
