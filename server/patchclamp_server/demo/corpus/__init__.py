"""The corpus of the bundled model: every text is generated here, one module per task, from a seed."""
