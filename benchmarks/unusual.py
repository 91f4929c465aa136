"What cxr_lab.unusual warns of: false warnings on the test split, and each kind of image that is no upright chest X-ray; with and without lung masks. Needs the real images."
import io, os, time
from pathlib import Path

import numpy as np
from common import arguments, report

SIZE = 128
WORDS = 'the film shows both lungs clear heart of normal size no effusion report name date hospital ward referred by'.split()

def gray(image):
    "A PIL image as lesson 00 would read it: (1,SIZE,SIZE) uint8."
    from cxr_lab.films import square, to_gray
    return square(to_gray(image), SIZE)

def photographs():
    "Sample images that come with scikit-image, scikit-learn and matplotlib, without a download."
    import matplotlib, skimage, sklearn
    from PIL import Image, UnidentifiedImageError
    folders = (Path(skimage.__file__).parent/'data', Path(sklearn.__file__).parent/'datasets'/'images', Path(matplotlib.get_data_path())/'sample_data')
    for path in sorted(p for f in folders for p in f.iterdir() if p.suffix in ('.png', '.jpg', '.gif', '.tif')):
        try: yield Image.open(path).convert('RGB')
        except UnidentifiedImageError: print(f'{path.name} is in a form that Pillow does not read')

def parts(image, rng, n=6):
    "Random parts of a photograph."
    w, h = image.size
    for share in rng.uniform(.3, .9, n):
        a, b = int(w*share), int(h*share)
        x, y = rng.integers(0, w - a + 1), rng.integers(0, h - b + 1)
        yield image.crop((x, y, x + a, y + b))

def page(rng, negative=False):
    "A page of text."
    from PIL import Image, ImageDraw, ImageFont
    image, size = Image.new('L', (1240, 1754), 255), int(rng.integers(18, 60))
    draw, font, y, end = ImageDraw.Draw(image), ImageFont.load_default(size), int(rng.integers(40, 200)), rng.uniform(.3, .95)*1754
    while y < end:
        text, width = '', rng.uniform(.5, .95)*1040
        while draw.textlength(text, font=font) < width: text += f'{rng.choice(WORDS)} '
        draw.text((100, y), text, fill=int(rng.integers(0, 80)), font=font)
        y += int(size*rng.uniform(1.2, 2.2))
    return Image.eval(image, lambda v: 255 - v) if negative else image

def chart(rng, i):
    "A diagram."
    from matplotlib.figure import Figure
    from PIL import Image
    figure = Figure(figsize=(4, 3), dpi=100, facecolor='black' if i % 3 == 0 else 'white')
    ax = figure.subplots()
    [lambda: ax.plot(rng.normal(size=(60, 3)).cumsum(0)), lambda: ax.bar(range(8), rng.random(8)), lambda: ax.scatter(*rng.normal(size=(2, 200))), lambda: ax.hist(rng.normal(size=500), 20)][i % 4]()
    ax.set_title('a diagram')
    file = io.BytesIO()
    figure.savefig(file)
    return Image.open(file)

def noise(rng, i):
    "White, normal, black and white, smooth, or like clouds: (SIZE,SIZE) float."
    import cv2
    if i % 5 == 0: return rng.uniform(0, 255, (SIZE, SIZE))
    if i % 5 == 1: return rng.normal(128, rng.uniform(10, 60), (SIZE, SIZE))
    if i % 5 == 2: return 255.*(rng.random((SIZE, SIZE)) < rng.uniform(.05, .95))
    if i % 5 == 3: return cv2.resize(rng.uniform(0, 255, (int(rng.integers(3, 30)),)*2), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    f = np.fft.fftfreq(SIZE)
    a = np.fft.ifft2(np.fft.fft2(rng.normal(size=(SIZE, SIZE)))/(np.hypot(f[:, None], f) + 1/SIZE)**rng.uniform(.5, 2)).real
    return 128 + 50*(a - a.mean())/a.std()

def gradient(rng, i):
    "Across, from the middle, to the middle, or waves: (SIZE,SIZE) float."
    y, x = np.mgrid[-1:1:SIZE*1j, -1:1:SIZE*1j]
    angle, (cx, cy) = rng.uniform(0, 2*np.pi), rng.uniform(-.3, .3, 2)
    across, ring = x*np.cos(angle) + y*np.sin(angle), np.hypot(x - cx, y - cy)
    g = (across, ring, -ring, np.sin(rng.uniform(2, 20)*across))[i % 4]
    low, high = np.sort(rng.uniform(0, 255, 2))
    return low + (g - g.min())/np.ptp(g)*(high - low)

def kinds(films, n, seed=1):
    "name -> (is it one that has to be found, (N,1,SIZE,SIZE) uint8); made from test films and from nothing."
    from cxr_lab.unusual import POSES, phantom_strangers
    rng, photos = np.random.default_rng(seed), list(photographs())
    def stack(images): return np.stack([np.clip(a, 0, 255).astype(np.uint8).reshape(1, SIZE, SIZE) for a in images])
    def turned(k, mirror=False): return np.rot90(films[..., ::-1] if mirror else films, k, (2, 3))
    quarter = SIZE//2
    found = {'photographs and drawings': stack(map(gray, photos)), 'parts of photographs': stack(gray(p) for photo in photos for p in parts(photo, rng)),
             'pages of text': stack(gray(page(rng, i % 4 == 3)) for i in range(n)),
             'diagrams': stack(gray(chart(rng, i)) for i in range(n)), 'noise': stack(noise(rng, i) for i in range(n)),
             'gradients and waves': stack(gradient(rng, i) for i in range(n)),
             'blank, half of them with faint noise': stack(rng.integers(0, 256) + rng.normal(0, 2*(i % 2), (SIZE, SIZE)) for i in range(n)),
             'phantoms of other seeds': phantom_strangers(SIZE, n, seed=7)[:n],
             'films, inverted': 255 - films, **{f'films, {POSES[k]}': turned(k) for k in (1, 2, 3)}, 'films, mirrored': turned(0, True), 'films, upside down': turned(2, True)}
    beside = {'films, the middle half enlarged': films[:, :, quarter//2:-(quarter//2), quarter//2:-(quarter//2)].repeat(2, 2).repeat(2, 3),
              'films, left half only': films[..., :quarter].repeat(2, 3)}
    return {k: (k in found, np.ascontiguousarray(v)) for k, v in (found | beside).items()}

def main(a):
    import torch
    from cxr_lab import __file__ as package
    from cxr_lab.data import Dataset, index_images, split_validation
    from cxr_lab.images import find_data, pixel_cache
    from cxr_lab.lungs import load_segmenter, segment
    from cxr_lab.model import load_model
    from cxr_lab.runs import CLASSES
    from cxr_lab.tsne import embed
    from cxr_lab.unusual import Unusual
    if not os.environ.get('CXR_LAB_DATA'): raise SystemExit('the real images are needed; CXR_LAB_DATA names the folder that holds chest_xray/')
    os.environ.setdefault('CXR_LAB_PROGRESS', '0')
    source = find_data('kermany')
    index = split_validation(index_images(source.images, size=SIZE)[0])
    data = Dataset(index, pixel_cache(source.images, index, SIZE), source)
    network = load_model(Path(package).parent/'weights'/'classifier.safetensors')[0]
    usual, segmenter = Unusual.load(network=network), load_segmenter() if a.masks else None
    rng, rows, seconds = np.random.default_rng(0), data.rows('test'), []
    def measure(name, pixels):
        "The row of the table, and the share warned of without masks."
        vectors = embed(network, pixels)[0]
        begin = time.process_time()  # of all threads: what the machine does besides is not counted
        reasons = usual.reasons(pixels, vectors)
        seconds.append((time.process_time() - begin)/len(pixels))
        row = {'images': name, 'number': len(pixels), 'warned of, %': 100*np.mean([bool(r) for r in reasons])}
        if a.masks:
            some = np.arange(len(pixels)) if name == 'test films' else np.sort(rng.permutation(len(pixels))[:a.masks])
            with_masks = usual.reasons(pixels[some], vectors[some], segment(segmenter, pixels[some]))
            row |= {'of these, number': len(some), 'warned of without masks, %': 100*np.mean([bool(reasons[i]) for i in some]), 'with masks, %': 100*np.mean([bool(r) for r in with_masks])}
        seen = [r for r in reasons if r]
        return row | {'commonest reason': max(set(seen), key=seen.count) if seen else ''}
    ordinary = [measure('test films', np.array(data.pixels[rows]))]
    for label, name in enumerate(CLASSES): ordinary.append(measure(f'test films, {name}', np.array(data.pixels[rows[data.labels[rows] == label]])))
    ordinary.append(measure('validation films', np.array(data.pixels[data.rows('validation')])))
    films = np.array(data.pixels[np.sort(rng.choice(rows, a.images, replace=False))])
    table = kinds(films, a.images)
    strange = {name: measure(name, pixels) for name, (_, pixels) in table.items()}
    share = 'warned of, %'
    asked = [strange[k] for k, (must, _) in table.items() if must]
    mean = float(np.mean([r[share] for r in asked]))
    checks = {'false warnings on the test split, %': (ordinary[0][share], 5, ordinary[0][share] <= 5),
              'warned of, mean of all kinds that must be found, %': (mean, 90, mean >= 90)}
    checks['ms of processor time per image, embedding not included'] = (1000*float(np.median(seconds)), 1, np.median(seconds) < .001)
    return ordinary + list(strange.values()), checks

if __name__ == '__main__':
    a = arguments(__doc__, images=(200, 'images of each kind, where they can be made'), masks=(40, 'of each kind are also judged by lung masks, and all test films; 0 for none'))
    load = round(os.getloadavg()[0], 1)
    rows, checks = main(a)
    report('unusual', 'Warnings of unusual images', rows, checks, a.write, load=load, images=a.images, masks=a.masks)
