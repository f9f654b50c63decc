import math

import pytest
import scipy.stats
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from torch_feather.training.config import DataConfig
from torch_feather.training.data import crops
from torch_feather.training.data.crops import DRAWS, random_boxes, resize_boxes
from torch_feather.training.data.prepare import Augment, Center

SIZES = [(128, 128), (375, 500), (20, 400), (400, 20), (7, 5), (1, 1)]


def uniform(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, DRAWS, dtype=torch.float64, generator=generator)


def random_images(count, height, width, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, height, width, channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("smallest", [0.08, 0.5, 1.0])
def test_boxes_lie_inside_the_image(height, width, smallest):
    extremes = torch.cat(
        [torch.zeros(1, DRAWS), torch.full((1, DRAWS), 1 - 2**-53, dtype=torch.float64)]
    )
    boxes = random_boxes(torch.cat([uniform(2000), extremes]), height, width, smallest)
    top, left, high, wide = boxes.unbind(1)
    assert boxes.dtype == torch.int64
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (high >= 1).all()
    assert (wide >= 1).all()
    assert (top + high <= height).all()
    assert (left + wide <= width).all()


@pytest.mark.parametrize(("height", "width"), [(500, 500), (375, 500), (300, 900)])
@pytest.mark.parametrize("smallest", [0.08, 0.35])
def test_boxes_are_distributed_like_those_of_torchvision(height, width, smallest):
    torch.manual_seed(0)
    reference = v2.RandomResizedCrop(224, scale=(smallest, 1.0))
    image = torch.empty(3, height, width)
    drawn = [reference.make_params([image]) for _ in range(3000)]
    keys = ("top", "left", "height", "width")
    expected = torch.tensor([[params[key] for key in keys] for params in drawn]).double()
    given = random_boxes(uniform(3000, seed=1), height, width, smallest).double()
    measures = {
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 3] / b[:, 2],
        "top": lambda b: b[:, 0] / (height - b[:, 2] + 1),
        "left": lambda b: b[:, 1] / (width - b[:, 3] + 1),
    }
    for name, measure in measures.items():
        test = scipy.stats.ks_2samp(measure(given).numpy(), measure(expected).numpy())
        assert test.pvalue > 1e-3, name


def test_area_is_uniform_and_ratio_log_uniform_if_every_box_fits():
    boxes = random_boxes(uniform(20_000), 1000, 1000, 0.1).double()
    fraction = boxes[:, 2] * boxes[:, 3] / 1000**2
    small = fraction[
        fraction < 0.7
    ]  # larger boxes may not fit with every ratio, and are drawn again
    assert scipy.stats.kstest(small.numpy(), "uniform", (0.1, 0.6)).pvalue > 1e-3
    ratio = (boxes[:, 3] / boxes[:, 2]).log()[fraction < 0.7]
    limit = math.log(4 / 3)
    assert scipy.stats.kstest(ratio.numpy(), "uniform", (-limit, 2 * limit)).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(20, 400), (400, 20), (3, 3), (300, 301)])
def test_if_no_box_fits_the_box_is_the_center_crop_of_torchvision(height, width):
    above = torch.full((1, DRAWS), 1 - 2**-53, dtype=torch.float64)  # the largest and widest
    box = random_boxes(above, height, width, 1.0)[0].tolist()

    reference = v2.RandomResizedCrop(224, scale=(1e6, 1e6))  # larger than any image
    params = reference.make_params([torch.empty(3, height, width)])
    assert box == [params[key] for key in ("top", "left", "height", "width")]


@pytest.mark.parametrize("method", [crops._one_by_one, crops._products])
@pytest.mark.parametrize(
    ("height", "width", "size", "channels"),
    [(64, 64, 64, 3), (64, 48, 32, 3), (20, 30, 64, 1), (40, 40, 7, 3), (5, 5, 9, 3)],
)
def test_scaled_boxes_equal_torchvision_to_rounding(method, height, width, size, channels):
    images = random_images(40, height, width, channels)
    boxes = random_boxes(uniform(40), height, width, 0.08)
    mirrored = torch.arange(40) % 3 == 0
    scaled = method(images, boxes, mirrored, size)
    assert scaled.shape == (40, size, size, channels)
    for image, box, flip, result in zip(images, boxes.tolist(), mirrored, scaled, strict=True):
        planes = TF.resized_crop(image.permute(2, 0, 1), *box, [size, size], antialias=True)
        expected = (planes.flip(2) if flip else planes).permute(1, 2, 0)
        assert (result.float() - expected.float()).abs().max() <= 1.001


def test_scaling_a_box_is_not_biased():
    images = random_images(64, 48, 48)
    boxes = random_boxes(uniform(64), 48, 48, 0.08)
    plain = torch.zeros(64, dtype=torch.bool)
    one, other = (f(images, boxes, plain, 32).float() for f in (crops._one_by_one, crops._products))
    assert (one - other).mean().abs() < 0.05  # two roundings


def test_the_result_for_an_image_does_not_depend_on_its_batch():
    images, boxes = random_images(50, 40, 40), random_boxes(uniform(50), 40, 40, 0.08)
    mirrored = torch.arange(50) % 2 == 0
    for method in (crops._one_by_one, crops._products):
        whole = method(images, boxes, mirrored, 24)
        parts = [slice(0, 1), slice(1, 18), slice(18, 50)]
        split = torch.cat([method(images[p], boxes[p], mirrored[p], 24) for p in parts])
        torch.testing.assert_close(split.float(), whole.float(), rtol=0, atol=1e-4)
    assert torch.equal(
        resize_boxes(images, boxes, mirrored, 24), crops._one_by_one(images, boxes, mirrored, 24)
    )


@pytest.mark.gpu
def test_crops_on_a_gpu_equal_those_on_the_cpu_to_rounding():
    images, boxes = random_images(50, 128, 128), random_boxes(uniform(50), 128, 128, 0.08)
    mirrored = torch.arange(50) % 2 == 0
    here = resize_boxes(images, boxes, mirrored, 112).float()
    there = resize_boxes(images.cuda(), boxes.cuda(), mirrored.cuda(), 112)
    assert (here - there.cpu()).abs().max() <= 1.01


@pytest.mark.parametrize(("height", "width"), [(60, 60), (50, 80), (81, 50), (33, 32)])
def test_the_center_equals_torchvision(height, width):
    image = random_images(1, height, width)[0]
    given = Center(36, 32)(image)
    planes = TF.resize(image.permute(2, 0, 1), [36], antialias=True)
    assert torch.equal(given, TF.center_crop(planes, [32, 32]).permute(1, 2, 0))


def test_the_center_of_an_image_of_that_size_is_the_image():
    image = random_images(1, 32, 32)[0]
    assert torch.equal(Center(32, 32)(image), image)


def test_a_shift_moves_the_center_by_at_most_its_pixels_in_each_direction():
    image = random_images(1, 12, 12)[0]
    augment = Augment(DataConfig(shift=2), 12)
    padded = torch.nn.functional.pad(image, (0, 0, 2, 2, 2, 2))
    windows = {
        tuple(crop.flatten().tolist()): (top, left, mirrored)
        for top in range(5)
        for left in range(5)
        for mirrored in (False, True)
        for window in [padded[top : top + 12, left : left + 12]]
        for crop in [window.flip(1) if mirrored else window]
    }
    seen = {windows[tuple(augment(image, seed).flatten().tolist())] for seed in range(600)}
    assert len(seen) == 50  # all of them, and no others


def test_augmentation_depends_on_the_seed_alone():
    image = random_images(1, 40, 50)[0]
    augment = Augment(DataConfig(crop="resized"), 24)
    first = [augment(image, seed) for seed in range(20)]
    torch.manual_seed(5)
    assert all(torch.equal(augment(image, seed), first[seed]) for seed in range(20))
    assert len({tuple(x.flatten().tolist()) for x in first}) == 20
    unmirrored = Augment(DataConfig(crop="resized", flip=False), 24)
    same = [torch.equal(unmirrored(image, seed), first[seed]) for seed in range(20)]
    flipped = [torch.equal(unmirrored(image, seed).flip(1), first[seed]) for seed in range(20)]
    assert all(a != b for a, b in zip(same, flipped, strict=True))
    assert 3 < sum(same) < 17
