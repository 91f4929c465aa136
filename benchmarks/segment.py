"From image files to lung masks: lesson 07's network in batches, and the published way of lung-segmentation-2d, image by image with scikit-image and `predict`."
import os
from importlib.metadata import version

import numpy as np
from common import arguments, image_folder, report, seconds

def ours(segmenter, root, folder):
    "Files checked and decoded, segmented in batches, masks cleaned; nothing is reused."
    from cxr_lab.data import index_images
    from cxr_lab.images import pixel_cache
    from cxr_lab.lungs import segment
    cache = folder/f'{len(list(folder.iterdir()))}'
    index, rejected = index_images(root, size=256, folder=cache)
    assert not len(rejected), rejected
    masks = segment(segmenter, pixel_cache(root, index, 256, folder=cache))
    assert len(masks) == len(index)
    return masks

def reference_in_batches(model, root, folder):
    "The reference's network and steps, from the pixel cache, in batches: what is gained without another network."
    from cxr_lab.data import index_images
    from cxr_lab.images import pixel_cache
    from cxr_lab.reference import segment_reference
    cache = folder/f'{len(list(folder.iterdir()))}'
    index, _ = index_images(root, size=256, folder=cache)
    masks = segment_reference(model, pixel_cache(root, index, 256, folder=cache))
    assert len(masks) == len(index)
    return masks

def published_way(model, files):
    "As its repository does it: all images prepared one after the other, standardised together, then predicted one by one."
    from skimage import exposure, io, morphology, transform
    x = np.array([exposure.equalize_hist(transform.resize(io.imread(path, as_gray=True), (256, 256))) for path in files])[..., None]
    x -= x.mean()
    x /= x.std()
    masks = []
    for image in x:
        mask = model.predict(image[None], verbose=0)[0, ..., 0] > .5
        mask = morphology.remove_small_objects(mask, max_size=int(.02*mask.size))
        masks.append(morphology.remove_small_holes(mask, max_size=int(.02*mask.size)))
    return np.stack(masks)

if __name__ == '__main__':
    a = arguments(__doc__, images=(400, 'training images for lesson 07'), slow=(40, "images for the reference's network"), repeats=(3, 'times each; the median counts'))
    load = round(os.getloadavg()[0], 1)
    from cxr_lab.lungs import load_segmenter
    from cxr_lab.reference import reference_unet
    with image_folder(a.images) as (root, what, work):
        files = [p for folder in sorted(root.glob('train/*')) for p in sorted(folder.iterdir())]
        some = work/'some'  # both classes, and both splits that an index needs
        for path in files[::max(1, len(files)//a.slow)]:
            for split in ('train', 'test'):
                target = some/split/path.parent.name/path.name
                if split == 'train' or not target.parent.is_dir():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.symlink_to(path.resolve())
        few = sorted(some.glob('*/*/*'))
        everything = sorted(root.glob('*/*/*'))
        (work/'pixels').mkdir()
        segmenter, reference = load_segmenter(), reference_unet()  # the speed does not depend on the weights
        published_way(reference, few[:2])  # the first call compiles
        rows = []
        for way, work_through, n, network in (
                ('lesson 07', lambda: ours(segmenter, root, work/'pixels'), len(everything), segmenter.network),
                ("reference's network, in batches here", lambda: reference_in_batches(reference, some, work/'pixels'), len(few), reference),
                ('reference as published', lambda: published_way(reference, few), len(few), reference)):
            work_through()
            rows.append({'way': way, 'images': n, 'parameters': f'{network.count_params():,}', 'images/s': n/seconds(work_through, a.repeats)})
    for row in rows: row['times the published way'] = row['images/s']/rows[-1]['images/s']
    ratio = rows[0]['times the published way']
    report('segment', f'From file to lung mask ({what})', rows, {'times as fast as the reference as published': (ratio, 4, ratio >= 4)}, a.write, load=load,
           images=a.images, slow=a.slow, repeats=a.repeats, tensorflow=version('tensorflow'), keras=version('keras'), **{'scikit-image': version('scikit-image')})
