"""`python -m benchmarks.report`: plots, a page and the tables of README and docs from JSON."""
