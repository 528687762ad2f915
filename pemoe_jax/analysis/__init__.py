"""Evaluates and analyzes models: zero-shot accuracy, routing, planning, counts, tables, plots."""
