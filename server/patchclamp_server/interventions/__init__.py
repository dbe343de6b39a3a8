"""Interventions: typed edits, compiled to tables, applied to the sites of a batch and answered for in receipts."""
