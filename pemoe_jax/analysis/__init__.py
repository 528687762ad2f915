"""Analysis of runs: tables, plots, parameter counts, zero-shot accuracy, routing, planning."""
