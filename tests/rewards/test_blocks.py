"""Code blocks of a response, and the program among them."""

from __future__ import annotations

import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from gcpo.rewards.blocks import Block, code_blocks, program_blocks
from gcpo.rewards.code import extract, grade
from gcpo.rewards.sandbox import SandboxError, check

TOTAL = {"assert_case": ["assert total([1, 2]) == 3", "assert total([]) == 0"]}
ADD_UP = {"inputs": ["3\n1 2 3\n"], "outputs": ["6\n"]}
BODY = ["def total(xs):", "    return sum(xs)"]
CODE = "\n".join(BODY)
READS = "n = int(input())\nprint(sum(map(int, input().split())))"


@pytest.fixture(scope="module")
def box():
    try:
        check()
    except SandboxError as error:
        pytest.skip(str(error))


def indented(by: str, lines=("```python", *BODY, "```")) -> str:
    return "\n".join(by + line for line in lines)


@pytest.mark.parametrize(
    "info",
    [
        *("python", "Python", "PYTHON", "py", "Py", "python3", "Python3", "py3", "python3.11", "python2", "ipython"),
        *("pypy3", "{.python}", "{ .python .numberLines }", "{python}", 'python title="x"', "python:main.py"),
        *("python,linenos", "python{1,3}", "language-python", "lang-py", " python ", "python # solution"),
    ],
)
def test_info_strings_that_say_python(info):
    (block,) = code_blocks(f"```{info}\nx\n```\n")
    assert block == Block("x", True, True)
    if "`" not in info:
        assert code_blocks(f"~~~{info}\nx\n~~~")[0].python is True


@pytest.mark.parametrize(
    "info",
    [*("cpp", "c++", "output", "text", "plaintext", "bash", "pycon", "python-repl", "pytb", "pythonic", "c python"),
     *("java", "json", "diff", "rust", "solution", "pyx", "py+java", "{.cpp}")],
)  # fmt: skip
def test_info_strings_that_do_not(info):
    assert code_blocks(f"```{info}\nx\n```") == [Block("x", False, True)]
    assert extract(f"```{info}\nx\n```") is None


@pytest.mark.parametrize(
    "response",
    [
        *(f"1. do this\n{indented(by)}" for by in (" ", "  ", "   ", "    ", "     ", " " * 8, " " * 12, "\t", "\t\t")),
        f"- do\n  - so\n{indented('    ')}\n  - that is it",
        "- do\n\t```python\n\tdef total(xs):\n\t\treturn sum(xs)\n\t```\n",
        indented("> "),
        indented(">"),
        indented("> > "),
        f"{indented('> ')}\nand so on",
        indented(">   "),
        "- do\n  ```python\ndef total(xs):\n    return sum(xs)\n  ```\n",
        "1. ```python\n   def total(xs):\n       return sum(xs)\n   ```",
        "- ```python\n  def total(xs):\n      return sum(xs)\n  ```",
        "10) ```py\n    def total(xs):\n        return sum(xs)\n    ```",
        "  ```python\n  def total(xs):\n\n      return sum(xs)\n  ```",
        "   ```python\n   def total(xs):\n       return sum(xs)\n```",
        "```python\ndef total(xs):\n    return sum(xs)\n   ```",
        f"~~~python\n{CODE}\n~~~",
        f"`````python\n{CODE}\n`````",
        f"```python\n{CODE}\n`````",
        f"```python\r\n{CODE}\r\n```\r\n",
        f"```python\n{CODE}",
        f"```\n{CODE}\n```",
        # fences inside strings and comments
        '```python\ndef total(xs):\n    """Sum.\n\n    ```\n    total([1])\n    ```\n    """\n    return sum(xs)\n```',
        '```python\ndef total(xs):\n    """\n    ```python\n    total([1])\n    ```\n    """\n    return sum(xs)\n```',
        "```python\ndef total(xs):\n    # ```\n    return sum(xs)\n```",
        '```python\n"""\n```\ntotal([1])\n```\n"""\ndef total(xs):\n    return sum(xs)\n```',
        "```python\ndef total(xs):\n  '''\n  ```\n  total([1])\n  ```\n  '''\n  return sum(xs)\n```\nThat's it.",
        '1. so\n   ```python\n   def total(xs):\n       """\n       ```\n       """\n       return sum(xs)\n   ```',
        f'~~~python\n{CODE}\n~~~\nIt\'s """done""".',
        # more than one block
        f"```python\n{CODE}\n```\nExample:\n```python\nprint(total([1]))\n```",
        f"```python\n{CODE}\n```\nTests:\n```python\nassert total([1,2])==3\n```",
        f"```python\n{CODE}\n```\nA wrong test:\n```python\nassert total([1,2])==4\n```",
        f"```python\n{CODE}\n```\nIn a session:\n```python\n>>> total([1])\n1\n```",
        f"```python\n{CODE}\n```\nUse it:\n```python\nprint(total(list(map(int, input().split()))))\n```",
        f"```python\n{CODE}\n```\n```python\n```",
        f"```python\n{CODE}\n```\n```python\n\n",
        f"```\n{CODE}\n```\nOutput:\n```\n3\n```",
        f"```python\n{CODE}\n```\n```cpp\nint total() {{}}\n```",
        f"```cpp\nint total() {{}}\n```\n```python\n{CODE}\n```",
        "```python\ndef helper(x): return x\n```\n```python\ndef total(xs): return sum(map(helper, xs))\n```",
        "```python\nfrom math import fsum\n```\nand\n```python\ndef total(xs):\n    return fsum(xs)\n```\n```\n3\n```",
        f"```python\ndef total(xs): return []\n```\nbetter:\n```python\n{CODE}\n```",
        f"```python\nimport nothing_like_it\n```\n```python\n{CODE}\n```",
        "```python\ntotal = lambda xs: sum(xs)\n```\n```python\nprint(total([1]))\n```",
        "```python\ntotal: object = sum\n```\nso\n```python\ntotal([1]) == 1\n```",
        f"```python\n{CODE}\n```\nIf you like\n```python\nprint(total([1])",
        f"<think>\n```python\ndef total(xs): return 0\n```\n</think>\n```python\n{CODE}\n```",
    ],
)
def test_right_programs(box, response):
    result = grade(response, TOTAL)
    assert result.passed, result.reason


@pytest.mark.parametrize(
    "response",
    [
        f"```python\n{CODE}\n```\nwrong alternative:\n```python\ndef total(xs): return 0\n```",
        f"```python\n{CODE}\n```\n```python\ntotal = None\n```",
        f"```cpp\n{CODE}\n```",
        f"<think>\n```python\n{CODE}\n```\n</think>\nno",
        f"<think>\n```python\n{CODE}\n```",
        CODE,
        f"``python\n{CODE}\n``",
        f"```python {CODE} ```",
        "```python\ndef total(xs):\n    return helper(xs)\n```\n```python\ndef helper(xs): return sum(xs)\n```",
        "```python\ndef total(xs):\n    return sum(xs",
    ],
)
def test_wrong_programs(box, response):
    assert not grade(response, TOTAL).passed


@pytest.mark.parametrize(
    "response",
    [
        "1. do this\n" + indented("   ", ("```python", *READS.split("\n"), "```")),
        f"```python\n{READS}\n```\nFor example\n```python\nprint(sum([1, 2, 3]))\n```",
        f"```\n{READS}\n```\nOutput:\n```\n6\n```",
        f"```python\n{READS}\n```\nIt defines nothing like\n```python\ndef solve(): ...\n```",
        "```python\ndef solve(a): return sum(a)\n```\n```python\ninput()\nprint(solve(map(int, input().split())))\n```",
        "```python\nimport sys\nprint(sum(map(int, sys.stdin.read().split()[1:])))\n```\n```python\nx = 3\n```",
        f"```python\nprint(input())\n```\nbetter\n```python\n{READS}\n```",
        "```python\nprint(6)\n```\nbecause\n```python\nassert 1 + 2 + 3 == 6\n```",
    ],
)
def test_programs_that_read(box, response):
    result = grade(response, ADD_UP)
    assert result.passed, result.reason


def test_a_continued_function_is_followed_by_its_use(box):
    tests = {"prompt": "def f():\n", "test": "def check(c):\n    assert c() == 1", "entry_point": "f"}
    assert grade("```python\n    return 1\n```\n```python\nassert f() == 1\n```", tests).passed
    assert grade("```python\ndef f(): return 1\n```", tests).passed, "a head alone is no whole function"
    assert not grade("```python\n    return 2\n```", tests).passed


def test_the_format_asks_for_a_closed_block(box):
    assert grade(f"```python\n{CODE}\n```", TOTAL).format
    assert not grade(f"```python\n{CODE}", TOTAL).format
    assert not grade(f"```cpp\n{CODE}\n```", TOTAL).format


def test_a_fence_with_more_indentation_does_not_close():
    """CommonMark: at most three spaces more than the opening fence."""
    for more, closes in ((0, True), (3, True), (4, False), (8, False)):
        for fence in ("", "  "):
            text = f"{fence}```cpp\nx\n{fence}{' ' * more}```\ny\n{fence}```\n"
            assert ("y" not in code_blocks(text)[0].code) is closes


def test_the_choice():
    blocks = [Block(code, True, True) for code in ("def f(): 1", "def g(): 2", "f()")]
    assert program_blocks(blocks, ["f"]) == ["def f(): 1"]
    assert program_blocks(blocks, ["g", "f"]) == ["def f(): 1", "def g(): 2"]
    assert program_blocks(blocks, ["h"]) == program_blocks(blocks) == ["def f(): 1", "def g(): 2", "f()"]
    assert program_blocks([]) == []
    assert program_blocks([Block("f == 1", True, True), Block("x", True, True)], ["f"])[-1] == "x", "a comparison"
    assert program_blocks([Block("def ff(): 1", True, True), Block("x", True, True)], ["f"])[-1] == "x"
    method = Block("class Solution:\n    async def f(self): 1", True, True)
    assert program_blocks([method, Block("Solution().f()", True, True)], ["f"])[-1] == method.code


@pytest.mark.parametrize(
    "text",
    ["```" * 20_000, "\n```" * 20_001, '```python\n"""' + "\n```" * 20_000, "> " * 30_000, "- " * 30_000 + "```",
     " " * 60_000 + "```", "```python\n" + "'" * 60_000, "```python\n" + '\\"""' * 20_000 + "\n```" * 100],
)  # fmt: skip
def test_long_responses_are_read_in_no_time(text):
    start = time.process_time()
    program_blocks(code_blocks(text))
    assert time.process_time() - start < 5


# ---- CommonMark ------------------------------------------------------------------------------------------------------

LINES = ("x", "", "    y", "```", "````", "~~~", "```python", "~~~ py", "``` a`b", "   ```", "a ``` b", "\tz")
LINES += ("    ```", "``` ", "~~~~ py", "`", "`````")


@settings(max_examples=500)
@given(st.lists(st.sampled_from(LINES), max_size=12))
def test_blocks_are_those_of_commonmark(lines):
    """Outside of its fences the text has no indented line, for there the rules differ on purpose."""
    text = "".join(line + "\n" for line in lines)
    fences = [token for token in MarkdownIt("commonmark").parse(text) if token.type == "fence"]
    inside = {number for token in fences for number in range(token.map[0] + 1, token.map[1])}
    assume(not any(line.startswith((" ", "\t")) for number, line in enumerate(lines) if number not in inside))
    expected = [(token.content.rstrip("\n"), token.info.strip() in ("python", "py")) for token in fences]
    assert [(block.code.rstrip("\n"), bool(block.python)) for block in code_blocks(text)] == expected
