"""The paper's experiments at a small size: planned, run, and shown on one page."""
