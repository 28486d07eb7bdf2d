"""Tests of the harness itself: `python3 -m unittest discover -s bench/faults/tests -t bench/faults`."""

import os
import sys

_FAULTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [_FAULTS, os.path.dirname(_FAULTS)]
