"""Faults planted in the kernels: the table applies, and every one of them is caught."""

import dataclasses

import pytest

from tools import mutate

TESTS = "tests/ops/test_dispatch.py"
HARMLESS = mutate.Fault("a word", "meal_fast/ops/dispatch.py", "one decision", "a choice", TESTS)


@pytest.mark.parametrize("fault", mutate.FAULTS, ids=lambda fault: f"{fault.file} {fault.what}")
def test_every_fault_has_its_place(fault):
    source = (mutate.ROOT / fault.file).read_text()
    assert fault.planted(source) != source
    assert (mutate.ROOT / fault.tests).is_file()


def test_the_table_has_the_faults_that_kernels_are_known_for():
    what = " ".join(fault.what for fault in mutate.FAULTS)
    for known in ("mask", "sign", "32-bit offset", "starts at 0"):
        assert known in what


@pytest.mark.parametrize("source", ["", "twice twice"])
def test_a_fault_without_one_place_is_an_error(source):
    fault = dataclasses.replace(HARMLESS, old="twice")
    with pytest.raises(ValueError, match=r"a word: [02] places for 'twice'"):
        fault.planted(source)


def test_the_verdict_of_a_run():
    """A fault in the copy reaches the tests that run there, and a harmless one is missed."""
    status, output = mutate.run(HARMLESS, [TESTS])
    assert mutate.verdict(status) == "MISSED", output
    fatal = dataclasses.replace(HARMLESS, old='"TRITON_INTERPRET", "0"', new='"NOT_THIS", "1"')
    status, output = mutate.run(fatal, [TESTS])
    assert mutate.verdict(status) == "caught", output
    assert mutate.verdict(-11) == "caught"  # a segmentation fault
    assert mutate.verdict(4) == mutate.verdict(5) == "BROKEN"
