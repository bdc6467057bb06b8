"""Several processes that train one network: by themselves, and placed by Ray."""

import dataclasses
import gzip
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.ray_training import Task, train_together
from datamix.bundle import read_manifest
from datamix.errors import ConfigError, DataMixError
from edge.augment import Augmentation
from edge.batches import Batches
from edge.data import load_sample
from edge.workers import Alone
from tests.test_fit import CONFIG, same

SETTINGS = dataclasses.replace(CONFIG, optimizer="muon", validate=0.1)

SCRIPT = """
import itertools, sys
from datetime import timedelta
from pathlib import Path
import torch
from torch import distributed
import tests.test_workers as here
from edge.data import load_dataset
from edge.train import train
from edge.workers import ProcessGroup
rank, store, data, output, stop = int(sys.argv[1]), *sys.argv[2:5], int(sys.argv[5])
distributed.init_process_group(
    "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
)
import edge.fit
whole = edge.fit.Learner.finish
def finish(learner):
    whole(learner)
    torch.save(learner.part.state_dict(), f"{output}.rank{rank}.pt")
edge.fit.Learner.finish = finish
asked = itertools.count(1)
sets = [load_dataset("fashion-mnist", split, data) for split in ("train", "test")]
try:
    train(
        here.SETTINGS, *sets, Path(output), workers=ProcessGroup(),
        stop=lambda: rank == 1 and next(asked) == stop,
    )
except KeyboardInterrupt:
    print("stopped", rank)
distributed.destroy_process_group()
"""


def pair(folder: Path, data: Path, output: Path, stop: int = 0) -> str:
    """Train with two processes of torch's own; what they printed."""
    root = Path(__file__).parents[1]
    store = folder / f"store-{len(list(folder.iterdir()))}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), *map(str, (store, data, output, stop))],
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    printed = [process.communicate(timeout=150)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert printed[1].replace("stopped 1\n", "") == ""  # number 0 speaks for both
    return printed[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Fashion-MNIST in its own layout."""
    folder = tmp_path_factory.mktemp("data")
    sample = load_sample()
    images = sample.inputs[:]
    for stem, start, end in (("train", 0, 320), ("t10k", 900, 1000)):
        for kind, values in (("images-idx3", images[:, 0]), ("labels-idx1", sample.labels)):
            part = values[start:end].astype(np.uint8)
            header = bytes((0, 0, 8, part.ndim)) + struct.pack(f">{part.ndim}I", *part.shape)
            body = gzip.compress(header + part.tobytes())
            (folder / f"{stem}-{kind}-ubyte.gz").write_bytes(body)
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The bundle of two processes that nobody interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    pair(folder, data, folder / "bundle")
    return folder / "bundle"


def bundle_files(bundle: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in bundle.iterdir() if f.suffix == ".safetensors"}


def test_shares_make_up_the_batch_of_one_worker() -> None:
    sample = load_sample()
    plain = dataclasses.replace(CONFIG, augmentation=Augmentation())
    alone = Batches(sample, plain)
    shares = [Batches(sample, plain, rank, 4) for rank in range(4)]
    for step in (0, 3, alone.per_epoch):
        whole, parts = alone(step), [share(step) for share in shares]
        assert all(len(part.labels) == 8 for part in parts)
        torch.testing.assert_close(torch.cat([part.inputs for part in parts]), whole.inputs)
        torch.testing.assert_close(torch.cat([part.labels for part in parts]), whole.labels)
    with pytest.raises(ConfigError, match="batch_size is 32, expected a multiple of the 3 workers"):
        Batches(sample, plain, 0, 3)


def test_alone_is_a_group_of_one() -> None:
    tensor = torch.ones(2)
    Alone().average([tensor])
    assert (Alone().rank, Alone().size, Alone().any(True), Alone().share(3)) == (0, 1, True, 3)
    assert torch.equal(tensor, torch.ones(2))


def test_both_workers_have_the_same_network(straight: Path) -> None:
    one, other = (torch.load(f"{straight}.rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(one, other)
    assert all(torch.isfinite(tensor).all() for tensor in one.values())
    metrics = read_manifest(straight).metrics
    assert abs(metrics["accuracy_mixed"] - metrics["accuracy_unmixed"]) <= 0.02


def test_workers_stop_together_and_go_on_bit_for_bit(
    tmp_path: Path, data: Path, straight: Path
) -> None:
    first = pair(tmp_path, data, tmp_path / "bundle", stop=4)
    assert "stopped 0" in first  # though it was the other one that was asked to
    second = pair(tmp_path, data, tmp_path / "bundle")
    assert "through-the-cloud: going on from step 4 of 18" in second
    assert bundle_files(tmp_path / "bundle") == bundle_files(straight)


@pytest.mark.parametrize(
    ("changes", "workers", "sentence"),
    [
        ({}, 1, "workers is 1, expected at least 2"),
        ({"batch_size": 30}, 4, "batch_size is 30, expected a multiple of the 4 workers"),
        ({"budget_cpu_s": 9.0}, 2, "budget_cpu_s is given with several workers"),
    ],
)
def test_what_cannot_work_is_refused_before_ray_starts(
    tmp_path: Path, changes: dict[str, object], workers: int, sentence: str
) -> None:
    config = dataclasses.replace(SETTINGS, **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=sentence):
        train_together(Task(config, "fashion-mnist", None, str(tmp_path / "b")), workers)


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """One Ray for both tests: starting it takes longer than training."""
    import ray

    ray.init(include_dashboard=False, num_cpus=3)
    yield
    ray.shutdown()


@pytest.mark.cluster
@pytest.mark.timeout(500)
@pytest.mark.filterwarnings("ignore")  # Ray's own, in its modules and at its exit
def test_ray_places_two_workers_that_go_on_where_others_stopped(
    tmp_path: Path, data: Path, straight: Path, ray_here: None
) -> None:
    output = tmp_path / "bundle"
    pair(tmp_path, data, output, stop=4)
    task = Task(SETTINGS, "fashion-mnist", str(data), str(output), str(tmp_path / "board"))
    train_together(task, 2)
    assert bundle_files(output) == bundle_files(straight)
    assert any((tmp_path / "board").iterdir())
    assert not (tmp_path / "bundle.training").exists()


@pytest.mark.cluster
@pytest.mark.timeout(500)
@pytest.mark.filterwarnings("ignore")
def test_a_worker_that_fails_is_one_sentence(tmp_path: Path, data: Path, ray_here: None) -> None:
    task = Task(SETTINGS, "cifar10", str(data), str(tmp_path / "bundle"))
    with pytest.raises(DataMixError, match="^a worker failed: no cifar10 files in .*") as caught:
        train_together(task, 2)
    assert "\n" not in str(caught.value)
