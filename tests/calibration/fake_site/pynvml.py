"""Stands in for NVML in tests: FAKE_GPUS boards that draw a constant power and count its energy."""

import os
import time
from types import SimpleNamespace

NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
POWER_MW = 412_000
_began = time.perf_counter()


def nvmlInit():
    if os.environ.get("FAKE_GPUS") == "none":
        raise RuntimeError("NVML Shared Library Not Found")


def nvmlDeviceGetCount():
    return int(os.environ.get("FAKE_GPUS", "4"))


def nvmlDeviceGetHandleByIndex(i):
    if i >= nvmlDeviceGetCount():
        raise RuntimeError("Invalid Argument")
    return i


def nvmlDeviceGetName(h):
    return os.environ.get("FAKE_GPU_NAME", "NVIDIA H100 80GB HBM3")


def nvmlSystemGetDriverVersion():
    return "580.00"


def nvmlDeviceGetPowerManagementLimit(h):
    return 700_000


def nvmlDeviceGetNvLinkState(h, link):
    return 1


def nvmlDeviceGetMemoryInfo(h):
    return SimpleNamespace(total=85_520_809_984, used=600_000_000, free=84_000_000_000)


def nvmlDeviceGetMaxClockInfo(h, which):
    return 1980


def nvmlDeviceGetClockInfo(h, which):
    return 1755


def nvmlDeviceGetTemperature(h, sensor):
    return 41


def nvmlDeviceGetCurrentClocksEventReasons(h):
    return 0x4


def nvmlDeviceGetPowerUsage(h):
    return POWER_MW


def nvmlDeviceGetFieldValues(h, fields):
    return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=POWER_MW)) for _ in fields]


def nvmlDeviceGetTotalEnergyConsumption(h):
    return int((time.perf_counter() - _began) * POWER_MW)
