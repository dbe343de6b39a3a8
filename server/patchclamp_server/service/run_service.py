"""RunService: runs the model with hooks, and goes on with prompts."""

from __future__ import annotations

import time

import grpc.aio

from patchclamp.v1 import generation_pb2, run_pb2, run_pb2_grpc
from patchclamp_server.config import ServerConfig
from patchclamp_server.engine.messages import TokenGenerated
from patchclamp_server.service.generation import parse_generate_request
from patchclamp_server.service.jobs import Jobs
from patchclamp_server.service.metrics import Metrics
from patchclamp_server.service.offload import beside_the_loop
from patchclamp_server.service.parse import parse_run_request
from patchclamp_server.service.readiness import Readiness
from patchclamp_server.service.render import ResultRenderer, render_summary
from patchclamp_server.service.render_generation import GenerationRenderer
from patchclamp_server.service.tensors import Outlet

Context = grpc.aio.ServicerContext[run_pb2.RunRequest, run_pb2.RunResponse]
GenerateContext = grpc.aio.ServicerContext[generation_pb2.GenerateRequest, generation_pb2.GenerateResponse]


class RunServicer(run_pb2_grpc.RunServiceServicer):
    """Request to job, events to messages.

    It writes to the context instead of yielding: a call that is cancelled while a message is on its way is then left
    at once, and its job with it; a generator would wait for the garbage collector.
    """

    def __init__(self, readiness: Readiness, jobs: Jobs, config: ServerConfig, metrics: Metrics) -> None:
        self._readiness = readiness
        self._jobs = jobs
        self._config = config
        self._metrics = metrics

    async def Run(self, request: run_pb2.RunRequest, context: Context) -> None:
        loaded = self._readiness.admit(request.model)
        parsed = await beside_the_loop(_effort(request), parse_run_request, request, loaded, self._config)
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

    async def Generate(self, request: generation_pb2.GenerateRequest, context: GenerateContext) -> None:
        began, first_token = time.perf_counter(), 0.0
        loaded = self._readiness.admit(request.model)
        effort = _generation_effort(request)
        parsed = await beside_the_loop(effort, parse_generate_request, request, loaded, self._config)
        outlet = Outlet()
        n_ctx = loaded.facts.dims.n_ctx
        # What was received of a broken stream is gone through again.
        renderer = await beside_the_loop(effort, GenerationRenderer, parsed, loaded.tokenizer, n_ctx, outlet)
        with self._jobs.generating(
            parsed.spec,
            seconds=context.time_remaining(),
            solo=parsed.solo,
            result_bytes=parsed.result_bytes,
            backlog=parsed.backlog,
        ) as job:
            for response in renderer.start():
                await context.write(response)
            async for event in job:
                if isinstance(event, TokenGenerated):
                    self._metrics.generated()
                    if not first_token:
                        first_token = time.perf_counter() - began
                        self._metrics.first_token(first_token)
                for response in await beside_the_loop(renderer.effort(event), renderer.responses, event):
                    await context.write(response)
                    for chunk in outlet.drain():
                        await context.write(generation_pb2.GenerateResponse(chunk=chunk))
            await context.write(renderer.summary(job.done, first_token))


def _effort(request: run_pb2.RunRequest) -> int:
    """About as much as there is to parse: the bytes, and each edit is held against the whole of a prompt."""
    return request.ByteSize() * (1 + sum(len(run.interventions) for run in request.runs))


def _generation_effort(request: generation_pb2.GenerateRequest) -> int:
    """Likewise; each edit and read is also held against all tokens that may be generated."""
    return request.ByteSize() + (len(request.interventions) + len(request.reads)) * (
        request.ByteSize() + request.stop.max_new_tokens
    )
