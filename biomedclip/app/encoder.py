"""A model as the tools of every day use it: pictures in, unit embeddings out, from several threads at once.

Reads what `biomedclip.load` takes and holds the model with its preprocessing, tokenizer and calibration. Pixels are
those of evaluation. `fast` changes three things that change them or the last digits a little: JPEGs are scaled while
they are decoded, the mean is subtracted from whole batches in channels-last order, and batch norms are folded into the
convolutions before them. A folding that changes what comes out is taken back: it is checked on noise, because which
norm follows which convolution is read from names and not from the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from biomedclip.evaluation.embed import check_finite, embed_texts, logit_scale_of
from biomedclip.models.calibration import read_calibration
from biomedclip.models.load import load
from biomedclip.models.preprocess import open_clip_config

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import nn

    from biomedclip.models.build import Loaded

_TOLERANCE = 1e-4


class Encoder:
    """A model with what it needs; built once, used by any number of threads.

    `lite` is for those who only embed: the bundled model then comes without open_clip's long import. Raises
    CheckpointError as `load` does.
    """

    def __init__(self, name: str | Path, *, fast: bool = False, device: str = "cpu", lite: bool = False) -> None:
        self.name, self.device, self.fast = str(name), device, fast
        self.model, self.preprocess, self.tokenizer = _load(name, device, lite)
        self.logit_scale = logit_scale_of(self.model)
        self.calibration = read_calibration(name)
        self._config = open_clip_config(self.preprocess) if fast else None
        if fast and device == "cpu":
            self.model = tune(self.model, self.size_px)

    @cached_property
    def size_px(self) -> int:
        """The longer side of the model's input."""
        sizes = [step.size for step in self.preprocess.steps if step.size is not None]
        last = sizes[-1] if sizes else 224
        return last if isinstance(last, int) else max(last)

    @property
    def at_least_px(self) -> int | None:
        """The shorter side that a JPEG keeps while it is decoded; None where it is decoded whole."""
        return self.size_px if self._config is not None else None

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """The picture as `encode` takes it: preprocessed, or (H, W, 3) uint8 where `fast` does the rest in batches."""
        import torch

        if self._config is None:
            return self.preprocess(image)
        return torch.from_numpy(np.array(_fit(image, self._config)))

    def encode(self, prepared: Sequence[torch.Tensor], names: Sequence[str] = ()) -> NDArray[np.float32]:
        """(N, D) unit embeddings. Raises DataError naming the pictures whose embedding is not finite."""
        import torch

        model: Any = self.model
        with torch.inference_mode():
            batch = torch.stack(list(prepared)).to(self.device)
            if self._config is not None:
                batch = self._normalise(batch)
            vectors = model.encode_image(batch, normalize=True).float()
            found: NDArray[np.float32] = (vectors / vectors.norm(dim=-1, keepdim=True)).cpu().numpy()
        check_finite(found, names or [f"picture {i}" for i in range(len(found))], self.name)
        return found

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(M, D) unit embeddings."""
        return embed_texts(self.model, self.tokenizer, texts, device=self.device)

    def _normalise(self, batch: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in channels-last order from (B, H, W, 3) uint8."""
        import torch

        mean, std = ((torch.tensor(self._config[key]) * 255).to(self.device) for key in ("mean", "std"))  # type: ignore[index]
        return ((batch.float() - mean) / std).permute(0, 3, 1, 2)


def tune(model: nn.Module, size_px: int) -> nn.Module:
    """A copy that computes faster on a CPU: weights in channels-last order, batch norms folded where that is exact."""
    import torch

    tuned: Any = copy.deepcopy(model)
    visual = getattr(tuned, "visual", tuned)
    if fold_norms(visual):
        noise = torch.randn(2, 3, size_px, size_px, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            first, second = (m.encode_image(noise, normalize=True) for m in (model, tuned))  # type: ignore[operator]
        if not bool((first - second).abs().max() < _TOLERANCE):
            tuned = copy.deepcopy(model)
            visual = getattr(tuned, "visual", tuned)
    visual.to(memory_format=torch.channels_last)
    return tuned  # type: ignore[no-any-return]


def fold_norms(model: nn.Module) -> int:
    """How many batch norms were folded, in place, into a convolution registered right before them.

    w' = w g / sqrt(v + eps), b' = (b - m) g / sqrt(v + eps) + beta; what a norm of timm does besides (its activation)
    stays in its place.
    """
    import torch
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    count = 0
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in pairwise(children):
            if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)) or (
                conv.out_channels != norm.num_features or norm.running_var is None
            ):
                continue
            rest = [m for name in ("drop", "act") if isinstance(m := getattr(norm, name, None), torch.nn.Module)]
            setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
            setattr(parent, norm_name, nn.Sequential(*rest) if rest else nn.Identity())
            count += 1
    return count


def _load(name: str | Path, device: str, lite: bool) -> Loaded:
    if lite:
        from biomedclip.models.lite import load_lite

        if (loaded := load_lite(name, device=device)) is not None:
            return loaded
    return load(name, device=device)


def _fit(image: Image.Image, config: dict[str, Any]) -> Image.Image:
    from biomedclip.stream.decode import Geometry, fit

    return fit(image, Geometry(size_px=config["size"][0], resize_mode=config["resize_mode"],
                               interpolation=config["interpolation"]))  # fmt: skip
