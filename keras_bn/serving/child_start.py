"""Begins a process that imports what the process that started it imports.

It is run by its path. Until `sys.path` is set it imports modules of Python
alone: a file in the current folder or in one of PYTHONPATH must not take the
place of one.
"""

import importlib.util
import json
import runpy
import sys


class _SameFiles:
    """Finds top-level modules in given files, whatever comes first elsewhere.

    Args:
        files: Dictionary from a name to the module's file and, for a package,
            the folders of its submodules, else None.
    """

    def __init__(self, files):
        self._files = files

    def find_spec(self, name, path=None, target=None):
        if name not in self._files:
            return None
        file, folders = self._files[name]
        return importlib.util.spec_from_file_location(
            name, file, submodule_search_locations=folders
        )


if __name__ == "__main__":
    # The program reads the rest of the input.
    start = json.loads(sys.stdin.readline())
    sys.path[:] = start["path"]
    sys.meta_path.insert(0, _SameFiles(start["files"]))
    runpy.run_path(start["program"], run_name="__main__")
