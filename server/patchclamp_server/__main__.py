"""The command `patchclamp-server`: settings, then the worker, then the server in front of it. The only wiring."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from patchclamp_server.adapters.load import ModelSource
    from patchclamp_server.config import ServerConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT. Returns 0; 1 when the engine failed, 2 when the settings are wrong,
    130 when interrupted before it could serve."""
    try:
        from patchclamp_server.config import ConfigError, read_config
    except ModuleNotFoundError as missing:
        # The base install of the package is the SDK alone.
        return _fail(f"{missing.name} is not installed; the server needs: pip install 'patchclamp[server]'", 1)
    try:
        config = read_config(arguments)
        _log_to_stderr(config)
        _serve(config)
    except KeyboardInterrupt:
        return 130
    except ConfigError as error:
        return _fail(error.message, 2)
    except Exception as error:
        logging.getLogger(__name__).debug("failed", exc_info=True)
        return _fail(" ".join(str(error).split()) or type(error).__name__, 1)
    return 0


def _serve(config: ServerConfig) -> None:
    # Imported once the settings are known to be right: torch and transformers take seconds.
    import asyncio

    from patchclamp_server.service.process import use_huge_pages

    if config.huge_pages:
        use_huge_pages()

    from patchclamp_server.engine.decoding import DecodingLimits
    from patchclamp_server.engine.loading import load_resident
    from patchclamp_server.engine.worker import Worker
    from patchclamp_server.service.server import Ready, serve

    def announce(ready: Ready) -> None:
        print(f"patchclamp-server ready on {ready.address} (model {ready.model})", flush=True)

    source = _source(config)
    decoding = DecodingLimits(config.max_decoding, config.chunk_tokens, config.kv_bytes)
    worker = Worker(load=lambda progress: load_resident(source, progress), decoding=decoding)
    asyncio.run(serve(config, worker, announce))


def _source(config: ServerConfig) -> ModelSource:
    from patchclamp_server.adapters.load import ModelSource

    return ModelSource(
        source=_model_path(config),
        name=config.served_name,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        device_map=config.device_map,
        offline=config.offline,
    )


def _model_path(config: ServerConfig) -> str:
    if config.model is not None:
        return config.model
    from patchclamp_server import demo

    return str(demo.model_dir())


def _log_to_stderr(config: ServerConfig) -> None:
    logging.basicConfig(
        level=config.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


def _fail(message: str, code: int) -> int:
    print(f"patchclamp-server: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
