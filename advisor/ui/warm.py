"""What the server works out before anybody asks: the slow first views, in the background, once."""

from __future__ import annotations

import gc
import logging
from contextlib import suppress
from threading import Lock, Thread
from time import sleep

from advisor.errors import AdvisorError
from advisor.ui import accuracy, call, jobs, pool

BEFORE_S = 3.0
"""The first visitor has the machine to himself for so long."""

_lock = Lock()
_thread: Thread | None = None


def start() -> None:
    """Start, once and in the background, the worker processes and then the work on the slow first views."""
    global _thread
    with _lock:
        if _thread is None:
            _thread = Thread(target=_prepare, name="advisor first views", daemon=True)
            _thread.start()


def _prepare() -> None:
    # streamlit remarks that its caches are filled by no session, which is the point
    logging.getLogger("streamlit.runtime.scriptrunner_utils.script_run_context").setLevel(logging.ERROR)
    sleep(BEFORE_S)
    pool.start()
    pool.wait()
    with suppress(AdvisorError):  # a broken data file is told by the page that needs it
        accuracy.validate_file(accuracy.usual_file(), jobs.run)
        for name, text in call.claims_files().items():
            call.audit(text, name, jobs.run)
    # what a server has loaded by now stays: a search for garbage need not look through it again (90 ms each time)
    gc.collect()
    gc.freeze()
