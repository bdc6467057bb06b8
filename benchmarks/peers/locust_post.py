"""Locust posting one file at a rate: ``DATAMIX_BODY``, ``DATAMIX_PATH``, ``DATAMIX_RATE_EACH``.

``FastHttpUser`` is Locust's cheaper client, which its documentation advises for high rates.
"""

from __future__ import annotations

import os
from pathlib import Path

from locust import FastHttpUser, HttpUser, constant_throughput, task

BODY = Path(os.environ["DATAMIX_BODY"]).read_bytes()
PATH = os.environ["DATAMIX_PATH"]
RATE = float(os.environ["DATAMIX_RATE_EACH"])
HEADERS = {
    "content-type": "application/vnd.apache.arrow.stream",
    "x-request-disconnect-disabled": "?1",
}


class Fast(FastHttpUser):
    wait_time = constant_throughput(RATE)

    @task
    def post(self) -> None:
        self.client.post(PATH, data=BODY, headers=HEADERS)


class Plain(HttpUser):
    wait_time = constant_throughput(RATE)

    @task
    def post(self) -> None:
        self.client.post(PATH, data=BODY, headers=HEADERS)
