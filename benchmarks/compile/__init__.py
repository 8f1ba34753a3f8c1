"""Compile every Triton kernel without a GPU, and check registers, spills and instructions."""
