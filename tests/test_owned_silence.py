"""What the tests named test_silence_*.py do with sharded updates, done with owned ones and whole-matrix optimizers."""

import dataclasses

import pytest
import test_silence_context
import test_silence_gradients
import test_silence_model
import test_silence_optimizer
import test_silence_parameters
from silence import check

TESTS = (
    test_silence_context.test_the_context_of_a_reader_changes_nothing,
    test_silence_gradients.test_gradients_are_those_of_plain_ddp,
    test_silence_model.test_changes_of_the_model_are_seen,
    test_silence_optimizer.test_the_optimizer_is_that_of_plain_ddp,
    test_silence_parameters.test_reads_see_finished_parameters,
    test_silence_parameters.test_writes_are_not_lost,
)
CASES = [
    pytest.param(dataclasses.replace(case, how="owned"), may_refuse, id=test.id)
    for function in TESTS
    for mark in function.pytestmark
    for test in mark.args[1]
    for case, may_refuse in [test.values]
    if case.how == "sharded" and not test.marks
]


@pytest.mark.parametrize(("case", "may_refuse"), CASES)
def test_the_same_training_or_one_clear_error(pool2, case, may_refuse):
    check(pool2, case, may_refuse)
