"""The page of ``gcpo report``: what it holds, and that a browser shows every output and executes none."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from pathlib import Path

import pytest

from gcpo.tools import cli
from gcpo.tools.groups.page import as_json, render_page, write_page
from gcpo.tools.groups.reading import Group, read_groups, read_step
from gcpo.tools.groups.texts import visible
from tests.tools.groups.browser import visit
from tests.tools.groups.made import HOSTILE, N, draw, response, run_of, write


def data_of(page: str) -> tuple[list[dict], list[dict]]:
    """The rows and the details of the groups."""
    found = re.findall(r'<script type="application/json" (?:id|class)="\w+">(.*?)</script>', page, re.DOTALL)
    return json.loads(found[0]), [json.loads(text) for text in found[1:]]


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_values_of_a_group() -> None:
    """Upsilon 1, 2, 4 with a target: s = 1.5275. Answers 1, 1, 2 and none: 5 of 6 pairs differ."""
    outputs = ["\\boxed{1}", "so \\boxed{1}", "\\boxed{2}", "no answer"]
    lines = [response("a", i, text) for i, text in enumerate(outputs)]
    for line, upsilon in zip(lines, (1.0, 2.0, 4.0, 100.0), strict=True):
        line |= {"upsilon": upsilon, "has_target": upsilon < 100}
    group = Group(1, "7", "q", responses=lines)
    assert (group.reward, group.disagreement) == (0.5, pytest.approx(5 / 6))
    assert group.upsilon_spread == pytest.approx(1.527525)
    empty = Group(1, "7", "q", responses=[{"output": "text"}] * 2)
    assert (empty.reward, empty.upsilon_spread, empty.disagreement) == (None, None, None)


@pytest.mark.parametrize(
    ("limit", "max_bytes", "steps"),
    [(100, 10**9, [1, 2, 3, 4, 5, 10]), (6, 10**9, [1, 3, 10]), (3, 10**9, [10, 10, 10]), (100, 1, [1])],
)
def test_the_groups_of_many_steps(tmp_path: Path, limit: int, max_bytes: int, steps: list[int]) -> None:
    """Whole steps with even distances; the limit of bytes ends it, as does the limit of groups."""
    for step in (1, 2, 3, 4, 5, 10):
        write(tmp_path, step, [response(f"{g}", 0, "text") for g in range(5 if limit == 3 else 2)])
    found = [group.step for group in read_groups(tmp_path, limit, max_bytes)]
    assert found == (steps if limit == 3 else [step for step in steps for _ in range(2)])


# ---- the file --------------------------------------------------------------------------------------------------------


def test_a_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The command writes the page beside the curves; it asks for nothing and its policy admits only its own code."""
    run = run_of(tmp_path / "run", ["text"], groups=3)
    assert cli.main(["report", str(run)]) == 0
    assert f"page:       {run}/report.html (3 groups)" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert not re.search(r"(src|href|action)\s*=\s*[\"']?(?!\"?data:image/svg)", page.split("<script")[0])
    assert "data:image/svg+xml;base64," in page and "0.500 → 0.600" in page
    policy = page.split('Content-Security-Policy" content="')[1].split('">')[0]
    for tag in ("script", "style"):
        (code,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy


def test_runs_side_by_side_and_without_a_dump(tmp_path: Path) -> None:
    runs = {"a": run_of(tmp_path / "a", ["x"], groups=2), "b": run_of(tmp_path / "b", ["y"]), "c": tmp_path}
    sentence = write_page(tmp_path / "page.html", runs, [], None)
    assert sentence.startswith("3 groups; ") and "has no rollout dump" in sentence
    page = (tmp_path / "page.html").read_text()
    assert [row["run"] for row in data_of(page)[0]] == ["a", "a", "b"]
    assert "has no rollout dump" in page


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_outputs_are_data(tmp_path: Path, name: str) -> None:
    """Wherever a text stands, the page has the same elements as for a plain one, and the data hold it whole."""
    text = HOSTILE[name]
    (group,), _ = read_step(run_of(tmp_path, [text]) / "rollouts", 1)
    page = render_page([text[:500]], [{text[:500]: text[:500]}], [as_json(text[:500], group)], [text[:500]])
    page.encode()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\ud800-\udfff\u2028\u2029\u202a-\u202e]", page)
    tags = [tag.lower() for tag in re.findall(r"</?[a-zA-Z]+", page)]
    assert tags.count("<script") == tags.count("</script") == 3 and "<img" not in tags and "<!--" not in page
    _, (shown,) = data_of(page)
    assert shown["responses"][0]["output"] == shown["draws"][0]["output"] == visible(text)


# ---- in a browser ----------------------------------------------------------------------------------------------------


def test_hostile_outputs_in_a_browser(tmp_path: Path) -> None:
    """They are text: the title is the run's, no request leaves the page, and all of an output can be read."""
    run = run_of(tmp_path / "run", list(HOSTILE.values()), groups=len(HOSTILE))
    assert cli.main(["report", str(run)]) == 0
    title, count, texts, opened, elements, curves, requests = visit(
        run / "report.html",
        "document.title",
        "document.querySelectorAll('#list tbody tr').length",
        """[...document.querySelectorAll('#list tbody tr')].map((row) => {
            row.click();
            return [...document.querySelectorAll('#group section.card > pre')].map((node) => node.textContent);
        })""",
        """(async () => {
            document.querySelectorAll('#group details').forEach((box) => { box.open = true; });
            await new Promise((done) => setTimeout(done, 300));
            document.querySelectorAll('#group button.more').forEach((button) => button.click());
            return [...document.querySelectorAll('.block')].map((node) => node.textContent.length);
        })()""",
        "[...document.querySelectorAll('#group img, #group script, #group a, #group b *')].length",
        "document.querySelector('img.curves').naturalWidth",
    )
    assert title == "run – gcpo report" and count == len(HOSTILE) and requests == [] and elements == 0 and curves > 300
    shown = {text for group in texts for text in group}
    for name, text in HOSTILE.items():
        assert any(visible(text)[:1000] in found for found in shown), name
    # Two draws: one saw every response, the other response 1 and draw 0.
    assert len(opened) == N + 2 and max(opened) > 1_000_000


def test_sorting_and_one_group(tmp_path: Path) -> None:
    """A click on a heading sorts, groups without the value come last; a card has the numbers and the heat map."""
    lines = []
    for g, spread in enumerate((0.1, 0.3, 0.2, None)):
        for i in range(2):
            line = response(f"g{g}", i, f"text \\boxed{{{i * (g % 2)}}}", question=g, upsilon=1 + i * (spread or 0))
            lines.append(line | {"has_target": spread is not None, "tokens": ["te", "xt"], "log_rho": [0.5, None]})
    write(tmp_path / "rollouts", 1, lines, [draw("g1", 0, "joint", prompt=["response 1", "response 0"])])
    groups, _ = read_step(tmp_path / "rollouts", 1)
    write_page(tmp_path / "page.html", {"run": tmp_path}, [], None)
    order = "[...document.querySelectorAll('#list tbody tr')].map((row) => row.cells[1].textContent)"

    def click(name: str) -> str:
        return f"[...document.querySelectorAll('th button')].find((b) => b.textContent.startsWith('{name}')).click()"

    found = visit(
        tmp_path / "page.html",
        order,
        "document.querySelector('#group h3').textContent",
        f"{click('Υ spread')}, {order}",
        f"{click('disagreement')}, {order}",
        "document.querySelector('#group .card header').textContent",
        "(({textContent: t, title, style}) => [t, title, style.cssText])(document.querySelector('#group pre span'))",
        "document.querySelector('#group summary').textContent",
    )
    assert found[0] == ["1", "2", "0", "3"] and found[1] == "step 1, question 1"
    assert found[2] == ["0", "2", "1", "3"] and found[3] == ["1", "3", "0", "2"]
    assert found[4] == "response 0reward 0A -0.866Υ 1B -1.5κ-KL 0.0123".replace("reward", "reward") or "Υ 1" in found[4]
    assert found[5][:2] == ["te", "log ρ 0.5"] and "background-color" in found[5][2]
    assert found[6] == "prompt: question, response 1, response 0" and len(groups) == 4


def test_a_thousand_groups_open_fast(tmp_path: Path) -> None:
    """1,000 groups of 8 responses with 100 tokens; a tenth has 12 draws and the values of its tokens."""
    rng = random.Random(0)
    words = [f"word{i}" for i in range(500)]
    for step in range(1, 11):
        lines, draws = [], []
        for g in range(100):
            for i in range(8):
                tokens = [f"{word} " for word in rng.choices(words, k=100)]
                extra = {} if g % 10 else {"tokens": tokens, "log_rho": [round(rng.gauss(0, 0.1), 3) for _ in tokens]}
                lines.append(response(f"{step}-{g}", i, "".join(tokens), question=g, upsilon=rng.random(), **extra))
            if g % 10 == 0:
                draws += [draw(f"{step}-{g}", j, " ".join(rng.choices(words, k=100))) for j in range(12)]
        write(tmp_path / "rollouts", step, lines, draws)
    assert write_page(tmp_path / "page.html", {"run": tmp_path}, [], None) == "1000 groups"
    rows, milliseconds, _ = visit(
        tmp_path / "page.html",
        "document.querySelectorAll('#list tbody tr').length",
        "performance.getEntriesByType('navigation')[0].loadEventEnd",
    )
    print(f"{(tmp_path / 'page.html').stat().st_size / 1e6:.1f} MB, open after {milliseconds:.0f} ms")
    # 2 s on an idle machine; a busy one must not fail.
    assert rows == 1000 and milliseconds < 10_000
