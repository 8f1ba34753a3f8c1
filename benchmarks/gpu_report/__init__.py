"""Tests and measurements on a GPU, in two commands of a few minutes each.

    python -m benchmarks.gpu_report first --out FOLDER
    python -m benchmarks.gpu_report second --out FOLDER --winners FOLDER/winners.json

They run from the source tree without installation; torch, triton, pytest, transformers and peft
must be there. Wheels of peers (liger-kernel, trl, unsloth_zoo and their requirements) in .whl/ at
the root of the tree are installed into a temporary folder. `--small` tries either command on the
CPU, with Triton's kernels in its interpreter, in about a minute.

A stage is one or more processes with a time limit. Each result is appended to COMMAND.jsonl at
once, so that finished results outlive the machine. COMMAND.json is the whole report, which
`python -m benchmarks.report` reads; COMMAND.log has the processes' output. What was stopped,
crashed or did not start counts as failed: it is printed, and the exit status is 1.
"""
