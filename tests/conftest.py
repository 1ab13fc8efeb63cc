"""What every test shares: reproducible hypothesis runs, no network, and reasons for what is skipped."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
IN_CI = bool(os.environ.get("CI"))

# Machines that run this are shared and small: a deadline or a "too slow" check would fail on their load, not on our
# code. CI repeats the same examples on every run; a developer's run keeps looking for new ones.
settings.register_profile("advisor", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=IN_CI)
settings.load_profile("advisor")


def find_chromium() -> str | None:
    """The system's browser, or $CHROMIUM; tests never download one."""
    for name in (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"):
        if name and (path := shutil.which(name)):
            return path
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_engine = [name for name in ("vllm", "deepspeed") if importlib.util.find_spec(name) is None]
    no_chromium = find_chromium() is None
    for item in items:
        if len(no_engine) == 2 and item.get_closest_marker("engines"):
            item.add_marker(pytest.mark.skip(reason=f"{' and '.join(no_engine)} not installed: make test-engines"))
        # CI installs a browser, so there its absence is a failure of the tests that ask for it.
        if no_chromium and not IN_CI and item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.skip(reason="no chromium on this machine: apt-get install chromium"))
    # the longest files first: begun last, one of them would run alone while the other cores have nothing left to do
    items.sort(key=lambda item: item.get_closest_marker("browser") is None)


def is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name that would have to be looked up
        return False


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Refuses every connection of the test process that leaves this machine: the product works offline."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not is_this_machine(address[0]):
            raise AssertionError(f"a test tried to reach {address[0]}; tests use this machine only")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's path, for `playwright.chromium.launch(executable_path=...)`."""
    path = find_chromium()
    assert path is not None, "no chromium on this machine: apt-get install chromium"
    return path


@pytest.fixture(scope="session")
def run_advisor() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line as its own process: `run_advisor("gpus", "--json").stdout`."""

    def run(*args: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from advisor.cli import main; main()", *args]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout_s, check=False)

    return run
