"""The trainer in one file: its transformer beside transformers', its steps beside those of the verl path."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from examples import gcpo_in_one_file as one_file
from examples import training_run
from examples.small_transformer import Response, Transformer, generate, log_probs, read
from examples.training_run import RunSettings, batches, command, evaluate
from gcpo import algorithms
from gcpo.adapters.questions import question_key
from gcpo.settings import ConfigError
from tests.adapters.ranks import run_on_ranks
from tests.golden.runs import FOLDER, StoredServer, make_model, run, stored


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("golden") / "model")


@pytest.fixture
def transformer(model: Path) -> Transformer:
    return Transformer(model)


def tokens(*lengths: int, seed: int = 0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(3, 300, (length,), generator=generator).tolist()) for length in lengths]


# ---- the transformer -------------------------------------------------------------------------------------------------


def test_logits_are_those_of_transformers(model: Path, transformer: Transformer) -> None:
    """Log-probabilities behind a text in segments; segments that texts share are read once, others are padded."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    head, a, b, tail = tokens(5, 3, 7, 4)
    texts, responses = [[head, a, tail], [head, b, tail], [head, a, tail], [b, a, tail]], tokens(6, 2, 0, 9, seed=1)
    found, states = log_probs(transformer, texts, responses, 0.7)
    assert found.shape == (4, 9)
    for text, response, row, state in zip(texts, responses, found, states, strict=True):
        ids = torch.tensor([[*(token for segment in text for token in segment), *response]])
        start = ids.shape[1] - len(response)
        with torch.no_grad():
            output = theirs(ids, output_hidden_states=True)
        expected = (output.logits[0, start - 1 : -1] / 0.7).log_softmax(-1).gather(1, ids[0, start:, None])[:, 0]
        torch.testing.assert_close(row[: len(response)], expected[: len(response)], atol=2e-5, rtol=1e-4)
        assert not row[len(response) :].any()
        torch.testing.assert_close(state, output.hidden_states[-1][0, start - 1], atol=2e-5, rtol=1e-4)
    nothing, same = log_probs(transformer, texts, [()] * 4, 0.7)  # the targets of a step without kappa terms
    assert nothing.shape == (4, 0) and torch.equal(same, states)


def test_gradients_run_through_shared_segments(model: Path) -> None:
    """The same as from texts that share nothing."""
    found = []
    head, a, b = tokens(5, 3, 7)
    for texts in ([[head, a], [head, b]], [[(*head, *a)], [(*head, *b)]]):
        transformer = Transformer(model)
        values, _ = log_probs(transformer, texts, tokens(4, 6, seed=1), 1.0)
        values.square().sum().backward()
        found.append([weight.grad.clone() for weight in transformer.weights.values()])
    assert any(gradient.any() for gradient in found[0])
    for gradient, expected in zip(*found, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


def test_generation(transformer: Transformer) -> None:
    """Each token and its log-probability are those of the whole text without a cache; a response ends at its end."""
    head, a, b = tokens(5, 3, 7)
    texts = [[head, a], [head, b]] * 8
    greedy = generate(transformer, texts, 12, 0.0, 2, 0)
    sampled = generate(transformer, texts, 12, 1.0, int(greedy[0].ids[3]), 0)
    for text, response in zip(texts * 2, [*greedy, *sampled], strict=True):
        assert len(response.ids) == len(response.log_p) <= 12
        expected, _ = log_probs(transformer, [text], [response.ids], 1.0)
        torch.testing.assert_close(response.log_p, expected[0].detach(), atol=2e-5, rtol=1e-4)
    for text, response in zip(texts, greedy, strict=True):
        _, state = read(transformer, [[*text, response.ids[:5]]])
        assert int(transformer.next_token(state, 1.0).argmax()) == response.ids[5]
    assert len({response.ids for response in sampled}) > 8
    end = int(greedy[0].ids[3])
    assert any(not response.is_cut for response in sampled)
    for response in sampled:
        assert (response.ids[-1] == end) is not response.is_cut and end not in response.ids[:-1]
    again = generate(transformer, texts, 12, 1.0, end, 0)
    assert [response.ids for response in again] == [response.ids for response in sampled]
    other = generate(transformer, texts, 12, 1.0, end, 1)
    assert [response.ids for response in other] != [response.ids for response in sampled]


def test_samples_follow_the_distribution(transformer: Transformer) -> None:
    """First tokens of 4,000 responses against the probabilities: the total variation is that of chance."""
    text = tokens(6)
    _, state = read(transformer, [text])
    probability = transformer.next_token(state, 1.5)[0].exp().detach()
    responses = generate(transformer, [text] * 4000, 1, 1.5, 2, 3)
    counts = torch.bincount(torch.tensor([response.ids[0] for response in responses]), minlength=len(probability))
    chance = (probability * (1 - probability) / 4000).sqrt().sum() / 2
    assert 0.5 * (counts / 4000 - probability).abs().sum() < 1.3 * chance


# ---- a step beside the verl path -------------------------------------------------------------------------------------


class Stored:
    """Stands in for `generate` and `grade`: the responses, draws and rewards of the golden runs."""

    def __init__(self, tokenizer: Any) -> None:
        self.server, self.tokenizer = StoredServer(tokenizer), tokenizer
        self.sessions: Counter[str] = Counter()
        content = stored()
        self.rewards = {text: value for question in content["questions"] for text, value in question["responses"]}

    def generate(self, model: Transformer, texts: Any, most: int, temperature: float, end: int, seed: int) -> list:
        ids = [(*self.tokenizer.encode(self.answer(text), add_special_tokens=False), end) for text in texts]
        with torch.no_grad():
            log_p, _ = log_probs(model, texts, ids, temperature)
        return [Response(one, values[: len(one)], False) for one, values in zip(ids, log_p, strict=True)]

    def answer(self, text: Any) -> str:
        prompt = tuple(token for segment in text for token in segment)
        shown = self.tokenizer.decode(prompt)
        (question,) = (question for question in self.server.responses if question in shown)
        answers = self.server.responses[question]
        if not any(answer in shown for answer in answers):
            self.sessions[question] += 1
            return answers[self.sessions[question] - 1]
        digest = hashlib.sha256(repr((prompt, self.server.seen[prompt])).encode()).digest()
        self.server.seen[prompt] += 1
        return self.server.draws[int.from_bytes(digest[:4], "big") % len(self.server.draws)]

    def grade(self, tokenizer: Any, rows: Any, responses: Any, key: str) -> torch.Tensor:
        texts = [tokenizer.decode(response.ids, skip_special_tokens=True) for response in responses]
        return torch.tensor([float(self.rewards.get(text, 0.0)) for text in texts])


def questions() -> list[dict[str, Any]]:
    rows = []
    for i, question in enumerate(stored()["questions"]):
        prompt = [{"role": "user", "content": question["question"]}]
        name = question_key({"raw_prompt": prompt, "index": i})
        rows.append({"prompt": prompt, "data_source": "golden", "extra_info": {"index": name}})
    return rows


def settings_of(model: Path, **settings: Any) -> RunSettings:
    common = {"model": str(model), "data": "", "output": "", "n": 4, "batch": 4, "max_response": 48, "lr": 1e-3}
    return RunSettings.parse({"mini_batches": 1, **common, **settings}, "settings")


CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "grpo": ("grpo", (), {"method": "grpo"}),
    "balanced": ("balanced", (), {"method": "gcpo"}),
    "shared": (
        "balanced",
        ("gcpo.collider.scheme=shared", "gcpo.collider.num_draws=2"),
        {"method": "gcpo", "scheme": "shared", "num_draws": 2},
    ),
    "regenerated": (
        "balanced",
        ("gcpo.features.source=response", "gcpo.collider.num_draws=2", "gcpo.weighting.similarity=gaussian"),
        {"method": "gcpo", "source": "response", "num_draws": 2, "similarity": "gaussian"},
    ),
    "group mean": ("balanced", ("gcpo.weighting.target=group_mean",), {"method": "gcpo", "target": "group_mean"}),
}
"""Name: the golden run, overrides of the verl path, and settings of the one file."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_the_verl_path(name: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same responses: advantages, Upsilon, pi'_ref, losses, gradient norms of the parts, and the new weights."""
    run_name, overrides, settings = CASES[name]
    whole_batch = ("actor_rollout_ref.actor.ppo_mini_batch_size=4", *overrides)
    config = str(FOLDER.parents[1] / "gcpo" / "config")
    theirs = json.loads(json.dumps(run_on_ranks(1, run, run_name, str(model), config, whole_batch, 1)[0]))
    trainer = one_file.Trainer(settings_of(model, **settings))
    stand_in = Stored(trainer.tokenizer)
    monkeypatch.setattr(one_file, "generate", stand_in.generate)
    monkeypatch.setattr(one_file, "grade", stand_in.grade)
    groups: list[Any] = []
    update = trainer.update
    monkeypatch.setattr(trainer, "update", lambda found: (groups.extend(found), update(found)))
    metrics = trainer.step(1, questions())
    (step,), compared = theirs["steps"], Counter()
    for i, group in enumerate(groups):
        for session in range(4):
            row = step["rows"][f"{i}_{session}_0"]
            assert float(group.advantage[session]) == pytest.approx(row["advantage"], rel=2e-4, abs=2e-5)
            if "log_ref" in row:
                length = len(group.responses[session].ids)
                assert group.kappa_weight[session] > 0 and len(row["log_ref"]) == length
                assert group.log_ref[session, :length].tolist() == pytest.approx(row["log_ref"], rel=1e-3, abs=1e-3)
            elif "method" in settings and settings["method"] == "gcpo":
                assert group.kappa_weight[session] == 0
            compared["log_ref"] += "log_ref" in row
            compared["advantage"] += row["advantage"] != 0
    assert compared["advantage"] >= 8 and (compared["log_ref"] > 0) == (name != "grpo")
    names = ["actor/pg_loss", "actor/grad_norm", "gcpo/kl_loss", "gcpo/grad_norm/policy", "gcpo/grad_norm/kappa"]
    shared = [key for key in names if key in metrics and key in step["metrics"]]
    assert len(shared) == (2 if name == "grpo" else 5), shared
    for key in shared:
        assert metrics[key] == pytest.approx(step["metrics"][key], rel=1e-3, abs=1e-6), key
    weighted = [row for row in step["rows"].values() if "upsilon" in row]
    assert len(weighted) == (0 if name == "grpo" else 16)
    for side, sign in (("above", 1), ("below", -1)) if weighted else ():
        upsilon = [row["upsilon"] for row in weighted if sign * row["advantage"] * row["upsilon"] > 0]
        assert metrics[f"gcpo/upsilon/mean_{side}"] == pytest.approx(sum(upsilon) / len(upsilon), rel=2e-4)
    for key, weight in trainer.model.weights.items():
        found = theirs["weights"][f"model.{key}"]
        assert float(weight.double().norm()) == pytest.approx(found["norm"], rel=1e-5), key


def test_gvpo_is_its_loss(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a mini-batch is that of `gvpo_loss` of whole groups, the mean over the questions."""
    trainer = one_file.Trainer(settings_of(model, method="gvpo", beta=0.3, mini_batches=2, lr=1e-2))
    stand_in = Stored(trainer.tokenizer)
    monkeypatch.setattr(one_file, "generate", stand_in.generate)
    monkeypatch.setattr(one_file, "grade", stand_in.grade)
    groups = trainer.sample(1, questions())
    for station in (trainer.draw, trainer.score, trainer.credit):
        station(groups)
    assert trainer.metrics["tokens/generated"] == sum(len(y.ids) for group in groups for y in group.responses)
    before = {name: weight.detach().clone() for name, weight in trainer.model.weights.items()}
    trainer.update(groups[:2])
    # theta has moved: now D is not 0.
    for weight in trainer.parameters:
        weight.grad.zero_()
    loss = trainer._policy_backward(groups[2:])
    found = [weight.grad.clone() for weight in trainer.parameters]
    for weight in trainer.parameters:
        weight.grad.zero_()
    losses = []
    for group in groups[2:]:
        texts, ids = [[group.prompt]] * 4, [y.ids for y in group.responses]
        log_p, _ = log_probs(trainer.model, texts, ids, 1.0)
        old = pad_sequence([y.log_p for y in group.responses], batch_first=True)
        ratio = torch.stack([(a - b)[: len(y)].sum() for a, b, y in zip(log_p, old, ids, strict=True)])
        assert ratio.abs().max() > 1e-3
        losses.append(algorithms.gvpo_loss(group.rewards, ratio, beta=0.3))
    expected = torch.stack(losses).mean()
    expected.backward()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    for gradient, weight in zip(found, trainer.parameters, strict=True):
        torch.testing.assert_close(gradient, weight.grad, atol=1e-5, rtol=1e-4)
    assert any((weight - before[name]).abs().max() > 1e-3 for name, weight in trainer.model.weights.items())


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_a_run(tiny_model: Path, tmp_path: Path) -> None:
    """Two steps from the command line leave metrics in verl's format and a model that transformers loads; a second run
    is the same."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.arithmetic.task import prepare

    prepare(tmp_path / "data", train_size=12, test_size=6)
    lines = []
    for name in ("a", "b"):
        done = command(one_file.Trainer, [
            *("--method", "gcpo", "--model", str(tiny_model), "--data", str(tmp_path / "data")),
            *("--output", str(tmp_path / name), "--steps", "2", "--seed", "3"),
            *("batch=4", "n=4", "max_response=24", "target=group_mean", "kappa=0", "lr=1e-3", "eval_temperature=1"),
        ])  # fmt: skip
        assert done == 0
        lines.append([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
    assert [line["step"] for line in lines[0]] == [0, 1, 2]
    for first, second in zip(*lines, strict=True):
        for data in (first["data"], second["data"]):
            data.pop("timing_s/step", None)
        assert first == second
    last = lines[0][-1]["data"]
    assert {"critic/score/mean", "actor/grad_norm", "tokens/generated", "val-core/gcpo/arithmetic/acc/mean@1"} <= {
        *last
    }
    assert last["tokens/generated"] == pytest.approx(16 * last["response_length/mean"])
    ours = Transformer(tmp_path / "a" / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model", dtype=torch.float32)
    weight = theirs.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert torch.equal(ours.weights["layers.0.mlp.up_proj.weight"], weight)
    assert not torch.equal(Transformer(tiny_model).weights["layers.0.mlp.up_proj.weight"], weight)
    AutoTokenizer.from_pretrained(tmp_path / "a" / "model")


@pytest.mark.parametrize("options", [{}, {"eval_temperature": 0.7}])
def test_evaluation(options: dict[str, float], tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy unless a temperature is set; a response has noise of its own, the same at every evaluation."""
    calls: list[tuple[float, int]] = []

    def answer(model: Any, texts: Any, most: int, temperature: float, end: int, seed: int) -> list[Response]:
        calls.append((temperature, seed))
        return [Response((end,), torch.zeros(1), False)] * len(texts)

    monkeypatch.setattr(one_file, "generate", answer)
    monkeypatch.setattr(training_run, "grade", lambda _, rows, *others: torch.tensor([row["acc"] for row in rows]))
    trainer = one_file.Trainer(settings_of(tiny_model, method="grpo", temperature=1.3, **options))
    row = {"prompt": [{"role": "user", "content": "?"}], "data_source": "set"}
    splits = {"test": [{**row, "acc": float(at < 260)} for at in range(300)], "ood": [{**row, "acc": 0.0}]}
    for _ in range(2):
        found = evaluate(trainer, splits, 280)
        assert found["val-core/set/acc/mean@1"] == pytest.approx(260 / 280) and found["val-ood/acc/mean@1"] == 0
    assert {temperature for temperature, _ in calls} == {options.get("eval_temperature", 0.0)}
    seeds = [seed for _, seed in calls]
    assert seeds[:3] == seeds[3:] and len(set(seeds)) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["lr=0"], "settings.lr is 0; it must be greater than 0"),
        (["learning_rate=1"], "settings.learning_rate is not a setting"),
        (["--method", "ppo"], "settings.method is 'ppo'; choose one of grpo, gvpo, gcpo"),
        (["scheme=shared"], "num_draws is 1: one shared draw makes the causal part zero"),
    ],
)
def test_refused(options: list[str], says: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--method", "gcpo", "--model", str(tiny_model), "--data", "none", "--output", "none", *options]
    assert command(one_file.Trainer, argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gcpo_in_one_file: {says}") and error.count("\n") == 1


def test_too_few_questions() -> None:
    settings = settings_of(Path("m"), method="grpo", batch=5, data="somewhere")
    with pytest.raises(ConfigError, match="somewhere has 4 training questions; set batch to 4 or less"):
        next(batches(questions(), settings))
