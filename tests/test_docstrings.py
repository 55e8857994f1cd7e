"""Every public name has a docstring that a stranger can use: a sentence, arguments, result, errors, an example.

The examples themselves run as doctests.
"""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import jlora
from jlora.cli import main, parser
from jlora.variants import Factored

SPACES = "adapters checkpoint init nnx optim peft quant serial sharding variants".split()

# What has no errors of its own.
RAISES_NOTHING = tuple(
    """
    init.embedding init.gaussian init.kaiming init.milora init.olora init.pissa init.spectral quant.prepare
    variants.frozen variants.gained variants.low_rank variants.plain variants.static variants.trained
    variants.turned_by cli.parser
    AdaptedParam.advice AdaptedParam.beside AdaptedParam.effective AdaptedParam.everywhere AdaptedParam.laid
    AdaptedParam.placed AdaptedParam.resolved LoraSpec.at nnx.Adapted.eval nnx.Adapted.set_view nnx.Adapted.train
    variants.DoraParam.norm variants.Kernel.keys variants.Kernel.matrix
    """.split()
)


def public():
    """Public names with what they are; what has several names has its first."""
    spaces = {"": jlora, **{f"{name}.": importlib.import_module(f"jlora.{name}") for name in SPACES}}
    found = {f"{space}{name}": getattr(module, name) for space, module in spaces.items() for name in module.__all__}
    found = {name: x for name, x in found.items() if not inspect.ismodule(x)} | {"cli.main": main, "cli.parser": parser}
    first = {id(x): name for name, x in reversed(found.items())}
    return {name: x for name, x in found.items() if first[id(x)] == name}


def methods(name, cls):
    """The public methods of a class, but those that override another's of jlora, which has the docstring."""
    above = [base for base in cls.__mro__[1:] if base.__module__.startswith("jlora")]
    own = [key for key, x in vars(cls).items() if not key.startswith("_") and inspect.isroutine(inspect.unwrap(x))]
    return {f"{name}.{key}": getattr(cls, key) for key in own if not any(key in vars(base) for base in above)}


NAMES = public()
CLASSES = {name: x for name, x in NAMES.items() if inspect.isclass(x)}
DATA = [name for name, x in NAMES.items() if not callable(x)]
METHODS = {
    key: method for name, cls in CLASSES.items() if cls is not Factored for key, method in methods(name, cls).items()
}
FUNCTIONS = {name: x for name, x in NAMES.items() if inspect.isroutine(x)} | METHODS


def doc_of(x):
    return inspect.getdoc(x) or ""


def shows_a_value(doc):
    """Whether an example can fail: it has a result, and is run."""
    return any(example.want for example in doctest.DocTestParser().get_examples(doc)) and "+SKIP" not in doc


@pytest.mark.parametrize("name", sorted({*NAMES, *METHODS} - {*DATA}))
def test_it_begins_with_a_sentence(name):
    first, *rest = doc_of((NAMES | METHODS)[name]).split("\n")
    assert re.match(r"[A-Z`|0-9]", first) and first.endswith(".") and (not rest or not rest[0])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name):
    doc, signature = doc_of(FUNCTIONS[name]), inspect.signature(FUNCTIONS[name])
    takes = [parameter for parameter in signature.parameters if parameter != "self"]
    assert ("\nArgs:\n" in doc) == bool(takes)
    assert ("\nReturns:\n" in doc) == (signature.return_annotation not in (None, "None"))
    assert ("\nRaises:\n" in doc) == (name not in RAISES_NOTHING)
    assert "\nExample:\n" in doc and shows_a_value(doc)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_argument_is_told(name):
    doc, told = doc_of(FUNCTIONS[name]), ""
    if "\nArgs:\n" in doc:
        told = "\n".join(re.findall(r"^  (\S.*?): ", doc.split("\nArgs:\n")[1].split("\n\n")[0], re.MULTILINE))
    arguments = [parameter for parameter in inspect.signature(FUNCTIONS[name]).parameters if parameter != "self"]
    assert sorted(re.findall(r"\w+", told)) == sorted(arguments)


@pytest.mark.parametrize("name", CLASSES)
def test_class(name):
    doc = doc_of(CLASSES[name])
    assert shows_a_value(doc)
    assert not issubclass(CLASSES[name], Exception) or doc.split("Example:")[0].count(". ") >= 1


def test_those_that_raise_nothing_are_there():
    assert set(RAISES_NOTHING) <= set(FUNCTIONS)


def test_data_has_a_comment():
    text = "\n".join(path.read_text() for path in Path(jlora.__file__).parent.rglob("*.py"))
    assert not [name for name in DATA if not re.search(rf"^#: .*\n{name.rpartition('.')[2]}\b", text, re.MULTILINE)]
