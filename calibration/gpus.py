"""GPUs seen through NVML: names, limits, clocks, and board power sampled while a cell runs."""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from calibration import cpu
from calibration.errors import EngineMissing

# NVML device name (without "NVIDIA ") -> catalogue name
CATALOGUE = {
    "H100 80GB HBM3": "h100-sxm-80gb",
    "H100 PCIe": "h100-pcie-80gb",
    "H100 NVL": "h100-nvl-94gb",
    "H200": "h200-sxm-141gb",
    "H200 NVL": "h200-nvl-141gb",
    "H20": "h20-sxm-96gb",
    "A100-SXM4-80GB": "a100-sxm-80gb",
    "A100-SXM4-40GB": "a100-sxm-40gb",
    "A100 80GB PCIe": "a100-pcie-80gb",
    "A100-PCIE-40GB": "a100-pcie-40gb",
    "B200": "b200-sxm-180gb",
    "L40S": "l40s-48gb",
    "L4": "l4-24gb",
    "A10": "a10-24gb",
    "A10G": "a10g-24gb",
    "A40": "a40-48gb",
    "RTX A6000": "rtx-a6000-48gb",
    "GeForce RTX 4090": "rtx-4090-24gb",
    "GeForce RTX 3090": "rtx-3090-24gb",
    "Tesla V100-SXM2-32GB": "v100-sxm-32gb",
    "Tesla T4": "t4-16gb",
}
FIELD_POWER_INSTANT = 186  # NVML_FI_DEV_POWER_INSTANT, driver 535 and later
SAMPLE_S = 0.015
IDLE_S = float(os.environ.get("CALIBRATION_IDLE_S") or 0.7)  # how long the idle power is sampled
# nvmlClocksEventReasons bits
THROTTLE_BITS = {"power_cap": 0x4, "hw_slowdown": 0x8 | 0x80, "thermal": 0x20 | 0x40}


def catalogue_name(nvml_name: str) -> str:
    """Return the catalogue name of a device; an unknown one gets its own name in lower case with hyphens."""
    short = nvml_name.removeprefix("NVIDIA ").strip()
    return CATALOGUE.get(short) or re.sub(r"[^a-z0-9]+", "-", short.lower()).strip("-") or "unknown-gpu"


def open_nvml() -> Any:
    """Return an initialised pynvml. Raises EngineMissing when the driver or the module is not there."""
    try:
        import pynvml
    except ImportError:
        raise EngineMissing("pynvml is not installed: pip install nvidia-ml-py") from None
    try:
        pynvml.nvmlInit()
    except Exception as err:
        raise EngineMissing(f"no NVIDIA driver answers here ({err}): calibration needs a GPU host") from None
    return pynvml


def visible(nvml: Any) -> list[str]:
    """Return the ids (index or UUID) of the GPUs that this process may use."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(i) for i in range(nvml.nvmlDeviceGetCount())]
    return [g.strip() for g in listed.split(",") if g.strip() and g.strip() != "-1"]


def _try(call: Any, *args: Any) -> Any:
    try:
        return call(*args)
    except Exception:
        return None


@dataclass
class Gpus:
    """The GPUs of one engine."""

    n_gpus: int
    nvml: Any = field(default_factory=open_nvml)
    handles: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        ids = visible(self.nvml)
        if len(ids) < self.n_gpus:
            raise EngineMissing(f"this job needs {self.n_gpus} GPU(s), {len(ids)} are visible here")
        nvml = self.nvml
        try:
            self.handles = [
                nvml.nvmlDeviceGetHandleByIndex(int(i)) if i.isdigit() else nvml.nvmlDeviceGetHandleByUUID(i)
                for i in ids[: self.n_gpus]
            ]
        except Exception as err:
            raise EngineMissing(f"GPU {','.join(ids[: self.n_gpus])} is not there: {err}") from None

    def describe(self) -> dict[str, Any]:
        """Return what a record says of the host: names, driver, limits, clocks, what else holds the GPUs."""
        nvml, first = self.nvml, self.handles[0]
        name = nvml.nvmlDeviceGetName(first)
        name = name.decode() if isinstance(name, bytes) else name
        driver = _try(nvml.nvmlSystemGetDriverVersion)
        limit = _try(nvml.nvmlDeviceGetPowerManagementLimit, first)
        links = [_try(nvml.nvmlDeviceGetNvLinkState, first, i) for i in range(18)]
        memory = _try(nvml.nvmlDeviceGetMemoryInfo, first)
        return {
            "gpu": catalogue_name(name),
            "gpu_nvml_name": name,
            "interconnect": "nvlink" if any(link == 1 for link in links) else "pcie",
            "driver": driver.decode() if isinstance(driver, bytes) else driver,
            "power_limit_w_per_gpu": None if limit is None else limit / 1e3,
            "max_sm_clock_mhz": _try(nvml.nvmlDeviceGetMaxClockInfo, first, nvml.NVML_CLOCK_SM),
            "max_mem_clock_mhz": _try(nvml.nvmlDeviceGetMaxClockInfo, first, nvml.NVML_CLOCK_MEM),
            "temperatures_c": [_try(nvml.nvmlDeviceGetTemperature, h, 0) for h in self.handles],
            "before_used_bytes": self.used_bytes(),
            "nvml_memory_bytes": None if memory is None else memory.total,
            **cpu.describe(),
        }

    def used_bytes(self) -> list[int | None]:
        """Return the memory in use on each GPU [bytes]."""
        infos = [_try(self.nvml.nvmlDeviceGetMemoryInfo, h) for h in self.handles]
        return [None if i is None else i.used for i in infos]

    def wait_free(self, limit_s: float = 20.0, below_bytes: float = 2.5e9) -> bool:
        """Wait until no process holds much of the GPUs' memory: a killed engine takes seconds to let go."""
        end = time.monotonic() + limit_s
        while any((used or 0) > below_bytes for used in self.used_bytes()):
            if time.monotonic() > end:
                return False
            time.sleep(0.5)
        return True


class PowerMeter(threading.Thread):
    """Samples board power and SM clock of some GPUs until it is stopped.

    Power is NVML's instantaneous field where the driver has it: nvmlDeviceGetPowerUsage is a one-second average on
    recent boards and lags behind a short cell.
    """

    def __init__(self, gpus: Gpus, sample_s: float = SAMPLE_S) -> None:
        super().__init__(daemon=True, name="power-meter")
        self.gpus, self.sample_s = gpus, sample_s
        self.rows: list[tuple[float, float]] = []
        self.clocks: list[tuple[float, float, int]] = []
        self.stopping = threading.Event()
        self.is_instant = self._instant(gpus.handles[0]) is not None

    @classmethod
    def over(cls, gpus: Gpus, seconds: float = IDLE_S) -> dict[str, Any] | None:
        """Return the board power over the next `seconds`."""
        meter, start = cls(gpus), time.perf_counter()
        meter.start()
        time.sleep(seconds)
        meter.stop()
        meter.join()
        return meter.window(start, time.perf_counter())

    def _instant(self, handle: Any) -> float | None:
        try:
            value = self.gpus.nvml.nvmlDeviceGetFieldValues(handle, [FIELD_POWER_INSTANT])[0]
            watts = value.value.uiVal / 1e3
        except Exception:
            return None
        return watts if value.nvmlReturn == 0 and 0 < watts < 1e4 else None

    def _power_w(self, handle: Any) -> float | None:
        if self.is_instant and (watts := self._instant(handle)) is not None:
            return watts
        milliwatts = _try(self.gpus.nvml.nvmlDeviceGetPowerUsage, handle)
        return None if milliwatts is None else milliwatts / 1e3

    def run(self) -> None:
        """Sample until `stop`."""
        nvml = self.gpus.nvml
        reasons_of = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or getattr(
            nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", lambda h: 0
        )
        tick = 0
        while not self.stopping.is_set():
            at = time.perf_counter()
            watts = [self._power_w(h) for h in self.gpus.handles]
            if all(w is not None for w in watts):
                self.rows.append((at, sum(w for w in watts if w is not None)))
            if tick % 4 == 0:
                for h in self.gpus.handles:
                    mhz = _try(nvml.nvmlDeviceGetClockInfo, h, nvml.NVML_CLOCK_SM)
                    if mhz is not None:
                        self.clocks.append((at, float(mhz), int(_try(reasons_of, h) or 0)))
            tick += 1
            self.stopping.wait(max(0.0, self.sample_s - (time.perf_counter() - at)))

    def stop(self) -> None:
        """End the sampling."""
        self.stopping.set()

    def energy_j(self) -> float | None:
        """Return the boards' energy counters, summed [J]; only differences mean something."""
        values = [_try(self.gpus.nvml.nvmlDeviceGetTotalEnergyConsumption, h) for h in self.gpus.handles]
        return None if any(v is None for v in values) else sum(values) / 1e3

    def window(self, start: float, end: float) -> dict[str, Any] | None:
        """Return the record's `board_power_w` over a window of `time.perf_counter()`, or None without samples."""
        watts = [w for at, w in self.rows if start <= at <= end]
        if not watts:
            return None
        seen = [(mhz, bits) for at, mhz, bits in self.clocks if start <= at <= end]
        out: dict[str, Any] = {
            "mean": sum(watts) / len(watts),
            "max": max(watts),
            "n_gpus": len(self.gpus.handles),
            "n_samples": len(watts),
            "is_instant": self.is_instant,
        }
        if seen:
            out["sm_clock_mhz"] = statistics.median(mhz for mhz, _ in seen)
            out["sm_clock_mhz_mean"] = sum(mhz for mhz, _ in seen) / len(seen)
            out["throttled_frac"] = {
                name: sum(bool(bits & mask) for _, bits in seen) / len(seen) for name, mask in THROTTLE_BITS.items()
            }
        return out

    def forget(self, before: float) -> None:
        """Drop the samples of cells that are over."""
        with contextlib.suppress(ValueError):
            self.rows = [r for r in self.rows if r[0] >= before]
            self.clocks = [r for r in self.clocks if r[0] >= before]
