"""An embedded cluster that scales itself, as a program: says what it does in lines of JSON.

Its argument, an object of JSON, changes settings of the application.

It ends when its standard input does.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

from cluster.local import APPLICATION, free_port, local_ray, wait_ready
from deployments.config import Config

SHAPE = (4, 2, 2)
A_S, B_S, MAX_BATCH_ROWS = 0.02, 0.005, 32
AUTOSCALING: dict[str, Any] = {
    "min_replicas": 1,
    "max_replicas": 3,
    "metrics_interval_s": 1,
    "look_back_period_s": 5,
    "upscale_delay_s": 0,
    "downscale_delay_s": 0,
    "policy": {
        "policy_function": "deployments.policy:PredictedWait",
        "policy_kwargs": {
            "wait_target_s": 0.6,
            "lead_s": 5,
            "down_window_s": 5,
            "settle_s": 3,
            "burst_share": 0,
        },
    },
}


def say(**words: Any) -> None:
    print(json.dumps(words), flush=True)


def main() -> None:
    given = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    config = Config(
        **{
            "engine": f"emulated:{A_S},{B_S}",
            "echo_shape": SHAPE,
            "max_batch_rows": MAX_BATCH_ROWS,
            "max_request_rows": 4,
            "rotate_streams_within_s": 1,
            **given,
        }
    )
    with local_ray(AUTOSCALING["max_replicas"]) as address:
        from ray import serve

        from deployments.app import bind

        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        bound = bind(config, autoscaling_config=AUTOSCALING)
        serve.run(bound, name=APPLICATION, route_prefix="/")
        url = f"http://127.0.0.1:{port}"
        wait_ready(url, 60)
        say(url=url, address=address)
        ended = threading.Event()

        def wait() -> None:
            sys.stdin.read()
            ended.set()

        threading.Thread(target=wait, daemon=True).start()
        before = None
        while not ended.wait(0.25):
            deployment = serve.status().applications[APPLICATION].deployments["Backbone"]
            states = {str(state): count for state, count in deployment.replica_states.items()}
            if states != before:
                say(at_s=time.monotonic(), **states)
                before = states


if __name__ == "__main__":
    main()
