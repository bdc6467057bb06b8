"""The figures of a run, and what each of them means."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from edge.fleet.quantiles import Intervals, Percentiles
from edge.fleet.series import Series
from edge.fleet.terms import ECHO
from edge.promises import sentence


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run says.

    Every inference that fell due is in exactly one of ok, failed, wrong, unsent, stopped and
    cancelled.

    Attributes:
        valid: whether the figures are the cloud's, and not the generator's own limit.
        invalid_reason: one sentence where they are not.
        interrupted: the run was stopped before its end.
        loop: ``open``, or ``closed``, where a device asks again once it has its answer: a cloud
            that slows down is then asked less, and a stall hardly shows in any latency.
        arrivals: the law by which inferences fell due.
        workload: ``bundle`` or ``echo``.
        mode: what leaves the devices: ``mix``, ``bounded``, ``split``, or ``echo``.
        promise: what the mode promises, in a line; None for ``echo``.
        bits_per_input: most that the operator who gets the features learns of one input, all rounds
            together; None where there is no bound.
        known_break: what is known to get around the mode; None for ``echo``.
        not_private: why both ends of ``split`` seem to have one operator, so that the promise does
            not hold; else None.
        model: the model's name.
        stem: ``cached`` (computed once per input, not charged per inference), ``charged`` (added
            to each inference, from a profile), ``partly charged`` (by some profiles) or ``none``.
        mix: ``run``, ``charged``, ``partly charged`` or ``none``, which is said of what a workload
            without a model does not have.
        encode: the same, of making messages.
        demix: the same, of de-mixing and bridges.
        head: the same, of the head.
        profiles: what each kind of device charges, its link, its share of the devices and where
            that is from; none for devices as fast as the generator on this machine's own link.
        verified: every answer was compared with the locally computed one.
        clients: devices, each with a stream.
        processes: how many processes held them.
        duration_s: for how long inferences fell due.
        elapsed_s: until the last one ended.
        seed: of the schedule.
        group_size: rows per request.
        rounds: requests per inference.
        warm_up_s: inferences due before it count everywhere but in latencies, queue, compute and
            waterfall.
        warm_up_inferences: how many those are.
        slo_s: the latency that an answer may take to be of use; None for any.
        offered_rate: requests due per second.
        retried_rate: messages sent again, per second; in neither of the two around it.
        throughput: requests answered per second, within ``duration_s``.
        offered_inferences_per_s: inferences due per second.
        inferences_per_s: of those, answered right, per second of ``duration_s``.
        goodput_inferences_per_s: of those, within ``slo_s`` of their schedule.
        rows_per_s: rows answered per second, within ``duration_s``.
        inferences: inferences that fell due.
        ok: answered right.
        within_slo: of those, within ``slo_s`` of their schedule; None without one.
        failed: by HTTP status, or ``timeout``, ``connection``, ``answer`` (not what was asked).
        wrong: answered with other values than the local ones.
        unsent: due, but nothing left the device before the deadline.
        stopped: under way when the run was interrupted.
        cancelled: given up by the device of its own accord, or left behind when it went; in no
            latency, because nobody knows how long they would have taken.
        requests: messages sent, retries included.
        retries: messages sent again.
        reconnects: streams opened again.
        moved: messages sent again because the cloud had moved the stream unread.
        duplicates: second answers to one message.
        late: answers after the device had given up.
        misrouted: answers that came to another device.
        unmatched: answers that nobody had asked for.
        unreadable: messages that were no response.
        came: devices that came back after they had gone.
        left: devices that went.
        dropped: streams that a storm dropped.
        latency_samples: inferences that have a latency: answered, or kept waiting until the
            deadline; warm-up excluded.
        latency_s: of those, from the scheduled send; None where the samples are too few.
        latency_interval_s: where each of these percentiles lies with 95%.
        latency_from_send_s: of inferences, from the real send.
        latency_from_send_interval_s: where each of these percentiles lies with 95%.
        generator_lag_s: real minus scheduled time of the first message.
        queue_s: waiting in the cloud, per request, by the cloud's clock (mean).
        compute_s: the engine's step, per request, by the cloud's clock (mean).
        waterfall_s: mean seconds of each part of an answered inference
            (:mod:`edge.fleet.waterfall`); None where none was answered.
        waterfall_slowest_s: the same over the slowest hundredth of them.
        by_profile: how each kind of device fared (:func:`edge.fleet.waterfall.by_profile`).
        batch_rows_mean: rows per batch, from the replica's statistics; None where it gives none.
        batch_rows_per_request: rows of the batch that a request was in, on average.
        engine_busy_ratio: share of time the engine computed; None where it gives no statistics.
        generator_cpu_s_per_request: processor time of all processes per message sent.
        generator_cpu_ratio: of the busiest process, in cores.
        bytes_up_per_input: sent per classified input, all rounds; ``split``: to operator A.
        bytes_down_per_input: received per classified input, all rounds; ``split``: from operator A.
        masks_fetched: groups that operator B answered seeds for; None but in ``split``, like all
            that is said of it.
        masks_used: of those, that an inference took; the rest was wiped.
        masks_waited: inferences that fell due and found no masks ready.
        offline_requests: messages to operator B, retries included.
        offline_retries: messages sent again to it.
        offline_bytes_up_per_input: sent to it per input that masks were fetched for.
        offline_bytes_down_per_input: received from it, likewise.
        accuracy_cloud: share of inputs with the labelled class, by way of the cloud.
        accuracy_local: the same inputs, computed locally.
        accuracy_edge_only: of a network that never uses the cloud, as the bundle says.
        series: the run second by second; not in the JSON.
        start_error_s: by how much the shards' common start may differ, where they are on several
            machines; 0 on one.
    """

    valid: bool
    invalid_reason: str | None
    interrupted: bool
    loop: str
    arrivals: str
    workload: str
    mode: str
    promise: str | None
    bits_per_input: float | None
    known_break: str | None
    not_private: str | None
    model: str
    stem: str
    mix: str
    encode: str
    demix: str
    head: str
    profiles: list[dict[str, Any]]
    verified: bool
    clients: int
    processes: int
    duration_s: float
    elapsed_s: float
    seed: int
    group_size: int
    rounds: int
    warm_up_s: float
    warm_up_inferences: int
    slo_s: float | None
    offered_rate: float
    retried_rate: float
    throughput: float
    offered_inferences_per_s: float
    inferences_per_s: float
    goodput_inferences_per_s: float
    rows_per_s: float
    inferences: int
    ok: int
    within_slo: int | None
    failed: dict[str, int]
    wrong: int
    unsent: int
    stopped: int
    cancelled: int
    requests: int
    retries: int
    reconnects: int
    moved: int
    duplicates: int
    late: int
    misrouted: int
    unmatched: int
    unreadable: int
    came: int
    left: int
    dropped: int
    latency_samples: int
    latency_s: Percentiles
    latency_interval_s: Intervals
    latency_from_send_s: Percentiles
    latency_from_send_interval_s: Intervals
    generator_lag_s: Percentiles
    queue_s: float | None
    compute_s: float | None
    waterfall_s: dict[str, float] | None
    waterfall_slowest_s: dict[str, float] | None
    by_profile: list[dict[str, Any]]
    batch_rows_mean: float | None
    batch_rows_per_request: float | None
    engine_busy_ratio: float | None
    generator_cpu_s_per_request: float | None
    generator_cpu_ratio: float
    bytes_up_per_input: float | None
    bytes_down_per_input: float | None
    masks_fetched: int | None
    masks_used: int | None
    masks_waited: int | None
    offline_requests: int | None
    offline_retries: int | None
    offline_bytes_up_per_input: float | None
    offline_bytes_down_per_input: float | None
    accuracy_cloud: float | None
    accuracy_local: float | None
    accuracy_edge_only: float | None
    series: Series = field(repr=False)
    start_error_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything but the series, ready for JSON."""
        return {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name != "series"
        }

    @property
    def privacy(self) -> str:
        """The mode, its promise and its known break; first why nothing holds, where it does not."""
        if self.promise is None or self.known_break is None:
            return ECHO
        return sentence(self.promise, self.known_break, self.not_private)

    @property
    def exit_code(self) -> int:
        """0: valid, and every inference answered right; 1: the cloud failed some; 3: invalid."""
        if not self.valid:
            return 3
        strays = self.duplicates + self.misrouted + self.unmatched + self.unreadable
        clean = not (self.failed or self.wrong or self.unsent or strays) and self.ok > 0
        return 0 if clean else 1
