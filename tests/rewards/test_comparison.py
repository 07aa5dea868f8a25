"""Outputs of programs: integers exactly, decimals with a tolerance, in every place where outputs are compared."""

from __future__ import annotations

import math
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcpo.rewards import judge
from gcpo.rewards.code import grade
from gcpo.rewards.comparison import same_output, same_value
from gcpo.rewards.sandbox import SandboxError, check

BIG = "1" + "0" * 400 + "7"


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        # an expected integer
        ("1000009999.0", "1000000007", False),
        ("1e17", "100000000000000001", False),
        ("123456000.0", "123456789", False),
        ("100000.5", "100000", False),
        ("3.00001", "3", False),
        ("3.0", "3", True),
        ("1e5", "100000", True),
        ("7", "7", True),
        ("3.", "3", True),
        ("-3.0", "-3", True),
        ("-0.0", "0", True),
        ("1.5e1", "15", True),
        ("9007199254740993.0", "9007199254740993", True),
        ("9007199254740992.0", "9007199254740993", False),
        ("0.9999999999999999", "1", False),
        ("0.99999999999999999999", "1", False),
        ("1.000000001", "1", False),
        ("100000001", "100000002", False),
        ("007", "7", False),
        ("1_000", "1000", False),
        ("\u0661", "1", False),
        ("nan", "1", False),
        ("inf", "1", False),
        ("True", "1", False),
        ("0x10", "16", False),
        (BIG, BIG, True),
        (BIG[:-1] + "8", BIG, False),
        ("1e401", BIG, False),
        ("1e401", "1" + "0" * 401, True),
        ("1e99999999999", "1", False),
        # an expected decimal
        ("0.3333333", "0.33333333", True),
        ("0.33", "0.34", False),
        ("1e3", "1000.0", True),
        ("1000", "1e3", True),
        ("5", "5.0", True),
        ("0.1000005", "0.1", True),
        ("0.10001", "0.1", False),
        ("-0.5", "0.5", False),
        ("0.000000001", "0.0", True),
        ("0.0001", "0.0", False),
        ("0_1.5", "01.5", False),
        ("5", "1e400", False),
        ("1e400", "1e500", False),
        ("1e400", "1.0e400", True),
        ("inf", "1e400", False),
        ("1.5" + "0" * 500, "1.5", False),
        # neither
        ("nan", "nan", True),
        ("nan", "1.5", False),
        ("inf", "1.5", False),
        ("1.5", "inf", False),
        ("inf", "infinity", False),
        ("YES", "yes", False),
        # lines and words
        ("1 2", "1  2", True),
        ("1 2\n\n3", "1 2\n3\n", True),
        ("1\n2 3", "1 2\n3", False),
        ("1 2", "1 2 3", False),
        ("1\n2", "1", False),
        ("a 3.0 b", "a 3 b", True),
        ("a 3.5 b", "a 3 b", False),
        ("", "", True),
        ("", "1", False),
        ("1", "", False),
    ],
)
def test_same_output(printed, expected, same):
    assert same_output(printed, expected) is same
    assert judge.same_output is same_output


@pytest.mark.parametrize(
    ("value", "expected", "same"),
    [
        (1000009999.0, 1000000007, False),
        (1e17, 10**17 + 1, False),
        (3.0, 3, True),
        (3.00001, 3, False),
        (float(2**53), 2**53 + 1, False),
        ([1.0], [1], True),
        ([1.00001], [1], False),
        (1.1, 1, False),
        (0.1 + 0.2, 0.3, True),
        (3, 3.0, True),
        (10**400, 3.0, False),
        (3.0, 10**400, False),
        (10**400, 10**400, True),
        (5, math.inf, False),
        (math.inf, math.inf, True),
        (math.inf, 1.5, False),
        (-math.inf, math.inf, False),
        (math.nan, math.nan, True),
        (math.nan, 1.5, False),
        (1.5, math.nan, False),
        ([1, 2], [1, 2], True),
        ([1, 2], [1], False),
        ([[1, 0.3]], [[1, 0.1 + 0.2]], True),
        ({1: 2}, {1: 2}, True),
        ({"a": 0.3}, {"a": 0.1 + 0.2}, True),
        ({"a": 2.5}, {"a": 2}, False),
        ({"a": 1}, {"b": 1}, False),
        ("1", 1, False),
        ("0.5", 0.5, False),
        (None, 0, False),
        (None, None, True),
        ({1}, [1], False),
    ],
)
def test_same_value(value, expected, same):
    assert same_value(value, expected) is same


@given(st.integers(-(10**30), 10**30), st.floats(allow_nan=False, allow_infinity=False))
def test_an_expected_integer_is_equal_or_not_the_same(number, drawn):
    for value in (drawn, float(number), math.nextafter(float(number), math.inf), float(number) * (1 + 1e-6)):
        exact = Fraction(value) == number
        assert same_value(value, number) is exact
        printed = format(value, "f") if abs(value) < 1e50 else repr(value)
        if Fraction(printed) == Fraction(value):
            assert same_output(printed, str(number)) is exact


@given(st.floats(-1e300, 1e300), st.floats(-1, 1))
def test_an_expected_float_has_the_stated_tolerance(expected, part):
    inside_it = expected + 0.99 * part * (1e-8 + 1e-5 * abs(expected))
    assert same_value(inside_it, expected)
    sign = 1 if part >= 0 else -1
    assert not same_value(expected + sign * 1.01 * (2e-8 + 1e-5 * abs(expected)), expected)


@pytest.fixture(scope="module")
def box():
    try:
        check()
    except SandboxError as error:
        pytest.skip(str(error))


STDIN = {"inputs": ["1"], "outputs": ["1000000007"]}
CALL = {"fn_name": "f", "inputs": ["1"], "outputs": ["1000000007"]}
CASES = {"fn_name": "f", "inputs": [[1]], "outputs": [[[1000000007]]]}
ASSERT = {"assert_case": ["assert f(1) == 1000000007"]}
LISTED = [{"input": "1", "output": "1000000007", "metadata": {"func_name": "f"}}]


@pytest.mark.parametrize(
    ("tests", "program"),
    [
        (STDIN, "print({})"),
        (CALL, "def f(x): return {}"),
        (CASES, "def f(x): return [{}]"),
        (ASSERT, "def f(x): return {}"),
        (LISTED, "def f(x): return {}"),
    ],
)
def test_wherever_outputs_are_compared(box, tests, program):
    for value, passed in (("1000009999.0", False), ("1000000007", True), ("1000000007.0", True), ("-1", False)):
        assert grade(f"```python\n{program.format(value)}\n```", tests).passed is passed, value


def test_an_element_does_not_pass_for_the_list(box):
    tests = {"fn_name": "f", "inputs": ["1", "2"], "outputs": ["[1, 2]", "[2]"]}
    assert not grade("```python\ndef f(x): return x\n```", tests).passed
    assert grade("```python\ndef f(x): return [1, 2][x - 1 :]\n```", tests).passed
    wrapped = {"fn_name": "f", "inputs": [[1], [2]], "outputs": [[2], [3]]}
    assert grade("```python\ndef f(x): return x + 1\n```", wrapped).passed
    assert not grade("```python\ndef f(x): return x\n```", wrapped).passed


def test_a_huge_result_is_wrong_and_not_a_fault_of_the_sandbox(box):
    tests = {"fn_name": "f", "inputs": ["1"], "outputs": ["1.5"]}
    assert grade("```python\ndef f(x): return 10**4000\n```", tests).reason.startswith("wrong result")
    assert sys.float_info.max < 10**4000
