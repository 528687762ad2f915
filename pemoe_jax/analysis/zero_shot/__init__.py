"""Zero-shot accuracy: results.json and its tables, the paper's table, intervals, bar chart."""
