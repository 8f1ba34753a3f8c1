"""Launchers and kernels; each takes a problem and a plan and knows no other backend."""
