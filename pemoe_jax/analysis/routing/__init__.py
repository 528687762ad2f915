"""Measures which experts tasks and tokens use: totals, metrics, tables, plots and an HTML page."""
