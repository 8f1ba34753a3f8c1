"""``python -m opsd_train``."""

import sys

from opsd_train.cli import main

sys.exit(main())
