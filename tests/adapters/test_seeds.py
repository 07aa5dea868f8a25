"""Which requests have which seed: rows that are alike, steps, validations, and runs without seeds."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gcpo.adapters.questions import OCCURRENCE, QuestionCounter, question_key
from gcpo.adapters.rollout import GCPOAgentLoopManager
from gcpo.checks import check_run
from gcpo.methods.fields import PROMPTS, RESPONSES
from gcpo.settings import ConfigError
from tests.adapters.conftest import N
from tests.adapters.memory_queue import MemoryQueue
from tests.adapters.test_pipeline import GENERATED, Server, make_trainer, roll_out, take_step

ALIKE = ("a", "b", "a", "a")
"""Two workers get the first two rows and the last two."""


def rows(texts: tuple[str, ...], prefix: str = "uid", step: int = 1, validate: bool = False, index: Any = 0) -> Any:
    """What the trainer hands to the agent-loop manager, with the same index in every row unless it is a list."""
    from verl.utils import tensordict_utils as tu

    count = len(texts)
    batch = tu.get_tensordict(
        {
            "uid": [f"{prefix}{i}" for i in range(count)],
            "raw_prompt": [[{"role": "user", "content": text}] for text in texts],
            "index": index if isinstance(index, list) else [index] * count,
            "data_source": ["arithmetic"] * count,
            "reward_model": [{"style": "rule", "ground_truth": "1"}] * count,
        },
        {"global_steps": step},
    )
    if validate:
        tu.assign_non_tensor_data(batch, "validate", True)
    return batch


@pytest.fixture
def make_manager(monkeypatch: pytest.MonkeyPatch) -> Callable[..., GCPOAgentLoopManager]:
    """Our manager over two workers in this process."""
    from verl.trainer.ppo.v1 import agent_loop_tq

    monkeypatch.setattr(agent_loop_tq.ray, "get", list)

    def make(config: Any, server: Server) -> GCPOAgentLoopManager:
        manager = object.__new__(GCPOAgentLoopManager)
        manager.questions = QuestionCounter()
        remote = SimpleNamespace(remote=lambda chunk: roll_out(config, server, batch=chunk))
        manager.agent_loop_workers = [SimpleNamespace(generate_sequences=remote) for _ in range(2)]
        return manager

    return make


def seeds(server: Server) -> list[int]:
    return sorted(request.seed for request in server.requests)


@pytest.mark.parametrize("index", [0, None, [3, 3, 3, 3], [0, 1, 2, 3]], ids=repr)
def test_rows_that_are_alike(
    make_config: Callable,
    queue: MemoryQueue,
    make_manager: Callable,
    index: Any,
) -> None:
    """Each has a group of its own, whichever worker it goes to; in another run the seeds are the same."""
    config = make_config(*GENERATED)
    runs = []
    for prefix, slow in (("first", lambda at: 0), ("second", lambda at: (7 * at) % 11)):
        server = Server(slow)
        make_manager(config, server).generate_sequences(rows(ALIKE, prefix, index=index))
        responses = {
            i: [queue.fields["train"][f"{prefix}{i}_{session}_0"]["responses"].tolist() for session in range(N)]
            for i in range(4)
        }
        assert len(set(seeds(server))) == len(server.requests)
        assert len({str(group) for group in responses.values()}) == 4
        runs.append((seeds(server), responses))
    assert runs[0] == runs[1]


def test_batches_of_one_step(make_config: Callable, queue: MemoryQueue, make_manager: Callable) -> None:
    """A row that comes again in a later batch of the step is another one; at the next step all seeds are others."""
    config = make_config("gcpo.preset=light")
    server = Server()
    manager = make_manager(config, server)
    manager.generate_sequences(rows(("a", "b"), "x", step=1))
    manager.generate_sequences(rows(("a", "c"), "y", step=1))
    first = seeds(server)
    assert len(set(first)) == len(first) and manager.questions.of_uid == {"x0": 0, "x1": 0, "y0": 1, "y1": 0}
    server.requests.clear()
    manager.generate_sequences(rows(("a", "b", "c"), "z", step=2))
    assert server.requests and not set(seeds(server)) & set(first)
    assert manager.questions.of_uid == {"z0": 0, "z1": 0, "z2": 0}


def test_validation(make_config: Callable, queue: MemoryQueue, make_manager: Callable) -> None:
    """Every validation has the same seeds, also where its rows come in several batches and are alike."""
    config = make_config("gcpo.preset=light", "actor_rollout_ref.rollout.val_kwargs.n=2")
    server = Server()
    manager, found = make_manager(config, server), []
    for step in (0, 5):
        for batch, texts in enumerate((("a", "b"), ("a", "a"))):
            manager.generate_sequences(rows(texts, f"v{step}{batch}", step, validate=True))
        found.append(seeds(server))
        server.requests.clear()
        manager.generate_sequences(rows(("a", "b"), f"t{step}", step + 1))
        server.requests.clear()
    assert found[0] == found[1] and len(set(found[0])) == 8


def test_rows_that_are_alike_keep_their_places(
    make_config: Callable,
    queue: MemoryQueue,
    make_manager: Callable,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: Any,
) -> None:
    """verl's balancing is given the rows in an order that does not depend on which question was answered first."""
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    monkeypatch.setattr(PPOTrainerSync, "_balance_batch", lambda self, batch, metrics: batch)
    config, server = make_config("gcpo.weighting=off", "gcpo.kappa=0"), Server()
    trainer = make_trainer(config, queue, tokenizer)
    trainer.agent_loop_manager = make_manager(config, server)
    trainer.agent_loop_manager.generate_sequences(rows(ALIKE))
    wanted = [f"uid{question}_{session}_0" for question in (0, 2, 3, 1) for session in range(N)]
    for reverse in (False, True):
        keys = sorted(queue.finished_rows(), reverse=reverse)
        assert trainer._balance_batch(queue.meta(keys, "train"), {}).keys == wanted


def test_a_worker_without_the_manager(make_config: Callable, queue: MemoryQueue) -> None:
    """The worker numbers rows that nobody numbered; none of it becomes a field of a response."""
    server = Server()
    roll_out(make_config("gcpo.preset=light"), server, batch=rows(ALIKE))
    assert len(set(seeds(server))) == len(server.requests)
    assert not any(OCCURRENCE in fields for fields in queue.fields["train"].values())


def test_the_first_of_its_kind_has_the_plain_name() -> None:
    """The seeds of a row that no other is like follow from its text and index only."""
    row = {"raw_prompt": [{"role": "user", "content": "a"}], "index": 3}
    assert question_key(row) == question_key(row, 0) != question_key(row, 1) != question_key(row, 2)
    assert question_key({**row, "index": 4}) != question_key(row)


class Unseeded(Server):
    """A server that samples from a generator of its own."""

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict, **kwargs: Any) -> Any:
        assert "seed" not in sampling_params
        params = {**sampling_params, "seed": len(self.requests)}
        return await super().generate(request_id, prompt_ids=prompt_ids, sampling_params=params, **kwargs)


@pytest.mark.parametrize(
    "overrides",
    [(*GENERATED, "gcpo.weighting.ablation=shuffled"), ("gcpo.weighting=off", "gcpo.kappa=0")],
    ids=["gcpo", "grpo"],
)
def test_no_request_has_a_seed(
    make_config: Callable,
    queue: MemoryQueue,
    make_manager: Callable,
    tokenizer: Any,
    overrides: tuple[str, ...],
) -> None:
    """``gcpo.seed=null`` holds for plain responses, draws, regenerated responses and validation, and for the twin."""
    config = make_config(*overrides, "gcpo.seed=null")
    server = Unseeded()
    manager = make_manager(config, server)
    manager.generate_sequences(rows(("a", "b", "c"), index=[0, 1, 2]))
    manager.generate_sequences(rows(("a",), "val", validate=True))
    assert all(queue.tags["train"][f"uid{i}"]["status"] == "finished" for i in range(3))
    assert queue.tags["val"]["val0"]["status"] == "finished"
    if "gcpo.kappa=0" not in overrides:
        draws = [request for request in server.requests if hasattr(request, "max_tokens")]
        assert len(draws) > 3 * N
    take_step(make_trainer(config, queue, tokenizer), queue)


def test_chunked_prefill_needs_requests_without_seeds(make_config: Callable, tmp_path: Any) -> None:
    """On the CPU it is refused because of the seeds only."""
    chunked = "actor_rollout_ref.rollout.enable_chunked_prefill=True"
    with pytest.raises(ConfigError, match="gcpo.seed=null"):
        check_run(make_config(chunked))
    with pytest.raises(ConfigError) as other:
        check_run(make_config(chunked, "gcpo.seed=null", "data.train_files=no_such_file.parquet"))
    assert "chunk" not in str(other.value)


def test_gc2po_without_seeds(recipe_config: Callable) -> None:
    """The perturbations then follow from the step and the tokens only; one override turns both seeds off."""
    from omegaconf import OmegaConf

    from gcpo.methods.gc2po import fields as own
    from gcpo.methods.gc2po.scoring import RowReader
    from gcpo.methods.gc2po.settings import GC2POConfig
    from gcpo.tokens import TokenReader

    settings = OmegaConf.to_container(recipe_config("method=gc2po", "gcpo.seed=null"), resolve=True)
    config = GC2POConfig.from_config(settings["gc2po"], n=8)
    assert config.seed is None

    def seed(step: int, *response: int) -> int:
        names = (PROMPTS, RESPONSES, own.PLACE, own.ANSWERS, own.ANSWER_LENGTHS, own.PROBE)
        values = ([5, 6], response, [1, 0, 0], [0], [0], [4])
        row = {name: torch.tensor(value) for name, value in zip(names, values, strict=True)}
        reader = TokenReader(SimpleNamespace(decode=lambda ids, **options: "a" * len(ids)))
        return RowReader(config, reader, set(), step).read(row).seed

    assert seed(1, 7, 8) == seed(1, 7, 8)
    assert len({seed(1, 7, 8), seed(2, 7, 8), seed(1, 7, 9)}) == 3
