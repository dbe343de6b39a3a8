"""The engine: one worker that owns the model and its device, and everything that runs on it."""
