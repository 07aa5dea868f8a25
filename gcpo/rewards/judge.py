"""The judge, which grades a program inside the sandbox.

This file is sent to the sandbox as text, after ``comparison.py``, ``messages.py``, ``confinement.py``, ``child.py`` and
``runs.py``. All of them use only the standard library and Python 3.10 features, because a
SandboxFusion service has its own interpreter.

The judge reads a job (the program and its limits) and starts the child *before* it reads the tests: the child's memory
and its open files never hold an expected result, the tests, or the channel to the caller. The child's rights
are restricted before the program's first line runs (see `confine`). The modes are

* ``stdin``: a child for every test case; the judge compares the printed with the expected output;
* ``call``: one child, whose function gets the arguments of every case; the judge compares the returned values;
* ``assert``: one child; the test's code runs in the judge with the program's functions as `Remote`: a call sends the
  arguments to the child and returns the result as plain data, so that ``==`` is Python's own.

Only the judge writes the verdict: a program that ends early or keeps the judge waiting has failed.
"""

import os
import resource

if __name__ != "__main__":  # in the sandbox, these files precede this one
    from gcpo.rewards.comparison import same_output, same_value
    from gcpo.rewards.confinement import prctl
    from gcpo.rewards.messages import Gone, Remote, describe, pack, read_message, unpack, write_message
    from gcpo.rewards.runs import Clock, Failed, Server, run_once


def judge_stdin(job, read, clock):
    """Run one test of a program that reads and prints; raise Failed if it fails."""
    clock.next_case()
    printed = run_once(job, read(), clock)
    if not same_output(printed, read()):
        raise Failed("wrong output: " + shown(printed[:200]))


def shown(value):
    """Return a short text for a value."""
    try:
        return repr(value)[:200]
    except ValueError:  # an integer of more digits than Python converts
        return "a " + type(value).__name__


def judge_call(server, entry, unwrap, read, clock):
    """Run one test of a function; with ``unwrap`` the expected result may be wrapped in a list. Raises Failed."""
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
    """Convert a JSON value: objects become dictionaries, with integer keys if all keys are integers in digits."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if not isinstance(value, dict):
        return pack(value)
    numbers = bool(value) and all(key.removeprefix("-").isdecimal() and len(key) < 20 for key in value)
    return {"dict": [[int(key) if numbers else key, plain(item)] for key, item in value.items()]}


def without_tuples(value):
    """Return a value whose tuples are lists, since JSON has no tuples."""
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
    """Read and run the tests in turn; return the number that passed, and the reason of the first failure or None."""
    mode, passed, server = job["mode"], 0, None
    limit = job["limits"]["memory"] + 2**28
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    if mode != "stdin":
        server = Server(job, clock)  # before the tests are read
    try:
        if server:
            server.loaded()
        tests = read()
        namespace = {"__name__": "test"}
        if mode == "assert":
            import random

            random.seed(0)  # makes the verdict reproducible
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
    """Return whether there is a route to another machine; nothing is sent."""
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
    for fd in (0, 1):  # output of a test must not look like a verdict
        os.dup2(null, fd)
    verdict = {"passed": 0, "reason": None, "trouble": None, "seconds": 0.0, "secret": None}
    try:
        job = read_message(source)
        write_message(sink, {"started": True})
        os.chdir(job["folder"] or ".")
        prctl(4, 0)  # PR_SET_DUMPABLE: other processes cannot inspect this one
        if job["probe"] and reachable():
            raise OSError("the network can be reached")
        clock = Clock(job["limits"], job["folder"])
        verdict["passed"], verdict["reason"] = judge(job, lambda: read_message(source), clock)
        verdict["seconds"] = clock.used()
        # The secret comes last: no process forked earlier has seen it.
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
