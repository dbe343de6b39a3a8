"""What is loaded, as Describe tells it."""

from __future__ import annotations

from patchclamp.v1 import model_pb2
from patchclamp_server import __version__
from patchclamp_server.adapters.facts import Dims, ModelFacts
from patchclamp_server.config import ServerConfig
from patchclamp_server.engine.messages import Loaded
from patchclamp_server.hookpoints import AbsentSite, SiteInfo
from patchclamp_server.service.capabilities import capabilities
from patchclamp_server.service.sites import SITE_TO_WIRE
from patchclamp_server.service.tensors import INLINE_BYTES, TO_WIRE


def describe(loaded: Loaded, config: ServerConfig) -> model_pb2.DescribeResponse:
    """Model, sites, limits and capabilities."""
    facts = loaded.facts
    has_template = loaded.tokenizer is not None and loaded.tokenizer.has_chat_template
    return model_pb2.DescribeResponse(
        model=_model(facts, has_template),
        sites=map(_site, facts.sites),
        absent_sites=map(_absent, facts.absent),
        limits=_limits(config),
        capabilities=capabilities(facts),
        server_version=__version__,
    )


def _model(facts: ModelFacts, has_chat_template: bool) -> model_pb2.Model:
    return model_pb2.Model(
        name=facts.name,
        revision=facts.revision,
        architecture=facts.architecture,
        dims=_dims(facts.dims),
        dtype=TO_WIRE[facts.dtype],
        devices=facts.devices,
        parameters=facts.n_parameters,
        layout=model_pb2.BLOCK_LAYOUT_PARALLEL if facts.parallel else model_pb2.BLOCK_LAYOUT_SEQUENTIAL,
        has_chat_template=has_chat_template,
    )


def _dims(dims: Dims) -> model_pb2.Dims:
    return model_pb2.Dims(
        n_layers=dims.n_layers,
        n_heads=dims.n_heads,
        n_kv_heads=dims.n_kv_heads,
        d_model=dims.d_model,
        d_head=dims.d_head,
        d_mlp=dims.d_mlp,
        d_vocab=dims.d_vocab,
        n_ctx=dims.n_ctx,
        n_experts=dims.n_experts,
        n_experts_per_token=dims.n_experts_per_token,
    )


def _site(info: SiteInfo) -> model_pb2.SiteInfo:
    return model_pb2.SiteInfo(
        site=SITE_TO_WIRE[info.site],
        name=info.site.value,
        layers=(layer for layer in info.layers),
        axes=(model_pb2.Axis(name=name, size=size) for name, size in info.axes),
        writable=info.writable,
        read_only_reason=info.read_only_reason,
    )


def _absent(absent: AbsentSite) -> model_pb2.AbsentSite:
    return model_pb2.AbsentSite(
        site=SITE_TO_WIRE[absent.site], name=absent.site.value, layers=absent.layers, reason=absent.reason
    )


def _limits(config: ServerConfig) -> model_pb2.Limits:
    return model_pb2.Limits(
        max_runs=config.max_runs,
        max_tokens=config.max_tokens,
        max_result_bytes=config.max_result_bytes,
        max_message_bytes=config.max_message_bytes,
        max_reads=config.max_reads,
        inline_bytes=INLINE_BYTES,
        max_prompt_characters=config.max_prompt_characters,
        max_waiting_bytes=config.max_waiting_bytes,
    )
