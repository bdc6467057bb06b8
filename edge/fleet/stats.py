"""The cloud's own figures: what it serves, and how busy its engine was.

``GET /v2/stats`` answers for one replica. With several behind one address, each sample comes from
whichever replica got the call, so figures are kept apart by replica and a replica counts only
between its first and its last sample; one that was never sampled twice is not in the figures.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datamix.errors import DataMixError, Unavailable, from_status
from edge.access import Access, distrust

_PERIOD_S = 1.0


_ANYBODY = Access()


def fetch(url: str, access: Access = _ANYBODY, timeout_s: float = 5.0) -> dict[str, Any]:
    """GET a JSON object.

    Raises:
        ConfigError: the cloud's certificate is not trusted.
        Unavailable: nobody answers at that address, or what answers is not JSON.
        DataMixError: the cloud answered with an error status.
    """
    request = urllib.request.Request(url)
    for name, value in access.headers.items():
        request.add_unredirected_header(name, value)
    # No proxy from the environment: a load test through one would measure the proxy.
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=access.context(url)),
    )
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            body = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            raise from_status(error.code, f"{url} answered {error.code}, expected 200") from error
    except (OSError, ValueError) as error:
        raise distrust(error) or Unavailable(f"{url} gives no answer: {error}") from error
    if not isinstance(body, dict):
        raise Unavailable(f"{url} answered {type(body).__name__}, expected a JSON object")
    return body


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer of ``/v2/stats``.

    Attributes:
        at_s: when it was read, by this machine's monotonic clock.
        replica: who answered.
        engine_busy_s: for how long its engine has computed since it started.
        uptime_s: since when it has been up.
        batches: batches computed.
        rows: rows computed.
    """

    at_s: float
    replica: str
    engine_busy_s: float
    uptime_s: float
    batches: int
    rows: int


@dataclass(frozen=True, slots=True)
class Use:
    """How the engines were used between two samples; None where nothing is known."""

    busy_ratio: float | None
    batch_rows_mean: float | None


def use(samples: Sequence[Sample]) -> Use:
    """Fold samples: busy time per time up and rows per batch, over all replicas sampled twice."""
    replicas: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        replicas[sample.replica].append(sample)
    pairs = [(seen[0], seen[-1]) for seen in replicas.values()]
    up_s = sum(last.uptime_s - first.uptime_s for first, last in pairs)
    busy_s = sum(last.engine_busy_s - first.engine_busy_s for first, last in pairs)
    batches = sum(last.batches - first.batches for first, last in pairs)
    rows = sum(last.rows - first.rows for first, last in pairs)
    return Use(busy_s / up_s if up_s > 0 else None, rows / batches if batches > 0 else None)


class Sampler:
    """Reads ``/v2/stats`` every second in a thread of its own.

    A cloud without that endpoint gives no samples, and the figures made of them are None.
    """

    def __init__(
        self,
        *base_urls: str,
        access: Access = _ANYBODY,
        keep: Callable[[Sample], None] | None = None,
    ) -> None:
        """Make a sampler, of one front door or several, that has not started.

        ``keep`` gets each sample as it comes.
        """
        self.samples: list[Sample] = []
        self._urls = [f"{base_url}/v2/stats" for base_url in base_urls]
        self._access = access
        self._keep = keep
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stats", daemon=True)

    def start(self) -> None:
        """Read once, then go on in the background."""
        self.read()
        self._thread.start()

    def stop(self) -> list[Sample]:
        """Read a last time, end the thread and hand over the samples."""
        self._stop.set()
        self._thread.join()
        self.read()
        return self.samples

    def read(self) -> None:
        """Read one sample from each door; a cloud that gives none is not an error here."""
        for url in self._urls:
            try:
                body = fetch(url, self._access, timeout_s=2.0)
                sample = Sample(
                    time.monotonic(),
                    str(body["replica"]),
                    float(body["engine_busy_s"]),
                    float(body["uptime_s"]),
                    int(body["batches"]),
                    int(body["rows"]),
                )
            except (DataMixError, KeyError, TypeError, ValueError):
                continue
            self.samples.append(sample)
            if self._keep is not None:
                self._keep(sample)

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            self.read()
