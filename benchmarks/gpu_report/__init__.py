"""Everything a machine with a GPU is asked, in two commands of a few minutes each.

    python -m benchmarks.gpu_report first --out FOLDER
    python -m benchmarks.gpu_report second --out FOLDER --winners FOLDER/winners.json

Runs from the tree, nothing installed: needs torch, triton, pytest, transformers and peft. Wheels of
peers (liger-kernel, trl, unsloth_zoo and what they need) are found in .whl/ at the root of the tree
and installed beside, in a temporary folder. `--small` rehearses either command on the CPU, with
Triton's kernels in its interpreter, in about a minute.

Each stage is one or more processes with a time limit. A result is appended to COMMAND.jsonl in the
folder when it is there, so a machine that is taken away leaves all finished results; COMMAND.json
is the whole, which `python -m benchmarks.report` reads, and COMMAND.log what the processes printed.
What was stopped, crashed or never started counts as failed: it is named, and the exit status is 1.
"""
