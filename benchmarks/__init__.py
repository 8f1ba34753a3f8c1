"""What the losses cost, beside what others' cost: see README.md, "Benchmarks"."""
