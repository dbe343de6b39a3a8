"""patchclamp's server: one language model, resident on its device, read and steered over gRPC."""

__version__ = "0.1.0"
