"""`python -m benchmarks.report`: plots, a page and the README's tables from JSON alone."""
