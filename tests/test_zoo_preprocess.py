"""Each model's image steps against its authors' pipeline, written here with torchvision or numpy: bit for bit."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from biomedclip.errors import DataError
from biomedclip.models.preprocess import ImageTransform
from biomedclip.models.zoo import read_model

CLIP = T.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = T.Normalize((0.5,) * 3, (0.5,) * 3)
RGB = T.Lambda(lambda picture: picture.convert("RGB"))
BICUBIC = InterpolationMode.BICUBIC


def open_clip_order(size, normalize):
    return T.Compose([T.Resize(size, BICUBIC), T.CenterCrop(size), RGB, T.ToTensor(), normalize])


def rgb_first(size, normalize, interpolation=BICUBIC):
    return T.Compose([RGB, T.Resize(size, interpolation), T.CenterCrop(size), T.ToTensor(), normalize])


def biovil(crop):
    def pipeline(picture):
        values = np.asarray(picture).astype(float)
        values -= values.min()
        values = (values / values.max() * 255).astype(np.uint8)
        grey = Image.fromarray(values).convert("L")
        tensor = T.Compose([T.Resize(512), T.CenterCrop(crop), T.ToTensor()])(grey)
        return torch.repeat_interleave(tensor, 3, dim=0)

    return pipeline


def medclip(picture):
    across, down = picture.size
    side = max(224, across, down)
    canvas = Image.new("L", (side, side), 0)
    canvas.paste(picture, (int((side - across) / 2), int((side - down) / 2)))
    values = np.asarray(canvas.resize((224, 224), Image.Resampling.BICUBIC)).astype(np.float32) / 255
    grey = (torch.from_numpy(values) - 0.5862785803043838) / 0.27950088968644304
    return grey[None].repeat(3, 1, 1)


def flair(picture):
    image = np.float32(np.array(picture.convert("RGB")))
    if image.max() > 0:
        image /= 255
    tensor = torch.tensor(np.expand_dims(np.transpose(image, (2, 0, 1)), 0))
    scale = max(tensor.shape[-2:]) / 512
    tensor = T.Resize((int(tensor.shape[-2] / scale), int(tensor.shape[-1] / scale)), antialias=True)(tensor)
    return TF.pad(tensor, [0, 0, 512 - tensor.shape[-1], 512 - tensor.shape[-2]])[0]


retizero = T.Compose([RGB, T.Resize((224, 224)), T.ToTensor(), IMAGENET])

AUTHORS = {
    "keep": rgb_first(224, IMAGENET),
    "musk": rgb_first(384, HALF),
    "cxr-clip-r50-mcc": rgb_first(224, IMAGENET, InterpolationMode.BILINEAR),
    "cxr-clip-swin-mcc": rgb_first(224, HALF, InterpolationMode.BILINEAR),
    "conch": open_clip_order(448, CLIP),
    "pmc-clip": open_clip_order(224, CLIP),
    "echo-clip": open_clip_order(224, CLIP),
    "biovil": biovil(480),
    "biovil-t": biovil(448),
    "medclip-vit": medclip,
    "medclip-resnet": medclip,
    "flair": flair,
    "retizero": retizero,
}


def picture(mode, size, seed=0):
    noise = np.random.default_rng(seed).integers(0, 200, (size[1] // 4 + 1, size[0] // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BILINEAR).convert(mode)


@pytest.mark.parametrize("size", [(301, 200), (150, 170)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", AUTHORS)
def test_steps_are_the_authors_pipeline(name, mode, size):
    image = picture(mode, size)
    found, expected = ImageTransform(read_model(name).preprocess.steps)(image), AUTHORS[name](image)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    if "medclip" in name:
        # The authors normalise in numpy, whose last bit may differ.
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-7)
    else:
        assert torch.equal(found, expected)


def test_every_member_of_a_family_has_the_steps_of_the_tested_one():
    for kind in ("r50", "swin"):
        steps = {read_model(f"cxr-clip-{kind}-{data}").preprocess.steps for data in ("m", "mc", "mcc")}
        assert len(steps) == 1


def test_sixteen_bits_are_refused_except_where_the_model_stretches_them():
    deep = Image.fromarray(np.arange(256 * 256, dtype=np.uint16).reshape(256, 256))
    stretched = ImageTransform(read_model("biovil").preprocess.steps)(deep)
    # The centre crop takes off the outermost rows; a saturated image would be white nearly everywhere.
    assert stretched.min() < 0.05
    assert 0.4 < stretched.mean() < 0.6
    assert stretched.max() < 0.98
    for name in set(AUTHORS) - {"biovil", "biovil-t"}:
        with pytest.raises(DataError, match="more than 8 bits and no window"):
            ImageTransform(read_model(name).preprocess.steps)(deep)
