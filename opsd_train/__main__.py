"""``python -m opsd_train``."""

import sys


def run() -> int:
    try:
        from opsd_train.cli import main

        return main()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("opsd"):
            raise
        print(
            f"error: {error.name} is not installed; the trainer needs its extras: "
            'pip install -e ".[train,demo]"',
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(run())
