"""In the processes that tests start, torch is not to be found: Lathe does not need it, and it loads for seconds.

The tests' own process has it, as an oracle. `tests/conftest.py` puts this folder on the children's path. Where that
process keeps to one core (`tests/support/cores.py`), they do not.
"""

import os
import sys
from importlib.machinery import PathFinder


class WithoutTorch(PathFinder):
    """Python's own search of the path, but for one name."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname == "torch" else super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTorch

if "TEST_CORES" in os.environ:
    os.sched_setaffinity(0, map(int, os.environ["TEST_CORES"].split(",")))
