"""An image's way into a model, as a list of steps that data describes.

Reads a PIL image (or a uint8 array) and the steps of a model's facts (`biomedclip.models.zoo`), yields a float32
(3, H, W) tensor, bit for bit what the authors' pipeline gives. The steps before `tensor` work on PIL images, as
torchvision's do there, and need no torchvision; those after it work on the tensor. Grey of more than 8 bits is refused
without a window, because PIL's own conversion would clip it to white.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from biomedclip.errors import CheckpointError, DataError
from biomedclip.models.zoo import Step

if TYPE_CHECKING:
    import torch
    from PIL import Image

CONSTANTS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
_DEEP_MODES = ("I", "F")


@dataclass(frozen=True)
class ImageTransform:
    """A callable from an image to the model's input tensor."""

    steps: tuple[Step, ...]

    def __call__(self, image: Image.Image | np.ndarray, *, window: tuple[float, float] | None = None) -> torch.Tensor:
        """(3, H, W) float32 of one image; `window` (centre, width) turns grey of more than 8 bits into 8.

        Raises DataError for grey of more than 8 bits without a window, and for arrays of another type or shape.
        """
        value: Any = _to_picture(image, window, stretched=self.steps[0].verb == "minmax")
        for step in self.steps:
            value = (_ON_PICTURE if not _is_tensor(value) else _ON_TENSOR)[step.verb](value, step)
        return value  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        shown = (step.model_dump(exclude_defaults=True) for step in self.steps)
        return f"ImageTransform({', '.join(str(step) for step in shown)})"


def transform_from_open_clip(config: Mapping[str, Any]) -> ImageTransform:
    """The transform of an open_clip `preprocess_cfg`: size, mean, std, interpolation, resize_mode, fill_color.

    Raises CheckpointError for a resize_mode or interpolation that open_clip does not know either.
    """
    size, fill = config["size"], config.get("fill_color", 0)
    size = tuple(size) if isinstance(size, Sequence) else (size, size)
    square: Any = size[0] if size[0] == size[1] else size
    known = {"interpolation": config.get("interpolation", "bicubic")}
    if known["interpolation"] not in ("bicubic", "bilinear"):
        raise CheckpointError("preprocess_cfg", "has an unknown interpolation", found=known["interpolation"],
                              todo="bicubic or bilinear")  # fmt: skip
    mode: Any = config.get("resize_mode") or "shortest"
    if mode == "squash":
        geometry = [Step(resize="squash", size=size, **known)]
    elif mode in ("shortest", "longest"):
        geometry = [Step(resize=mode, size=square, **known), Step(crop="center", size=square, fill=fill)]
    else:
        raise CheckpointError("preprocess_cfg", "has an unknown resize_mode", found=mode,
                              todo="shortest, longest or squash")  # fmt: skip
    normalize = Step(normalize=(tuple(config["mean"]), tuple(config["std"])))
    return ImageTransform((*geometry, Step(mode="RGB"), Step(tensor=255), normalize))


def open_clip_config(transform: ImageTransform) -> dict[str, Any] | None:
    """The steps as an open_clip `preprocess_cfg`; None where open_clip has no words for them."""
    for mode in ("shortest", "longest", "squash"):
        resize = next((step for step in transform.steps if step.resize == mode), None)
        last = transform.steps[-1]
        if resize is None or resize.size is None or last.normalize is None:
            continue
        mean, std = CONSTANTS[last.normalize] if isinstance(last.normalize, str) else last.normalize
        size = (resize.size, resize.size) if isinstance(resize.size, int) else resize.size
        crop = next((step for step in transform.steps if step.crop), None)
        config = {
            "size": size, "mode": "RGB", "mean": mean, "std": std, "interpolation": resize.interpolation,
            "resize_mode": mode, "fill_color": crop.fill if crop else 0,
        }  # fmt: skip
        if _same_but_for_order(transform, transform_from_open_clip(config)):
            return config
    return None


def _same_but_for_order(first: ImageTransform, second: ImageTransform) -> bool:
    """Whether two lists have the same steps; when an image becomes RGB changes palette images only."""

    def plain(transform: ImageTransform) -> list[Any]:
        kept = []
        for step in transform.steps:
            values = step.model_dump(exclude_defaults=True, exclude={"rounding"})
            if isinstance(values.get("size"), tuple) and len(set(values["size"])) == 1:
                values["size"] = values["size"][0]
            if isinstance(step.normalize, str):
                values["normalize"] = CONSTANTS[step.normalize]
            if step.verb != "mode":
                kept.append(values)
        return kept

    return plain(first) == plain(second) and any(step.mode == "RGB" for step in first.steps)


def _to_picture(image: Image.Image | np.ndarray, window: tuple[float, float] | None, *, stretched: bool) -> Any:
    from PIL import Image as Pictures

    from biomedclip.windows import apply_window

    mode = image.mode if isinstance(image, Pictures.Image) else ""
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
            raise DataError("image", "is no (H, W) or (H, W, 3) array", found=image.shape, todo="put channels last")
        deep = image.dtype != np.uint8
        image = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    else:
        deep = mode.split(";")[0] in _DEEP_MODES
    if window is not None:
        if not deep:
            raise DataError("image", "has 8 bits and needs no window", found=mode or "uint8", todo="leave window out")
        return Pictures.fromarray(apply_window(np.asarray(image, dtype=np.float64), *window))
    if deep and not stretched:
        raise DataError(
            "image", "has more than 8 bits and no window says which values become black and white",
            found=mode or f"{image.dtype} array",  # type: ignore[union-attr]
            todo="give preprocess(image, window=(centre, width)), or read it through biomedclip.images",
        )  # fmt: skip
    return Pictures.fromarray(image) if isinstance(image, np.ndarray) and not deep else image


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "dim")


def _mode(image: Any, step: Step) -> Any:
    return image if image.mode == step.mode else image.convert(step.mode)


def _minmax(image: Any, step: Step) -> Any:
    from PIL import Image as Pictures

    values = np.asarray(image).astype(np.float64)
    values -= values.min()
    top = values.max()
    return Pictures.fromarray((values / top * 255 if top > 0 else values).astype(np.uint8))


def target_size(step: Step, height: int, width: int) -> tuple[int, int]:
    """(height, width) after a resize step, by the formula of torchvision or open_clip."""
    wanted: Any = step.size
    if step.resize == "squash":
        return (wanted, wanted) if isinstance(wanted, int) else wanted
    if step.resize == "shortest" and isinstance(wanted, int):
        short, long = sorted((height, width))
        other = int(wanted * long / short)
        return (wanted, other) if height <= width else (other, wanted)
    tall, wide = (wanted, wanted) if isinstance(wanted, int) else wanted
    ratios = (height / tall, width / wide)
    ratio = max(ratios) if step.resize == "longest" else min(ratios)
    cut = int if step.rounding == "floor" else round
    return cut(height / ratio), cut(width / ratio)


def _resize(image: Any, step: Step) -> Any:
    from PIL import Image as Pictures

    height, width = target_size(step, image.height, image.width)
    if (width, height) == image.size:
        return image
    if step.antialias:
        return image.resize((width, height), Pictures.Resampling[step.interpolation.upper()])
    raise CheckpointError("preprocess", "resizes a PIL image without antialiasing, which PIL cannot",
                          todo="put the step after `tensor`")  # fmt: skip


def _pad(image: Any, step: Step) -> Any:
    from PIL import Image as Pictures

    if step.pad == "square":
        side = max(*image.size, step.size if isinstance(step.size, int) else 0)
        size, corner = (side, side), ((side - image.width) // 2, (side - image.height) // 2)
    else:
        tall, wide = (step.size, step.size) if isinstance(step.size, int) else step.size or (0, 0)
        size, corner = (wide, tall), (0, 0)
    if size == image.size:
        return image
    canvas = Pictures.new(image.mode, size, _colour(image.mode, step.fill))
    canvas.paste(image, corner)
    return canvas


def _colour(mode: str, fill: int) -> Any:
    bands = {"RGB": 3, "RGBA": 4, "LA": 2, "CMYK": 4, "YCbCr": 3}.get(mode, 1)
    return fill if bands == 1 else (fill,) * bands


def _crop(image: Any, step: Step) -> Any:
    from PIL import Image as Pictures

    tall, wide = (step.size, step.size) if isinstance(step.size, int) else step.size or (0, 0)
    if wide > image.width or tall > image.height:
        size = (max(wide, image.width), max(tall, image.height))
        canvas = Pictures.new(image.mode, size, _colour(image.mode, step.fill))
        if image.mode == "P":
            canvas.putpalette(image.getpalette())
        canvas.paste(image, (max(wide - image.width, 0) // 2, max(tall - image.height, 0) // 2))
        image = canvas
    down, across = image.height - tall, image.width - wide
    # Python's round is to even on halves, as torchvision's centre crop has it.
    top, left = (down // 2, across // 2) if step.rounding == "floor" else (round(down / 2), round(across / 2))
    return image.crop((left, top, left + wide, top + tall))


def _tensor(image: Any, step: Step) -> torch.Tensor:
    import torch

    array = np.array(image, dtype=np.uint8)
    array = array[:, :, None] if array.ndim == 2 else array
    # The copy as channels-first floats is torchvision's ToTensor.
    value = torch.from_numpy(array).permute(2, 0, 1).contiguous().to(torch.float32)
    return value if step.tensor == 1 else value.div(255)


def _normalize(value: torch.Tensor, step: Step) -> torch.Tensor:
    import torch

    mean, std = CONSTANTS[step.normalize] if isinstance(step.normalize, str) else step.normalize or ((), ())
    centre, spread = (torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1) for numbers in (mean, std))
    return (value - centre) / spread


def _channels(value: torch.Tensor, step: Step) -> torch.Tensor:
    return value.expand(3, -1, -1).contiguous() if value.shape[0] == 1 else value


def _resize_tensor(value: torch.Tensor, step: Step) -> torch.Tensor:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    size = target_size(step, value.shape[1], value.shape[2])
    return resize(value, list(size), InterpolationMode(step.interpolation), antialias=step.antialias)


def _pad_tensor(value: torch.Tensor, step: Step) -> torch.Tensor:
    from torch.nn.functional import pad

    _, height, width = value.shape
    if step.pad == "square":
        down, across = max(height, width) - height, max(height, width) - width
        edges = [across // 2, across - across // 2, down // 2, down - down // 2]
    else:
        tall, wide = (step.size, step.size) if isinstance(step.size, int) else step.size or (0, 0)
        edges = [0, wide - width, 0, tall - height]
    return pad(value, edges, value=step.fill)


def _crop_tensor(value: torch.Tensor, step: Step) -> torch.Tensor:
    tall, wide = (step.size, step.size) if isinstance(step.size, int) else step.size or (0, 0)
    down, across = value.shape[1] - tall, value.shape[2] - wide
    top, left = (down // 2, across // 2) if step.rounding == "floor" else (round(down / 2), round(across / 2))
    return value[:, top : top + tall, left : left + wide]


_ON_PICTURE = {"mode": _mode, "minmax": _minmax, "pad": _pad, "resize": _resize, "crop": _crop, "tensor": _tensor}
_ON_TENSOR = {
    "pad": _pad_tensor, "resize": _resize_tensor, "crop": _crop_tensor, "normalize": _normalize, "channels": _channels,
}  # fmt: skip
