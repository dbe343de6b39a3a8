"""The gRPC front: wire messages in, validated jobs to the worker, results out. Only this package sees gRPC."""
