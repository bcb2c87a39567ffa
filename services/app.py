"""Wiring, in one place: the gateway's parts, the two deployments, and how Ray Serve is started.

Ray is the caller's: call `ray.init` first, and `ray.shutdown` after `stop_serving`.
"""

import gc
import time
from typing import Any
from uuid import uuid4

import ray
import structlog
from fastapi import FastAPI
from ray import serve
from ray.serve._private import replica
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions
from ray.serve.schema import LoggingConfig

from services.event_log import EventLog
from services.gateway import GatewayParts, build_api
from services.metrics import GatewayMetrics
from services.profiles import ProfileReader
from services.ranker_client import ServeRankerClient
from tailrace.catalogue import Catalogue
from tailrace.registry import open_registry
from tailrace.settings import Settings
from tailrace.stores import open_store
from tailrace.table_reader import TableReader
from tailrace.telemetry import configure_logging

log = structlog.get_logger()

APP_NAME = "tailrace"
_READY_WAIT_S = 30.0  # a replica that has no model by then takes requests all the same: the ladder has rungs
_QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")


class RankerReplica:
    """`services.ranker.Ranker` as Ray Serve runs it. Requests come once a model serves, or after half a minute."""

    def __init__(self, settings: Settings) -> None:
        _keep_to_loopback()
        from services.ranker import Ranker  # here, so that gateways and drivers do not load ONNX Runtime

        self._ranker = Ranker(settings)
        self._ranker.wait(_READY_WAIT_S)
        _settle_garbage()

    async def rank(self, asked: bytes) -> bytes:
        """Returns the encoded RankedAnswer to an encoded Asked."""
        return await self._ranker.rank(asked)

    async def similar(self, item_id: Any, n: int) -> bytes:
        """Returns the encoded list of similar items."""
        return await self._ranker.similar(item_id, n)

    async def status(self) -> bytes:
        """Returns the encoded ModelStatus."""
        return await self._ranker.status()

    def __del__(self) -> None:
        self._ranker.close()


class GatewayReplica:
    """The API as Ray Serve runs it: the parts are made here, in the replica, and nowhere else."""

    def __init__(self, settings: Settings, ranker: Any) -> None:
        _keep_to_loopback()
        configure_logging(settings)
        catalogue = Catalogue()
        self._tables = [
            TableReader(settings.kafka, "items", catalogue.apply_item).start(),
            TableReader(settings.kafka, "item-stats", catalogue.apply_stats).start(),
        ]
        self._event_log = EventLog(settings.kafka, delivery_timeout_s=settings.gateway.ack_timeout_s).start()
        self._profiles = ProfileReader(lambda: open_store(settings, read_only=True), settings.kafka.user_partitions)
        self._parts = GatewayParts(
            settings=settings,
            ranker=ServeRankerClient(ranker),
            profiles=self._profiles,
            event_log=self._event_log,
            catalogue=catalogue,
            tables=self._tables,
            registry=open_registry(settings),
            metrics=GatewayMetrics(serve.get_replica_context().replica_id.unique_id),
            new_id=lambda: uuid4().hex,
            now_ms=lambda: time.time_ns() // 1_000_000,
        )
        _settle_garbage()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Returns the API; Ray Serve asks for it once the parts are there."""
        return build_api(self._parts)

    def __del__(self) -> None:
        for table in self._tables:
            table.stop()
        self._event_log.close()
        self._profiles.close()


def _settle_garbage() -> None:
    """Says that what the process holds by now stays: it is not looked through for garbage any more.

    That are the modules, Ray's above all; to look through them stops every thread for 0.13 s.
    """
    gc.collect()
    gc.freeze()


def _keep_to_loopback() -> None:
    """On a Ray that keeps to loopback, makes Serve's replica do so too.

    Ray 2.60 binds every replica's internal gRPC server, which unpickles what it is sent, to all interfaces, with no
    setting for it. The server is bound after the deployment's constructor has run, so this comes in time; a test looks
    at the sockets. Across machines the network must be closed to others anyway, as for all of Ray.
    """
    if ray.util.get_node_ip_address() != "127.0.0.1":  # type: ignore[no-untyped-call]  # Ray leaves it untyped
        return
    module: Any = replica  # the name is not one Ray exports
    bind = module.add_port_to_grpc_server
    module.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", "127.0.0.1"))


def build_app(settings: Settings) -> serve.Application:
    """Returns the Ray Serve application: the gateway over the rankers."""
    ranker, gateway = settings.ranker, settings.gateway
    num_gpus = 1.0 if ranker.device == "cuda" else 0.0
    rankers = serve.deployment(
        name="ranker",
        max_ongoing_requests=ranker.max_ongoing_requests,
        max_queued_requests=ranker.max_queued_requests,
        ray_actor_options={"num_cpus": ranker.num_cpus, "num_gpus": num_gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=ranker.min_replicas,
            max_replicas=ranker.max_replicas,
            target_ongoing_requests=ranker.target_ongoing_requests,
            upscale_delay_s=ranker.upscale_delay_s,
            downscale_delay_s=ranker.downscale_delay_s,
            metrics_interval_s=1.0,
            look_back_period_s=2.0,
        ),
        graceful_shutdown_timeout_s=5.0,
        health_check_period_s=2.0,
        logging_config=_QUIET,
    )(RankerReplica)
    # The gateway keeps its own queue (`admission.py`), so that a refusal is a problem document and health and metrics
    # answer under any load. Refusing is cheap, so a replica takes in eight times what it may hold; Ray's queue limit,
    # whose refusals are plain text, stands behind that.
    places = gateway.max_ongoing_requests + gateway.max_queued_requests
    gateways = serve.deployment(
        name="gateway",
        num_replicas=gateway.replicas,
        max_ongoing_requests=8 * places,
        max_queued_requests=8 * places,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1.0),
        ray_actor_options={"num_cpus": gateway.num_cpus},
        graceful_shutdown_timeout_s=5.0,
        health_check_period_s=2.0,
        logging_config=_QUIET,
    )(serve.ingress()(GatewayReplica))
    application: serve.Application = gateways.bind(settings, rankers.bind(settings))
    return application


def start_serving(settings: Settings) -> str:
    """Starts the proxies and the application on the running Ray, and returns the base URL once both answer."""
    serve.start(
        proxy_location="EveryNode",
        http_options=HTTPOptions(host=settings.gateway.host, port=settings.gateway.port),
        logging_config=_QUIET,
    )
    serve.run(build_app(settings), name=APP_NAME, route_prefix="/", logging_config=_QUIET)
    return f"http://{settings.gateway.host}:{settings.gateway.port}"


def stop_serving() -> None:
    """Removes the application and returns when its replicas are gone; answers in flight are finished first.

    Proxies and controller stay: on a shared cluster they may serve others.
    """
    serve.delete(APP_NAME)
