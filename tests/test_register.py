"""Architectures of one's own: registered by name, saved and loaded like those that come along."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from datamix.bundle import ArchitectureSpec, ImagePreprocessing, load_backbone, load_device
from datamix.bundle import save_bundle as save
from datamix.errors import BundleError, ConfigError
from datamix.models import Architecture, Options, SplitModel, build, register, split_model

ROOT = Path(__file__).parents[1]
VARIABLE = "DATAMIX_ARCHITECTURES"
MODULE = """
from datamix.models import build, register
from tests.test_register import tiny

register("{name}", tiny)
"""


@pytest.fixture(autouse=True)
def _nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["datamix.models.build"], "_registered", {})
    monkeypatch.delenv(VARIABLE, raising=False)


def tiny(options: Options) -> SplitModel:
    width = options.take("width", 4, 1, 64)
    layers = nn.Sequential(
        *(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(width * 16, 3)),
    )
    return split_model(layers, [2, 3], input_shape=(1, 8, 8), classes=3, linear=True)


def write(path: Path, architecture: Architecture) -> SplitModel:
    torch.manual_seed(0)
    model = build(architecture).eval()
    save(
        path,
        model,
        name="own",
        version="1",
        mode="mix",
        group_size=4,
        architecture=ArchitectureSpec(name=architecture.name, options=dict(architecture.options)),
        preprocessing=ImagePreprocessing(
            kind="image",
            input_shape=model.input_shape,
            mean=(0.5,) * model.input_shape[0],
            std=(0.5,) * model.input_shape[0],
        ),
        class_names=tuple(f"class {index}" for index in range(model.classes)),
        tolerance=0.01,
        metrics={},
    )
    return model


def the_same_from_disk(path: Path, model: SplitModel) -> None:
    inputs = torch.randn(2, *model.input_shape, generator=torch.Generator().manual_seed(1))
    _, stem, bridges, head = load_device(path)
    _, blocks = load_backbone(path)
    with torch.inference_mode():
        features = blocks[0](stem(inputs))
        for bridge, block in zip(bridges, list(blocks)[1:], strict=True):
            features = block(bridge(features))
        assert torch.equal(head(features), model(inputs))


def test_a_registered_network_is_saved_and_loaded(tmp_path: Path) -> None:
    register("tiny", tiny)
    model = write(tmp_path / "bundle", Architecture("tiny", {"width": 6}))
    assert model.linear
    the_same_from_disk(tmp_path / "bundle", model)


@pytest.mark.parametrize("cloud", ["relu", "linear", "prelu"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2"])
def test_so_is_one_that_comes_along(tmp_path: Path, name: str, cloud: str) -> None:
    options: dict[str, int | str] = {"width": 6, "rounds": 2, "cloud": cloud}
    the_same_from_disk(tmp_path / "b", write(tmp_path / "b", Architecture(name, options)))


def test_options_nobody_took_are_refused() -> None:
    register("tiny", tiny)
    with pytest.raises(ConfigError, match="tiny: unknown option 'colour'"):
        build(Architecture("tiny", {"colour": 1}))


@pytest.mark.parametrize("name", ["", "Tiny", "../tiny", "a b", "x" * 65, "-x"])
def test_odd_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="architecture is .*, expected"):
        register(name, tiny)


@pytest.mark.parametrize("name", ["resnet18", "convnet", "mine"])
def test_a_name_is_never_taken_over(name: str) -> None:
    if name == "mine":
        register(name, tiny)
    with pytest.raises(ConfigError, match=f"architecture '{name}' exists already"):
        register(name, tiny)


def test_a_server_imports_what_its_operator_names(tmp_path: Path) -> None:
    register("tiny-elsewhere", tiny)
    write(tmp_path / "bundle", Architecture("tiny-elsewhere"))
    (tmp_path / "mine.py").write_text(MODULE.format(name="tiny-elsewhere"))
    code = f"from datamix.bundle import load_backbone; load_backbone({str(tmp_path / 'bundle')!r})"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}

    def run(modules: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env=environment | {VARIABLE: modules},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    without, with_it = run(""), run("json, mine")
    assert without.returncode == 1 and "architecture is 'tiny-elsewhere', expected" in (
        without.stderr
    )
    assert with_it.returncode == 0, with_it.stderr


def test_a_module_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "no_such_module_anywhere")
    with pytest.raises(
        ConfigError, match=f"{VARIABLE}: 'no_such_module_anywhere' cannot be imported: ModuleNotF"
    ):
        build(Architecture("unheard-of"))
    # Names that come along need no imports.
    build(Architecture("convnet"))


def test_a_bundle_names_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest's architecture is looked up, and never imported."""
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    register("tiny", tiny)
    write(tmp_path / "bundle", Architecture("tiny"))
    manifest = tmp_path / "bundle" / "manifest.json"
    for name in ("evil", "evil.py", "evil:build"):
        manifest.write_text(manifest.read_text().replace('"name": "tiny"', f'"name": "{name}"'))
        with pytest.raises(BundleError, match="architecture is 'evil"):
            load_backbone(tmp_path / "bundle")
        assert "evil" not in sys.modules
        manifest.write_text(manifest.read_text().replace(f'"name": "{name}"', '"name": "tiny"'))
