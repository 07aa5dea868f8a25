"""Limits of the child process that runs a program.

The file is sent to the sandbox as text (see ``judge.py``), so it uses only the standard library, from Python 3.10 on.
"""

import ctypes
import os
import resource


def confine(limits, strict):
    """Limit this process and all its threads; the limits cannot be lifted.

    Raises:
        OSError: the kernel refuses a limit and ``strict`` is set.
    """
    memory, file_bytes = limits["memory"], limits["file"]
    seconds = int(limits["cpu_total"]) + 2  # the judge stops it earlier, with a finer limit
    for name, value in (
        ("RLIMIT_AS", memory),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_CPU", seconds),
        ("RLIMIT_FSIZE", file_bytes),
        ("RLIMIT_MEMLOCK", 0),
        ("RLIMIT_MSGQUEUE", 0),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_NPROC", limits["processes"]),
        ("RLIMIT_STACK", min(memory, 64 * 2**20)),
    ):
        which = getattr(resource, name, None)
        if which is not None:
            hard = resource.getrlimit(which)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(which, (value, value))
    try:
        refuse_system_calls()
    except OSError:
        if strict:
            raise


ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS = 1, 38
CLONE_THREAD = 0x00010000
# System calls that a program does not need: they reach other processes or programs, the network, namespaces, mounts,
# other processes' memory and signals, or memory that no limit counts. Threads and abort need clone and tgkill, so only
# their use on other processes is refused.
REFUSED = {
    "x86_64": (
        0xC000003E,
        {"clone": 56, "clone3": 435, "tgkill": 234},
        "fork 57 vfork 58 execve 59 execveat 322 socket 41 connect 42 bind 49 ptrace 101 process_vm_readv 310 "
        "process_vm_writev 311 pidfd_getfd 438 unshare 272 setns 308 mount 165 umount2 166 pivot_root 155 "
        "chroot 161 open_tree 428 move_mount 429 fsopen 430 fsconfig 431 fsmount 432 fspick 433 mount_setattr 442 "
        "shmget 29 semget 64 msgget 68 memfd_create 319 memfd_secret 447 mq_open 240 io_uring_setup 425 bpf 321 "
        "perf_event_open 298 userfaultfd 323 add_key 248 request_key 249 keyctl 250 syslog 103 "
        "kill 62 tkill 200 rt_sigqueueinfo 129 rt_tgsigqueueinfo 297 pidfd_send_signal 424",
    ),
    "aarch64": (
        0xC00000B7,
        {"clone": 220, "clone3": 435, "tgkill": 131},
        "execve 221 execveat 281 socket 198 connect 203 bind 200 ptrace 117 process_vm_readv 270 process_vm_writev 271 "
        "pidfd_getfd 438 unshare 97 setns 268 mount 40 umount2 39 pivot_root 41 chroot 51 open_tree 428 "
        "move_mount 429 fsopen 430 fsconfig 431 fsmount 432 fspick 433 mount_setattr 442 shmget 194 semget 190 "
        "msgget 186 memfd_create 279 memfd_secret 447 mq_open 180 io_uring_setup 425 bpf 280 perf_event_open 241 "
        "userfaultfd 282 add_key 217 request_key 218 keyctl 219 syslog 116 "
        "kill 129 tkill 130 rt_sigqueueinfo 138 rt_tgsigqueueinfo 240 pidfd_send_signal 424",
    ),
}


class _Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint)]


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction))]


def refuse_system_calls():
    """Make the calls of `REFUSED` fail in this process from now on.

    Raises:
        OSError: the kernel or the architecture does not support this.
    """
    if os.uname().machine not in REFUSED:
        raise OSError("system calls can't be refused on " + os.uname().machine)
    architecture, partly, names = REFUSED[os.uname().machine]
    load, equal, above, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    program = [
        (load, 0, 0, 4),  # architecture
        (equal, 1, 0, architecture),
        (answer, 0, 0, KILL),
        (load, 0, 0, 0),  # number of the call
        (above, 0, 1, 0x40000000),  # the x32 numbers
        (answer, 0, 0, ERRNO | EPERM),
        (equal, 0, 1, partly["clone3"]),  # its flags cannot be read; libc falls back to clone
        (answer, 0, 0, ERRNO | ENOSYS),
    ]
    for number in names.split()[1::2]:
        program += [(equal, 0, 1, int(number)), (answer, 0, 0, ERRNO | EPERM)]
    program += [
        (equal, 0, 3, partly["clone"]),
        (load, 0, 0, 16),  # its flags
        (any_bit, 4, 0, CLONE_THREAD),
        (answer, 0, 0, ERRNO | EPERM),
        (equal, 0, 2, partly["tgkill"]),
        (load, 0, 0, 16),  # the process
        (equal, 0, 1, os.getpid()),
        (answer, 0, 0, ALLOW),
        (answer, 0, 0, ERRNO | EPERM),
    ]
    array = (_Instruction * len(program))(*(_Instruction(*one) for one in program))
    prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    whole = _Filter(len(program), array)
    prctl(22, 2, ctypes.addressof(whole))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def prctl(option, *values):
    """Call prctl and raise OSError if it fails."""
    numbers = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    if ctypes.CDLL(None, use_errno=True).prctl(option, *numbers):
        raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")
