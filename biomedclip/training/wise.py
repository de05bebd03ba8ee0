"""WiSE-FT: weights between the start of a run and its end, which often keep the old and have most of the new.

Reads two sets of weights of one architecture; yields their interpolation as a folder in open_clip's format, or, during
training, a model that carries it for the length of a `with` block. Everything with a fractional part is interpolated,
buffers of batch norm and the logit scale too (stored as its logarithm, and interpolated so, as the authors do);
counters and position ids are the end's.
"""

from __future__ import annotations

from pathlib import Path

from biomedclip.errors import CheckpointError, ConfigError
from biomedclip.models.interpolate import carrying, interpolate

__all__ = ["carrying", "interpolate", "interpolate_folders"]


def interpolate_folders(start: str | Path, end: str | Path, alpha: float, out: str | Path) -> Path:
    """Write the interpolation of two models as a folder in open_clip's format; returns it.

    `start` and `end` are folders that `biomedclip.models.load` knows (run, checkpoint, export). Raises CheckpointError
    where they are not of one architecture, ConfigError for an alpha outside [0, 1].
    """
    import json

    from safetensors.torch import load_file, save

    from biomedclip.files import write_bytes, write_json
    from biomedclip.models.export import CONFIG_FILE, WEIGHTS_FILE
    from biomedclip.models.load import find_export

    if not 0 <= alpha <= 1:
        raise ConfigError("--alpha", "is not between 0 (start) and 1 (end)", found=alpha)
    first, last, out = find_export(start), find_export(end), Path(out)
    configs = [json.loads((folder / CONFIG_FILE).read_bytes()) for folder in (first, last)]
    if configs[0]["model_cfg"] != configs[1]["model_cfg"]:
        raise CheckpointError(last, f"is another architecture than {first}", todo="name two states of one model")
    for folder in (first, last):
        if not (folder / WEIGHTS_FILE).exists():
            raise CheckpointError(folder / WEIGHTS_FILE, "is missing", todo="export the model again")
    mixed = interpolate(load_file(first / WEIGHTS_FILE), load_file(last / WEIGHTS_FILE), alpha)
    facts = {"format": "pt", "wise_ft_alpha": str(alpha), "wise_ft_start": str(first), "wise_ft_end": str(last)}
    (out / CONFIG_FILE).unlink(missing_ok=True)
    write_bytes(out / WEIGHTS_FILE, save(mixed, metadata=facts))
    write_json(out / CONFIG_FILE, configs[1])
    return out
