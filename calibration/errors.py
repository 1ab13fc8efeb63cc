"""What can go wrong in a calibration run, each with the exit status that says so."""

from __future__ import annotations


class CalibrationError(Exception):
    """Base: one sentence that says what was wrong and what is allowed."""

    status = 1


class JobError(CalibrationError):
    """The job or a cell of it cannot be run as it is written."""

    status = 2


class EngineDied(CalibrationError):
    """The engine stopped while cells were running."""

    status = 3


class EngineStartFailed(CalibrationError):
    """The engine never became ready."""

    status = 4


class EngineMissing(CalibrationError):
    """The engine, the driver or a GPU is not there."""

    status = 5


class OutFileBusy(CalibrationError):
    """Another run holds the file or the folder."""

    status = 6


def first_error(err: BaseException) -> str:
    """Return the first leaf of an exception group as one line."""
    while isinstance(err, BaseExceptionGroup):
        err = err.exceptions[0]
    return f"{type(err).__name__}: {err}"
