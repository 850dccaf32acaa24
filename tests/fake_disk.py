"""A disk that forgets what was not flushed when the power fails."""

import contextlib
import itertools
import os
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import pytest

# What changes the names in a folder, or flushes; all of them calls of `os`.
_CALLS = ("fsync", "replace", "rename", "unlink", "remove", "mkdir", "rmdir")


class FakeDisk:
    """What would be left of a folder if the power failed.

    A file has the content that the last `os.fsync` of it saw, and is empty
    if there was none. The names in a folder are those that the last
    `os.fsync` of the folder saw, or any later ones: a file system may write
    them in the background, each change after the one before it.

    Args:
        root: the folder; what is in it now is on the disk.
    """

    def __init__(self, root: Path):
        self._root = root
        self._held = {}
        self._contents = {}
        self._names = {}
        for folder, names in self._scan().items():
            self._names[folder] = [names]
            for number, path in names.values():
                if not path.is_dir():
                    self._contents[number] = path.read_bytes()

    @contextlib.contextmanager
    def watching(
        self, check: Callable[[dict[str, bytes]], None]
    ) -> Iterator[None]:
        """Calls `check` with each of `left()`, before and after each call."""

        def watched(name):
            call = getattr(os, name)

            def run(*arguments, **options):
                self._look(check)
                if name == "fsync":
                    self._flush(*arguments)
                    result = None
                else:
                    result = call(*arguments, **options)
                self._look(check)
                return result

            return run

        with pytest.MonkeyPatch.context() as patch:
            for name in _CALLS:
                patch.setattr(os, name, watched(name))
            yield
        self._look(check)

    def left(self) -> list[dict[str, bytes]]:
        """Returns what may be left: of each path below the root its content.

        Folders are left out.
        """
        folders, found = list(self._names), []
        for names in itertools.product(*self._names.values()):
            known = dict(zip(folders, names))
            files = dict(self._files(known, self._number()))
            if files not in found:
                found.append(files)
        return found

    def _look(self, check):
        for folder, names in self._scan().items():
            # A new folder has nothing in it.
            known = self._names.setdefault(folder, [{}])
            if names != known[-1]:
                known.append(names)
        for files in self.left():
            check(files)

    def _flush(self, descriptor):
        number = os.fstat(descriptor).st_ino
        if number in self._names:
            self._names[number] = [self._scan()[number]]
            return
        for names in self._scan().values():
            for other, path in names.values():
                if other == number:
                    self._contents[number] = path.read_bytes()

    def _scan(self):
        """From the number of each folder to its names."""
        found = {}
        for folder, *names in os.walk(self._root):
            folder = Path(folder)
            found[self._number(folder)] = {
                name: (self._number(folder / name), folder / name)
                for name in itertools.chain(*names)
            }
        return found

    def _number(self, path=None):
        number = os.stat(path or self._root).st_ino
        if number not in self._held:
            # Held open, so that no later file gets its number.
            self._held[number] = os.open(path or self._root, os.O_RDONLY)
        return number

    def _files(self, names, folder, before=""):
        for name, (number, _) in names.get(folder, {}).items():
            if number in names:
                yield from self._files(names, number, f"{before}{name}/")
            else:
                yield f"{before}{name}", self._contents.get(number, b"")

    def close(self) -> None:
        """Lets go of the files."""
        for descriptor in self._held.values():
            os.close(descriptor)


@pytest.fixture
def disk(tmp_path):
    """Makes a `FakeDisk` of `tmp_path`, of what is there at that moment."""
    made = []

    def make():
        made.append(FakeDisk(tmp_path))
        return made[-1]

    yield make
    for one in made:
        one.close()
