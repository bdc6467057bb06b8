"""NVML for nodes without GPUs: `pynvml` itself but for the calls that would reach a driver.

Its functions have the names and parameters of the real ones, which a test compares; errors and
constants are the real ones. Time moves its energy, and its figures can be changed while it is read.
"""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pynvml

GIB = 1 << 30


class Gpu:
    """One GPU as it stands."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.utilisation, self.memory_utilisation = 57, 31  # percent
        self.memory, self.used = 80 * GIB, 21 * GIB
        self.milliwatts, self.limit_milliwatts = 312_500, 700_000
        self.millijoules = 5_000_000
        self.celsius = 61
        self.mhz = {pynvml.NVML_CLOCK_SM: 1755, pynvml.NVML_CLOCK_MEM: 2619}
        self.throttled = 0
        self.throttled_ns = {pynvml.NVML_PERF_POLICY_POWER: 4_000_000_000}
        self.ecc = {
            pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED: 2,
            pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED: 0,
        }
        self.processes: list[tuple[int, int | None]] = []  # pid, bytes
        self.mig: list[tuple[int, int, int]] = []  # GPU instance, compute instance, bytes
        self.lost = False
        self.unsupported: set[str] = set()


class Instance:
    """A MIG instance: what NVML says of the whole GPU only is not supported."""

    def __init__(self, gpu: Gpu, number: int) -> None:
        self.gpu, self.number = gpu, number


class FakeNvml:
    """A driver that can be missing, restart, hang and lose GPUs."""

    def __init__(self, gpus: int = 1) -> None:
        self.gpus = [Gpu(index) for index in range(gpus)]
        self.library = True  # whether there is a driver at all
        self.running = True
        self.opened = 0  # sessions that were begun
        self.open = False
        self.hang = threading.Event()
        self.hang.set()  # cleared: every call waits
        self.events: list[tuple[int, int]] = []  # GPU, XID
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        """Constants and errors, which are pynvml's own."""
        if name.startswith("nvml") and callable(getattr(pynvml, name)):
            raise AttributeError(f"the fake NVML has no {name}")
        return getattr(pynvml, name)

    def _enter(self, name: str, handle: Gpu | Instance | None = None) -> None:
        self.calls.append(name)
        self.hang.wait()
        if not self.library:
            raise pynvml.NVMLError_LibraryNotFound
        if not self.running:
            raise pynvml.NVMLError_DriverNotLoaded
        if not self.open and name != "nvmlInit":
            raise pynvml.NVMLError_Uninitialized
        if isinstance(handle, Gpu):
            if handle.lost:
                raise pynvml.NVMLError_GpuIsLost
            if name in handle.unsupported:
                raise pynvml.NVMLError_NotSupported

    def restart(self) -> None:
        """The driver is loaded again: sessions are lost, and meters begin anew."""
        self.open = False
        for gpu in self.gpus:
            gpu.millijoules = 0

    def nvmlInit(self) -> None:
        self._enter("nvmlInit")
        self.open = True
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self._enter("nvmlShutdown")
        self.open = False

    def nvmlSystemGetDriverVersion(self) -> str:
        self._enter("nvmlSystemGetDriverVersion")
        return "580.65"

    def nvmlDeviceGetCount(self) -> int:
        self._enter("nvmlDeviceGetCount")
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        self._enter("nvmlDeviceGetHandleByIndex", self.gpus[index])
        return self.gpus[index]

    def nvmlDeviceGetIndex(self, handle: Gpu) -> int:
        self._enter("nvmlDeviceGetIndex", handle)
        return handle.index

    def nvmlDeviceGetUUID(self, handle: Gpu | Instance) -> str:
        self._enter("nvmlDeviceGetUUID", handle)
        if isinstance(handle, Instance):
            return f"MIG-{handle.gpu.index}-{handle.number}"
        return f"GPU-{handle.index}"

    def nvmlDeviceGetName(self, handle: Gpu | Instance) -> bytes:
        self._enter("nvmlDeviceGetName", handle)
        return b"NVIDIA Fake"

    def nvmlDeviceGetMemoryInfo(self, handle: Gpu | Instance, version: int | None = None) -> Any:
        self._enter("nvmlDeviceGetMemoryInfo", handle)
        if isinstance(handle, Instance):
            return SimpleNamespace(total=handle.gpu.mig[handle.number][2], used=GIB)
        return SimpleNamespace(total=handle.memory, used=handle.used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Gpu | Instance) -> list[Any]:
        self._enter("nvmlDeviceGetComputeRunningProcesses", handle)
        if isinstance(handle, Instance):
            return []
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in handle.processes]

    def nvmlDeviceGetUtilizationRates(self, handle: Gpu) -> Any:
        self._enter("nvmlDeviceGetUtilizationRates", handle)
        if handle.mig:
            raise pynvml.NVMLError_NotSupported
        return SimpleNamespace(gpu=handle.utilisation, memory=handle.memory_utilisation)

    def nvmlDeviceGetPowerUsage(self, handle: Gpu) -> int:
        self._enter("nvmlDeviceGetPowerUsage", handle)
        return handle.milliwatts

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Gpu) -> int:
        self._enter("nvmlDeviceGetEnforcedPowerLimit", handle)
        return handle.limit_milliwatts

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Gpu) -> int:
        self._enter("nvmlDeviceGetTotalEnergyConsumption", handle)
        return handle.millijoules

    def nvmlDeviceGetTemperature(self, handle: Gpu, sensor: int) -> int:
        self._enter("nvmlDeviceGetTemperature", handle)
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return handle.celsius

    def nvmlDeviceGetClockInfo(self, handle: Gpu, type: int) -> int:
        self._enter("nvmlDeviceGetClockInfo", handle)
        return handle.mhz[type]

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Gpu) -> int:
        self._enter("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        return handle.throttled

    def nvmlDeviceGetViolationStatus(self, device: Gpu, perfPolicyType: int) -> Any:
        self._enter("nvmlDeviceGetViolationStatus", device)
        if perfPolicyType not in device.throttled_ns:
            raise pynvml.NVMLError_NotSupported
        return SimpleNamespace(violationTime=device.throttled_ns[perfPolicyType])

    def nvmlDeviceGetTotalEccErrors(self, handle: Gpu, errorType: int, counterType: int) -> int:
        self._enter("nvmlDeviceGetTotalEccErrors", handle)
        assert counterType == pynvml.NVML_VOLATILE_ECC
        return handle.ecc[errorType]

    def nvmlDeviceGetMigMode(self, device: Gpu) -> list[int]:
        self._enter("nvmlDeviceGetMigMode", device)
        return [int(bool(device.mig))] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, device: Gpu) -> int:
        self._enter("nvmlDeviceGetMaxMigDeviceCount", device)
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Gpu, index: int) -> Instance:
        self._enter("nvmlDeviceGetMigDeviceHandleByIndex", device)
        if index >= len(device.mig):
            raise pynvml.NVMLError_NotFound
        return Instance(device, index)

    def nvmlDeviceGetGpuInstanceId(self, device: Instance) -> int:
        self._enter("nvmlDeviceGetGpuInstanceId", device)
        return device.gpu.mig[device.number][0]

    def nvmlDeviceGetComputeInstanceId(self, device: Instance) -> int:
        self._enter("nvmlDeviceGetComputeInstanceId", device)
        return device.gpu.mig[device.number][1]

    def nvmlEventSetCreate(self) -> object:
        self._enter("nvmlEventSetCreate")
        return self

    def nvmlEventSetFree(self, eventSet: object) -> None:
        self._enter("nvmlEventSetFree")

    def nvmlDeviceRegisterEvents(self, handle: Gpu, eventTypes: int, eventSet: object) -> None:
        self._enter("nvmlDeviceRegisterEvents", handle)
        assert eventTypes == pynvml.nvmlEventTypeXidCriticalError

    def nvmlEventSetWait(self, eventSet: object, timeoutms: int) -> Any:
        self._enter("nvmlEventSetWait")
        if not self.events:
            raise pynvml.NVMLError_Timeout
        gpu, xid = self.events.pop(0)
        return SimpleNamespace(device=self.gpus[gpu], eventData=xid)


def living(nvml: FakeNvml, began: float | None = None) -> FakeNvml:
    """One that draws its power, is throttled, fails and restarts, for a whole cluster's test."""
    began = time.monotonic() if began is None else began
    gpu = nvml.gpus[0]
    gpu.throttled = pynvml.nvmlClocksThrottleReasonSwPowerCap
    gpu.processes = [(1, GIB)]
    enter, counts = nvml._enter, 0

    def live(name: str, handle: Gpu | Instance | None = None) -> None:
        nonlocal counts
        nvml.calls.clear()
        passed_s = time.monotonic() - began
        gpu.millijoules = 5_000_000 + int(passed_s * gpu.milliwatts)
        gpu.throttled_ns[pynvml.NVML_PERF_POLICY_POWER] = int(passed_s * 1e8)
        gpu.ecc[pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED] = int(passed_s)
        counts += name == "nvmlDeviceGetCount"
        if name == "nvmlDeviceGetCount" and counts % 3 == 0:
            nvml.events.append((0, 63))
        if name == "nvmlDeviceGetCount" and counts % 8 == 0:
            nvml.open = False
        enter(name, handle)

    nvml._enter = live  # type: ignore[method-assign]
    return nvml
