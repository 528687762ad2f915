"""Zero-shot accuracy: results files, comparisons, the paper's table."""
