"""opsd_train: a small trainer for On-Policy Self-Distillation.

Start it with ``python -m opsd_train``; ``python -m opsd_train --help`` lists what else it does.
"""
