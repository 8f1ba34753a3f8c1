"""Entry point of `python -m opsd_train`."""

import os
import sys

if __name__ == "__main__":
    try:
        from opsd_train.cli import main

        code = main()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("opsd"):
            raise
        print(
            f"error: {error.name} is not installed; the trainer needs its extras: "
            'pip install -e ".[train,demo]"',
            file=sys.stderr,
        )
        code = 2
    except BrokenPipeError:  # such as `... --help | head`: discard the rest of the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
