"""MONAI's random array transforms by name, for presets that ask for what this project has not.

Reads what a preset lists under `monai`; yields the transforms, to be seeded picture by picture with MONAI's own
`set_random_state`. Only transforms of single arrays are taken: dictionary transforms and those without randomness have
nothing to do in an augmentation.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from biomedclip.errors import ConfigError


@lru_cache(maxsize=32)
def monai_transforms(listed: str) -> tuple[Any, ...]:
    """The transforms of a JSON list of `{name: arguments}`. Raises ConfigError for an unknown name or argument."""
    from monai import transforms

    made = []
    for entry in json.loads(listed):
        for name, arguments in entry.items():
            kind: Any = getattr(transforms, name, None)
            usable = isinstance(kind, type) and issubclass(kind, transforms.Randomizable)
            if not usable or issubclass(kind, transforms.MapTransform | transforms.Compose):
                raise ConfigError("augmentation.monai", "is no random array transform of MONAI", found=repr(name),
                                  todo="use a name such as RandBiasField or RandGibbsNoise")  # fmt: skip
            try:
                made.append(kind(**arguments))
            except (TypeError, ValueError, AssertionError) as error:
                raise ConfigError(f"augmentation.monai: {name}", "does not take these arguments", found=arguments,
                                  todo=str(error)) from None  # fmt: skip
    return tuple(made)
