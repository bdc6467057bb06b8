"""What `serve deploy` and Ray's working_dir take to the nodes, without a cluster."""

import zipfile
from pathlib import Path
from types import FunctionType

import pytest
import yaml
from pydantic import ValidationError
from ray._private.runtime_env.packaging import create_package
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from deployments.app import app
from deployments.config import Config

ROOT = Path(__file__).parents[1]


def test_serve_yaml_is_what_serve_and_the_application_expect() -> None:
    settings = yaml.safe_load((ROOT / "deployments/serve.yaml").read_text())
    schema = ServeDeploySchema.model_validate(settings)
    (application,) = schema.applications
    assert application.import_path == "deployments.app:app"
    config = Config(**application.args)
    assert config.device == "cuda"
    (bundle,) = config.bundles
    assert (ROOT / bundle / "manifest.json").exists()
    (deployment,) = application.deployments
    assert deployment.name == "Backbone"
    settings["applications"][0]["deployments"][0]["max_ongoing_requests"] = "many"
    with pytest.raises(ValidationError):
        ServeDeploySchema.model_validate(settings)


def test_serve_makes_the_settings_out_of_what_a_file_says() -> None:
    arguments = {"engine": "null", "echo_shape": [1, 2, 2]}
    assert isinstance(app, FunctionType)
    bound = call_user_app_builder_with_args_if_necessary(app, arguments)._bound_deployment
    assert bound.init_args == (Config(engine="null", echo_shape=(1, 2, 2)),)
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        call_user_app_builder_with_args_if_necessary(app, arguments | {"colour": "red"})


def test_a_bound_application_has_the_defaults_that_streams_need() -> None:
    bound = app(Config(engine="null", echo_shape=(1, 2, 2)))._bound_deployment
    assert bound.name == "Backbone"
    assert bound.max_ongoing_requests == 100_000
    assert bound._deployment_config.health_check_period_s == 1
    assert bound._deployment_config.max_surge_percent == 100
    assert (bound.ray_actor_options or {}).get("num_gpus") == 0


def test_the_devices_code_and_weights_stay_off_the_nodes(tmp_path: Path) -> None:
    """What Ray packs of the repository as a working_dir: the cloud's half, and nothing secret."""
    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True)
    names = set(zipfile.ZipFile(package).namelist())
    assert {"datamix/wire.py", "deployments/app.py", "deployments/serve.yaml"} <= names
    assert "bundles/fashion-mnist-mix/backbone.safetensors" in names
    assert {name.split("/")[0] for name in names if "/" in name} <= {
        "datamix", "deployments", "bundles",
    }  # fmt: skip
    assert not [name for name in names if name.endswith("device.safetensors")]
