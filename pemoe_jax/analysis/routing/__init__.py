"""Which experts tasks and tokens use: measurement, tables, plots and the HTML page."""
