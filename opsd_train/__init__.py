"""opsd_train: a small trainer for On-Policy Self-Distillation.

`python -m opsd_train` runs the demo; `python -m opsd_train --help` lists all commands.
"""
