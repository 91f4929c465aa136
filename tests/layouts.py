"Small data sets on the disk, for tests of what reads them."
import io

import numpy as np
from PIL import Image

from cxr_lab.runs import CLASSES

def gray(w=40, h=30, seed=0):
    "A smooth picture, (h,w) uint8."
    y, x = np.mgrid[:h, :w]
    a, b = np.random.default_rng(seed).uniform(2, 4, 2)
    return (127 + 60 * np.sin(a * x / w) + 60 * np.cos(b * y / h)).astype(np.uint8)

def encoded(array, form='JPEG', **options):
    buffer = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(buffer, form, **options)
    return buffer.getvalue()

NAMES = {'NORMAL': 'IM-{:04d}-0001.jpeg', 'PNEUMONIA': 'person{}_virus_1.jpeg'}

def layout(root, n=3, splits=('train', 'test')):
    "A small valid data set, every file with its own content."
    for s, split in enumerate(splits):
        for c in CLASSES:
            (root/split/c).mkdir(parents=True)
            for i in range(n):
                number = 100 * s + i
                (root/split/c/NAMES[c].format(number)).write_bytes(encoded(gray(seed=2 * number + (c == 'NORMAL'))))
    return root

def first(root, split='train', c='NORMAL'): return sorted((root/split/c).iterdir())[0]
