"""Jobs of several processes save, and jobs of fewer and of more load the same."""

import pytest

from jlora.checkpoint import gather
from tests.checkpoint.support import APIS
from tests.processes import run

POD = "tests.checkpoint.pod"


@pytest.mark.slow
@pytest.mark.parametrize("saved_by,loaded_by,writes,reads", [(2, 4, 0, -1), (2, 1, -1, 0), (1, 2, 0, 0)])
def test_what_some_processes_save_others_load(saved_by, loaded_by, writes, reads, tmp_path):
    assert len(run(POD, "save", tmp_path, APIS[writes], count=saved_by, devices=4 // saved_by)) == saved_by
    run(POD, "load", tmp_path, APIS[reads], saved_by, count=loaded_by, devices=4 // loaded_by)


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    run(POD, "agree", tmp_path, APIS[0], count=2, devices=2)


@pytest.mark.slow
@pytest.mark.parametrize("api", APIS)
def test_arrays_that_are_cut_are_refused(api, tmp_path):
    run(POD, "cut", tmp_path, api, devices=4)


def test_a_single_process_gathers_what_it_gives():
    assert gather({"a": [1, None]}) == [{"a": [1, None]}]
    with pytest.raises(TypeError, match="JSON"):
        gather(object())
