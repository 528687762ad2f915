"""Which experts tasks and tokens use: measurement, metrics, tables, plots and the HTML page."""
