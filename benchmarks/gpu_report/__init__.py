"""Tests and measurements on a GPU, in three commands of a few minutes each.

    python -m benchmarks.gpu_report first --out FOLDER
    python -m benchmarks.gpu_report second --out FOLDER --winners FOLDER/winners.json
    python -m benchmarks.gpu_report trainer --out FOLDER

They run from the source tree without installation; torch, triton, pytest, transformers and peft
must be there, and for `trainer` what opsd_train requires. Wheels in .whl/ at the root of the tree,
of peers (liger-kernel, trl, unsloth_zoo and their requirements) and of what else is missing, are
installed into a temporary folder. `--small` tries each command on the CPU, with Triton's kernels
in its interpreter, in about a minute.

A stage is one or more processes with a time limit. Each result is appended to COMMAND.jsonl at
once, so that finished results outlive the machine. COMMAND.json is the whole report, which
`python -m benchmarks.report` reads; COMMAND.log has the processes' output. What was stopped,
crashed or did not start counts as failed: it is printed, and the exit status is 1.
"""
