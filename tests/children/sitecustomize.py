"""In the processes that tests start, torch is not installed: Lathe does not need it, and importing it takes seconds.

The tests' own process has it, as an oracle. `tests/conftest.py` puts this folder on the children's path.
"""

import sys

sys.modules["torch"] = None  # what Python takes for "there is no such module"
