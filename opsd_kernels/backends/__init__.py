"""The backends: each computes a problem by a plan, and none imports another."""
