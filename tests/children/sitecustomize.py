"""In the processes that tests start, torch is not to be found: Lathe does not need it, and it loads for seconds.

The tests' own process has it, as an oracle. `tests/conftest.py` puts this folder on the children's path.
"""

import sys
from importlib.machinery import PathFinder


class WithoutTorch(PathFinder):
    """Python's own search of the path, but for one name."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname == "torch" else super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTorch
