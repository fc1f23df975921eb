"""How many of what: the arguments of `serve run`, and the deployments they make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from engines.backend import Opening
from engines.errors import OptionError
from runtime.serve.ray.bundles import is_remote
from runtime.serve.ray.front import Front
from runtime.serve.ray.replica import Replica
from runtime.serve.ray.router import ImageRouter
from runtime.serve.settings import Settings, read_api_key

FRONT_CPUS = 0.1  # of one front: it hashes and copies


@dataclass(frozen=True)
class Cluster:
    """What runs where. OptionError for what cannot be.

    bundle: path of its folder, the same on every machine; or a URL that fsspec reads, such as s3://bucket/name. digest:
    of the bundle, "sha256:..."; a URL needs it. cache: folder on every machine for bundles from URLs, None = under the
    user's cache folder. replicas: engines; max_replicas: so many when there is work for them, None = no more. ongoing:
    requests that one replica holds at most, one of which it answers. spill: by so many more than another replica holds,
    one has too many for a question about an image that it has encoded. busy: requests of one
    replica, on average, above which there are more replicas and below which fewer. cpus, gpus: of a replica; cpus are
    also its threads unless `threads` says otherwise. fronts: processes that hash images and pass requests on. affinity:
    questions about one image go to one replica; False = to whichever is less busy. api_key_file: file with the API key,
    read where the cluster is told what to run; or FLEX_API_KEY in the environment there. verify: check the SHA-256 of
    each file.
    """

    bundle: str
    digest: str | None = None
    cache: Path | None = None
    replicas: int = 1
    max_replicas: int | None = None
    ongoing: int = 16
    spill: int = 8
    busy: float = 2.0
    cpus: float = 1.0
    gpus: float = 0.0
    fronts: int = 1
    affinity: bool = True
    api_key_file: Path | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        for name in ("replicas", "ongoing", "spill", "fronts"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)}", expected="at least 1")
        for name, least in (("busy", 0.01), ("cpus", 0.01), ("gpus", 0.0)):
            value = getattr(self, name)
            if not math.isfinite(value) or value < least:
                raise OptionError(f"{name}={value}", expected=f"a number from {least:g} on")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise OptionError(f"max_replicas={self.max_replicas}", expected=f"replicas={self.replicas} or more")
        if not is_remote(self.bundle) and not Path(self.bundle).is_absolute():
            # A replica's current folder is Ray's own.
            object.__setattr__(self, "bundle", str(Path(self.bundle).resolve()))


def deployment(arguments: dict[str, Any]) -> Application:
    """What `serve run runtime.serve.ray:deployment NAME=VALUE ...` runs, and `import_path` of a config file. NAME, in
    small or capital letters: a field of `Cluster`, of `runtime.serve.Settings`, or of `engines.backend.Opening`.
    OptionError for what is none, or out of range."""
    given = {name.lower(): value for name, value in arguments.items()}
    known = {each.name: kind for kind in (Cluster, Settings, Opening) for each in fields(kind)}
    known.pop("api_key")  # never where it would be shown: Ray's dashboard lists the arguments
    for name in given:
        if name not in known:
            raise OptionError(
                f"the argument {name.upper():.100}", expected=f"one of {', '.join(sorted(known)).upper()}"
            )
    cluster = _made(Cluster, given, known)
    key = read_api_key(cluster.api_key_file)
    settings = _made(Settings, {**given, "api_key": key}, {**known, "api_key": Settings})
    if cluster.ongoing > settings.queue:
        raise OptionError(
            f"ONGOING={cluster.ongoing}", expected=f"at most QUEUE={settings.queue}, which a replica holds"
        )
    opening = {each.name: getattr(_made(Opening, given, known), each.name) for each in fields(Opening)}
    opening["threads"] = opening["threads"] or max(1, math.ceil(cluster.cpus))
    return _application(cluster, settings, {**opening, "verify": cluster.verify})


def _made(kind: type[Any], given: Mapping[str, Any], known: Mapping[str, type[Any]]) -> Any:
    """A dataclass of texts, as a command line has them, or of what YAML makes of them."""
    own = {name: value for name, value in given.items() if known[name] is kind}
    if isinstance(own.get("hosts"), str):
        own["hosts"] = own["hosts"].split(",")
    required = [each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING]
    if missing := [name for name in required if name not in own]:
        name = missing[0].upper()
        raise OptionError(
            f"no {name}", expected=f"{name}=...", fix=f"serve run runtime.serve.ray:deployment {name}=..."
        )
    try:
        return TypeAdapter(kind).validate_python(own)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = str(first["loc"][0])
        raise OptionError(
            f"{name.upper()}={own[name]!s:.100}", expected=first["msg"].removeprefix("Input should be ")
        ) from None


def _application(cluster: Cluster, settings: Settings, opening: dict[str, Any]) -> Application:
    count: dict[str, Any] = {"num_replicas": cluster.replicas}
    if cluster.max_replicas is not None:
        count = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=cluster.replicas,
                max_replicas=cluster.max_replicas,
                target_ongoing_requests=cluster.busy,
                upscale_delay_s=5.0,  # Ray's 30 s are for replicas that take minutes to start
                look_back_period_s=15.0,
            )
        }
    routed = (
        {
            "request_router_config": RequestRouterConfig(
                request_router_class=ImageRouter, request_router_kwargs={"spill": cluster.spill}
            )
        }
        if cluster.affinity
        else {}
    )
    replicas = serve.deployment(
        Replica,
        **count,
        **routed,
        ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
        max_ongoing_requests=cluster.ongoing,
        max_queued_requests=settings.queue * (cluster.max_replicas or cluster.replicas),
        graceful_shutdown_timeout_s=settings.grace,
        graceful_shutdown_wait_loop_s=0.5,
    ).bind(cluster.bundle, cluster.digest, cluster.cache, settings, opening)
    return serve.deployment(
        serve.ingress()(Front),
        num_replicas=cluster.fronts,
        ray_actor_options={"num_cpus": FRONT_CPUS},
        max_ongoing_requests=settings.connections,
        graceful_shutdown_timeout_s=settings.grace,
        graceful_shutdown_wait_loop_s=0.5,
    ).bind(settings, replicas)
