"""Load test of a live endpoint: predicted against measured, which coefficient is off, a run record for the fit."""

from advisor.verify.compare import Row, blame, compare
from advisor.verify.drive import Listener, Progress
from advisor.verify.endpoint import Endpoint, EndpointError, probe
from advisor.verify.loop import CellReport, VerifyReport, verify, write_records

__all__ = [
    "CellReport",
    "Endpoint",
    "EndpointError",
    "Listener",
    "Progress",
    "Row",
    "VerifyReport",
    "blame",
    "compare",
    "probe",
    "verify",
    "write_records",
]
