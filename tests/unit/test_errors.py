"""Errors reach another process with all they carry."""

import pickle

import pytest

from tailrace.errors import Fenced, InvalidRecord, Overloaded, TailraceError, TooLittleOverlap, TrainingDiverged

ERRORS = [
    InvalidRecord("is no number", field="$.value"),
    Fenced(3, 7, 8),
    TrainingDiverged(12, float("nan")),
    TooLittleOverlap(100, 2.5, 0.1, "refused"),
    Overloaded("full", retry_after_s=3.0),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_error_passes_from_process_to_process_as_it_is(error: TailraceError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
