"""The paper's experiments at a small size: plan them, run them, show them on one page."""
