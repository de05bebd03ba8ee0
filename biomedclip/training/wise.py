"""WiSE-FT: weights between the start of a run and its end, which often keep the old and have most of the new.

Reads two folders with weights of one architecture; yields their interpolation as a folder in their format. Everything
with a fractional part is interpolated, buffers of batch norm and the logit scale too (stored as its logarithm, and
interpolated so, as the authors do); counters and position ids are the end's.
"""

from __future__ import annotations

from pathlib import Path

from biomedclip.errors import CheckpointError, ConfigError
from biomedclip.models.interpolate import interpolate


def interpolate_folders(start: str | Path, end: str | Path, alpha: float, out: str | Path) -> Path:
    """Write the interpolation of two models as a folder like the end's, tokenizer files included; returns it.

    `start` and `end` are folders that `biomedclip.models.load` knows (run, checkpoint, export). Raises CheckpointError
    where they are not of one architecture, ConfigError for an alpha outside [0, 1].
    """
    import json

    from safetensors.torch import load_file, save

    from biomedclip.files import write_bytes
    from biomedclip.models.folders import CONFIG_FILE, FACTS_FILE
    from biomedclip.models.load import find_export
    from biomedclip.training.exports import find_weights

    if not 0 <= alpha <= 1:
        raise ConfigError("--alpha", "is not between 0 (start) and 1 (end)", found=alpha)
    first, last, out = find_export(start), find_export(end), Path(out)
    name = CONFIG_FILE if (last / CONFIG_FILE).exists() else FACTS_FILE
    key = "model_cfg" if name == CONFIG_FILE else "architecture"
    kinds = [
        json.loads(path.read_bytes())[key] if (path := folder / name).exists() else None for folder in (first, last)
    ]
    if kinds[0] != kinds[1]:
        raise CheckpointError(last, f"is another architecture than {first}", todo="name two states of one model")
    weights = find_weights(last)
    mixed = interpolate(load_file(find_weights(first)), load_file(weights), alpha)
    facts = {"format": "pt", "wise_ft_alpha": str(alpha), "wise_ft_start": str(first), "wise_ft_end": str(last)}
    (out / name).unlink(missing_ok=True)
    write_bytes(out / weights.name, save(mixed, metadata=facts))
    # Tokenizer and text tower's config lie beside the weights; what says that a folder is complete comes last.
    beside = sorted(path for path in last.iterdir() if path.is_file() and path.name not in (weights.name, name))
    for path in [*beside, last / name]:
        write_bytes(out / path.name, path.read_bytes())
    return out
