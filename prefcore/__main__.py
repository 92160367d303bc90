"""``python -m prefcore``: the same as the command ``prefcore``."""

import sys

from prefcore.cli import main

sys.exit(main())
