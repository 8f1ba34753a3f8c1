"""Benchmarks of single losses against peers: cases, contenders, time, memory, errors."""
