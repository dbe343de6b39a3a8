"""Whether the server takes calls: loading, serving, draining or broken, and what health checks say of it."""

from __future__ import annotations

from collections.abc import Sequence

from grpc_health.v1.health import aio as health
from grpc_health.v1.health_pb2 import HealthCheckResponse

from patchclamp_server.engine.messages import Loaded, Progress
from patchclamp_server.errors import NotFound, Unavailable


class Readiness:
    """The state of the server, and its health service.

    Health has an entry for the server as a whole (the empty name), for each of its services and for its model.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.health = health.HealthServicer()
        self._names = ("", *names)
        self._stage = "starting"
        self._loaded: Loaded | None = None
        self._refusal: Unavailable | None = None

    async def start(self) -> None:
        """Until the model is loaded, nothing is served."""
        await self._report(HealthCheckResponse.NOT_SERVING)

    def progress(self, progress: Progress) -> None:
        self._stage = f"{progress.stage}, {progress.share:.0%}"

    async def serve(self, loaded: Loaded) -> None:
        """The model is ready."""
        self._loaded = loaded
        await self._report(HealthCheckResponse.SERVING)

    @property
    def serving(self) -> bool:
        return self._loaded is not None and self._refusal is None

    async def leave(self) -> None:
        """Tells health checks that the server goes, for good; calls are still taken."""
        await self.health.enter_graceful_shutdown()

    def refuse(self, refusal: Unavailable) -> None:
        """From now on every call gets this error; the first refusal stays."""
        self._refusal = self._refusal or refusal

    def admit(self, model: str) -> Loaded:
        """What is loaded, for a call that names this model (empty: whichever)."""
        if self._refusal is not None:
            raise Unavailable(self._refusal.message, reason=self._refusal.reason)
        if self._loaded is None:
            raise Unavailable(f"the model is not loaded yet ({self._stage})")
        name = self._loaded.facts.name
        if model not in ("", name):
            raise NotFound(
                f"this server has no model {model!r}; it holds {name!r}",
                metadata={"resource_type": "model", "resource_name": model, "available": name},
            )
        return self._loaded

    async def _report(self, status: int) -> None:
        for name in self._names:
            await self.health.set(name, status)
