"""Go into namespaces of one's own, with nothing but Linux and Python.

Like ``judge.py``, this file is sent to a fresh interpreter as a whole, and runs before it there. `enter` leaves that
process behind as a guard and goes on in a grandchild, which is the first process of its own process namespace: when it
ends, or when the guard is killed, the kernel kills every process that it ever started, and its files are gone with its
mounts. Around it there is

* a root of its own, read-only: an empty folder, the folders of the interpreter and the system's libraries (read-only,
  no devices, no set-user-id), five devices without state, and a writable folder in memory of limited size;
* no network, and no other process, shared memory or message queue of the machine;
* no privilege: the user is not the caller where the caller is root, and every capability is dropped.
"""

import ctypes
import os
import select

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_NEW_NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x02000000
"""User, mount, process, network, System V IPC, host name, cgroup."""
_READ_ONLY, _NOSUID_ATTRIBUTE, _NODEV_ATTRIBUTE = 1, 2, 4
_AT_FDCWD, _AT_RECURSIVE, _SYS_MOUNT_SETATTR, _SYS_PIVOT_ROOT = -100, 0x8000, 442, {"x86_64": 155, "aarch64": 41}
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_STRANGER = 65534
_LIBC = ctypes.CDLL(None, use_errno=True)
_OLD = "/.old"


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def _check(result, what):
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source, target, kind, flags, options=None):
    arguments = [None if value is None else value.encode() for value in (source, target, kind, options)]
    result = _LIBC.mount(*arguments[:3], ctypes.c_ulong(flags), arguments[3])
    _check(result, f"mount {kind or 'of'} {source or ''} on {target}")


def _protect(path, attributes, recursive=True):
    """Add attributes to a mount, and to those below it. Needs Linux 5.12."""
    value = _MountAttributes(attributes, 0, 0, 0)
    result = _LIBC.syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_long(_AT_FDCWD),
        path.encode(),
        ctypes.c_uint(_AT_RECURSIVE if recursive else 0),
        ctypes.byref(value),
        ctypes.c_size_t(ctypes.sizeof(value)),
    )
    _check(result, f"mount_setattr of {path}")


def _prctl(option, value):
    return _LIBC.prctl(option, *(ctypes.c_ulong(number) for number in (value, 0, 0, 0)))


def _die_with(alive):
    """Be killed when the parent ends; ``alive`` is a pipe of which only the parent holds the writing end."""
    _check(_prctl(_PR_SET_PDEATHSIG, 9), "prctl")
    if select.select([alive], [], [], 0)[0]:  # it has ended already
        os._exit(1)


def enter(folders, devices, links, folder, size):
    """Go on in namespaces of one's own; only the grandchild returns.

    Args:
        folders: what is to be seen of the machine, read-only, at the same place; files and folders.
        devices: names of the devices in /dev to be had.
        links: symbolic links to make, as (place, target).
        folder: the writable folder.
        size: bytes that it holds.

    Raises:
        OSError: the kernel refuses; in the caller's process or in the grandchild.
    """
    root = os.geteuid() == 0
    user, group = os.geteuid(), os.getegid()
    alive, guard = os.pipe()
    unshared, tell = os.pipe()
    mapped, go = os.pipe()
    child = os.fork()
    if child:
        for fd in (alive, tell, mapped):
            os.close(fd)
        try:
            _map_users(child, unshared, go, root, user, group)
        finally:
            for fd in (unshared, go):
                os.close(fd)
            status = os.waitpid(child, 0)[1]
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    for fd in (guard, unshared, go):
        os.close(fd)
    _check(_LIBC.unshare(ctypes.c_int(_NEW_NAMESPACES)), "unshare")
    _die_with(alive)
    os.write(tell, b"1")
    os.close(tell)
    if os.read(mapped, 1) != b"1":
        os._exit(1)
    os.close(mapped)
    again, keep = os.pipe()
    init = os.fork()
    if init:
        os.close(again)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(init, 0)[1]) & 0xFF)
    for fd in (keep, alive):
        os.close(fd)
    _make_root(folders, devices, links, folder, size)
    _drop_privileges(root)
    _die_with(again)
    os.close(again)


def _map_users(child, unshared, go, root, user, group):
    """Say who the child's users are: it can't itself where they are two."""
    if os.read(unshared, 1) != b"1":
        return
    # Root is needed to make the mounts where only root may read the folders; afterwards it is somebody else.
    stranger = f"\n{_STRANGER} {_STRANGER} 1" if root else ""
    if not root:
        with open(f"/proc/{child}/setgroups", "w") as file:
            file.write("deny")
    for name, number in (("uid_map", user), ("gid_map", group)):
        with open(f"/proc/{child}/{name}", "w") as file:
            file.write(f"0 {number} 1{stranger}")
    os.write(go, b"1")


def _make_root(folders, devices, links, folder, size):
    machine = os.uname().machine
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,nr_inodes=4096,mode=755")
    os.mkdir("/tmp" + _OLD)
    os.chdir("/tmp")
    result = _LIBC.syscall(ctypes.c_long(_SYS_PIVOT_ROOT[machine]), b".", _OLD.lstrip("/").encode())
    _check(result, "pivot_root")
    os.chdir("/")
    for place in folders:
        _bind(place, _READ_ONLY | _NOSUID_ATTRIBUTE | _NODEV_ATTRIBUTE)
    for name in devices:
        _bind("/dev/" + name, _NOSUID_ATTRIBUTE)
    for place, target in links:
        os.symlink(target, place)
    os.makedirs(folder)
    options = f"size={size},nr_inodes=4096,mode=1777"
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)
    _check(_LIBC.umount2(_OLD.encode(), _MNT_DETACH), "umount2")
    os.rmdir(_OLD)
    _protect("/", _READ_ONLY, recursive=False)
    name = b"sandbox"
    _check(_LIBC.sethostname(name, ctypes.c_size_t(len(name))), "sethostname")


def _bind(place, attributes):
    source = _OLD + place
    if os.path.isdir(source):
        os.makedirs(place, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        open(place, "w").close()
    _mount(source, place, None, _MS_BIND | _MS_REC)
    _protect(place, attributes)


def _drop_privileges(root):
    for capability in range(64):
        if _prctl(_PR_CAPBSET_DROP, capability):
            break  # there are no more
    if root:
        os.setgroups([])
        os.setresgid(_STRANGER, _STRANGER, _STRANGER)
        os.setresuid(_STRANGER, _STRANGER, _STRANGER)
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _check(_LIBC.capset(header, nothing), "capset")
    _check(_prctl(_PR_SET_NO_NEW_PRIVS, 1), "prctl")
