"""Numbers in, numbers with error bars out."""
