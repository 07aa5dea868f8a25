"""Running a program for the judge: one child per test or one child that answers calls, with their limits.

The file is sent to the sandbox as text (see ``judge.py``), so it uses only the standard library, from Python 3.10 on.
"""

import builtins
import os
import select
import sys
import time

if __name__ != "__main__":  # in the sandbox, these files precede this one
    from gcpo.rewards.child import be_child, run_program, serve_calls
    from gcpo.rewards.messages import (
        MESSAGE_LIMIT,
        REASON_LIMIT,
        Gone,
        Remote,
        describe,
        read_message,
        unpack,
        write_message,
    )

FILES_SECONDS = 0.1
"""Interval at which the files of a program are counted."""


class Failed(BaseException):
    """The program has failed; the message gives the reason."""


class Clock:
    """The limits of the running child, in seconds of processor time and of wall-clock time."""

    def __init__(self, limits, folder):
        self.limits, self.folder = limits, folder
        self.cpu_before = self.cpu_start = 0.0
        self.wall_start = self.wall_case = time.monotonic()
        self.pid = 0

    def start(self, pid):
        """Start the limits of a new child."""
        self.pid = pid
        self.next_case()

    def next_case(self):
        """Reset the limits for the next case."""
        self.cpu_start = self.used()
        self.wall_case = time.monotonic()

    def used(self):
        """Return the processor time of all children so far in seconds."""
        if not self.pid:
            return self.cpu_before
        try:
            return self.cpu_before + time.clock_gettime((~self.pid) << 3 | 2)  # the process clock of another process
        except OSError:
            return self.cpu_before

    def end(self):
        """Kill the child if it still runs, and return its exit status."""
        os.kill(self.pid, 9)  # the process has not been waited for, so its id is still valid
        self.cpu_before, pid, self.pid = self.used(), self.pid, 0
        return os.waitpid(pid, 0)[1]

    def left(self):
        """Return the seconds until the next check; raise Failed if a limit is reached."""
        now, used, limits = time.monotonic(), self.used(), self.limits
        left = min(
            limits["cpu"] - (used - self.cpu_start),
            limits["cpu_total"] - used,
            limits["wall"] - (now - self.wall_case),
            limits["wall_total"] - (now - self.wall_start),
        )
        if left <= 0:
            raise Failed("out of time")
        if not self.folder:
            return max(left, 0.01)
        # The kernel does not limit the number of files, and an empty file takes memory that no other limit counts.
        space = os.statvfs(self.folder)
        if space.f_files - space.f_ffree > limits["files"]:
            raise Failed(f"it has more than {limits['files']} files")
        return min(max(left, 0.01), FILES_SECONDS)


def fork():
    """Fork with empty buffers, so that nothing is written twice."""
    sys.stdout.flush()
    sys.stderr.flush()
    return os.fork()


def run_once(job, text, clock):
    """Run the program with ``text`` as its standard input and return its output; raise Failed if it fails."""
    pid, out, err = start_program(job, text)
    clock.start(pid)
    printed = {out: bytearray(), err: bytearray()}
    # The end of its output is not the end of the program, which may have closed or passed on its output.
    ended = os.pidfd_open(pid)
    waiting = [out, err]
    try:
        over = False
        while not over:
            over = ended in select.select([*waiting, ended], [], [], clock.left())[0]
            waiting = [fd for fd in waiting if drain(fd, printed[fd])]
            del printed[err][:-2000]
            if len(printed[out]) > job["limits"]["output"]:
                raise Failed(f"it printed more than {job['limits']['output']} bytes")
    finally:
        status = clock.end()
        for fd in (out, err, ended):
            os.close(fd)
    if status:
        how = f"exit code {os.WEXITSTATUS(status)}" if os.WIFEXITED(status) else f"signal {os.WTERMSIG(status)}"
        complaint = bytes(printed[err]).decode("utf-8", "replace").strip().split("\n")[-1][:REASON_LIMIT]
        raise Failed(complaint or "it ended with " + how)
    return bytes(printed[out]).decode("utf-8", "replace")


def start_program(job, text):
    """Start a ``stdin`` child; return its process id and the readable ends of its standard output and error."""
    # Use a file instead of a pipe, so that a program that does not read its input cannot block the judge.
    stdin = os.memfd_create("stdin")
    with open(stdin, "wb", closefd=False) as file:
        file.write(text.encode("utf-8", "surrogatepass"))
    os.lseek(stdin, 0, os.SEEK_SET)
    (out, child_out), (err, child_err) = os.pipe(), os.pipe()
    pid = fork()
    if pid == 0:
        try:
            be_child(job, [stdin, child_out, child_err])
            for stream in (sys.stdin, sys.stdout):
                stream.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[attr-defined]
            run_program(job)
        except Exception as error:
            try:
                os.write(2, describe(error).encode())
            finally:
                os._exit(1)
    for fd in (stdin, child_out, child_err):
        os.close(fd)
    for fd in (out, err):
        os.set_blocking(fd, False)
    return pid, out, err


def drain(fd, into):
    """Read the available data, up to 1 MiB; return False at the end."""
    try:
        data = os.read(fd, 2**20)
    except BlockingIOError:
        return True
    into += data
    return bool(data)


class Server:
    """The child process of the modes ``call`` and ``assert``."""

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
        """Return the child's answer; raise the program's exception, or Gone."""
        if self.broken:
            raise Gone(self.broken)
        try:
            write_message(self.send, request, lambda: self._wait([], [self.send]))
            reply = self._receive()
            if "error" not in reply:
                return unpack(reply["value"], lambda number: Remote(self, None, number))
            name, text = reply["error"]
            error = Exception(str(text)[:REASON_LIMIT])
        except (Gone, Failed) as gone:
            self._break(str(gone))
        except BrokenPipeError:
            self._break("it ended before its tests did")
        except Exception:  # the message does not have the judge's format
            self._break("it sent something unreadable")
        type_ = getattr(builtins, str(name), None)
        if isinstance(type_, type) and issubclass(type_, Exception):
            try:
                error = type_(str(text).partition(": ")[2])
            except TypeError:  # UnicodeDecodeError and others need more arguments
                pass
        raise error

    def _break(self, how):
        self.broken = how
        raise Gone(how) from None

    def _wait(self, readable, writable):
        while not any(select.select(readable, writable, [], self.clock.left())):
            pass

    def _receive(self):
        reply = read_message(self.receive, MESSAGE_LIMIT, lambda: self._wait([self.receive], []))
        if not isinstance(reply, dict) or not (reply.keys() & {"value", "error"}):
            raise Gone("it sent something unreadable")
        return reply
