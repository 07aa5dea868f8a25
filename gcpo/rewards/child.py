"""The child process that runs a program.

The file is sent to the sandbox as text (see ``judge.py``), so it uses only the standard library, from Python 3.10 on.
"""

import builtins
import os
import sys

if __name__ != "__main__":  # in the sandbox, these files precede this one
    from gcpo.rewards.confinement import confine
    from gcpo.rewards.messages import describe, pack, read_message, unpack, write_message


STARS = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json "
    "typing"
)


def star_imports(namespace):
    """Add the names that contest programs take for granted: the modules of `STARS` and all of their names."""
    modules = {name: __import__(name) for name in STARS.split()}
    for module in modules.values():
        public = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
        namespace.update({name: getattr(module, name) for name in public if not hasattr(builtins, name)})
    namespace.update(modules)


def load(job, namespace):
    """Run the program's code in ``namespace``."""
    sys.setrecursionlimit(job["recursion"])
    builtins.exit = builtins.quit = sys.exit  # as in an interpreter that was started without -S
    if job["stars"]:
        star_imports(namespace)
    code = job["program"]
    if job["prompt"] is not None:
        above, code = assemble(job["prompt"], code, job["entry"])
        exec(compile(above, "<prompt>", "exec"), namespace)
    exec(compile(code, "<program>", "exec"), namespace)


def assemble(prompt, code, entry):
    """Return the parts of the prompt and of the answer to run, for a prompt that ends with the head of ``entry``.

    An answer that defines ``entry`` follows the prompt's text above that function; any other answer continues at the
    end of the prompt.
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
    except SyntaxError:  # a head without a docstring is not a complete function
        tree = ast.parse(prompt + "\n    pass\n")
    heads = [node.lineno for node in tree.body if getattr(node, "name", None) == entry]
    lines = prompt.splitlines(True)
    return "".join(lines[: heads[-1] - 1] if heads else lines), code


def fresh_module(name):
    """Return a new module under this name, to replace the judge's own."""
    module = type(sys)(name)
    sys.modules[name] = module
    if name != "__main__":
        sys.modules["__main__"] = module
    return vars(module)


def be_child(job, fds):
    """Prepare this forked process for the program: only ``fds`` stay open, as 0, 1, 2, and so on."""
    null = os.open(os.devnull, os.O_RDWR)
    high = [os.dup(null if fd is None else fd) for fd in fds]
    for target, fd in enumerate(high):
        os.dup2(fd, target)
    os.closerange(len(fds), 4096)
    sys.path[:] = [*(path for path in sys.path if path), *job["paths"]]
    confine(job["limits"], job["strict"])


def run_program(job):
    """Run a ``stdin`` child to its end. It ends with SystemExit, as interpreters do, which nothing here catches."""
    try:
        load(job, fresh_module("__main__"))
    except SystemExit:
        raise
    except BaseException as error:
        os.write(2, describe(error).encode("utf-8", "replace"))
        sys.exit(1)
    sys.exit(0)


def serve_calls(job, receive, send):
    """Run a ``call`` or ``assert`` child: load the program, then serve the judge's requests."""
    handles = []

    def attempt(action):
        try:
            return {"value": pack(action(), handles)}
        except BaseException as error:  # SystemExit too: the program must not end the test
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
