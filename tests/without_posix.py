"""Runs this project's code as Windows would, in a process of its own.

What POSIX alone has is hidden from the modules of this project. Other packages
have code of their own for Windows, which is not what is tested. Files are as
they are there: a folder cannot be opened or flushed, what is open for reading
alone cannot be flushed, and what is open cannot be removed or renamed.
"""

import builtins
import errno
import fcntl
import importlib
import os
import pkgutil
import subprocess
import sys
import textwrap
import types

PACKAGES = ("experiments", "keras_bn", "keras_bn_checks", "keras_bn_command")

MODULES = frozenset(
    "crypt curses fcntl grp nis ossaudiodev posix pty pwd readline resource "
    "spwd syslog termios tty".split()
)
_NAMES = {
    "os": (
        "EX_OK EX_USAGE EX_DATAERR EX_NOINPUT EX_SOFTWARE EX_OSERR EX_IOERR "
        "EX_TEMPFAIL EX_NOPERM EX_CONFIG O_CLOEXEC O_DIRECTORY O_DSYNC "
        "O_NOCTTY O_NOFOLLOW O_NONBLOCK O_PATH O_SYNC O_TMPFILE WCOREDUMP "
        "WEXITSTATUS WIFEXITED WIFSIGNALED WIFSTOPPED WNOHANG WSTOPSIG "
        "WTERMSIG WUNTRACED chown chroot confstr ctermid eventfd fchdir fchmod "
        "fchown fdatasync fork forkpty fpathconf fstatvfs getegid geteuid "
        "getgid getgrouplist getgroups getloadavg getpgid getpgrp getpriority "
        "getresgid getresuid getsid getuid getxattr initgroups killpg lchown "
        "listxattr lockf login_tty major makedev memfd_create minor mkfifo "
        "mknod nice openpty pathconf pidfd_open pipe2 posix_fadvise "
        "posix_fallocate posix_openpt posix_spawn posix_spawnp pread preadv "
        "pwrite pwritev register_at_fork removexattr sched_get_priority_max "
        "sched_getaffinity sched_getparam sched_getscheduler sched_setaffinity "
        "sched_setscheduler sched_yield sendfile setegid seteuid setgid "
        "setgroups setpgid setpgrp setpriority setregid setresgid setresuid "
        "setreuid setsid setuid setxattr splice statvfs sync sysconf "
        "sysconf_names tcgetpgrp tcsetpgrp ttyname uname wait wait3 wait4 "
        "waitid"
    ),
    "select": "epoll kqueue poll",
    "signal": (
        "ITIMER_REAL SIGALRM SIGBUS SIGCHLD SIGCLD SIGCONT SIGHUP SIGIO "
        "SIGKILL SIGPIPE SIGPOLL SIGPROF SIGPWR SIGQUIT SIGSTOP SIGSYS SIGTRAP "
        "SIGTSTP SIGTTIN SIGTTOU SIGURG SIGUSR1 SIGUSR2 SIGVTALRM SIGWINCH "
        "SIGXCPU SIGXFSZ SIG_BLOCK SIG_SETMASK SIG_UNBLOCK alarm getitimer "
        "pause pthread_kill pthread_sigmask setitimer siginterrupt sigpending "
        "sigtimedwait sigwait sigwaitinfo"
    ),
    "socket": "AF_UNIX socketpair send_fds recv_fds",
    "sys": "getdlopenflags setdlopenflags",
    "time": "clock_getres clock_gettime clock_settime tzset",
}
_CHANGED = {"os": {"name": "nt"}, "sys": {"platform": "win32"}}


def run(program, *arguments, **options):
    """Runs a program that has hidden what POSIX has.

    Args:
        program: Python code; `without_posix` is this module.
        *arguments: of the program.
        **options: of `subprocess.run`.

    Returns:
        What it printed.
    """
    program = textwrap.dedent(program)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from tests import without_posix\n"
            f"without_posix.hide()\n{program}",
            *map(str, arguments),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def hide():
    """Hides it in this process, from what this project imports from now on."""
    seen = {
        name: _Without(importlib.import_module(name), names.split())
        for name, names in _NAMES.items()
    }
    real_import = builtins.__import__

    def import_(name, globals=None, locals=None, fromlist=(), level=0):
        importer = (globals or {}).get("__name__", "").partition(".")[0]
        if importer not in PACKAGES or level:
            return real_import(name, globals, locals, fromlist, level)
        if name.partition(".")[0] in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        module = real_import(name, globals, locals, fromlist, level)
        return seen.get(module.__name__, module)

    builtins.__import__ = import_
    _take_windows_file_rules()


def walk(package, left_out=()):
    """Imports all modules of a package, and gets all their public names.

    Args:
        package: Name of a package of this project.
        left_out: Beginnings of names of modules that are not imported.

    Returns:
        List of the modules' names.
    """
    found = []
    top = importlib.import_module(package)

    def visit(path, prefix):
        for one in pkgutil.iter_modules(path, prefix):
            last = one.name.rpartition(".")[2]
            if last == "__main__" or one.name.startswith(tuple(left_out)):
                continue
            module = importlib.import_module(one.name)
            found.append(one.name)
            for name in getattr(module, "__all__", dir(module)):
                getattr(module, name)
            if one.ispkg:
                visit(module.__path__, f"{one.name}.")

    for name in getattr(top, "__all__", ()):
        getattr(top, name)
    visit(top.__path__, f"{package}.")
    return found


class _Without(types.ModuleType):
    """A module without some of its names."""

    def __init__(self, module, names):
        super().__init__(module.__name__)
        self._module = module
        self._names = frozenset(names)
        self.__dict__.update(_CHANGED.get(module.__name__, {}))

    def __getattr__(self, name):
        if name in self._names:
            raise AttributeError(
                f"module {self.__name__!r} has no attribute {name!r}"
            )
        return getattr(self._module, name)


def _take_windows_file_rules():
    real = {
        name: getattr(os, name)
        for name in ("open", "fsync", "unlink", "remove", "rename", "replace")
    }

    def open_(path, flags, *arguments, dir_fd=None, **options):
        # shutil's own way of removing a tree is another one there.
        if dir_fd is None and not isinstance(path, int) and os.path.isdir(path):
            ours = sys._getframe(1).f_globals["__name__"].partition(".")[0]
            if ours in PACKAGES:
                raise PermissionError(errno.EACCES, "Permission denied", path)
        return real["open"](path, flags, *arguments, dir_fd=dir_fd, **options)

    def fsync(file):
        descriptor = file if isinstance(file, int) else file.fileno()
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == 0:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return real["fsync"](file)

    def refusing(name):
        def function(path, *arguments, **options):
            if not options and _is_open(path):
                raise PermissionError(errno.EACCES, "in use", path)
            return real[name](path, *arguments, **options)

        return function

    os.open, os.fsync = open_, fsync
    for name in ("unlink", "remove", "rename", "replace"):
        setattr(os, name, refusing(name))


def _is_open(path):
    """Whether this process has a file open, or one in a folder."""
    path = os.path.realpath(os.fspath(path))
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if target == path or target.startswith(path + os.sep):
            return True
    return False
