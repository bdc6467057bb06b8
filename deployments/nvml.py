"""What NVML knows of a node's GPUs, as samples of the table of metrics, whatever a driver does.

It may be missing, restart, lose a GPU or never come back from a call: reading happens in a thread
of its own, and whoever asks waits for a bounded time and gets the last state otherwise, marked as
such (``datamix_gpu_up`` 0). NVML sees the node's GPUs whatever CUDA_VISIBLE_DEVICES says.

Not tried on a real GPU yet: tests put another NVML in this one's place.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deployments.metrics import Sample

Nvml = Any  # the module `pynvml`, or what stands in its place

# Ask again so long after NVML could not be opened, in seconds.
_RETRY_S = 5.0
_EVENTS = 100  # of critical errors in one reading at most

# (bit of the clocks' event reasons, label)
_THROTTLED = (
    ("nvmlClocksThrottleReasonSwPowerCap", "power_cap"),
    ("nvmlClocksThrottleReasonHwSlowdown", "hardware"),
    ("nvmlClocksThrottleReasonSwThermalSlowdown", "thermal_software"),
    ("nvmlClocksThrottleReasonHwThermalSlowdown", "thermal_hardware"),
    ("nvmlClocksThrottleReasonHwPowerBrakeSlowdown", "power_brake"),
    ("nvmlClocksThrottleReasonSyncBoost", "sync_boost"),
)
_POLICIES = (
    ("NVML_PERF_POLICY_POWER", "power"),
    ("NVML_PERF_POLICY_THERMAL", "thermal"),
    ("NVML_PERF_POLICY_RELIABILITY", "reliability"),
    ("NVML_PERF_POLICY_BOARD_LIMIT", "board_limit"),
)


def load() -> Nvml:
    """NVIDIA's own bindings; the driver's library is looked for when NVML is opened."""
    import pynvml

    return pynvml


class Session:
    """NVML, opened; one reading after the other. Raises ``NVMLError`` where it is not well."""

    def __init__(self, nvml: Nvml, xids: Counter[tuple[str, str]]) -> None:
        """Open NVML and ask for its critical errors, which are counted into ``xids``.

        Args:
            nvml: the module `pynvml`.
            xids: by index of the GPU and number of the error.
        """
        self._nvml, self._xids = nvml, xids
        nvml.nvmlInit()
        self._driver = _text(nvml.nvmlSystemGetDriverVersion())
        self._events = self._listen()

    def read(self) -> list[Sample]:
        """All that can be known now. A GPU that fails is down (``datamix_gpu_up`` 0), alone."""
        nvml = self._nvml
        found: list[Sample] = []
        self._hear()
        for index in range(nvml.nvmlDeviceGetCount()):
            gpu = str(index)
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                of_gpu = list(self._device(gpu, handle))
            except (nvml.NVMLError_GpuIsLost, nvml.NVMLError_Unknown, nvml.NVMLError_ResetRequired):
                of_gpu = [Sample("datamix_gpu_up", {"gpu": gpu}, 0)]
            found += of_gpu
        for (gpu, xid), count in self._xids.items():
            found.append(Sample("datamix_gpu_xid_errors_total", {"gpu": gpu, "xid": xid}, count))
        return found

    def close(self) -> None:
        """Let go of NVML, as far as it lets one."""
        with contextlib.suppress(self._nvml.NVMLError):
            if self._events is not None:
                self._nvml.nvmlEventSetFree(self._events)
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def _ask(self, name: str, *arguments: Any) -> Any:
        """What a function says; None where this GPU, driver or user may not know it."""
        nvml = self._nvml
        try:
            return getattr(nvml, name)(*arguments)
        except (
            nvml.NVMLError_NotSupported,
            nvml.NVMLError_FunctionNotFound,
            nvml.NVMLError_NoPermission,
            nvml.NVMLError_InvalidArgument,  # of a policy or counter that an old GPU lacks
        ):
            return None

    def _device(self, gpu: str, handle: Any) -> Iterator[Sample]:
        nvml, whole = self._nvml, {"gpu": gpu}

        def gauge(name: str, value: Any, scale: float = 1.0, **labels: str) -> Iterator[Sample]:
            if value is not None:
                yield Sample(f"datamix_gpu_{name}", {**whole, **labels}, value * scale)

        ask = self._ask
        yield from gauge("up", 1)
        yield from self._part(gpu, "", handle)
        for mig, instance in self._instances(handle):
            yield from self._part(gpu, mig, instance)
        if (rates := ask("nvmlDeviceGetUtilizationRates", handle)) is not None:
            yield from gauge("utilisation_ratio", rates.gpu, 0.01)
            yield from gauge("memory_utilisation_ratio", rates.memory, 0.01)
        yield from gauge("power_watts", ask("nvmlDeviceGetPowerUsage", handle), 1e-3)
        limit = ask("nvmlDeviceGetEnforcedPowerLimit", handle)
        yield from gauge("power_limit_watts", limit, 1e-3)
        energy = ask("nvmlDeviceGetTotalEnergyConsumption", handle)
        yield from gauge("energy_joules_total", energy, 1e-3)
        celsius = ask("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU)
        yield from gauge("temperature_celsius", celsius)
        for domain, clock in (("sm", nvml.NVML_CLOCK_SM), ("memory", nvml.NVML_CLOCK_MEM)):
            mhz = ask("nvmlDeviceGetClockInfo", handle, clock)
            yield from gauge("clock_hertz", mhz, 1e6, domain=domain)
        bits = ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        for name, reason in _THROTTLED if bits is not None else ():
            yield from gauge("throttled", int(bool(bits & getattr(nvml, name))), reason=reason)
        for name, reason in _POLICIES:
            status = ask("nvmlDeviceGetViolationStatus", handle, getattr(nvml, name))
            if status is not None:
                ns = status.violationTime
                yield from gauge("throttled_seconds_total", ns, 1e-9, reason=reason)
        for kind in ("corrected", "uncorrected"):
            error = getattr(nvml, f"NVML_MEMORY_ERROR_TYPE_{kind.upper()}")
            count = ask("nvmlDeviceGetTotalEccErrors", handle, error, nvml.NVML_VOLATILE_ECC)
            yield from gauge("ecc_errors_total", count, kind=kind)

    def _instances(self, handle: Any) -> Iterator[tuple[str, Any]]:
        """The instances of a GPU in MIG mode, as ``GI/CI`` and handle."""
        nvml, ask = self._nvml, self._ask
        mode = ask("nvmlDeviceGetMigMode", handle)
        if mode is None or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
            return
        for index in range(ask("nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
            try:
                instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
            except nvml.NVMLError_NotFound:  # there is room for more
                continue
            parts = (nvml.nvmlDeviceGetGpuInstanceId, nvml.nvmlDeviceGetComputeInstanceId)
            yield "/".join(str(part(instance)) for part in parts), instance

    def _part(self, gpu: str, mig: str, handle: Any) -> Iterator[Sample]:
        """What a GPU and its instances have in common: names, memory, processes."""
        labels = {"gpu": gpu, "mig": mig}
        uuid, name = self._ask("nvmlDeviceGetUUID", handle), self._ask("nvmlDeviceGetName", handle)
        names = {"uuid": _text(uuid), "name": _text(name), "driver": self._driver}
        yield Sample("datamix_gpu_info", {**labels, **names}, 1)
        if (memory := self._ask("nvmlDeviceGetMemoryInfo", handle)) is not None:
            yield Sample("datamix_gpu_memory_bytes", labels, memory.total)
            yield Sample("datamix_gpu_memory_used_bytes", labels, memory.used)
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses", handle)
        if processes is None:
            return
        counts, used = Counter[str](), Counter[str]()
        for process in processes:
            kind = _kind(process.pid)
            counts[kind] += 1
            used[kind] += process.usedGpuMemory or 0  # None where the driver does not tell
        for kind in ("replica", "other"):
            of_kind = {**labels, "process": kind}
            yield Sample("datamix_gpu_processes", of_kind, counts[kind])
            yield Sample("datamix_gpu_process_memory_bytes", of_kind, used[kind])

    def _listen(self) -> Any:
        """Ask for critical errors (XID) of all GPUs that tell; None where none does."""
        nvml, listening = self._nvml, False
        events = self._ask("nvmlEventSetCreate")
        if events is None:
            return None
        for index in range(nvml.nvmlDeviceGetCount()):
            with contextlib.suppress(nvml.NVMLError):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
                listening = True
        return events if listening else None

    def _hear(self) -> None:
        """Count the errors that were reported since the last reading."""
        nvml = self._nvml
        for _ in range(_EVENTS if self._events is not None else 0):
            try:
                event = nvml.nvmlEventSetWait(self._events, 0)
            except nvml.NVMLError:  # in time: no more; anything else shows in what is read next
                return
            index = self._ask("nvmlDeviceGetIndex", event.device)
            self._xids["" if index is None else str(index), str(event.eventData)] += 1


class Watch:
    """The newest samples, in bounded time, whatever NVML does."""

    def __init__(
        self,
        nvml: Nvml,
        *,
        deadline_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watch through ``nvml``; nothing is opened before the first reading.

        Args:
            nvml: the module `pynvml`.
            deadline_s: how long :meth:`samples` waits for a reading.
            clock: seconds, monotonic.
        """
        self._nvml, self._deadline_s, self._clock = nvml, deadline_s, clock
        self._lock = threading.Lock()  # one reader; the thread has it while it reads
        self._xids: Counter[tuple[str, str]] = Counter()
        self._session: Session | None = None
        self._last: list[Sample] = []
        self._read_s = clock()
        self._failed_s = float("-inf")
        self.problem = "not read yet"  # why the newest figures are old; "" where they are not
        self.absent = False  # whether this node has no driver at all

    def samples(self) -> list[Sample]:
        """A reading, or after ``deadline_s`` the last one with ``datamix_gpu_up`` at 0.

        A call that never returns costs its thread, and no second one while it hangs.
        """
        if self._lock.acquire(blocking=False):
            done = threading.Event()
            # A daemon: a driver that hangs keeps no process from ending.
            threading.Thread(target=self._read, args=(done,), name="nvml", daemon=True).start()
            if not done.wait(self._deadline_s):
                self.problem = f"NVML gave no answer in {self._deadline_s:g} s"
        if not self.problem:
            return [*self._last, Sample("datamix_gpu_reading_age_seconds", {}, 0)]
        age_s = self._clock() - self._read_s
        return [*_down(self._last), Sample("datamix_gpu_reading_age_seconds", {}, age_s)]

    def _read(self, done: threading.Event) -> None:
        try:
            if self._session is None:
                if self._clock() - self._failed_s < _RETRY_S:
                    return
                self._session = Session(self._nvml, self._xids)
            self._last = self._session.read()
            self._read_s, self.problem, self.absent = self._clock(), "", False
        except self._nvml.NVMLError as error:
            # As after a restart of the driver, whose old handles are worth nothing: begin anew.
            self.problem = f"NVML: {error}"
            self.absent = isinstance(error, self._nvml.NVMLError_LibraryNotFound)
            self._failed_s = self._clock()
            session, self._session = self._session, None
            if session is not None:
                self._failed_s -= _RETRY_S  # the first attempt at once
                session.close()
        finally:
            self._lock.release()
            done.set()


def _down(samples: list[Sample]) -> list[Sample]:
    kept = [sample for sample in samples if sample.name != "datamix_gpu_up"]
    gpus = [sample.labels["gpu"] for sample in samples if sample.name == "datamix_gpu_up"]
    return kept + [Sample("datamix_gpu_up", {"gpu": gpu}, 0) for gpu in gpus or [""]]


def _kind(pid: int) -> str:
    """Whose process that is; in a container without the host's processes, other."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return "other"
    return "replica" if line.startswith(b"ray::ServeReplica") else "other"


def _text(value: Any) -> str:
    """A name: older bindings give bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value or "")
