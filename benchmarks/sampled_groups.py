"""Groups with every kind of sample, from vLLM's offline engine, and the policy that scores them, for `estimators`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from gcpo.collider.plan import LeaveOneOutPlan, leave_one_out_plan
from gcpo.collider.prompts import CandidatePrompts, GroupPrompts
from gcpo.methods.gcpo.draws import ColliderSampler, GroupResult
from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.scoring import PrefixForest
from gcpo.scoring.attention import tree_attention_on
from gcpo.seeding import request_seed
from gcpo.tools.evaluate.sampling import CPU_OPTIONS

N = 8
"""Responses, shared draws, leave-one-out draws of a response, and generations of a context."""
Contexts = list[list[list[int]]]
"""Token ids by response and slot; slots 0 to N - 1 are the shared draws; an empty list means no valid draw."""


class Engine:
    """vLLM's offline engine with the asynchronous call of the collider stage."""

    def __init__(self, model: str, max_model_len: int) -> None:
        from vllm import LLM

        self.engine = LLM(model=model, max_model_len=max_model_len, block_size=32, **CPU_OPTIONS).llm_engine
        self.waiting: dict[str, asyncio.Future] = {}
        self.numbers = itertools.count()

    async def __call__(self, prompt_ids: list[int], params: dict[str, Any]) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        name = str(next(self.numbers))
        options = {key: value for key, value in params.items() if key != "logprobs"}
        sampling = SamplingParams(**options, output_kind=RequestOutputKind.FINAL_ONLY)
        self.engine.add_request(name, {"prompt_token_ids": list(prompt_ids)}, sampling)
        self.waiting[name] = asyncio.get_running_loop().create_future()
        return await self.waiting[name]

    async def drive(self, work: Any) -> Any:
        """Run the coroutine ``work``, and step the engine whenever it waits."""
        task = asyncio.ensure_future(work)
        while not task.done():
            await asyncio.sleep(0)
            for output in self.engine.step() if self.waiting else ():
                if output.finished:
                    (sample,) = output.outputs
                    answer = SimpleNamespace(
                        token_ids=list(sample.token_ids),
                        stop_reason=sample.finish_reason,
                        extra_fields={"num_cached_tokens": output.num_cached_tokens},
                    )
                    self.waiting.pop(output.request_id).set_result(answer)
        return task.result()


@dataclass
class Group:
    """One question with all of its samples."""

    messages: list[dict[str, Any]]
    prompt: list[int]
    responses: list[list[int]]
    result: GroupResult


def sample_groups(
    engine: Engine, prompts: CandidatePrompts, questions: Sequence[Any], seed: int, response_length: int
) -> Iterator[Group]:
    """Yield one group per question, each with N samples of every kind."""
    config = GCPOConfig.from_config(
        {
            "seed": seed,
            "features": {"source": "response"},
            "weighting": {"target": "projection"},
            "collider": {"scheme": "leave_one_out", "num_draws": N, "num_leave_one_out_draws": N, "num_generations": N},
        },
        n=N,
        response_length=response_length,
    )
    stage = ColliderSampler(config, prompts, engine, {"temperature": 1.0}, None, prompts.end_ids)

    async def sample(index: int, messages: list[dict[str, Any]]) -> Group:
        text = prompts.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = prompts.tokenizer.encode(text, add_special_tokens=False)
        params = {"temperature": 1.0, "max_tokens": response_length}
        seeds = [request_seed(seed, "plain", index, k) for k in range(N)]
        outputs = await asyncio.gather(*(engine(prompt, {**params, "seed": one}) for one in seeds))
        responses = [output.token_ids for output in outputs]
        # Rewards of the task are ignored, so that every group gets every sample.
        result = await stage.run(messages, responses, seed_parts=("study", index), equal_rewards=False)
        return Group(messages, prompt, responses, result)

    for index, messages in enumerate(questions):
        yield asyncio.run(engine.drive(sample(index, messages)))
        print(f"group {index + 1} of {len(questions)}", flush=True)


def cut_contexts(group: Group, prompts: CandidatePrompts) -> Contexts:
    """Return the contexts of a group under the block budget of ``prompts``, with the same draws and tie order."""
    before = LeaveOneOutPlan.from_dict(group.result.plan["plan"])
    blocks = tuple(tuple(prompts.candidate_block(k, ids)) for k, ids in enumerate(group.responses))
    plan = leave_one_out_plan(N, 2 * N, lengths=[len(block) for block in blocks], permutation=before.permutation)
    made = GroupPrompts(prompts.frame(group.messages), blocks, plan)
    shared, own = ([draw for draw in group.result.draws if draw.kind == kind] for kind in ("collider", "leave_one_out"))
    contexts: Contexts = [[] for _ in range(N)]
    for position, i in enumerate(before.depth_first()):
        for slot, draw in enumerate([*shared, *own[position * N : (position + 1) * N]]):
            block = prompts.collider_block(draw.token_ids)
            contexts[i].append(made.context(i, slot, block) if draw.valid else [])
    return contexts


class Policy:
    """The model in float32 on packed prefix trees of at most ``budget`` tokens."""

    def __init__(self, path: str, budget: int) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.budget = budget

    def _hidden(self, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (index, hidden states [length, d]) of every sequence that is not empty."""
        present = [i for i, sequence in enumerate(sequences) if len(sequence)]
        with tree_attention_on(self.model.config):
            for pack in PrefixForest([torch.tensor(sequences[i]) for i in present]).packs(self.budget):
                ids, positions = pack.token_ids[None], pack.position_ids[None]
                output = self.model.model(ids, position_ids=positions, use_cache=False, tree_pack=pack)
                for sequence, place in zip(pack.sequences, pack.places, strict=True):
                    yield present[sequence], output.last_hidden_state[0][place]

    @torch.no_grad()
    def states(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the state of the last token of every sequence [N, d], zero for an empty one."""
        states = torch.zeros(len(sequences), self.model.config.hidden_size)
        for i, hidden in self._hidden(sequences):
            states[i] = hidden[-1]
        return states

    def log_probs(self, contexts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Return log pi(target | context) [target length], with gradient if enabled; zeros for an empty context."""
        values = [torch.zeros(len(target)) for target in targets]
        joined = [[*context, *target] if context else [] for context, target in zip(contexts, targets, strict=True)]
        for i, hidden in self._hidden(joined):
            logits = self.model.lm_head(hidden[len(contexts[i]) - 1 : -1])
            values[i] = logits.log_softmax(-1).gather(-1, torch.tensor(targets[i])[:, None])[:, 0]
        return values
