"""Runs commands of sftx in this process as they would find Windows: `python fake_windows.py COMMANDS.json`.

To code of sftx, and to that code alone, modules and attributes that Python lacks on Windows are absent, Triton is not
installed, no directory can be opened, and no file is flushed through a descriptor that only reads. For all code, no
file that this process has open or mapped can be removed, renamed or replaced, nor can a directory that contains one.
What this cannot show: `os.name` and paths stay those of POSIX, and libraries find the system that is there.

The file holds a list of command lines, each a list of words after `sftx`; a JSON list of [exit code, output] is
written to the file OUTPUT.json beside it. Every command gets one question as its standard input.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil

MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty", "triton"}

SIGNALS = {"SIGABRT", "SIGBREAK", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN"}
"""The names with which the module `signal` begins on Windows, and which `signal.Signals` has there."""

POSIX_ONLY = set(
    """
    chown chroot confstr ctermid eventfd fchdir fchmod fchown fork forkpty fpathconf fstatvfs getegid geteuid getgid
    getgrouplist getgroups getloadavg getpgid getpgrp getpriority getresgid getresuid getsid getuid getxattr
    initgroups killpg lchown lockf login_tty major makedev memfd_create minor mkfifo mknod nice openpty pathconf
    pipe2 posix_fadvise posix_fallocate posix_spawn posix_spawnp pread preadv pwrite pwritev readv register_at_fork
    sched_getaffinity sched_getparam sched_getscheduler sched_setaffinity sched_yield sendfile setegid seteuid
    setgid setgroups setpgid setpriority setregid setresgid setresuid setreuid setsid setuid setxattr splice statvfs
    sync sysconf tcgetpgrp tcsetpgrp ttyname uname wait wait3 wait4 waitid writev O_ACCMODE O_ASYNC O_CLOEXEC
    O_DIRECTORY O_DSYNC O_NOCTTY O_NOFOLLOW O_NONBLOCK O_SYNC WNOHANG
    """.split()  # noqa: SIM905
)
"""Names of the module `os` that it lacks on Windows."""


def is_sftx(frame: Any) -> bool:
    return frame.f_globals.get("__name__", "").split(".")[0] in ("sftx", "sftx_kernels", "sftx_plugins")


def hide(module: ModuleType, is_absent: Callable[[str], bool]) -> None:
    """Let attributes of a module be absent to code of sftx."""

    class Hidden(ModuleType):
        def __getattribute__(self, name: str) -> Any:
            if is_absent(name) and is_sftx(sys._getframe(1)):
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r} on Windows")
            return super().__getattribute__(name)

    module.__class__ = Hidden


def become_windows() -> None:
    real_import, real_open, real_fsync = builtins.__import__, os.open, os.fsync

    def import_(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in MODULES and is_sftx(sys._getframe(1)):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real_import(name, *args, **kwargs)

    def open_(path: Any, *args: Any, **kwargs: Any) -> int:
        if is_sftx(sys._getframe(1)) and os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real_open(path, *args, **kwargs)

    def fsync(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real_fsync(number)

    builtins.__import__, os.open, os.fsync = import_, open_, fsync
    for name in ("remove", "rename", "replace", "rmdir", "unlink"):
        setattr(os, name, refuse_in_use(getattr(os, name), replaces=name == "replace"))
    shutil._use_fd_functions = False  # type: ignore[attr-defined]  # as where no directory can be opened
    hide(os, POSIX_ONLY.__contains__)
    hide(signal, lambda name: name.startswith("SIG") and name not in SIGNALS)
    sys.modules["triton"] = None  # type: ignore[assignment]
    memory_info = psutil.Process.memory_info

    def with_peak(process: psutil.Process) -> Any:
        found = memory_info(process)
        return SimpleNamespace(**found._asdict(), peak_wset=found.rss)

    psutil.Process.memory_info = with_peak


def refuse_in_use(function: Callable[..., None], *, replaces: bool) -> Callable[..., None]:
    def refuse(path: Any, *args: Any, **kwargs: Any) -> None:
        targets = [path, *args] if function.__name__ == "rename" or replaces else [path]
        if function.__name__ == "rename" and os.path.lexists(args[0]):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(args[0]))
        if replaces and os.path.isdir(args[0]):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(args[0]))
        used = files_in_use()
        for target in map(os.path.realpath, targets):
            if found := [file for file in used if file == target or file.startswith(f"{target}/")]:
                raise PermissionError(errno.EACCES, f"in use by this process: {found[0]}", target)
        function(path, *args, **kwargs)

    return refuse


def files_in_use() -> set[str]:
    """Return the files that this process has open or mapped."""
    used = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISREG(os.stat(f"/proc/self/fd/{number}").st_mode):
                used.add(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue  # the descriptor by which the list was read
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return used | {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6}


def main() -> None:
    file = Path(sys.argv[1])
    commands = json.loads(file.read_text(encoding="utf-8"))
    become_windows()
    from click.testing import CliRunner

    from sftx.cli import main as sftx

    results = []
    for command in commands:
        done = CliRunner().invoke(sftx, command, input="2 + 2")
        unexpected = done.exception is not None and not isinstance(done.exception, SystemExit)
        trace = "".join(traceback.format_exception(done.exception)) if unexpected else ""
        results.append([done.exit_code, done.output + trace])
    file.with_name("OUTPUT.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
