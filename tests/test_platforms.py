"""The package imports on systems without Unix's modules and names."""

from __future__ import annotations

import subprocess
import sys

from tests import ROOT


NO_UNIX = """
import importlib, os, pkgutil, signal, sys
import hf_detrkd

modules = [module.name for module in pkgutil.walk_packages(hf_detrkd.__path__, "hf_detrkd.")]
for module in modules:  # once as it is, so that other packages, which go by the system's name, are loaded
    importlib.import_module(module)
for module in ("hf_detrkd", *modules):
    del sys.modules[module]

for module in ("fcntl", "grp", "posix", "pty", "pwd", "resource", "termios", "tty"):
    sys.modules[module] = None  # makes an import of it fail
for name in ("fork", "getuid", "geteuid", "getloadavg", "killpg", "mkfifo", "setsid", "statvfs", "uname"):
    delattr(os, name)
for name in ("SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2", "alarm", "setitimer"):
    delattr(signal, name)
for module in modules:
    importlib.import_module(module)
print(len(modules))
"""


def test_every_module_imports_without_what_only_unix_has() -> None:
    done = subprocess.run([sys.executable, "-c", NO_UNIX], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 150
