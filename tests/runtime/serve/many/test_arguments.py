"""What `serve run runtime.serve.ray:deployment NAME=VALUE` takes; without a cluster."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")

from engines.backend import Opening
from engines.errors import OptionError
from runtime.serve import Settings
from runtime.serve.ray import Cluster, deployment
from runtime.serve.ray.router import ImageRouter
from runtime.serve.settings import KEY_VARIABLE
from tests.paths import ROOT

KEY = "a-key-of-24-characters-x"


def made(**arguments: object) -> tuple:
    """The front, the replicas, and what these are started with."""
    front = deployment({"BUNDLE": "/b", **arguments})._bound_deployment
    replicas = front.init_args[1]._bound_deployment
    return front, replicas, replicas.init_args


def test_defaults():
    front, replicas, (bundle, digest, cache, settings, opening) = made()
    assert (front.name, front.num_replicas, replicas.name, replicas.num_replicas) == ("Front", 1, "Replica", 1)
    assert (bundle, digest, cache, settings) == ("/b", None, None, Settings())
    assert opening == {**vars(Opening()), "threads": 1, "verify": True}
    assert replicas._deployment_config.request_router_config.get_request_router_class() is ImageRouter


def test_texts_of_a_command_line_and_values_of_a_config_file():
    for arguments in (
        {"REPLICAS": "2", "CPUS": "1.5", "GPUS": "0.5", "QUEUE": "20", "GRACE": "3", "HOSTS": "a,b", "CACHE": "/c"},
        {"replicas": 2, "cpus": 1.5, "gpus": 0.5, "queue": 20, "grace": 3.0, "hosts": ["a", "b"], "cache": "/c"},
    ):
        front, replicas, (_, _, cache, settings, opening) = made(**arguments)
        assert replicas.num_replicas == 2 and replicas.ray_actor_options == {"num_cpus": 1.5, "num_gpus": 0.5}
        assert replicas._deployment_config.graceful_shutdown_timeout_s == 3
        assert replicas._deployment_config.max_queued_requests == 40, "as many as two would hold alone"
        assert (settings.queue, settings.hosts, cache) == (20, ("a", "b"), Path("/c")) and opening["threads"] == 2
        assert front.init_args[0] == settings, "both check the same"


def test_more_replicas_when_there_is_work():
    _, replicas, _ = made(REPLICAS="1", MAX_REPLICAS="8", BUSY="1.5")
    scaling = replicas._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 8, 1.5)


def test_the_key_is_no_argument(monkeypatch, tmp_path):
    """Ray's dashboard shows the arguments."""
    with pytest.raises(OptionError, match="the argument API_KEY"):
        made(API_KEY=KEY)
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    front, _, (*_, settings, _) = made()
    assert settings.api_key == KEY and front.init_args[0].api_key == KEY
    monkeypatch.delenv(KEY_VARIABLE)
    (tmp_path / "key").write_text(f"{KEY}\n")
    assert made(API_KEY_FILE=str(tmp_path / "key"))[2][3].api_key == KEY


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"REPLICA": "2"}, "the argument REPLICA"),
        ({"REPLICAS": "two"}, "REPLICAS=two"),
        ({"REPLICAS": "0"}, "replicas=0"),
        ({"REPLICAS": "3", "MAX_REPLICAS": "2"}, "max_replicas=2"),
        ({"CPUS": "nan"}, "cpus=nan"),
        ({"ONGOING": "40"}, "ONGOING=40"),
        ({"QUEUE": "0"}, "queue=0"),
    ],
)
def test_what_cannot_be_is_said(arguments, found):
    with pytest.raises(OptionError) as caught:
        made(**arguments)
    assert caught.value.found.startswith(found) and caught.value.expected


def test_a_bundle_is_needed():
    with pytest.raises(OptionError, match="no BUNDLE") as caught:
        deployment({})
    assert caught.value.fix.endswith("BUNDLE=...")


def test_documentation_names_every_argument():
    text = (ROOT / "docs/scaling.md").read_text()
    missing = [each.name for each in fields(Cluster) if f"`{each.name.upper()}`" not in text]
    assert not missing


def test_the_example_names_nothing_else():
    (application,) = yaml.safe_load((ROOT / "examples/serve.yaml").read_text())["applications"]
    known = {each.name for kind in (Cluster, Settings, Opening) for each in fields(kind)}
    assert application["import_path"] == "runtime.serve.ray:deployment" and set(application["args"]) <= known
    deployment(application["args"])
