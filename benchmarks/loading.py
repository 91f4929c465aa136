"One epoch of training batches: from the pixel cache, and by torchvision's ImageFolder, Resize, ToTensor and DataLoader over the same files."
import os
from pathlib import Path

import numpy as np
from common import arguments, dataset, image_folder, report, seconds

SIZE = 128

def cached(data, batch):
    "An epoch as cxr_lab.trainer reads it."
    from cxr_lab.networks import to_float
    from cxr_lab.trainer import make_loader
    for x, y in make_loader(data, 'train', batch, shuffle_seed=0):
        x = to_float(x)
        assert x.shape[1:] == (1, SIZE, SIZE)

def folder_loader(root, data, batch, workers, shuffle):
    "The same images by the usual means: one gray channel, 0 to 1, float32."
    from torch.utils.data import DataLoader, Subset
    from torchvision import transforms as T
    from torchvision.datasets import ImageFolder
    images = ImageFolder(root/'train', T.Compose([T.Grayscale(1), T.Resize((SIZE, SIZE)), T.ToTensor()]))
    place = {Path(path).relative_to(root).as_posix(): i for i, (path, _) in enumerate(images.samples)}
    rows = [place[path] for path in data.index.path[data.rows('train')]]
    return DataLoader(Subset(images, rows), batch, shuffle=shuffle, drop_last=shuffle, num_workers=workers)

def run_through(loader):
    for x, y in loader: assert x.shape[1:] == (1, SIZE, SIZE)

def difference(root, data, batch):
    "Mean and largest absolute difference between the two sides' images, 0 to 1, in the same order, and whether the labels agree."
    from cxr_lab.networks import to_float
    from cxr_lab.trainer import make_loader
    total, largest, n = 0., 0., 0
    for (a, ya), (b, yb) in zip(make_loader(data, 'train', batch), folder_loader(root, data, batch, 0, False), strict=True):
        a = to_float(a)
        assert a.dtype == b.dtype and a.shape == b.shape and (ya == yb).all()
        d = (a - b).abs()
        total, largest, n = total + float(d.sum()), max(largest, float(d.max())), n + d.numel()
    return total/n, largest

def upsampled(root, target, width, n):
    "The first images of each class, enlarged: full-resolution JPEGs in the same layout."
    import cv2
    for folder in sorted(root.glob('*/*/')):
        (target/folder.relative_to(root)).mkdir(parents=True)
        k = n//4 + n%4 if folder.parts[-2:] == ('train', 'NORMAL') else n - n//4 if folder.parts[-2:] == ('train', 'PNEUMONIA') else 1
        for path in sorted(folder.iterdir())[:k]:
            image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
            image = cv2.resize(image, (width, round(width*image.shape[0]/image.shape[1])), interpolation=cv2.INTER_CUBIC)
            cv2.imwrite(str(target/path.relative_to(root)), image, [cv2.IMWRITE_JPEG_QUALITY, 92])

def measure(what, root, batch, repeats):
    "The table's row for one set of files."
    data, building = dataset(root, SIZE, validation=False)
    n = len(data.rows('train'))//batch*batch
    mean, largest = difference(root, data, batch)  # also brings the files into the memory of the operating system
    assert mean < .004, f'the two sides do not read the same: mean difference {mean:.4f}'
    cached(data, batch)
    ours = seconds(lambda: cached(data, batch), 5)
    peers = {workers: seconds(lambda: run_through(folder_loader(root, data, batch, workers, True)), repeats) for workers in (0, os.cpu_count())}
    best = min(peers, key=peers.get)
    return {'files': what, 'images': n, 'cache, images/s': n/ours, 'ImageFolder, images/s': n/peers[best], 'its workers': best, 'ratio': peers[best]/ours,
            'building the cache once, s': building, 'mean difference of pixels': f'{mean:.4f}', 'largest': f'{largest:.3f}'}

if __name__ == '__main__':
    a = arguments(__doc__, images=(5216, 'training images at 224 px'), full=(200, 'training images at full resolution'), width=(2000, 'their width in pixels'),
                  batch=(64, 'images per batch'), repeats=(2, 'epochs of ImageFolder'))
    load = round(os.getloadavg()[0], 1)
    with image_folder(a.images) as (root, what, work):
        rows = [measure(what, root, a.batch, a.repeats)]
        if os.environ.get('CXR_LAB_DATA'):
            from cxr_lab.phantom import write_phantoms
            root = write_phantoms(work/'phantoms', n_train=max(80, a.full), n_val=8, n_test=40)/'chest_xray'
        upsampled(root, work/'full', a.width, a.full)
        rows.append(measure(f'phantoms enlarged to {a.width} px', work/'full', min(a.batch, max(2, a.full//4)), 2))
    checks = {'times as fast at 224 px': (rows[0]['ratio'], 20, rows[0]['ratio'] >= 20), f'times as fast at {a.width} px': (rows[1]['ratio'], 40, rows[1]['ratio'] >= 40)}
    report('loading', 'Loading one epoch at 128 px', rows, checks, a.write, load=load, images=a.images, full=a.full, width=a.width, batch=a.batch)
