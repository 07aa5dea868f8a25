"""The warm-started model of the quick start.

``python -m examples.arithmetic.warm_start --data DIR --output MODEL_DIR`` makes a small Qwen2 model with its
own tokenizer, fine-tuned on worked solutions with injected carry and borrow errors: it knows the procedure and makes
the same errors. Some prompts contain candidate answers in the format of the rollout; their targets have fewer errors,
so the model learns to use the candidates.

The folder contains ``recipe.json``; a folder made by the same recipe is not changed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Callable, Container, Hashable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from examples.arithmetic.task import PrepError, parse_question
from examples.arithmetic.training_data import (
    Arithmetic,
    BaseRecipe,
    Example,
    Recipe,
    collate,
    make_batches,
    make_examples,
)
from examples.tasks.base import Solver
from gcpo.collider.prompts import PromptTemplate
from gcpo.files import lock, put_in_place

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(recipe: BaseRecipe, solver: Solver[Any, Any] | None = None) -> Any:
    """Return a byte-level tokenizer with a small vocabulary, in the class that ``AutoTokenizer`` uses for Qwen2.

    Args:
        recipe: size of the vocabulary, and the seed.
        solver: writes the texts from which the tokenizer is made; that of the quick start if None.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    reference = Qwen2Tokenizer().backend_tokenizer
    raw = Tokenizer(models.BPE())
    raw.normalizer, raw.pre_tokenizer, raw.decoder = reference.normalizer, reference.pre_tokenizer, decoders.ByteLevel()
    rng = random.Random(recipe.seed)
    solver = solver or Arithmetic(Recipe())
    template = PromptTemplate()
    texts: list[str] = []
    for i in range(300):
        texts += [*solver.sample_texts(rng), template.intro, template.candidate.format(label=i % 8 + 1)]
        texts += [template.collider, template.outro, "user\n", "assistant\n", "system\n"]
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=recipe.vocab_size,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            min_frequency=2,
            show_progress=False,
        ),
    )
    model = json.loads(raw.to_str())["model"]
    merges: Any = [tuple(merge) for merge in model["merges"]]
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


def make_model(recipe: BaseRecipe, tokenizer: Any) -> Any:
    """Return the untrained model."""
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


def _progress_lines() -> Any:
    """Return a callback that prints progress lines instead of a bar."""
    from transformers import TrainerCallback

    class Lines(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in (logs or {}):
                done = state.global_step / state.max_steps
                print(f"warm start: {done:4.0%}  loss {float(logs['loss']):.3f}", flush=True)

    return Lines()


def train(recipe: BaseRecipe, model: Any, examples: Sequence[Sequence[Example]], folder: Path) -> None:
    """Train ``model`` with transformers' Trainer, first on plain examples, then on both kinds."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    rng = random.Random(recipe.seed)
    plain, candidates = examples
    first = int(len(plain) * recipe.plain_first)
    mixed = make_batches(plain[first:], recipe.batch_tokens, rng)
    mixed += make_batches(candidates, recipe.batch_tokens, rng)
    rng.shuffle(mixed)
    batches: Any = make_batches(plain[:first], recipe.batch_tokens, rng) + mixed
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
        train_sampling_strategy="sequential",
        disable_tqdm=not sys.stderr.isatty(),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=batches, data_collator=collate)
    if arguments.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_progress_lines())
    trainer.train()


def excluded_questions(data: Path) -> set[tuple[str, int, int]]:
    """Return the keys of the held-out questions in ``data``.

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
    """Return the hash of the recipe that made ``folder``, or ``None`` if it has no model.

    Raises:
        PrepError: ``folder`` has other content, which a new model must not replace.
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
    """Create the model in ``output`` unless the same recipe has created it already.

    Raises:
        PrepError: the data are missing, or ``output`` cannot be written or has other content.
    """
    recipe = recipe or Recipe()
    make_once(output, recipe, Arithmetic(recipe), lambda: excluded_questions(data))


def make_once(
    output: Path, recipe: BaseRecipe, solver: Solver[Any, Any], excluded: Callable[[], Container[Hashable]]
) -> None:
    """Create the model of ``recipe`` in ``output`` unless the same recipe has created it already.

    Args:
        output: the folder of the model.
        recipe: determines the model, together with the solver.
        solver: writes the worked solutions.
        excluded: returns the keys of the held-out questions.

    Raises:
        PrepError: ``output`` cannot be written or has other content.
    """
    if made_by(output) == recipe.hash:
        print(f"{output}: made by this recipe already")
        return
    try:
        held_out = excluded()
        with lock(output, lambda: print(f"{output}: another process is making it; waiting", flush=True)):
            if made_by(output) == recipe.hash:
                print(f"{output}: made by this recipe meanwhile")
            else:
                _make(held_out, output, recipe, solver)
    except OSError as error:
        raise PrepError(f"cannot write {output}: {error}") from error


def _make(excluded: Container[Hashable], output: Path, recipe: BaseRecipe, solver: Solver[Any, Any]) -> None:
    import torch

    torch.set_num_threads(1)  # results do not depend on the machine, and such small matrices gain nothing from cores
    unfinished = output.with_name(f".{output.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    try:
        folder = unfinished / "model"
        tokenizer = make_tokenizer(recipe, solver)
        model = make_model(recipe, tokenizer)
        print(f"{output}: training {model.num_parameters():,} parameters", flush=True)
        train(recipe, model, make_examples(recipe, tokenizer, excluded, solver), unfinished / "trainer")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "recipe.json").write_text(json.dumps({"hash": recipe.hash, **asdict(recipe)}, indent=2) + "\n")
        put_in_place(folder, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


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
