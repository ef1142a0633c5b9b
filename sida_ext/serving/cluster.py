"""``sida serve --ray``: the HTTP application before replicas on a Ray cluster, each with experts and a budget of its
own.

``serve run sida_ext.serving.cluster:app model=FOLDER expert_memory=4GiB replicas=2`` starts the same.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

try:
    import ray
    from ray import serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig
except ImportError as error:
    raise ImportError(
        f"serving on a cluster needs {error.name}, which is not installed: pip install 'sida_ext[ray]'"
    ) from error

from fastapi import FastAPI

from sida_ext.experts.options import NAMES, Options
from sida_ext.progress import console
from sida_ext.serving.command import served_name
from sida_ext.serving.replica import Replica, ReplicaArguments
from sida_ext.serving.scheduler import Limits
from sida_ext.serving.settings import ServerSettings

__all__ = ["INGRESS", "REPLICAS", "Shape", "app", "application", "run"]

INGRESS, REPLICAS = "sida-ingress", "sida-replicas"


@dataclass(frozen=True)
class Shape:
    """How a cluster is laid out.

    Args:
        replicas: how many; ``"1-4"``: as many of these as the load asks for.
        cpus: of each replica: what Ray sets aside, and the threads that it computes with.
        memory: of each replica in bytes, which Ray sets aside; 0: none.
        gpus: of each replica, which Ray sets aside.
        imbalance: see :class:`~sida_ext.serving.expert_routing.ExpertRouting`; 0: Ray's own routing.
        report_seconds: between two reports of a replica.

    Raises:
        ValueError: names the argument.
    """

    replicas: str | int = 1
    cpus: float = 1.0
    memory: int = 0
    gpus: float = 0.0
    imbalance: float = 1.25
    report_seconds: float = 1.0

    def __post_init__(self) -> None:
        least, most = self.range
        if not 1 <= least <= most:
            raise ValueError(f"replicas is {self.replicas!r}, expected a number of at least 1, or two such as '1-4'")
        if not self.cpus > 0:
            raise ValueError(f"cpus is {self.cpus}, expected more than 0")
        if not (self.imbalance == 0 or self.imbalance >= 1):
            raise ValueError(f"imbalance is {self.imbalance}, expected at least 1, or 0 for Ray's own routing")
        if not self.report_seconds > 0:
            raise ValueError(f"report_seconds is {self.report_seconds}, expected more than 0")

    @property
    def range(self) -> tuple[int, int]:
        """The fewest and the most replicas."""
        parts = str(self.replicas).split("-")
        if len(parts) > 2 or not all(part.isdecimal() for part in parts):
            return 0, 0
        return int(parts[0]), int(parts[-1])


def application(arguments: ReplicaArguments, shape: Shape, settings: ServerSettings) -> serve.Application:
    """The Ray Serve application: an ingress with the HTTP application, and the replicas behind it."""
    least, most = shape.range
    limits = arguments.limits
    router: dict[str, Any] = {"request_routing_stats_period_s": shape.report_seconds}
    if shape.imbalance:
        router |= {
            "request_router_class": "sida_ext.serving.request_router:ExpertRequestRouter",
            "request_router_kwargs": {"imbalance": shape.imbalance},
        }
    scale: dict[str, Any] = {"num_replicas": least}
    if most > least:
        scaling = AutoscalingConfig(min_replicas=least, max_replicas=most, target_ongoing_requests=limits.rows)
        scale = {"autoscaling_config": scaling}
    needs = {"num_cpus": shape.cpus, "num_gpus": shape.gpus} | ({"memory": shape.memory} if shape.memory else {})
    replicas: Any = serve.deployment(
        Replica,
        name=REPLICAS,
        ray_actor_options=needs,
        # A replica's batch is full and the next one waits for it; more go to the next best replica, or wait before all.
        max_ongoing_requests=2 * limits.rows,
        max_queued_requests=limits.queue,
        request_router_config=RequestRouterConfig(**router),
        graceful_shutdown_timeout_s=settings.drain,
        health_check_period_s=2.0,
        **scale,
    )

    def build() -> FastAPI:
        from sida_ext.serving.cluster_service import ClusterService
        from sida_ext.serving.server import create_app

        name = serve.get_replica_context().app_name
        return create_app(
            ClusterService(arguments, settings, name, lambda: serve.get_deployment_handle(REPLICAS, name))
        )

    ingress_class: Any = serve.ingress(build)()
    ingress: Any = serve.deployment(
        ingress_class,
        name=INGRESS,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=limits.queue + most * 2 * limits.rows,
        graceful_shutdown_timeout_s=settings.drain,
    )
    return ingress.bind(replicas.bind(arguments))


def run(
    arguments: ReplicaArguments,
    shape: Shape,
    settings: ServerSettings,
    host: str,
    port: int,
    address: str | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; running requests then have ``settings.drain`` seconds.

    Args:
        host, port: where every machine's proxy listens.
        address: of a Ray cluster; None: ``$RAY_ADDRESS``, else one of this machine alone is started.

    Raises:
        ValueError: the cluster is too small for the fewest replicas, which would wait for ever.
    """
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.WARNING)
    try:
        _check_room(shape, ray.cluster_resources())
        serve.start(http_options={"host": host, "port": port})
        serve.run(application(arguments, shape, settings), name="sida", route_prefix="/")
        console.print(
            f"serving {arguments.name} at http://{host}:{port} with {shape.replicas} replicas",
            markup=False,
            highlight=False,
        )
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        ended.wait()
        serve.delete("sida")
        serve.shutdown()
    finally:
        ray.shutdown()


def _check_room(shape: Shape, found: dict[str, float]) -> None:
    least = shape.range[0]
    for name, needed in (("CPU", shape.cpus), ("GPU", shape.gpus), ("memory", shape.memory)):
        if least * needed > found.get(name, 0.0):
            raise ValueError(
                f"{least} replicas of {needed:g} {name} need {least * needed:g}; the Ray cluster has "
                f"{found.get(name, 0.0):g}"
            )


def app(given: dict[str, str]) -> serve.Application:
    """What ``serve run sida_ext.serving.cluster:app`` builds.

    Args:
        given: ``model``, and what ``sida serve --ray`` takes, with underscores: the fields of :class:`Shape`, of
            ``Limits``, of ``ServerSettings`` and of ``Options``, ``name``, ``context`` and ``predictor``.

    Raises:
        ValueError: an unknown or unreadable argument, or no model.
    """
    rest = dict(given)
    if "model" not in rest:
        raise ValueError("there is no model: serve run sida_ext.serving.cluster:app model=FOLDER")
    model = rest.pop("model")
    shape, limits = Shape(**_taken(Shape, rest)), Limits(**_taken(Limits, rest))
    settings = ServerSettings(**_taken(ServerSettings, rest))
    name, predictor = rest.pop("name", None), rest.pop("predictor", None)
    context = int(rest.pop("context")) if "context" in rest else None
    known = {*NAMES, "dtype"}
    if unknown := sorted(rest.keys() - known):
        raise ValueError(f"{', '.join(unknown)}: not known here, expected some of {', '.join(sorted(known))}")
    options = {"expert_memory": "auto", **_taken(Options, rest), **rest}
    arguments = ReplicaArguments(model, name or served_name(model), context, predictor, options, limits, settings.drain)
    return application(arguments, shape, settings)


# By the type of a field: how its value is read from the command line's text.
_READ: dict[str, Callable[[str], Any]] = {
    "int": int,
    "int | None": int,
    "float": float,
    "str | int": str,
    "bool": {"true": True, "false": False}.__getitem__,
}


def _taken(kind: type, rest: dict[str, str]) -> dict[str, Any]:
    """Take what a dataclass has no text for out of ``rest``: numbers, and true or false."""
    found: dict[str, Any] = {}
    for field in fields(kind):
        read = _READ.get(str(field.type))
        if field.name in rest and read is not None:
            text = rest.pop(field.name)
            try:
                found[field.name] = read(text)
            except (ValueError, KeyError) as error:
                expected = "true or false" if field.type == "bool" else "a number"
                raise ValueError(f"{field.name} is {text!r}, expected {expected}") from error
    return found
