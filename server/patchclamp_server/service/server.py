"""The server: binds, reports its health, takes calls while the worker is ready, and leaves without dropping any."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from patchclamp.v1 import model_pb2, model_pb2_grpc, run_pb2, run_pb2_grpc
from patchclamp_server.config import ConfigError, ServerConfig
from patchclamp_server.engine.messages import EngineFailed, Loaded, Progress, Report
from patchclamp_server.errors import Unavailable
from patchclamp_server.service.interceptors import CallInterceptor
from patchclamp_server.service.jobs import Jobs, Worker
from patchclamp_server.service.metrics import Metrics, MetricsServer
from patchclamp_server.service.model_service import ModelServicer
from patchclamp_server.service.process import freeze_loaded, hush_departed_callers, keep_freed_memory
from patchclamp_server.service.readiness import Readiness
from patchclamp_server.service.run_service import RunServicer

log = logging.getLogger(__name__)

SERVICES = (
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    run_pb2.DESCRIPTOR.services_by_name["RunService"].full_name,
)
# Calls that are answered still have their last bytes to send.
_FLUSH_SECONDS = 0.5
_WORKER_STOP_SECONDS = 10.0


@dataclass(frozen=True, eq=False)
class Ready:
    """What a server that takes calls can be announced with."""

    address: str
    model: str
    metrics: str | None


class Front:
    """The gRPC server in front of one worker."""

    def __init__(self, config: ServerConfig, worker: Worker) -> None:
        self._config = config
        self._worker = worker
        self._metrics = Metrics()
        self._metrics_server: MetricsServer | None = None
        self._readiness = Readiness((*SERVICES, config.served_name))
        self._jobs = Jobs(worker, config.max_waiting, config.max_waiting_bytes)
        self._calls = CallInterceptor(self._metrics, config.max_message_bytes)
        self._server = grpc.aio.server(interceptors=(self._calls,), options=_options(config))
        self._loop = asyncio.get_running_loop()
        self._reports: asyncio.Queue[Report] = asyncio.Queue()
        self._port = 0

    @property
    def address(self) -> str:
        """Where the server listens."""
        return self._config.bound_address(self._port)

    async def start(self) -> None:
        """Listens, and lets the worker load. Raises ConfigError when an address cannot be had."""
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(self._readiness, self._config), self._server)
        run_pb2_grpc.add_RunServiceServicer_to_server(
            RunServicer(self._readiness, self._jobs, self._config, self._metrics), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._readiness.health, self._server)
        if self._config.serves_reflection:
            health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
            reflection.enable_server_reflection((*SERVICES, health, reflection.SERVICE_NAME), self._server)
        await self._readiness.start()
        self._bind()
        await self._server.start()
        self._worker.start(self._hear)

    async def ready(self) -> Ready:
        """Follows the worker until it is loaded. Raises what made loading fail."""
        while True:
            match await self._reports.get():
                case Progress() as progress:
                    self._readiness.progress(progress)
                    log.info("loading: %s, %.0f %%", progress.stage, 100 * progress.share)
                case Loaded() as loaded:
                    self._metrics.loaded(loaded.facts)
                    self._metrics.watch(self._worker)
                    await self._readiness.serve(loaded)
                    metrics = None if self._metrics_server is None else self._metrics_server.url
                    return Ready(self.address, loaded.facts.name, metrics)
                case EngineFailed(error=error):
                    raise error

    async def broken(self) -> BaseException:
        """Waits until the engine fails, should it; from then on every call is refused."""
        while True:
            report = await self._reports.get()
            if isinstance(report, EngineFailed):
                refusal = Unavailable("the engine failed; the server is about to restart", reason="ENGINE_FAILED")
                self._readiness.refuse(refusal)
                self._jobs.fail(refusal)
                await self._readiness.leave()
                return report.error

    async def stop(self, hurry: asyncio.Event) -> None:
        """Leaves: tells health checks, waits for them to be heard, refuses new calls, lets those in flight finish.

        Setting `hurry` ends every waiting.
        """
        await self._readiness.leave()
        if self._readiness.serving:
            await _first(asyncio.create_task(hurry.wait()), asyncio.sleep(self._config.drain_delay))
        self._readiness.refuse(Unavailable("the server is stopping"))
        await _first(asyncio.create_task(hurry.wait()), self._calls.idle(), self._config.grace)
        await self._server.stop(_FLUSH_SECONDS)
        await asyncio.to_thread(self._worker.stop, _WORKER_STOP_SECONDS)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.stop)

    def _hear(self, report: Report) -> None:
        """Takes a report from the worker's thread."""
        with suppress(RuntimeError):  # the loop is closed: the server is gone already
            self._loop.call_soon_threadsafe(self._reports.put_nowait, report)

    def _bind(self) -> None:
        try:
            self._port = self._server.add_insecure_port(self._config.address)
        except RuntimeError:
            raise ConfigError(f"cannot listen on {self._config.address}: is another server there?") from None
        if self._config.metrics_address is not None:
            try:
                self._metrics_server = MetricsServer(self._metrics, self._config.metrics_address)
            except OSError as fault:
                host, port = self._config.metrics_address
                text = f"cannot serve metrics on {host}:{port} ({fault.strerror}); --metrics-port sets another, or off"
                raise ConfigError(text) from None


async def serve(config: ServerConfig, worker: Worker, announce: Callable[[Ready], None]) -> None:
    """Serves until SIGTERM or SIGINT; a second one ends the waiting for calls in flight. Raises what broke the engine.

    `announce` is called once, when calls are taken.
    """
    front = Front(config, worker)
    leave, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: hurry.set() if leave.is_set() else leave.set())
    keep_freed_memory()
    hush_departed_callers()
    await front.start()
    life = asyncio.create_task(_live(front, announce))
    await _first(life, leave.wait())
    await front.stop(hurry)
    if life.done() and not life.cancelled():
        raise life.result()


async def _live(front: Front, announce: Callable[[Ready], None]) -> BaseException:
    """What broke the server, once something did."""
    try:
        ready = await front.ready()
        freeze_loaded()
        if ready.metrics is not None:
            log.info("metrics on %s", ready.metrics)
        announce(ready)
        return await front.broken()
    except Exception as error:
        return error


async def _first(task: asyncio.Task[Any], other: Coroutine[Any, Any, Any], seconds: float | None = None) -> None:
    """Waits for the task, the other, or the time to pass, whichever comes first; the others are dropped."""
    tasks = {task, asyncio.ensure_future(other)}
    _, pending = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for loser in pending:
        loser.cancel()
    await asyncio.gather(*pending, return_exceptions=True)


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    return [
        # The interceptor refuses what is beyond the limit, with details; this is the limit of what it gets to see.
        ("grpc.max_receive_message_length", 4 * config.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # Callers that wait for a long run ping in the meantime; the default of 300 s would end their connections.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # Callers look up the replicas again when their connection ends; calls in flight finish on the old one.
        ("grpc.max_connection_age_ms", 1_800_000),
        # Two servers on one port would share the calls between them.
        ("grpc.so_reuseport", 0),
    ]
