"""The law over programs that nobody wrote: `tests/random_programs.py` draws them, and cuts down what fails."""

import os

import pytest

from tests.random_programs import check, draw, shrunk

COUNT = int(os.environ.get("JLORA_PROGRAMS", "200"))  # in each run; the same ones, from seed 0
CHUNK = 20


@pytest.mark.parametrize("first", range(0, COUNT, CHUNK))
def test_programs(first):
    for seed in range(first, first + CHUNK):
        program = draw(seed)
        if told := check(program):
            small = shrunk(program, told)
            pytest.fail(f"seed {seed} {check(small)}\n{small}")


@pytest.mark.slow
def test_more_programs():
    """These follow on the quick ones, whose seeds stay the same, so that what failed yesterday is seen today."""
    for seed in range(COUNT, COUNT + 400):
        program = draw(seed)
        if told := check(program):
            small = shrunk(program, told)
            pytest.fail(f"seed {seed} {check(small)}\n{small}")


def test_what_fails_is_cut_down_to_its_lines(monkeypatch):
    """With a rule that is wrong."""
    from jlora.apply import RULES

    wrong = lambda interpreter, eqn, weight: weight.replace(base=-weight.base)
    monkeypatch.setitem(RULES, "transpose", wrong)
    program = next(p for p in map(draw, range(1000)) if "jnp.transpose(p[" in str(p) and len(p.lines) > 3)
    told = check(program)
    small = shrunk(program, told)
    assert told and len(small.lines) <= 2 and "transpose" in str(small)
