"""What the losses cost, beside what others' cost: see docs/benchmarks.md."""
