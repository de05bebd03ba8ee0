"""What goes wrong outside of our code while a run trains, in words that say what to change.

Memory, reading processes and the exchange between processes fail deep inside torch; each such failure has a remedy in
the config, and the run can be resumed from its last checkpoint once it is applied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from biomedclip.errors import ConfigError, DataError
from biomedclip.training.config import TrainConfig


@contextmanager
def explain_failures(config: TrainConfig, folder: Path) -> Iterator[None]:
    """Turn a lack of memory, a lost reading process or a parameter nobody uses into an error with its remedy."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise out_of_memory(config, folder, error) from error
    except (RuntimeError, ConnectionResetError, EOFError) as error:
        text = str(error)
        if re.search(r"out of memory|DefaultCPUAllocator|can't allocate memory", text, re.I):
            raise out_of_memory(config, folder, error) from error
        lost_pipe = config.data.workers and not isinstance(error, RuntimeError)
        if re.search(r"DataLoader worker", text) or lost_pipe:
            raise DataError(
                "data.workers", "a reading process died", found=_first_line(text),
                todo="most often memory: lower data.workers or data.cache_mb, or give /dev/shm more; then resume",
            ) from error  # fmt: skip
        if re.search(r"Expected to have finished reduction|find_unused_parameters", text):
            raise ConfigError(
                "strategy", "some parameters of the model take no part in the loss", found=_first_line(text),
                todo="set strategy: ddp_find_unused_parameters_true, then resume",
            ) from error  # fmt: skip
        raise


def out_of_memory(config: TrainConfig, folder: Path, error: BaseException) -> ConfigError:
    """The error for a step that does not fit, with the settings that make it smaller."""
    here = config.batch_size // (config.devices * config.num_nodes)
    part = config.micro_batch_size or here
    advice = [f"set micro_batch_size to {max(min(part, here) // 2, 1)} (the batch and the result stay the same)"]
    if not config.towers.gradient_checkpointing:
        advice.append("set towers.gradient_checkpointing: true")
    if config.precision == "fp32":
        advice.append("set precision: bf16")
    return ConfigError(folder, f"a step does not fit into memory, {part} samples at a time",
                       found=_first_line(str(error)), todo=f"{', or '.join(advice)}; then resume")  # fmt: skip


def check_tokens(tokenise: Any, model: Any, name: str) -> None:
    """Raise ConfigError where the tokenizer's ids or length do not fit the text tower."""
    from biomedclip.training.towers import context_length

    tokens = tokenise(["a chest X-ray"])
    longest, size = context_length(model), int(getattr(model, "vocab_size", 0))
    if tokens.shape[1] > longest:
        raise ConfigError(name, f"its tokenizer gives {tokens.shape[1]} tokens, its text tower takes {longest}",
                          todo="check text_cfg of the model: context_length and tokenizer name")  # fmt: skip
    if size and int(tokens.max()) >= size:
        raise ConfigError(name, f"its tokenizer has ids beyond the {size} of its text tower", found=int(tokens.max()),
                          todo="check text_cfg of the model: vocab_size and tokenizer name")  # fmt: skip


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:160]
