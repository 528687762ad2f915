"""What runs measured: tables, plots, counts, and the pages that show them."""
