"""Evaluation: completions graded, scored and given intervals; held-out accuracy in training."""
