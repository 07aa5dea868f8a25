"""A program that tests a sandbox: it prints an action that the sandbox should have prevented, or ``nothing``."""

import _thread
import json
import os
import socket
import sys

asked = json.loads(input())
leaks = []


def look(folder):
    """Record every visible file that is neither allowed nor a parent of an allowed one."""
    for name in os.listdir(folder):
        place = os.path.join(folder, name)
        if place not in asked["visible"]:
            if any(one.startswith(place + "/") for one in asked["visible"]):
                look(place)
            else:
                leaks.append("can see " + place)


look("/")
for place in asked["protected"]:
    try:
        open(os.path.join(place, "probe"), "w").close()
        leaks.append("can write into " + place)
    except OSError:
        continue
with open("probe", "w") as file:
    file.write("it has a folder of its own")
if sorted(os.listdir(".")) != ["probe"]:
    leaks.append("its folder is not its own")
for what, attempt in (("can start a process", os.fork), ("can open a socket", socket.socket)):
    try:
        attempt()
        leaks.append(what)
    except OSError:
        continue
try:
    bytearray(asked["memory"])
    leaks.append("has more memory than it should")
except MemoryError:
    pass
lock = _thread.allocate_lock()
lock.acquire()
_thread.stack_size(2**16)
try:
    for _ in range(asked["threads"]):
        _thread.start_new_thread(lock.acquire, ())
    leaks.append("has more threads than it should")
except RuntimeError:
    pass
print("; ".join(leaks) or "nothing")
sys.stdout.flush()
os._exit(0)  # the threads never end
