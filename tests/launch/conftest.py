"""`launch` is run from a checkout and not installed: put the checkout first, before the `launch` folder of the tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
