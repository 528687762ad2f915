"""Zero-shot accuracy: results.json, its tables, the paper's table, intervals and bar chart."""
