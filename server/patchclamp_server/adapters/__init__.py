"""Adapters: where hook points live in unmodified `transformers` models. Locations and facts; nothing runs here."""
