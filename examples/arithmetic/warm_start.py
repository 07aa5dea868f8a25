"""The warm-started model of the quick start.

``python -m examples.arithmetic.warm_start --data DIR --output MODEL_DIR`` trains a small Qwen2 model, with a tokenizer
of its own, on the notes of a pupil who forgets carries and, more often than not, borrows: it knows the procedure, and
is wrong where the pupil is. A part of the examples are prompts with candidate answers, in the format of the rollout,
where the pupil forgets less because somebody else's solution reminds him.

The folder holds ``recipe.json``; a folder made by the same recipe is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from examples.arithmetic.task import (
    LEVELS,
    OPERATIONS,
    PrepError,
    Pupil,
    Question,
    draw_question,
    parse_question,
    work_out,
)
from gcpo.collider.prompts import CandidatePrompts, PromptTemplate
from gcpo.files import lock, put_in_place

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Everything that the model depends on; a change of a value makes it anew."""

    version: int = 2
    """Raised when the code below changes what it makes."""
    vocab_size: int = 352
    hidden_size: int = 96
    intermediate_size: int = 256
    layers: int = 3
    heads: int = 3
    context: int = 2048
    initializer_range: float = 0.08
    plain_examples: int = 24_000
    plain_first: float = 0.6
    """Share of the plain examples that come before any example with candidates."""
    candidate_examples: int = 9_000
    max_blocks: int = 8
    batch_tokens: int = 1024
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    forget_carry: float = 0.3
    forget_borrow: float = 0.6
    miscount: float = 0.02
    seed: int = 11

    @property
    def hash(self) -> str:
        """Names the recipe."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of the response that is trained on."""

    prompt: list[int]
    response: list[int]

    @property
    def size(self) -> int:
        return len(self.prompt) + len(self.response)


def make_tokenizer(recipe: Recipe) -> Any:
    """A byte-level tokenizer with a small vocabulary, of the class that ``AutoTokenizer`` takes for a Qwen2 model."""
    from tokenizers import Tokenizer, decoders, models, trainers
    from transformers import Qwen2Tokenizer

    reference = Qwen2Tokenizer().backend_tokenizer
    raw = Tokenizer(models.BPE())
    raw.normalizer, raw.pre_tokenizer, raw.decoder = reference.normalizer, reference.pre_tokenizer, decoders.ByteLevel()
    rng = random.Random(recipe.seed)
    template = PromptTemplate()
    texts: list[str] = []
    for i in range(300):
        question = draw_question(rng, rng.choice(LEVELS), rng.choice(OPERATIONS))
        texts += [question.text, work_out(question).text, template.intro, template.candidate.format(label=i % 8 + 1)]
        texts += [template.collider, template.outro, "user\n", "assistant\n", "system\n"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    from tokenizers.pre_tokenizers import ByteLevel

    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=recipe.vocab_size,
            special_tokens=special,
            initial_alphabet=sorted(ByteLevel.alphabet()),
            min_frequency=2,
            show_progress=False,
        ),
    )
    model = json.loads(raw.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = recipe.context
    return tokenizer


def make_model(recipe: Recipe, tokenizer: Any) -> Any:
    """The untrained model."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(recipe.seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        initializer_range=recipe.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def make_examples(recipe: Recipe, tokenizer: Any, excluded: set[tuple[str, int, int]]) -> list[list[Example]]:
    """The plain examples and those with candidates, none about an excluded question."""
    rng = random.Random(recipe.seed)
    pupil = Pupil(recipe.forget_carry, recipe.forget_borrow, recipe.miscount)
    prompts = CandidatePrompts(tokenizer)

    def question() -> Question:
        while True:
            drawn = draw_question(rng, rng.choice(LEVELS), rng.choice(OPERATIONS))
            if drawn.key not in excluded:
                return drawn

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def plain(asked: Question) -> Example:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked.text}], add_generation_prompt=True, tokenize=False
        )
        return Example(encode(prompt), [*encode(pupil.solve(asked, rng).text), tokenizer.eos_token_id])

    def with_candidates(asked: Question) -> Example:
        count = rng.randint(1, recipe.max_blocks)
        skill = rng.choice((0.2, 0.5, 1.0, 1.3))
        others = Pupil(pupil.forget_carry * skill, pupil.forget_borrow * skill, pupil.miscount * 2)
        solutions = [others.solve(asked, rng) for _ in range(count)]
        reminded = frozenset(c for s in solutions for c, kept in enumerate(s.carries) if kept)
        labels = rng.sample(range(recipe.max_blocks), count)
        blocks = [prompts.candidate_block(k, encode(s.text)) for k, s in zip(labels, solutions, strict=True)]
        if rng.random() < 0.5:
            joint = pupil.solve(asked, rng, reminded)
            reminded |= {c for c, kept in enumerate(joint.carries) if kept}
            blocks[rng.randrange(count)] = prompts.collider_block(encode(joint.text))
        target = replace(pupil, miscount=0.0).solve(asked, rng, reminded)
        frame = prompts.frame([{"role": "user", "content": asked.text}])
        return Example(prompts.join(frame, blocks), [*encode(target.text), tokenizer.eos_token_id])

    return [
        [plain(question()) for _ in range(recipe.plain_examples)],
        [with_candidates(question()) for _ in range(recipe.candidate_examples)],
    ]


def make_batches(examples: Sequence[Example], budget: int, rng: random.Random) -> list[list[Example]]:
    """Batches of examples of about the same length, at most ``budget`` tokens with padding, in random order."""
    batches: list[list[Example]] = []
    for example in sorted(examples, key=lambda e: (e.size // 4, rng.random())):
        width = max([example.size, *(e.size for e in batches[-1])]) if batches else example.size
        if not batches or width * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(example)
    rng.shuffle(batches)
    return batches


def collate(items: Sequence[Sequence[Example]]) -> dict[str, Any]:
    """One batch of ``make_batches`` as tensors; the loss is on the responses alone."""
    import torch

    (batch,) = items
    width = max(example.size for example in batch)
    rows = [(e.prompt, e.response, width - e.size) for e in batch]
    return {
        "input_ids": torch.tensor([p + r + [0] * pad for p, r, pad in rows]),
        "labels": torch.tensor([[-100] * len(p) + r + [-100] * pad for p, r, pad in rows]),
        "attention_mask": torch.tensor([[1] * (len(p) + len(r)) + [0] * pad for p, r, pad in rows]),
    }


def train(recipe: Recipe, tokenizer: Any, model: Any, excluded: set[tuple[str, int, int]], folder: Path) -> None:
    """Train ``model`` with transformers' Trainer: first plain examples, then both kinds mixed."""
    from torch.utils.data import SequentialSampler
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Lines(TrainerCallback):
        """Progress where a bar can't be drawn over itself."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in (logs or {}):
                share = 100 * state.global_step / state.max_steps
                print(f"warm start: {share:3.0f} %  loss {float(logs['loss']):.3f}", flush=True)

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    rng = random.Random(recipe.seed)
    plain, candidates = make_examples(recipe, tokenizer, excluded)
    first = int(len(plain) * recipe.plain_first)
    mixed = make_batches(plain[first:], recipe.batch_tokens, rng)
    mixed += make_batches(candidates, recipe.batch_tokens, rng)
    rng.shuffle(mixed)
    batches = make_batches(plain[:first], recipe.batch_tokens, rng) + mixed
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=1,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, int(recipe.warmup * len(batches))),
        logging_steps=max(1, len(batches) // 20),
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=recipe.seed,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        disable_tqdm=not sys.stderr.isatty(),
    )
    trainer = InOrder(model=model, args=arguments, train_dataset=batches, data_collator=collate)
    if arguments.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Lines())
    trainer.train()


def excluded_questions(data: Path) -> set[tuple[str, int, int]]:
    """Keys of the held-out questions in ``data``.

    Raises:
        PrepError: the file is missing or cannot be read.
    """
    import pyarrow.parquet as pq

    path = data / "test.parquet"
    if not path.is_file():
        raise PrepError(f"there is no {path}; make it with python -m examples.arithmetic.task --output {data}")
    try:
        prompts = pq.read_table(path, columns=["prompt"])["prompt"].to_pylist()
        return {parse_question(prompt[-1]["content"]).key for prompt in prompts}
    except Exception as error:
        raise PrepError(f"{path} does not hold questions of examples.arithmetic.task: {error}") from error


def made_by(folder: Path) -> str | None:
    """Hash of the recipe that made ``folder``, ``None`` where no model is in it.

    Raises:
        PrepError: there is something else in ``folder``, which a new model must not replace.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / "recipe.json").is_file():
        raise PrepError(f"{folder} is there and holds no warm-started model; name another folder or remove it")
    try:
        return str(json.loads((folder / "recipe.json").read_text())["hash"])
    except (ValueError, TypeError, KeyError):
        return None


def warm_start(data: Path, output: Path, recipe: Recipe | None = None) -> None:
    """Make the model in ``output`` unless the same recipe has made it already.

    Raises:
        PrepError: the data are missing, or ``output`` cannot be written or holds something else.
    """
    recipe = recipe or Recipe()
    if made_by(output) == recipe.hash:
        print(f"{output}: made by this recipe already")
        return
    try:
        excluded = excluded_questions(data)
        with lock(output, lambda: print(f"{output}: another process is making it; waiting", flush=True)):
            if made_by(output) == recipe.hash:
                print(f"{output}: made by this recipe meanwhile")
            else:
                _make(excluded, output, recipe)
    except OSError as error:
        raise PrepError(f"cannot write {output}: {error}") from error


def _make(excluded: set[tuple[str, int, int]], output: Path, recipe: Recipe) -> None:
    import torch

    torch.set_num_threads(1)  # results do not depend on the machine, and matrices this small gain nothing from cores
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".warm-start-") as name:
        folder = Path(name) / "model"
        tokenizer = make_tokenizer(recipe)
        model = make_model(recipe, tokenizer)
        print(f"{output}: training {model.num_parameters():,} parameters", flush=True)
        train(recipe, tokenizer, model, excluded, Path(name) / "trainer")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "recipe.json").write_text(json.dumps({"hash": recipe.hash, **asdict(recipe)}, indent=2) + "\n")
        put_in_place(folder, output)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the warm-started model of the quick start.")
    parser.add_argument("--data", type=Path, required=True, help="folder made by examples.arithmetic.task")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        warm_start(args.data, args.output)
    except PrepError as error:
        print(f"warm_start: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
