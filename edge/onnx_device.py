"""The device's parts of the network behind numpy arrays: on onnxruntime, without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from datamix.bundle import Manifest, onnx_files
from datamix.errors import BundleError, ConfigError
from edge.device import Array, Floats, Part, Parts
from edge.onnx_files import INPUT, OUTPUT, load_onnx

_FATAL = 4  # onnxruntime writes to stderr what it raises as well


class OnnxDevice(Parts):
    """Stem, bridges and head as ``datamix export`` wrote them; see :class:`session.Device`.

    Safe to call from several threads: nothing changes after construction.
    """

    def __init__(self, bundle: str | Path, threads: int = 1) -> None:
        """Load a device's exported parts, and run each once.

        Args:
            bundle: folder, a local path or a URI; the safetensors files may be absent.
            threads: for one call of one part.

        Raises:
            BundleError: files that can't be read or trusted, or are not what the manifest declares.
            ConfigError: ``threads`` is below 1.
        """
        if threads < 1:
            raise ConfigError(f"threads is {threads}, expected at least 1")
        manifest, bodies = load_onnx(bundle)
        stem, *bridges, head = (
            load_part(file, bodies[file], inputs, outputs, threads)
            for file, (inputs, outputs) in part_shapes(manifest).items()
        )
        super().__init__(manifest, stem, bridges, head)


def part_shapes(manifest: Manifest) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """By the file of each part, the shapes of one row in and out."""
    blocks = manifest.blocks
    inputs = [manifest.preprocessing.input_shape, *(block.output_shape for block in blocks)]
    outputs = [*(block.input_shape for block in blocks), (len(manifest.class_names),)]
    return dict(zip(onnx_files(len(blocks)), zip(inputs, outputs, strict=True), strict=True))


def load_part(
    file: str, body: bytes, inputs: tuple[int, ...], outputs: tuple[int, ...], threads: int
) -> Part:
    """Make a function (n, *inputs) -> (n, *outputs), float32, of a file's bytes.

    They went through :func:`edge.onnx_files.check_program` before.

    Raises:
        BundleError: onnxruntime cannot run them, or the graph has another interface.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    try:
        session = onnxruntime.InferenceSession(body, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no other base
        raise BundleError(f"{file}: onnxruntime cannot load it: {_one_line(error)}") from None
    _check_interface(file, "input", session.get_inputs(), INPUT, inputs)
    _check_interface(file, "output", session.get_outputs(), OUTPUT, outputs)

    def run(array: Array) -> Floats:
        if not len(array):
            return np.empty((0, *outputs), np.float32)
        rows = np.ascontiguousarray(array, np.float32)
        output: Floats = session.run([OUTPUT], {INPUT: rows})[0]
        if output.shape != (len(rows), *outputs):
            raise BundleError(f"{file}: gave shape {output.shape}, expected {('n', *outputs)}")
        return output

    _try(file, run, inputs)
    return run


def _check_interface(
    file: str,
    what: str,
    found: list[onnxruntime.NodeArg],
    name: str,
    shape: tuple[int, ...],
) -> None:
    """Refuse anything but one float32 tensor of the declared name and shape, any rows."""
    if [(arg.name, arg.type) for arg in found] != [(name, "tensor(float)")]:
        got = [(arg.name[:64], arg.type[:64]) for arg in found][:4]
        raise BundleError(f"{file}: {what} is {got}, expected one float tensor {name!r}")
    rows, *row = found[0].shape or [None]
    if isinstance(rows, int) or tuple(row) != shape:
        raise BundleError(f"{file}: {what} has shape {found[0].shape}, expected {('n', *shape)}")


def _try(file: str, run: Part, inputs: tuple[int, ...]) -> None:
    """Run a part on zeros: a declared shape is a claim, and weights may hold NaN."""
    for rows in (1, 2):
        try:
            outputs = run(np.zeros((rows, *inputs), np.float32))
        except BundleError:
            raise
        except Exception as error:  # as above
            raise BundleError(f"{file}: onnxruntime cannot run it: {_one_line(error)}") from None
        if not np.isfinite(outputs).all():
            raise BundleError(f"{file}: gives NaN or Inf for zeros, expected finite values")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
