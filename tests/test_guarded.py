"""Tokens, TLS and rotation on a real cluster: Ray's health checks pass, and nothing is lost."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.guarded import CLIENTS
from tests.served import MARK, ROOT, gone


@pytest.mark.cluster
@pytest.mark.timeout(180)
def test_a_guarded_cluster_rotates_its_streams(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    done = subprocess.run(
        [sys.executable, "-m", "tests.guarded", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, MARK: mark},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert gone(mark, 5) == []
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["without_token"] == {
        "/-/healthz": 200,
        "/v2/health/live": 200,
        "/v2/health/ready": 200,
        "/v2": 401,
        "/v2/stats": 401,
    }
    assert seen["rotated"] == [CLIENTS, CLIENTS]
    assert sum(closed.get("rotated", 0) for closed in seen["closed"]) == 2 * CLIENTS
    assert len([closed for closed in seen["closed"] if closed.get("rotated")]) == 2  # both replicas
    assert seen["connections"] == 3 * CLIENTS
    assert seen["retries"] == 0
    assert seen["inferences"] > 3 * CLIENTS
    assert seen["spread"] < 0.02  # the same images, the same outputs
