"""Prometheus metrics of the front, in a registry of their own."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

from patchclamp_server import __version__
from patchclamp_server.adapters.facts import ModelFacts
from patchclamp_server.service.jobs import Worker

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


@dataclass(frozen=True)
class Method:
    """A method, as metrics and the log name it. `kind` is `unary` or `server_stream`."""

    kind: str
    service: str
    name: str

    def __str__(self) -> str:
        return f"{self.service}/{self.name}"


class Metrics:
    """Counts calls; tells of the model and of what waits for it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        labels = ("grpc_type", "grpc_service", "grpc_method")
        self._started = Counter("grpc_server_started", "Calls that came in.", labels, registry=self.registry)
        self._handled = Counter(
            "grpc_server_handled", "Calls that ended, by code.", (*labels, "grpc_code"), registry=self.registry
        )
        self._seconds = Histogram(
            "grpc_server_handling_seconds",
            "Seconds from a call's message to its end.",
            labels,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._generated = Counter(
            "patchclamp_generated_tokens", "Tokens generated, of all samples.", registry=self.registry
        )
        self._first_token = Histogram(
            "patchclamp_first_token_seconds",
            "Seconds from a call to generate to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._waiting = Gauge(
            "patchclamp_queue_depth", "Requests that the engine has not answered yet.", registry=self.registry
        )
        self._model = Gauge(
            "patchclamp_model_info",
            "The loaded model; always 1.",
            ("model", "revision", "architecture", "dtype", "version"),
            registry=self.registry,
        )

    def started(self, method: Method) -> None:
        self._started.labels(method.kind, method.service, method.name).inc()

    def handled(self, method: Method, code: grpc.StatusCode, seconds: float) -> None:
        labels = (method.kind, method.service, method.name)
        self._handled.labels(*labels, code.name).inc()
        self._seconds.labels(*labels).observe(seconds)

    def generated(self) -> None:
        """Counts a token."""
        self._generated.inc()

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def loaded(self, facts: ModelFacts) -> None:
        dtype = str(facts.dtype).removeprefix("torch.")
        self._model.labels(facts.name, facts.revision, facts.architecture, dtype, __version__).set(1)

    def watch(self, worker: Worker) -> None:
        """Asks the worker for its queue whenever metrics are read."""
        self._waiting.set_function(lambda: worker.waiting)


class MetricsServer:
    """Serves the registry over HTTP, from a thread of its own."""

    def __init__(self, metrics: Metrics, address: tuple[str, int]) -> None:
        host, port = address
        self._server, self._thread = start_http_server(port, host, registry=metrics.registry)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self._server.server_port}/metrics"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
