"""A folder of images that stands for photographs: three colors, in several sizes."""

import numpy as np
from PIL import Image

COLORS = {"blue": (60, 60, 220), "green": (60, 200, 60), "red": (220, 60, 60)}


def make_photos(root, train=24, val=6, classes=COLORS):
    random = np.random.RandomState(0)
    for part, count in (("train", train), ("val", val)):
        for name, color in classes.items():
            for i in range(count):
                path = root / part / name / f"{i:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                noise = random.randint(-60, 60, (20 + random.randint(8), 24, 3))
                Image.fromarray(np.clip(color + noise, 0, 255).astype(np.uint8)).save(path)
    return root
