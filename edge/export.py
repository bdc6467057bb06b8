"""A bundle's device parts as ONNX files, so that a device needs no torch (`datamix export`).

Each part is traced by torch, with batch norms folded into the convolutions before them, looked
through as a device will do, run by onnxruntime and compared with torch, before anything is written.

Of torch's two exporters this is the one over TorchScript: the other needs onnxscript besides onnx,
and torch is held to one minor release, so this one does not go away unnoticed.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path

import numpy as np
import onnx.checker
import torch
from torch import nn

from datamix.bundle import BACKBONE, DEVICE, MANIFEST, Manifest, load_device, write_folder
from datamix.errors import BundleError, ConfigError
from edge.onnx_device import load_part, part_shapes
from edge.onnx_files import INPUT, OPSET, OUTPUT, check_program

TOLERANCE = 1e-5
"""Largest difference between onnxruntime and torch, relative to the output's largest value or 1.

Not to each value: where large terms cancel, float32 leaves either of them that far from the truth.
"""
_SIZES = (1, 3, 8)  # rows of the batches compared


def default_output(bundle: str) -> Path:
    """The bundle's folder with ``-onnx`` behind its name.

    Raises:
        ConfigError: the bundle is a URI, which has no folder here.
    """
    if "://" in bundle:
        raise ConfigError(f"bundle {bundle!r} is a URI, expected an output folder beside it")
    path = Path(bundle).absolute()
    return path.with_name(f"{path.name}-onnx")


def export(bundle: str | Path, output: Path) -> Manifest:
    """Write a device's folder: the manifest and the ONNX files, all that a device needs.

    Args:
        bundle: folder or URI of the bundle; ``backbone.safetensors`` may be absent.
        output: the new folder.

    Returns:
        The manifest with the files' hashes.

    Raises:
        BundleError: the bundle can't be read or trusted, ``output`` exists, or a part can't be
            exported or computes something else afterwards; then nothing is written.
    """
    if output.exists():
        raise BundleError(f"{output} exists already, expected a new folder")
    manifest, stem, bridges, head = load_device(bundle)
    modules = [stem, *bridges, head]
    files = {}
    for module, (file, (inputs, outputs)) in zip(
        modules, part_shapes(manifest).items(), strict=True
    ):
        files[file] = trace(file, module, inputs)
        check_program(file, files[file])
        compare(file, files[file], module, inputs, outputs)
    hashes = {file: manifest.hashes[file] for file in (DEVICE, BACKBONE)}
    hashes |= {file: hashlib.sha256(body).hexdigest() for file, body in files.items()}
    manifest = manifest.model_copy(update={"hashes": hashes})
    files[MANIFEST] = (manifest.model_dump_json(indent=2) + "\n").encode()
    write_folder(output, files)
    return manifest


def trace(file: str, module: nn.Module, inputs: tuple[int, ...]) -> bytes:
    """One part, in eval mode, as an ONNX file for any number of rows of shape ``inputs``.

    Raises:
        BundleError: it does something that has no ONNX operator.
    """
    body = io.BytesIO()
    try:
        with warnings.catch_warnings():
            # Of the exporter itself: see this module's docstring.
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.onnx.export(
                module,
                (torch.zeros(2, *inputs),),
                body,  # type: ignore[arg-type]  # this exporter takes streams too
                dynamo=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes={INPUT: {0: "n"}, OUTPUT: {0: "n"}},
            )
        onnx.checker.check_model(body.getvalue(), full_check=True)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        torch.onnx.errors.OnnxExporterError,
        onnx.checker.ValidationError,
    ) as error:
        sentence = " ".join(str(error).split())[:300]
        raise BundleError(f"{file}: torch cannot export this part: {sentence}") from None
    return body.getvalue()


def compare(
    file: str,
    body: bytes,
    module: nn.Module,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
) -> None:
    """Refuse a file that onnxruntime answers otherwise than torch answers ``module``.

    Raises:
        BundleError: by more than ``TOLERANCE``, in a value of some random batch.
    """
    run = load_part(file, body, inputs, outputs, threads=1)
    random = np.random.default_rng(0)
    for rows in _SIZES:
        batch = random.standard_normal((rows, *inputs)).astype(np.float32)
        with torch.inference_mode():
            expected = module(torch.from_numpy(batch)).numpy()
        error = float(np.abs(run(batch) - expected).max() / max(1.0, np.abs(expected).max()))
        if not error <= TOLERANCE:
            raise BundleError(
                f"{file}: onnxruntime differs from torch by {error:.2g}, expected at most"
                f" {TOLERANCE:g}"
            )
