"""ModelService: what is loaded, and how text becomes tokens."""

from __future__ import annotations

import grpc.aio

from patchclamp.v1 import model_pb2, model_pb2_grpc
from patchclamp_server.config import ServerConfig
from patchclamp_server.engine.messages import Loaded
from patchclamp_server.service.describe import describe
from patchclamp_server.service.offload import beside_the_loop
from patchclamp_server.service.parse import parse_tokenize_request
from patchclamp_server.service.readiness import Readiness
from patchclamp_server.service.render import fill_tokens


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Answers from what is loaded; the engine is not asked."""

    def __init__(self, readiness: Readiness, config: ServerConfig) -> None:
        self._readiness = readiness
        self._config = config
        self._described: tuple[Loaded, model_pb2.DescribeResponse] | None = None

    async def Describe(
        self,
        request: model_pb2.DescribeRequest,
        context: grpc.aio.ServicerContext[model_pb2.DescribeRequest, model_pb2.DescribeResponse],
    ) -> model_pb2.DescribeResponse:
        loaded = self._readiness.admit(request.model)
        if self._described is None or self._described[0] is not loaded:
            self._described = loaded, describe(loaded, self._config)
        return self._described[1]

    async def Tokenize(
        self,
        request: model_pb2.TokenizeRequest,
        context: grpc.aio.ServicerContext[model_pb2.TokenizeRequest, model_pb2.TokenizeResponse],
    ) -> model_pb2.TokenizeResponse:
        loaded = self._readiness.admit(request.model)
        return await beside_the_loop(request.ByteSize(), _tokenize, request, loaded, self._config)


def _tokenize(request: model_pb2.TokenizeRequest, loaded: Loaded, config: ServerConfig) -> model_pb2.TokenizeResponse:
    response = model_pb2.TokenizeResponse()
    for tokens in parse_tokenize_request(request, loaded, config):
        prompt = response.prompts.add(text=tokens.text)
        fill_tokens(tokens, prompt.tokens)
    return response
