"""What runs inside the sandbox: the judge, and the child in which the program runs.

This file is sent to the sandbox as text, after ``comparison.py``, so it uses the standard library only and nothing else
of this package. It is written for Python 3.10 and later, because a SandboxFusion service has an interpreter of its own.

The judge reads a job (the program and its limits) and starts the child *before* it reads the tests: the child's memory
and its open files never hold an expected result, the tests, or the way back to whoever asked. What the child may do
besides computing is cut down before the program's first line runs (see `confine`). Then

* ``stdin``: a child for every test case; what it prints is compared with what it should print;
* ``call``: one child, whose function is called with the arguments of every case; what it returns is compared;
* ``assert``: one child; the test's code runs in the judge, where the program's functions are `Remote`: a call sends the
  arguments to the child and brings the result back as plain data, so that ``==`` is Python's own.

The verdict is the judge's: a program can end it early or keep it waiting, and then it has failed.
"""

import collections
import ctypes
import json
import os
import resource
import select
import sys
import time

if __name__ != "__main__":  # in the sandbox, comparison.py stands above this file
    from gcpo.rewards.comparison import same_output, same_value

MESSAGE_LIMIT = 8 * 2**20
"""Bytes that the child may send at once."""
DEPTH_LIMIT = 200
"""Nesting of a value that is sent."""
REASON_LIMIT = 300

# ---- messages --------------------------------------------------------------------------------------------------------


class Gone(BaseException):
    """The child ended, hung, or sent what can't be read. No Exception: a test's own ``except`` must not swallow it."""


def write_message(fd, message, wait=None):
    """Send an object as JSON, after 16 hexadecimal digits that say how long it is; ``wait`` before every write."""
    data = json.dumps(message).encode()
    view = memoryview(b"%016x" % len(data) + data)
    while view:
        if wait is not None:
            wait()
        view = view[os.write(fd, view) :]


def read_message(fd, limit=None, wait=None):
    """Receive an object; ``wait`` is called before every read. Raises Gone at the end or where it can't be read."""
    header = _read_exactly(fd, 16, wait)
    try:
        size = int(header, 16)
    except ValueError:
        raise Gone("it sent something unreadable") from None
    if limit is not None and not 0 <= size <= limit:
        raise Gone("it returned more than can be looked at")
    try:
        return json.loads(_read_exactly(fd, size, wait))
    except (ValueError, RecursionError):
        raise Gone("it sent something unreadable") from None


def _read_exactly(fd, size, wait):
    parts = []
    while size:
        if wait is not None:
            wait()
        part = os.read(fd, min(size, 2**20))
        if not part:
            raise Gone("it ended before its tests did")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# ---- values ----------------------------------------------------------------------------------------------------------
#
# Lists, strings, floats and small integers stand for themselves; everything else is an object with one key.


def pack(value, handles=None, depth=0):
    """A value as JSON. Subclasses become their plain type; what is no data becomes a handle, or a TypeError."""
    if depth > DEPTH_LIMIT:
        raise ValueError("a value is nested too deeply")
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int):
        number = int(value)
        return number if -(2**63) < number < 2**63 else {"int": hex(number)}
    if isinstance(value, str):
        return str.__str__(value)
    for name, (type_, _) in _SEQUENCES.items():
        if isinstance(value, type_):
            items = [pack(item, handles, depth + 1) for item in value]
            return items if name == "list" else {name: items}
    if isinstance(value, dict):
        return {"dict": [[pack(k, handles, depth + 1), pack(v, handles, depth + 1)] for k, v in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, range):
        return {"range": [pack(n) for n in (value.start, value.stop, value.step)]}
    if kind.__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
        return pack(value.item(), handles, depth + 1)
    if isinstance(value, type) and value.__module__ == "builtins" and getattr(_builtins(), value.__name__, 0) is value:
        return {"type": value.__name__}
    if isinstance(value, Remote):
        return {"handle": object.__getattribute__(value, "_handle")}
    if handles is None:
        raise TypeError("a " + kind.__name__ + " can't be given to the program")
    if hasattr(kind, "__next__"):  # iterators and generators: the test can go through them once, as it expects
        return {"iterator": [pack(item, handles, depth + 1) for item in value]}
    handles.append(value)
    return {"handle": len(handles) - 1}


_SEQUENCES = {  # their types, and what makes one of a list
    "list": (list, list),
    "tuple": (tuple, tuple),
    "set": (set, set),
    "frozenset": (frozenset, frozenset),
    "deque": (collections.deque, collections.deque),
    "dict_keys": (type({}.keys()), lambda items: dict.fromkeys(items).keys()),
    "dict_values": (type({}.values()), lambda items: dict(enumerate(items)).values()),
    "dict_items": (type({}.items()), lambda items: dict(items).items()),
}


def unpack(data, handle):
    """The value that was packed; ``handle`` makes something of a handle's number."""
    if isinstance(data, list):
        return [unpack(item, handle) for item in data]
    if not isinstance(data, dict):
        return data
    ((name, inner),) = data.items()
    if name in _SEQUENCES:
        return _SEQUENCES[name][1]([unpack(item, handle) for item in inner])
    if name == "dict":
        return {unpack(k, handle): unpack(v, handle) for k, v in inner}
    if name == "int":
        return int(inner, 16)
    if name == "complex":
        return complex(*inner)
    if name == "bytes":
        return bytes.fromhex(inner)
    if name == "range":
        return range(*(unpack(n, handle) for n in inner))
    if name == "iterator":
        return iter([unpack(item, handle) for item in inner])
    if name == "type":
        type_ = getattr(_builtins(), inner)
        if isinstance(type_, type):
            return type_
    if name == "handle" and isinstance(inner, int):
        return handle(inner)
    raise ValueError(name)


def _builtins():
    import builtins

    return builtins


# ---- the child -------------------------------------------------------------------------------------------------------


def confine(limits, strict):
    """Limit what this process, and every thread of it, can do. There is no way back.

    Raises:
        OSError: the kernel refuses, and ``strict`` is set.
    """
    memory, file_bytes = limits["memory"], limits["file"]
    seconds = int(limits["cpu_total"]) + 2  # the judge stops it first, and knows fractions of a second
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
# What a program has no use for: another process or program, the network, other namespaces and mounts, other processes'
# memory, signals to them, and memory that no limit of this process counts. Of clone and tgkill, which threads and abort
# need, only what concerns other processes is refused.
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
        OSError: the kernel or the architecture doesn't know how.
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
        (equal, 0, 1, partly["clone3"]),  # its flags are out of sight; libc then takes clone
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
    """The system call; raises OSError."""
    numbers = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    if ctypes.CDLL(None, use_errno=True).prctl(option, *numbers):
        raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")


STARS = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json "
    "typing"
)


def star_imports(namespace):
    """Names that the programs of competitive sets take for granted: of every module of `STARS`, and the modules."""
    modules = {name: __import__(name) for name in STARS.split()}
    for module in modules.values():
        public = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
        namespace.update({name: getattr(module, name) for name in public if not hasattr(_builtins(), name)})
    namespace.update(modules)


def load(job, namespace):
    """Run the program's code in ``namespace``."""
    sys.setrecursionlimit(job["recursion"])
    _builtins().exit = _builtins().quit = sys.exit  # as in an interpreter that was started without -S
    if job["stars"]:
        star_imports(namespace)
    code = job["program"]
    if job["prompt"] is not None:
        above, code = assemble(job["prompt"], code, job["entry"])
        exec(compile(above, "<prompt>", "exec"), namespace)
    exec(compile(code, "<program>", "exec"), namespace)


def assemble(prompt, code, entry):
    """What to run of a prompt that ends with the head of the function ``entry``, and then what of the answer.

    An answer that defines ``entry`` follows what stands above that function in the prompt; any other goes on where the
    prompt ends.
    """
    import ast

    try:
        defined = [node.name for node in ast.parse(code).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        defined = []
    if entry not in defined:
        return "", prompt + code
    try:
        tree = ast.parse(prompt)
    except SyntaxError:  # a head without a docstring below it is no whole function
        tree = ast.parse(prompt + "\n    pass\n")
    heads = [node.lineno for node in tree.body if getattr(node, "name", None) == entry]
    lines = prompt.splitlines(True)
    return "".join(lines[: heads[-1] - 1] if heads else lines), code


def fresh_module(name):
    """A new module under this name, in place of the judge's own."""
    module = type(sys)(name)
    sys.modules[name] = module
    if name != "__main__":
        sys.modules["__main__"] = module
    return vars(module)


def be_child(job, fds):
    """Turn this process, just forked, into the program's: only ``fds`` stay open, as 0, 1, 2, and so on."""
    null = os.open(os.devnull, os.O_RDWR)
    high = [os.dup(null if fd is None else fd) for fd in fds]
    for target, fd in enumerate(high):
        os.dup2(fd, target)
    os.closerange(len(fds), 4096)
    sys.path[:] = [*(path for path in sys.path if path), *job["paths"]]
    confine(job["limits"], job["strict"])


def run_program(job):
    """The whole life of a ``stdin`` child. It ends as interpreters end, with SystemExit, which nothing here catches."""
    try:
        load(job, fresh_module("__main__"))
    except SystemExit:
        raise
    except BaseException as error:
        os.write(2, describe(error).encode("utf-8", "replace"))
        sys.exit(1)
    sys.exit(0)


def serve_calls(job, receive, send):
    """The whole life of a ``call`` or ``assert`` child: load the program, then do what the judge asks."""
    handles = []

    def attempt(action):
        try:
            return {"value": pack(action(), handles)}
        except BaseException as error:  # SystemExit too: the program may not end the test
            return {"error": [type(error).__name__, describe(error)]}

    namespace = fresh_module("solution")
    write_message(send, attempt(lambda: load(job, namespace)))

    def find(name):
        if hasattr(namespace.get("Solution"), name):
            return getattr(namespace["Solution"](), name)
        if name not in namespace:
            raise NameError("it does not define " + name)
        return namespace[name]

    def do(request):
        known = handles.__getitem__
        target = known(request["on"]) if "on" in request else None
        if request["do"] == "call":
            function = target if target is not None else find(request["name"])
            arguments = [unpack(value, known) for value in request["arguments"]]
            return function(*arguments, **{k: unpack(v, known) for k, v in request["keywords"].items()})
        if request["do"] == "set":
            return setattr(target, request["name"], unpack(request["value"], known))
        return getattr(target, request["name"])

    while True:
        request = read_message(receive)
        write_message(send, attempt(lambda: do(request)))  # noqa: B023 (called at once)


def describe(error):
    """An exception in one line."""
    try:
        text = "".join(str(error).split("\n")[:1])
    except BaseException:
        text = ""
    return (type(error).__name__ + (": " + text if text else ""))[:REASON_LIMIT]


# ---- the judge -------------------------------------------------------------------------------------------------------


class Failed(BaseException):
    """The program has failed; the message says how."""


class Clock:
    """The limits of the child that runs now, in seconds of its processor and of the wall."""

    def __init__(self, limits):
        self.limits = limits
        self.cpu_before = self.cpu_start = 0.0
        self.wall_start = self.wall_case = time.monotonic()
        self.pid = 0

    def start(self, pid):
        """A new child."""
        self.pid = pid
        self.next_case()

    def next_case(self):
        """The limits of one case begin anew."""
        self.cpu_start = self.used()
        self.wall_case = time.monotonic()

    def used(self):
        """Processor time of all children so far."""
        if not self.pid:
            return self.cpu_before
        try:
            return self.cpu_before + time.clock_gettime((~self.pid) << 3 | 2)  # the process clock of another process
        except OSError:
            return self.cpu_before

    def end(self):
        """Kill the child, if it still runs; returns its exit status."""
        os.kill(self.pid, 9)  # it has not been waited for, so the number is still its own
        self.cpu_before, pid, self.pid = self.used(), self.pid, 0
        return os.waitpid(pid, 0)[1]

    def left(self):
        """Seconds until it makes sense to look again; raises Failed where a limit is reached."""
        now, used, limits = time.monotonic(), self.used(), self.limits
        left = min(
            limits["cpu"] - (used - self.cpu_start),
            limits["cpu_total"] - used,
            limits["wall"] - (now - self.wall_case),
            limits["wall_total"] - (now - self.wall_start),
        )
        if left <= 0:
            raise Failed("out of time")
        return max(left, 0.01)


def fork():
    """Like os.fork, with nothing in the buffers to be written twice."""
    sys.stdout.flush()
    sys.stderr.flush()
    return os.fork()


def run_once(job, text, clock):
    """Start the program with ``text`` as its standard input; returns what it printed. Raises Failed."""
    stdin = os.memfd_create("stdin")
    data = memoryview(text.encode("utf-8", "surrogatepass"))
    while data:
        data = data[os.write(stdin, data) :]
    os.lseek(stdin, 0, os.SEEK_SET)
    (out, child_out), (err, child_err) = os.pipe(), os.pipe()
    pid = fork()
    if pid == 0:
        try:
            be_child(job, [stdin, child_out, child_err])
            for stream in (sys.stdin, sys.stdout):
                stream.reconfigure(encoding="utf-8", errors="surrogateescape")
            run_program(job)
        except Exception as error:
            try:
                os.write(2, describe(error).encode())
            finally:
                os._exit(1)
    for fd in (stdin, child_out, child_err):
        os.close(fd)
    clock.start(pid)
    printed = {out: bytearray(), err: bytearray()}
    ended = os.pidfd_open(pid)
    waiting = [out, err]
    try:
        for fd in waiting:
            os.set_blocking(fd, False)
        over = False
        while not over:
            over = ended in select.select([*waiting, ended], [], [], clock.left())[0]
            waiting = [fd for fd in waiting if drain(fd, printed[fd])]
            del printed[err][:-2000]
            if len(printed[out]) > job["limits"]["output"]:
                raise Failed(f"it printed more than {job['limits']['output']} bytes")
        complaint = bytes(printed[err]).decode("utf-8", "replace").strip().split("\n")[-1][:REASON_LIMIT]
    finally:
        status = clock.end()
        for fd in (out, err, ended):
            os.close(fd)
    if status:
        how = f"exit code {os.WEXITSTATUS(status)}" if os.WIFEXITED(status) else f"signal {os.WTERMSIG(status)}"
        raise Failed(complaint or "it ended with " + how)
    return bytes(printed[out]).decode("utf-8", "replace")


def drain(fd, into):
    """Take what is there, up to a MiB; False at the end."""
    try:
        data = os.read(fd, 2**20)
    except BlockingIOError:
        return True
    into += data
    return bool(data)


class Server:
    """The child of ``call`` and ``assert``."""

    def __init__(self, job, clock):
        self.clock, self.broken = clock, None
        requests, self.send = os.pipe()
        self.receive, replies = os.pipe()
        self.pid = fork()
        if self.pid == 0:
            try:
                be_child(job, [None, None, None, requests, replies])
                serve_calls(job, 3, 4)
            finally:
                os._exit(0)
        os.close(requests)
        os.close(replies)
        os.set_blocking(self.send, False)

    def loaded(self):
        """Wait until the program's own code has run. Raises Failed."""
        self.clock.start(self.pid)
        try:
            reply = self._receive()
        except Gone as error:
            raise Failed(str(error)) from None
        if "error" in reply:
            raise Failed(str(reply["error"][-1])[:REASON_LIMIT])

    def ask(self, **request):
        """What the child answers; raises what the program raised, or Gone."""
        if self.broken:
            raise Gone(self.broken)
        try:
            write_message(self.send, request, lambda: self._wait([], [self.send]))
            reply = self._receive()
            if "error" in reply:
                name, text = reply["error"]
                error = Exception(str(text)[:REASON_LIMIT])
            else:
                return unpack(reply["value"], lambda number: Remote(self, None, number))
        except (Gone, Failed) as gone:
            self.broken = str(gone)
            raise Gone(self.broken) from None
        except BrokenPipeError:
            self.broken = "it ended before its tests did"
            raise Gone(self.broken) from None
        except Exception:  # nothing that the judge itself would send
            self.broken = "it sent something unreadable"
            raise Gone(self.broken) from None
        type_ = getattr(_builtins(), str(name), None)
        if isinstance(type_, type) and issubclass(type_, Exception):
            try:
                error = type_(str(text).partition(": ")[2])
            except TypeError:  # UnicodeDecodeError and the like want more
                pass
        raise error

    def _wait(self, readable, writable):
        while not any(select.select(readable, writable, [], self.clock.left())):
            pass

    def _receive(self):
        reply = read_message(self.receive, MESSAGE_LIMIT, lambda: self._wait([self.receive], []))
        if not isinstance(reply, dict) or not (reply.keys() & {"value", "error"}):
            raise Gone("it sent something unreadable")
        return reply


class Remote:
    """Something in the child: a name of the program, or an object that is no plain data. Equal to itself alone."""

    def __init__(self, server, name, handle=None):
        object.__setattr__(self, "_server", server)
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_handle", handle)

    def _ask(self, **request):
        get = object.__getattribute__
        if get(self, "_handle") is not None:
            request["on"] = get(self, "_handle")
        elif request["do"] == "call":
            request["name"] = get(self, "_name")
        else:
            raise AttributeError(request["name"])
        return get(self, "_server").ask(**request)

    def __call__(self, *arguments, **keywords):
        """Call it in the child."""
        packed = [pack(value) for value in arguments]
        return self._ask(do="call", arguments=packed, keywords={k: pack(v) for k, v in keywords.items()})

    def __getattr__(self, name):
        """Look the attribute up in the child."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask(do="get", name=name)

    def __setattr__(self, name, value):
        """Set the attribute in the child."""
        self._ask(do="set", name=name, value=pack(value))


def judge_stdin(job, read, clock):
    """One test of a program that reads and prints. Raises Failed."""
    clock.next_case()
    printed = run_once(job, read(), clock)
    if not same_output(printed, read()):
        raise Failed("wrong output: " + shown(printed[:200]))


def shown(value):
    """A value in a few words."""
    try:
        return repr(value)[:200]
    except ValueError:  # an integer of more digits than Python likes to write
        return "a " + type(value).__name__


def judge_call(server, entry, unwrap, read, clock):
    """One test of a function; ``unwrap``: the expected result may stand in a list of its own. Raises Failed."""
    clock.next_case()
    try:
        value = server.ask(do="call", name=entry, arguments=[plain(one) for one in read()], keywords={})
    except (Exception, Gone) as error:
        raise Failed(str(error) if isinstance(error, Gone) else describe(error)) from None
    expected = unpack(plain(read()), None)
    value = without_tuples(value)
    alternatives = [expected, expected[0]] if unwrap else [expected]
    if not any(same_value(value, one) for one in alternatives):
        raise Failed("wrong result: " + shown(value))


def plain(value):
    """A JSON value as a packed one: objects are dictionaries, whose keys are integers where all look like it."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if not isinstance(value, dict):
        return pack(value)
    numbers = bool(value) and all(key.removeprefix("-").isdecimal() and len(key) < 20 for key in value)
    return {"dict": [[int(key) if numbers else key, plain(item)] for key, item in value.items()]}


def without_tuples(value):
    """JSON has no tuples, so they count as lists."""
    if isinstance(value, (list, tuple)):
        return [without_tuples(item) for item in value]
    if isinstance(value, dict):
        return {key: without_tuples(item) for key, item in value.items()}
    return value


def judge_assert(server, namespace, read, clock):
    """Run one piece of test code. Raises Failed."""
    clock.next_case()
    try:
        exec(compile(read(), "<test>", "exec"), namespace)
    except (Exception, Gone) as error:
        raise Failed(str(error) if isinstance(error, Gone) else describe(error)) from None
    if server.broken:
        raise Failed(server.broken)


def judge(job, read, clock):
    """Read the tests one after the other and run them; returns how many passed, and why no more did, or None."""
    mode, passed, server = job["mode"], 0, None
    limit = job["limits"]["memory"] + 2**28
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    if mode != "stdin":
        server = Server(job, clock)  # before anything of the tests is read
    try:
        if server:
            server.loaded()
        tests = read()
        namespace = {"__name__": "test"}
        if mode == "assert":
            import random

            random.seed(0)  # the same verdict every time
            try:
                exec(compile(tests["setup"], "<setup>", "exec"), namespace)
            except Exception as error:  # the data set is wrong, and no program can pass
                raise OSError("the code before the tests fails: " + describe(error)) from None
            namespace.update({name: Remote(server, name) for name in tests["names"]})
        for _ in range(tests["cases"]):
            if mode == "stdin":
                judge_stdin(job, read, clock)
            elif mode == "call":
                judge_call(server, job["entry"], tests["unwrap"], read, clock)
            else:
                judge_assert(server, namespace, read, clock)
            passed += 1
    except Failed as failed:
        return passed, str(failed)
    except MemoryError:
        return passed, "it returned more than can be looked at"
    return passed, None


def reachable():
    """Whether there is a route to another machine; nothing is sent."""
    import _socket

    end = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    try:
        end.connect(("192.0.2.1", 9))
    except OSError:
        return False
    return True


def main():
    """Read a job, its tests and a secret from standard input; write the verdict to standard output."""
    source, sink, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):  # what a test prints is no verdict
        os.dup2(null, fd)
    verdict = {"passed": 0, "reason": None, "trouble": None, "seconds": 0.0, "secret": None}
    try:
        job = read_message(source)
        write_message(sink, {"started": True})
        os.chdir(job["folder"] or ".")
        prctl(4, 0)  # PR_SET_DUMPABLE: nobody looks into this process
        if job["probe"] and reachable():
            raise OSError("the network can be reached")
        clock = Clock(job["limits"])
        verdict["passed"], verdict["reason"] = judge(job, lambda: read_message(source), clock)
        verdict["seconds"] = clock.used()
        # The secret comes last: nothing that was forked from here has seen it.
        message = None
        while not (isinstance(message, dict) and "secret" in message):
            message = read_message(source)
        verdict["secret"] = message["secret"]
    except OSError as error:
        verdict["trouble"] = describe(error)
    except Gone:
        verdict["trouble"] = "the job could not be read"
    write_message(sink, verdict)
    os._exit(0)
