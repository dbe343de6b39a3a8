"""The `patchclamp.v1` contract: generated messages and stubs. Do not edit: see `protos/generate.py`."""
