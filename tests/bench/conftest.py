"""Lets the tests import the benchmarks; an installed prefcore stays the one that is tested."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
