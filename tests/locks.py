"""A check of how a lock is given back."""

import filelock
import pytest


def check_that_next_holder_is_alone(monkeypatch, use):
    """Runs what takes a lock, and takes it as soon as it is released.

    Its file must be removed while it is held. Removed later, it would be that
    of the next holder, and another one would get a lock on a new file.

    Args:
        monkeypatch: pytest's.
        use: Function that takes and releases the lock.
    """
    real, next_ones = filelock.FileLock, []

    class Watched:
        def __init__(self, lock_file, **options):
            self.lock_file = str(lock_file)
            self._lock = real(lock_file, **options)

        def acquire(self):
            self._lock.acquire()

        def release(self):
            self._lock.release()
            next_ones.append(real(self.lock_file, blocking=False))
            next_ones[0].acquire()

    with monkeypatch.context() as patch:
        patch.setattr(filelock, "FileLock", Watched)
        use()
    (held,) = next_ones
    with pytest.raises(filelock.Timeout):
        real(held.lock_file, blocking=False).acquire()
    held.release()
