"""The model folder: configuration, weights, tokenizer and chat template, without loading them into memory."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from gcpo.reading import MODEL, first_line, get
from gcpo.settings import ConfigError

KEY = f"{MODEL}.path"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt", "tekken.json",
                    "sentencepiece.bpe.model", "tokenizer.tiktoken", "*.tiktoken")  # fmt: skip
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Those of vLLM's attention on the CPU."""
_SAFETENSORS_HEADER_LIMIT = 100_000_000
"""The largest header that the safetensors format allows."""


def local_folder(path: str) -> Path | None:
    """Return the local folder of ``path``, or ``None`` for a model of the hub or of another file system."""
    local = Path(path).expanduser()
    return local if local.is_dir() else None


def check_model(config: DictConfig) -> None:
    """Check that a local model folder is complete: ``config.json``, weights, tokenizer, chat template.

    Raises:
        ConfigError: something is missing or cut off; the sentence names the file.
    """
    path = get(config, KEY)
    if not isinstance(path, str) or not path.strip():
        raise ConfigError(f"{KEY} is {path!r}; it must be a folder or the name of a model on the hub")
    folder = local_folder(path)
    if folder is None:
        if path.startswith(("/", "~", ".")) or Path(path).is_file():
            raise ConfigError(f"{KEY}: there is no folder {path}")
        return
    _read_json(folder / "config.json", f"{KEY}: {path} has no config.json, so it is not a model folder")
    check_weights(folder)
    _check_tokenizer(config, path)


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(missing)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{KEY}: {path} cannot be read as JSON ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{KEY}: {path} holds no JSON object")
    return found


# ---- weights ---------------------------------------------------------------------------------------------------------


def check_weights(folder: Path) -> None:
    """Check that the folder's weight files exist and have their stated sizes, without loading them.

    Raises:
        ConfigError: there is no weight file, a shard of an index is missing, or a file is cut off.
    """
    for suffix, whole in ((".safetensors", _check_safetensors), (".bin", _check_pickle)):
        names = _weight_files(folder, suffix)
        if names:
            for name in names:
                if not (folder / name).is_file():
                    raise ConfigError(
                        f"{KEY}: {folder} lacks the weight file {name} that its index names; download the model again"
                    )
                whole(folder / name)
            return
    raise ConfigError(
        f"{KEY}: {folder} has no weights (no *.safetensors and no pytorch_model*.bin); download the model again"
    )


def _weight_files(folder: Path, suffix: str) -> list[str]:
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    if (folder / f"{stem}{suffix}").is_file():
        return [f"{stem}{suffix}"]
    index = folder / f"{stem}{suffix}.index.json"
    if index.is_file():
        shards = _read_json(index, "").get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ConfigError(f"{KEY}: {index} names no weight file")
        return sorted({str(name) for name in shards.values()})
    return sorted(file.name for file in folder.glob(f"{stem}*{suffix}"))


def _check_safetensors(file: Path) -> None:
    """Check the header's length, and the end of the last tensor, against the size of the file."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, _SAFETENSORS_HEADER_LIMIT):
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ConfigError(
            f"{KEY}: the weight file {file} is no safetensors file, or is cut off ({first_line(error)})"
        ) from error
    if not ends:
        raise ConfigError(f"{KEY}: the weight file {file} holds no tensor")
    if size != expected:
        raise ConfigError(
            f"{KEY}: the weight file {file} has {size:,} bytes and should have {expected:,}, so it is cut off or "
            "damaged; download the model again"
        )


def _check_pickle(file: Path) -> None:
    """Check a PyTorch file: a zip archive, whose directory is at the end, or in older versions a bare pickle."""
    with file.open("rb") as stream:
        start = stream.read(2)
    if start == b"PK" and zipfile.is_zipfile(file) or start[:1] == b"\x80":
        return
    raise ConfigError(f"{KEY}: the weight file {file} is no PyTorch file, or is cut off; download the model again")


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def tokenizer_path(config: DictConfig) -> str:
    """Return the path from which verl reads the tokenizer."""
    return str(get(config, f"{MODEL}.tokenizer_path") or get(config, KEY))


def _check_tokenizer(config: DictConfig, path: str) -> None:
    place = tokenizer_path(config)
    folder = local_folder(place)
    if folder is None:
        return
    if not any(next(folder.glob(name), None) for name in _TOKENIZER_FILES):
        raise ConfigError(
            f"{KEY}: the folder {place} has no tokenizer (none of {', '.join(_TOKENIZER_FILES[:4])}, ...)"
        )
    if get(config, f"{MODEL}.custom_chat_template"):
        return
    settings = folder / "tokenizer_config.json"
    known = settings.is_file() and _read_json(settings, "").get("chat_template")
    if not known and not list(folder.glob("chat_template*")):
        raise ConfigError(
            f"the model in {path} has no chat template, and the candidates go into the user's message: set "
            f"{MODEL}.custom_chat_template"
        )


# ---- transformers' configuration -------------------------------------------------------------------------------------


def check_head_size(config: DictConfig, model: Any) -> None:
    """Check on a machine without accelerator that vLLM has an attention kernel for the model's heads.

    Raises:
        ConfigError: it has none, and the engine would die with the first request.
    """
    heads = getattr(model, "num_attention_heads", None)
    if get(config, "trainer.device") != "cpu" or not heads:
        return
    size = getattr(model, "head_dim", None) or model.hidden_size // heads
    if size not in CPU_HEAD_SIZES:
        raise ConfigError(
            f"{KEY}: {get(config, KEY)} has attention heads of size {size} (hidden_size / num_attention_heads), and on "
            f"the CPU vLLM has kernels for {', '.join(map(str, CPU_HEAD_SIZES))} only; use another model"
        )


def model_config(config: DictConfig) -> Any:
    """Return transformers' configuration of the model's text part, from its folder or the hub, else ``None``.

    Raises:
        ConfigError: it cannot be read.
    """
    from transformers import AutoConfig

    path = str(get(config, f"{MODEL}.hf_config_path") or get(config, KEY))
    if "://" in path:
        return None
    try:
        found = AutoConfig.from_pretrained(
            str(Path(path).expanduser()),
            trust_remote_code=bool(get(config, f"{MODEL}.trust_remote_code")),
        )
    except Exception as error:
        reason = first_line(error)
        raise ConfigError(
            f"{KEY}: {path} is no folder here and cannot be read from the hub: {reason}"
            if not Path(path).expanduser().exists()
            else f"{KEY}: transformers cannot read the config.json in {path}: {reason}"
        ) from error
    return found.get_text_config()
