"""A trained model on disk: ``manifest.json`` and the weights of the two sides, apart.

    manifest.json          what the model is; names, shapes, hashes      (both sides)
    device.safetensors     stem, bridges, head                           (the device)
    backbone.safetensors   blocks                                        (the cloud)
    canaries.safetensors   what the blocks make of noise; optional       (the cloud)
    stem.onnx, ...         stem, bridges, head again, for a device without torch; optional

A bundle is foreign input. Reading checks the schema, the sizes, the sha256 of the exact bytes and
the name, type and shape of every tensor, and refuses what it does not know. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args

from pydantic import Field, FiniteFloat, ValidationError, model_validator

from datamix import canaries
from datamix.canaries import CANARIES, Canary
from datamix.errors import BundleError, ConfigError
from datamix.preprocessing import ImagePreprocessing as ImagePreprocessing
from datamix.preprocessing import LogMelPreprocessing as LogMelPreprocessing
from datamix.preprocessing import Preprocessing as Preprocessing
from datamix.schema import MAX_VALUES, Shape, Strict

if TYPE_CHECKING:
    from torch import Tensor, nn

    from datamix.models import SplitModel

_WeightFile = Literal["device.safetensors", "backbone.safetensors"]

MANIFEST = "manifest.json"
DEVICE: Final = "device.safetensors"
BACKBONE: Final = "backbone.safetensors"

MAX_MANIFEST_BYTES = 1 << 20
MAX_BLOCKS = 64
MAX_SIGMA = 4096
_MAX_HEADER_BYTES = 1 << 20  # of a safetensors file: names, types and shapes

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

Side = Literal["device", "backbone"]
Mode = Literal["mix", "bounded", "split"]
_FILES: Mapping[Side, _WeightFile] = {"device": DEVICE, "backbone": BACKBONE}

_Text = Annotated[str, Field(max_length=256)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_HashedFile = Annotated[
    str,
    Field(
        pattern=r"^((device|backbone|canaries)\.safetensors|(stem|head|bridge_[0-9]{1,2})\.onnx)$"
    ),
]


class BlockShape(Strict):
    """Shapes (C, H, W) of one block's rows, in and out."""

    input_shape: Shape
    output_shape: Shape

    @model_validator(mode="after")
    def _fits(self) -> BlockShape:
        for channels, height, width in (self.input_shape, self.output_shape):
            if channels * height * width > MAX_VALUES:
                raise ValueError(f"a row has more than {MAX_VALUES} values")
        return self


class ArchitectureSpec(Strict):
    """What :func:`datamix.models.build` needs."""

    name: _Text
    options: Annotated[dict[_Text, int | _Text], Field(max_length=64)] = {}


class SplitSpec(Strict):
    """How the bundle is used by two operators (docs/privacy.md).

    Attributes:
        sigma: deviation of the noise that hides features of mean square 1 at most.
        wire_dtype: value type of what leaves for the operator that gets the features; ``int16`` in
            steps that follow from sigma (docs/privacy.md).
        tolerance: as the manifest's, for de-noised block outputs with these two.
    """

    sigma: Annotated[FiniteFloat, Field(gt=0, le=MAX_SIGMA)]
    wire_dtype: Literal["float16", "int16", "float32"]
    tolerance: Annotated[FiniteFloat, Field(gt=0, le=1)]


class BoundedSpec(Strict):
    """The noise that was trained for and is never cancelled (docs/privacy.md).

    Attributes:
        sigma: its deviation, for features of mean square 1 at most.
    """

    sigma: Annotated[FiniteFloat, Field(gt=0, le=MAX_SIGMA)]


class Manifest(Strict):
    """What a bundle says about itself.

    Attributes:
        schema_version: of this file's layout.
        name: of the model, ``[a-z0-9][a-z0-9._-]{0,63}``.
        version: of the model, ``[0-9A-Za-z._-]{1,32}``.
        mode: for which mode it was trained (docs/privacy.md); a client's, unless it says otherwise.
        split: how two operators serve it; None where it was not made for that.
        bounded: its noise; None where it was not trained for that.
        group_size: K, how many inputs are mixed together.
        blocks: one entry per round.
        architecture: name and options for :func:`datamix.models.build`.
        preprocessing: from raw inputs to what the stem takes.
        class_names: one per output.
        wire_dtype: the type features were checked with on the wire.
        tolerance: largest error of de-mixed block outputs that is the arithmetic's (float16 on the
            wire, float32 in the cloud, errors of earlier rounds included), relative to
            ``max(1, |value|)``; more than that is somebody's bug.
        metrics: as recorded at training.
        hashes: sha256 of the exact bytes of both weight files and, where they are there, of the
            canaries and of all files of :func:`onnx_files`, a device's exported parts.
    """

    schema_version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    version: Annotated[str, Field(pattern=r"^[0-9A-Za-z._-]{1,32}$")]
    mode: Mode
    group_size: Annotated[int, Field(ge=1, le=1024)]
    blocks: Annotated[tuple[BlockShape, ...], Field(min_length=1, max_length=MAX_BLOCKS)]
    architecture: ArchitectureSpec
    preprocessing: Preprocessing
    class_names: Annotated[tuple[_Text, ...], Field(min_length=1, max_length=10_000)]
    wire_dtype: Literal["float16"]
    tolerance: Annotated[FiniteFloat, Field(gt=0, le=1)]
    metrics: Annotated[dict[_Text, FiniteFloat], Field(max_length=256)]
    hashes: dict[_HashedFile, _Sha256]
    split: SplitSpec | None = None
    bounded: BoundedSpec | None = None

    @model_validator(mode="after")
    def _complete(self) -> Manifest:
        exported = onnx_files(len(self.blocks))
        if set(self.hashes) - {CANARIES} not in (
            {DEVICE, BACKBONE},
            {DEVICE, BACKBONE, *exported},
        ):
            raise ValueError(
                f"hashes need {DEVICE} and {BACKBONE}, and with them all or none of "
                f"{', '.join(exported)}"
            )
        if self.mode != "mix" and self.mode not in self.modes:
            raise ValueError(f"mode is {self.mode!r}, but there is no {self.mode!r} entry")
        return self

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes that the bundle was made for, its own first."""
        others = {"split": self.split, "bounded": self.bounded}
        made: tuple[Mode, ...] = ("mix",) if self.mode == "mix" else ()
        made += tuple(name for name in get_args(Mode) if others.get(name) is not None)
        return tuple(sorted(made, key=lambda name: name != self.mode))

    @property
    def has_onnx(self) -> bool:
        """Whether the device's parts are there as ONNX files too."""
        return "stem.onnx" in self.hashes

    @property
    def shapes(self) -> list[tuple[Shape, Shape]]:
        """Of every block's rows, in and out."""
        return [(block.input_shape, block.output_shape) for block in self.blocks]


def onnx_files(blocks: int) -> tuple[str, ...]:
    """Names of a device's ONNX files for so many blocks: stem, bridges, head."""
    return ("stem.onnx", *(f"bridge_{index}.onnx" for index in range(blocks - 1)), "head.onnx")


def read_manifest(path: str | Path) -> Manifest:
    """Read and check a bundle's manifest; the weights are not touched.

    Args:
        path: the bundle's folder, a local path or a ``pyarrow.fs`` URI (``s3://``, ``gs://``...).

    Raises:
        BundleError: missing, unreadable, too large, or not a valid manifest.
    """
    body = read_file(path, MANIFEST, MAX_MANIFEST_BYTES)
    try:
        return Manifest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:64] for part in first["loc"]) or "the file"
        raise BundleError(f"{MANIFEST}: {where}: {_one_line(first['msg'])}") from None


def load_backbone(path: str | Path) -> tuple[Manifest, nn.ModuleList]:
    """Load the cloud's side: the blocks, in eval mode, float32. The device's file may be absent.

    Raises:
        BundleError: a file that is missing, changed, or not what the manifest declares.
    """
    manifest = read_manifest(path)
    model = _load_side(path, manifest, "backbone")
    return manifest, model.blocks


def load_device(path: str | Path) -> tuple[Manifest, nn.Module, nn.ModuleList, nn.Module]:
    """Load the device's side: stem, bridges and head, in eval mode, float32.

    The backbone's file may be absent.

    Raises:
        BundleError: a file that is missing, changed, or not what the manifest declares.
    """
    manifest = read_manifest(path)
    model = _load_side(path, manifest, "device")
    return manifest, model.stem, model.bridges, model.head


def load_canaries(path: str | Path) -> tuple[Canary, ...]:
    """Load the canaries of every block; empty where the bundle has none.

    Raises:
        BundleError: the file is missing, changed, or does not fit the manifest.
    """
    manifest = read_manifest(path)
    if CANARIES not in manifest.hashes:
        return ()
    body = read_file(path, CANARIES, canaries.most_bytes(manifest.shapes))
    _check_hash(manifest, CANARIES, body)
    return canaries.parse(body, manifest.shapes)


def add_canaries(path: str | Path) -> Manifest:
    """Give a local bundle that was saved without canaries its own; the model stays what it is.

    Raises:
        BundleError: it can't be read or written, or it has canaries.
    """
    manifest, blocks = load_backbone(path)
    folder = Path(path)
    if CANARIES in manifest.hashes:
        raise BundleError(f"bundle {str(path)!r} has canaries already, expected none")
    body = canaries.make(blocks, [inputs for inputs, _ in manifest.shapes])
    manifest = _with_hash(manifest, CANARIES, body)
    try:
        # The manifest last and in one step: whoever reads meanwhile finds a bundle without them.
        (folder / CANARIES).write_bytes(body)
        draft = folder / f".{MANIFEST}"
        draft.write_bytes(_text(manifest))
        draft.replace(folder / MANIFEST)
    except OSError as error:
        raise BundleError(f"canaries cannot be written: {_one_line(str(error))}") from None
    return manifest


def save_bundle(
    path: str | Path,
    model: SplitModel,
    *,
    name: str,
    version: str,
    mode: Mode,
    group_size: int,
    architecture: ArchitectureSpec,
    preprocessing: Preprocessing,
    class_names: tuple[str, ...],
    tolerance: float,
    metrics: Mapping[str, float],
    split: SplitSpec | None = None,
    bounded: BoundedSpec | None = None,
) -> Manifest:
    """Write a bundle to a new local folder.

    Everything is written beside ``path`` first and renamed in one step: a reader sees the whole
    bundle or none. An existing folder is never replaced.

    Raises:
        BundleError: ``path`` exists, or a field or shape is not valid.
    """
    from safetensors.torch import save

    from datamix.models import block_shapes

    target = Path(path)
    if target.exists():
        raise BundleError(f"{target} exists already, expected a new folder")
    files: dict[str, bytes] = {file: save(_tensors(model, side)) for side, file in _FILES.items()}
    try:
        manifest = Manifest.model_validate(
            {
                "schema_version": 1,
                "name": name,
                "version": version,
                "mode": mode,
                "group_size": group_size,
                "blocks": tuple(
                    BlockShape(input_shape=inputs, output_shape=outputs)
                    for inputs, outputs in block_shapes(model)
                ),
                "architecture": architecture,
                "preprocessing": preprocessing,
                "class_names": class_names,
                "wire_dtype": "float16",
                "tolerance": tolerance,
                "metrics": dict(metrics),
                "hashes": {file: hashlib.sha256(body).hexdigest() for file, body in files.items()},
                "split": split,
                "bounded": bounded,
            }
        )
    except ValidationError as error:
        raise BundleError(f"cannot save: {_one_line(str(error.errors()[0]['msg']))}") from None
    skeleton = _skeleton(manifest)
    _check_model(manifest, skeleton)
    # What a reader will get, in eval mode, whatever the model is in the middle of.
    skeleton.load_state_dict(_tensors(model, "backbone"), strict=False, assign=True)
    files[CANARIES] = canaries.make(skeleton.blocks, [inputs for inputs, _ in manifest.shapes])
    manifest = _with_hash(manifest, CANARIES, files[CANARIES])
    files[MANIFEST] = _text(manifest)
    write_folder(target, files)
    return manifest


def _with_hash(manifest: Manifest, file: str, body: bytes) -> Manifest:
    hashes = manifest.hashes | {file: hashlib.sha256(body).hexdigest()}
    return manifest.model_copy(update={"hashes": hashes})


def _text(manifest: Manifest) -> bytes:
    return (manifest.model_dump_json(indent=2) + "\n").encode()


# ------------------------------------------------------------------ weights


def _tensors(model: SplitModel, side: Side) -> dict[str, Tensor]:
    """The named tensors of one side."""
    return {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if name.startswith("blocks.") == (side == "backbone")
    }


def _skeleton(manifest: Manifest) -> SplitModel:
    """The declared architecture without values, so that a hostile one costs no memory."""
    import torch

    from datamix.models import Architecture, build

    spec = manifest.architecture
    try:
        with torch.device("meta"):
            return build(Architecture(spec.name, spec.options)).eval()
    except ConfigError as error:
        raise BundleError(f"{MANIFEST}: architecture: {error}") from None


def _check_model(manifest: Manifest, model: SplitModel) -> None:
    """Refuse a manifest whose shapes are not those of its own architecture."""
    from datamix.models import block_shapes

    actual = block_shapes(model)
    if manifest.shapes != actual:
        raise BundleError(f"{MANIFEST}: blocks are {manifest.shapes}, expected {actual}")
    if manifest.preprocessing.input_shape != model.input_shape:
        raise BundleError(
            f"{MANIFEST}: input_shape is {manifest.preprocessing.input_shape},"
            f" expected {model.input_shape}"
        )
    if len(manifest.class_names) != model.classes:
        raise BundleError(
            f"{MANIFEST}: {len(manifest.class_names)} class_names, expected {model.classes}"
        )


def _load_side(path: str | Path, manifest: Manifest, side: Side) -> SplitModel:
    """Fill one side of the declared model with checked weights; the other stays on meta."""
    import torch
    from safetensors.torch import load

    model = _skeleton(manifest)
    _check_model(manifest, model)
    expected = _tensors(model, side)
    values = sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    file = _FILES[side]
    body = read_file(path, file, values + _MAX_HEADER_BYTES)
    _check_hash(manifest, file, body)
    _check_header(file, body, expected)
    try:
        tensors = load(body)
    except Exception as error:  # safetensors raises its own type, and others on odd headers
        raise BundleError(f"{file}: not valid safetensors: {_one_line(str(error))}") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BundleError(f"{file}: tensor {name!r} holds NaN or Inf")
    model.load_state_dict(tensors, strict=False, assign=True)
    model.requires_grad_(False)
    return model


def _check_hash(manifest: Manifest, file: str, body: bytes) -> None:
    """Refuse a file that is not the one the manifest was written for."""
    if hashlib.sha256(body).hexdigest() != manifest.hashes[file]:
        raise BundleError(f"{file}: sha256 differs from the manifest's; the file was changed")


def _check_header(file: str, body: bytes, expected: Mapping[str, Tensor]) -> None:
    """Compare a safetensors header with the declared tensors before any value is read."""
    import torch

    names = {torch.float32: "F32", torch.int64: "I64"}
    try:
        (length,) = struct.unpack_from("<Q", body)
        if length > len(body) - 8:
            raise ValueError("the header is longer than the file")
        header: dict[str, Any] = json.loads(body[8 : 8 + length])
        found = {
            key: (entry["dtype"], tuple(entry["shape"]))
            for key, entry in header.items()
            if key != "__metadata__"
        }
    except (struct.error, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BundleError(f"{file}: not valid safetensors") from None
    wanted = {key: (names[tensor.dtype], tuple(tensor.shape)) for key, tensor in expected.items()}
    if extra := sorted(found.keys() - wanted.keys()):
        raise BundleError(f"{file}: unknown tensor {extra[0][:128]!r}")
    if missing := sorted(wanted.keys() - found.keys()):
        raise BundleError(f"{file}: tensor {missing[0]!r} is missing")
    for key, want in wanted.items():
        if found[key] != want:
            raise BundleError(f"{file}: tensor {key!r} is {found[key]}, expected {want}")


# ------------------------------------------------------------------ files


def read_file(path: str | Path, file: str, max_bytes: int) -> bytes:
    """Exact bytes of ``path/file``, refused unread when there are more than ``max_bytes``.

    Raises:
        BundleError: no such file, too large, or it cannot be read.
    """
    read = _read_uri if isinstance(path, str) and _URI.match(path) else _read_local
    try:
        body = read(path, file, max_bytes)
    except (OSError, ValueError) as error:
        raise BundleError(f"{file} cannot be read: {_one_line(str(error))}") from None
    if len(body) > max_bytes:
        raise BundleError(f"{file} has more than {max_bytes} bytes")
    return body


def _read_local(path: str | Path, file: str, max_bytes: int) -> bytes:
    full = Path(path) / file
    if not full.is_file():
        raise BundleError(f"no {file} in bundle {str(path)!r}")
    _check_size(file, full.stat().st_size, max_bytes)
    with open(full, "rb") as stream:
        return stream.read(max_bytes + 1)


def _read_uri(path: str | Path, file: str, max_bytes: int) -> bytes:
    try:
        import pyarrow.fs  # with the clients of all clouds
    except ModuleNotFoundError:
        raise BundleError(f"bundle {str(path)!r} is a URI, which takes pyarrow to read") from None
    try:
        system, folder = pyarrow.fs.FileSystem.from_uri(path)
        full = f"{folder.rstrip('/')}/{file}"
        info = system.get_file_info(full)
        if info.type != pyarrow.fs.FileType.File:
            raise BundleError(f"no {file} in bundle {str(path)!r}")
        _check_size(file, info.size, max_bytes)
        with system.open_input_stream(full) as stream:
            return bytes(stream.read(max_bytes + 1))
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None


def _check_size(file: str, found: int | None, max_bytes: int) -> None:
    if found is None or found > max_bytes:
        raise BundleError(f"{file} has {found} bytes, expected at most {max_bytes}")


def write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Write a new folder in one step: a reader sees all files or none.

    Raises:
        BundleError: it cannot be written, or it came into being meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for file, body in files.items():
            with open(temporary / file, "wb") as stream:
                stream.write(body)
                stream.flush()
                os.fsync(stream.fileno())
        temporary.chmod(0o755)
        # Fails on a folder that came into being meanwhile, unless that one is empty.
        temporary.rename(target)
    except OSError as error:
        raise BundleError(f"bundle cannot be written: {_one_line(str(error))}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
