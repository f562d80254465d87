"""In the processes that tests start, torch is not to be found: Lathe does not need it, and it loads for seconds.

The tests' own process has it, as an oracle. `tests/conftest.py` puts this folder on the children's path. Where that
process keeps to one core (`tests/support/cores.py`), they do not. Nor do they read the thousands of files in which
transformers looks, twice, for its models' names: the tests' own process hands on what it found.
"""

import os
import sys
from importlib.machinery import PathFinder, SourceFileLoader


class KnowsNames(SourceFileLoader):
    """Of the module that looks for names: those of transformers' models are in the file that TEST_NAMES names."""

    def exec_module(self, module):
        super().exec_module(module)
        find = module.create_import_structure_from_path
        models = os.path.join(os.path.dirname(os.path.dirname(module.__file__)), "models")
        asked = {
            models,
            os.path.join(models, "__init__.py"),
        }  # by transformers itself, and by its models' package

        def known(path):
            if str(path) not in asked:
                return find(path)
            import pickle

            with open(os.environ["TEST_NAMES"], "rb") as file:
                return pickle.load(file)

        module.create_import_structure_from_path = known


class AsInTests(PathFinder):
    """Python's own search of the path, but for two names."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname == "torch":
            return None
        spec = super().find_spec(fullname, path, target)
        if fullname == "transformers.utils.import_utils" and spec and "TEST_NAMES" in os.environ:
            spec.loader = KnowsNames(fullname, spec.origin)
        return spec


sys.meta_path[sys.meta_path.index(PathFinder)] = AsInTests

if "TEST_CORES" in os.environ:
    os.sched_setaffinity(0, map(int, os.environ["TEST_CORES"].split(",")))
