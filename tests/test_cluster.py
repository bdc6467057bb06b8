"""The whole of it on a real cluster: Ray, HAProxy, WebSockets, the shipped bundle, real images."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from datamix import wire
from datamix.bundle import load_backbone
from datamix.errors import WireError
from edge.client import Client, ClientConfig, SyncClient
from edge.data import load_sample
from edge.runtime import TorchDevice
from edge.transport import StreamTransport
from tests.served import BUNDLE, MARK, ROOT, Served, gone, marked, serving

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def device() -> TorchDevice:
    return TorchDevice(BUNDLE)


@pytest.fixture(scope="module")
def images() -> npt.NDArray[np.uint8]:
    return load_sample().inputs[:]


@pytest.fixture(scope="module")
def local(device: TorchDevice, images: npt.NDArray[np.uint8]) -> Floats:
    """What the same bundle computes here, unmixed, in float32."""
    import torch

    _, blocks = load_backbone(BUNDLE)
    features = device.stem(device.preprocess(images))
    with torch.inference_mode():
        for index, block in enumerate(blocks):
            features = block(torch.from_numpy(features)).numpy()
            if index < len(blocks) - 1:
                features = device.bridge(index, features)
    return device.head(features)


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


TOLERANCE = 0.02  # of an output; outputs reach 10, and float16 on the wire moves them by 0.001


def assert_same(outputs: Floats, expected: Floats) -> None:
    """The same outputs within the tolerance, so the same classes wherever they are not tied."""
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=TOLERANCE)
    best_two = np.sort(expected, axis=1)[:, -2:]
    clear = best_two[:, 1] - best_two[:, 0] > 2 * TOLERANCE
    np.testing.assert_array_equal(outputs.argmax(1)[clear], expected.argmax(1)[clear])


@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_real_images_get_the_classes_that_they_get_locally(
    cluster: Served,
    device: TorchDevice,
    images: npt.NDArray[np.uint8],
    local: Floats,
    transport: Any,
) -> None:
    with SyncClient(cluster.url, device, transport=transport) as client:
        outputs = client.infer(images[:203])
        assert client.client.retries == 0
    assert_same(outputs, local[:203])


def test_two_hundred_clients_at_once(
    cluster: Served, device: TorchDevice, images: npt.NDArray[np.uint8], local: Floats
) -> None:
    async def one(number: int) -> None:
        start = number * 5
        async with Client(cluster.url, device) as client:
            outputs = await client.infer(images[start : start + 5])
        assert_same(outputs, local[start : start + 5])

    async def all_of_them() -> None:
        await asyncio.gather(*(one(number) for number in range(200)))

    before = get(f"{cluster.url}/v2/stats")
    asyncio.run(all_of_them())
    after = get(f"{cluster.url}/v2/stats")
    groups, rounds, rows = 200 * 2, len(device.manifest.blocks), device.manifest.group_size
    assert after["rows"] - before["rows"] == groups * rounds * rows
    # They were computed together, not one by one.
    assert after["batches"] - before["batches"] < groups * rounds


def test_a_malformed_message_beside_good_ones(
    cluster: Served, device: TorchDevice, images: npt.NDArray[np.uint8], local: Floats
) -> None:
    good = wire.encode_request(
        np.zeros((4, *device.manifest.blocks[0].input_shape), np.float32), request_id="broken"
    )
    name = device.manifest.name

    async def run() -> None:
        async with Client(cluster.url, device) as client:
            transport = client.cloud.transport
            assert isinstance(transport, StreamTransport)
            for number in range(20):
                answers = await asyncio.gather(
                    client.infer(images[:8]),
                    # No id can be read from the first; the others are told what is wrong.
                    _quietly(transport.send(b"junk", f"junk-{number}", 0.2)),
                    transport.send(good[:-3], "broken", 5),
                )
                assert_same(answers[0], local[:8])
                assert answers[2].status == 400
            assert transport.connections == 1

    asyncio.run(run())
    request = urllib.request.Request(
        f"{cluster.url}/v2/models/{name}/infer", b"junk", {"content-type": wire.MEDIA_TYPE}
    )
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request, timeout=10)
    with raised.value as answer:
        assert answer.code == WireError.status
        assert list(json.load(answer)) == ["error"]


async def _quietly(work: Any) -> None:
    with pytest.raises(Exception, match="no answer within"):
        await work


def test_a_killed_replica_loses_nothing(
    cluster: Served, device: TorchDevice, images: npt.NDArray[np.uint8], local: Floats
) -> None:
    """kill -9 of the only replica while 20 clients infer: all get their answers, all right."""
    killed = False
    patience = ClientConfig(timeout_s=90, attempt_timeout_s=5, retry_reserve=100)

    async def one(number: int) -> int:
        nonlocal killed
        async with Client(cluster.url, device, config=patience) as client:
            for turn in range(15):
                if number == 0 and turn == 5:
                    os.kill(get(f"{cluster.url}/v2/stats")["pid"], signal.SIGKILL)
                    killed = True
                start = (number * 15 + turn) % 900
                assert_same(await client.infer(images[start : start + 8]), local[start : start + 8])
                if killed and turn > 10:
                    await asyncio.sleep(0)
            return client.retries

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*(one(number) for number in range(20)))

    before = get(f"{cluster.url}/v2/stats")["replica"]
    retries = asyncio.run(all_of_them())
    assert killed
    assert sum(retries) > 0, "nobody noticed, so the replica was not killed under load"
    assert get(f"{cluster.url}/v2/stats")["replica"] != before


def test_a_new_version_is_swapped_in_under_load(
    cluster: Served,
    device: TorchDevice,
    images: npt.NDArray[np.uint8],
    local: Floats,
    tmp_path: Path,
) -> None:
    """Load, promote, kill the replica, roll back, unload: 20 clients notice nothing but a retry."""
    newer = tmp_path / "newer"
    shutil.copytree(BUNDLE, newer)
    manifest = json.loads((newer / "manifest.json").read_text())
    name, version = manifest["name"], manifest["version"]
    (newer / "manifest.json").write_text(json.dumps(manifest | {"version": "next"}))
    other = TorchDevice(newer)
    done = threading.Event()

    async def one(number: int) -> int:
        device_ = (device, other)[number % 2]
        answered = 0
        async with Client(cluster.url, device_) as client:
            while not done.is_set():
                start = (number * 40 + answered) % 900
                assert_same(await client.infer(images[start : start + 4]), local[start : start + 4])
                answered += 1
        return answered

    def models(*words: str) -> str:
        result = _datamix("models", *words, "--address", cluster.address)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def current() -> str:
        return str(get(f"{cluster.url}/v2/models/{name}")["parameters"]["version"])

    assert "ready on every replica" in models("load", str(newer))

    async def all_of_them() -> list[int]:
        def commands() -> None:
            try:
                models("promote", name, "next")
                assert current() == "next"
                models("rollback", name)
                assert current() == version
                models("promote", name, "next")
            finally:
                done.set()

        work = asyncio.create_task(asyncio.to_thread(commands))
        answered = await asyncio.gather(*(one(number) for number in range(20)))
        await work
        return answered

    assert all(count > 0 for count in asyncio.run(all_of_them()))
    os.kill(get(f"{cluster.url}/v2/stats")["pid"], signal.SIGKILL)
    with SyncClient(cluster.url, other) as client:  # waits, and tries again
        assert_same(client.infer(images[:4]), local[:4])
    assert current() == "next"  # the new replica serves what the old one did
    models("rollback", name)
    models("unload", name, "next")
    (row,) = json.loads(models("list", "--json"))
    assert (row["version"], row["current"], row["ready"]) == (version, True, 1)


def test_a_fleet_is_answered_right(cluster: Served, tmp_path: Path) -> None:
    report = tmp_path / "fleet.json"
    command = ["simulate", "--url", cluster.url, "--bundle", cluster.bundle, "--devices", "200"]
    command += ["--rate", "30", "--duration", "5", "--json", str(report)]
    done = _datamix(*command)
    summary = json.loads(report.read_text())
    assert done.returncode in (0, 3), done.stderr  # 3: this machine could not make the load in time
    assert summary["wrong"] == summary["unsent"] == 0
    assert not summary["failed"]
    assert summary["ok"] == summary["inferences"] > 100


def test_infer_prints_a_class_per_file(
    cluster: Served, tmp_path: Path, images: npt.NDArray[np.uint8], local: Floats
) -> None:
    from PIL import Image

    np.save(tmp_path / "some.npy", images[:3, 0])
    Image.fromarray(images[3, 0]).save(tmp_path / "one.png")
    done = _datamix(
        "infer", "--url", cluster.url, "--bundle", cluster.bundle,
        str(tmp_path / "some.npy"), str(tmp_path / "one.png"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = TorchDevice(BUNDLE).manifest.class_names
    expected = [names[i] for i in local[:4].argmax(axis=1)]
    assert [line.rsplit(": ", 1)[1] for line in done.stdout.splitlines()] == expected


def test_an_unknown_model_is_404(cluster: Served) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        get(f"{cluster.url}/v2/models/nobody")
    with raised.value as answer:  # an error of urllib's holds on to its connection
        assert answer.code == 404


def test_ctrl_c_leaves_no_process() -> None:
    with serving("--engine", "null", "--echo-shape", "2,3,3", bundle=None) as served:
        assert get(f"{served.url}/v2/models/echo")["parameters"]["engine"] == "null"
        assert len(marked(served.mark)) > 5
    assert served.process.returncode == 0
    assert gone(served.mark, 5) == []


def test_ctrl_c_while_ray_starts_leaves_no_process() -> None:
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "demo"],
        cwd=ROOT,
        env={**os.environ, MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "starting Ray" in line:
            break
    while len(marked(mark)) < 2:  # gcs_server is up, so ray.init is in the middle of it
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert gone(mark, 5) == []


@pytest.mark.timeout(240)
def test_a_new_replica_gets_its_share_of_the_streams(
    device: TorchDevice, images: npt.NDArray[np.uint8], local: Floats
) -> None:
    """One of two replicas is killed under load: its successor takes streams over, none fails."""
    count = 24

    rotated: dict[str, int] = {}

    def open_streams(url: str) -> dict[str, int]:
        """Streams of every replica; each call of a new connection may reach another one."""
        found = {}
        for _ in range(12):
            with contextlib.suppress(OSError, http.client.HTTPException):  # one was just killed
                stats = get(f"{url}/v2/stats")
                found[stats["replica"]] = stats["open_streams"]
                rotated[stats["replica"]] = stats["streams_closed"].get("rotated", 0)
        return found

    def until(url: str, condition: Any) -> dict[str, int]:
        deadline = time.monotonic() + 60
        while not condition(streams := open_streams(url)):
            assert time.monotonic() < deadline, streams
            time.sleep(0.5)
        return streams

    with serving("--replicas", "2") as served:
        done = threading.Event()
        patience = ClientConfig(timeout_s=60, attempt_timeout_s=5, retry_reserve=100)

        async def one(number: int) -> int:
            answered = 0
            async with Client(served.url, device, config=patience) as client:
                while not done.is_set():
                    start = (number * 40 + answered) % 900
                    outputs = await client.infer(images[start : start + 4])
                    assert_same(outputs, local[start : start + 4])
                    answered += 1
                    await asyncio.sleep(0.3)  # the successor needs a processor to start, too
            return answered

        def commands() -> None:
            try:

                def both(streams: dict[str, int]) -> bool:
                    return len(streams) == 2 and min(streams.values()) >= count / 4

                before = until(served.url, both)
                os.kill(get(f"{served.url}/v2/stats")["pid"], signal.SIGKILL)
                after = until(served.url, lambda s: both(s) and s.keys() != before.keys())
                (survivor,) = before.keys() & after.keys()
                until(served.url, lambda streams: rotated[survivor] > 0 and both(streams))
            finally:
                done.set()

        async def all_of_them() -> list[int]:
            work = asyncio.create_task(asyncio.to_thread(commands))
            answered = await asyncio.gather(*(one(number) for number in range(count)))
            await work
            return answered

        assert all(number > 0 for number in asyncio.run(all_of_them()))


def test_a_taken_port_is_one_sentence(cluster: Served) -> None:
    port = cluster.url.rsplit(":", 1)[1]
    done = _datamix("serve", "--bundle", cluster.bundle, "--port", port)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"datamix: port {port} cannot be used")


@pytest.mark.timeout(300)
def test_the_demo_tells_the_truth(tmp_path: Path) -> None:
    figures, page = tmp_path / "demo.json", tmp_path / "demo.html"
    mark = uuid.uuid4().hex
    command = ["demo", "--devices", "300", "--rate", "20", "--duration", "5"]
    start = time.monotonic()
    done = _datamix(*command, "--json", str(figures), "--html", str(page), mark=mark)
    assert time.monotonic() - start < 240
    assert done.returncode in (0, 3), done.stderr
    assert gone(mark, 5) == []
    result = json.loads(figures.read_text())
    assert (done.returncode == 0) is result["valid"]
    assert result["clients"] == 300
    assert result["wrong"] == 0
    assert result["ok"] == result["inferences"]
    assert result["accuracy_cloud"] == pytest.approx(result["accuracy_local"], abs=0.01)
    assert result["accuracy_cloud"] > 0.85
    for field in (
        "invalid_reason", "offered_rate", "throughput", "rows_per_s", "failed", "retries", "unsent",
        "latency_s", "latency_from_send_s", "generator_lag_s", "batch_rows_mean",
        "engine_busy_ratio", "edge_flops_share", "bytes_up_per_input", "bytes_down_per_input",
        "rounds", "mode",
    ):  # fmt: skip
        assert field in result, field
    assert "obfuscation" in done.stdout
    html = page.read_text()
    assert "obfuscation" in html
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(["']?http""", html)


def _datamix(*arguments: str, mark: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, MARK: mark},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
