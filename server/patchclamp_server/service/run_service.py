"""RunService: runs the model with hooks."""

from __future__ import annotations

import grpc.aio

from patchclamp.v1 import run_pb2, run_pb2_grpc
from patchclamp_server.config import ServerConfig
from patchclamp_server.service.jobs import Jobs
from patchclamp_server.service.offload import beside_the_loop
from patchclamp_server.service.parse import parse_run_request
from patchclamp_server.service.readiness import Readiness
from patchclamp_server.service.render import ResultRenderer, render_summary
from patchclamp_server.service.tensors import Outlet

Context = grpc.aio.ServicerContext[run_pb2.RunRequest, run_pb2.RunResponse]


class RunServicer(run_pb2_grpc.RunServiceServicer):
    """Request to job, events to messages.

    It writes to the context instead of yielding: a call that is cancelled while a message is on its way is then left
    at once, and its job with it; a generator would wait for the garbage collector.
    """

    def __init__(self, readiness: Readiness, jobs: Jobs, config: ServerConfig) -> None:
        self._readiness = readiness
        self._jobs = jobs
        self._config = config

    async def Run(self, request: run_pb2.RunRequest, context: Context) -> None:
        loaded = self._readiness.admit(request.model)
        parsed = await beside_the_loop(request.ByteSize(), parse_run_request, request, loaded, self._config)
        outlet, left, last = Outlet(), len(parsed.runs), run_pb2.RunResponse()
        renderer = ResultRenderer(parsed, loaded.tokenizer, outlet)
        with self._jobs.submitted(
            parsed.runs, seconds=context.time_remaining(), solo=parsed.solo, result_bytes=parsed.result_bytes
        ) as job:
            async for event in job:
                left -= 1
                response = run_pb2.RunResponse()
                await beside_the_loop(renderer.effort(event), renderer.fill, event, response.result)
                if not left and not outlet.waiting:
                    # The end of the job is next and travels with it: a message less for every short run.
                    last = response
                    continue
                await context.write(response)
                for chunk in outlet.drain():
                    await context.write(run_pb2.RunResponse(chunk=chunk))
            last.summary.CopyFrom(render_summary(job.done, parsed.prompt_tokens))
            await context.write(last)
