"From files to probabilities, and to heatmaps: cxr_lab.predict and the plain loop (PIL, torchvision, one image at a time, the package grad-cam), in turns, on the same files; memory over many files."
import os, shutil, statistics, subprocess, sys, time
from pathlib import Path

from common import arguments, image_folder, report

HERE = Path(__file__).resolve().parent

def model_file(folder):
    "A small network as lesson 03 saves it, with fresh weights that give every image a map."
    import torch
    from cxr_lab.model import build_model
    from cxr_lab.networks import save_model
    torch.manual_seed(0)
    network = build_model('small').eval()
    network.head.weight.data.abs_()
    save_model(folder/'model.safetensors', network, dict(model='small', image_size=128, aspect='stretch', threshold=.5))
    return folder/'model.safetensors'

def plain(network, paths, out=None):
    "The loop that one would write: probabilities, and heatmaps into `out` if given."
    import numpy as np, torch
    from PIL import Image
    from torchvision import transforms as T
    prepare = T.Compose([T.Grayscale(1), T.Resize((128, 128)), T.ToTensor()])
    if out:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.image import show_cam_on_image
        out.mkdir()
        cam = GradCAM(model=network, target_layers=[network.blocks])
    found = []
    for i, path in enumerate(paths):
        image = Image.open(path)
        x = prepare(image)[None]
        if out:
            heat = cam(x, None)[0]
            found.append(float(cam.outputs.detach().softmax(1)[0, 1]))
            shown = np.asarray(image.convert('RGB').resize((256, 256)), np.float32)/255
            Image.fromarray(show_cam_on_image(shown, np.asarray(Image.fromarray(heat).resize((256, 256))), use_rgb=True)).save(out/f'{i}.png')
        else:
            with torch.no_grad(): found.append(float(network(x).softmax(1)[0, 1]))
    return found

def ours(predictor, paths, out=None):
    "The same by cxr_lab; with `out`, table and provenance are written as well."
    from cxr_lab.answers import predict_files, read_table
    if not out: return predictor.predict(paths).probability.tolist()
    predict_files(predictor, paths, out)
    return read_table(out/'predictions.csv').probability.tolist()

def compare(predictor, paths, work, rounds, heatmaps):
    "Files per second of each side (medians over rounds in which they take turns), and the largest difference of probabilities."
    import numpy as np
    sides = {'ours': lambda o: ours(predictor, paths, o), 'theirs': lambda o: plain(predictor.network, paths, o)}
    times, found = {k: [] for k in sides}, {}
    for r in range(rounds + 1):  # the first is for warming up
        for side in list(sides)[::1 if r % 2 else -1]:
            out = work/'out' if heatmaps else None
            begin = time.perf_counter()
            found[side] = sides[side](out)
            if r: times[side].append(time.perf_counter() - begin)
            if out: shutil.rmtree(out)
    return {k: len(paths)/statistics.median(t) for k, t in times.items()}, float(np.abs(np.subtract(found['ours'], found['theirs'])).max())

def many(paths, folder, n):
    "n files, links to the same few."
    folder.mkdir()
    kept = [shutil.copy(p, folder/f'{i:05d}{p.suffix}') for i, p in enumerate(paths[:50])]
    for i in range(len(kept), n): os.link(kept[i % len(kept)], folder/f'{i:05d}{paths[0].suffix}')

def peak(model, folder, out) -> float:
    "MB at the peak of a process that predicts a folder with heatmaps; Linux only."
    code = ('import sys; from cxr_lab.answers import *; from cxr_lab.predict import *; told = predict_files(Predictor.load(sys.argv[1]), sys.argv[2], sys.argv[3])\n'
            'print(told["counts"]["read"], next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))/1024)')
    done = subprocess.run([sys.executable, '-c', code, model, folder, out], capture_output=True, text=True)
    if done.returncode: raise RuntimeError(done.stderr)
    read, mb = done.stdout.split()[-2:]
    assert int(read) == sum(1 for _ in folder.iterdir())
    shutil.rmtree(out)
    return float(mb)

if __name__ == '__main__':
    a = arguments(__doc__, files=(600, 'files of the comparison'), rounds=(5, 'turns of each side'), few=(2000, 'files of the short run for memory'), many=(20000, 'files of the long one'))
    load = round(os.getloadavg()[0], 1)
    with image_folder(a.files) as (root, what, work):
        from cxr_lab.predict import Predictor
        paths = sorted((root/'train').rglob('*.*'))[:a.files]
        paths = [p.resolve() for p in paths]
        predictor = Predictor.load(model_file(work), device='cpu')
        rows = []
        for heatmaps in (False, True):
            rate, differ = compare(predictor, paths, work, a.rounds, heatmaps)
            assert differ < .02, f'the two sides answer differently: {differ}'
            rows.append({'from file to': 'heatmap' if heatmaps else 'probability', 'files': len(paths), 'cxr_lab, files/s': rate['ours'], 'plain loop, files/s': rate['theirs'], 'ratio': rate['ours']/rate['theirs'], 'largest difference of probabilities': f'{differ:.0e}'})
        memory = []
        for n in (a.few, a.many):
            many(paths, work/f'{n} files', n)
            memory.append(peak(work/'model.safetensors', work/f'{n} files', work/'out'))
    checks = {'times as fast, from file to probability': (rows[0]['ratio'], 3, rows[0]['ratio'] >= 3), 'times as fast, heatmaps written': (rows[1]['ratio'], 2, rows[1]['ratio'] >= 2),
              f'peak MB over {a.many:,} files, relative to {a.few:,}': (memory[1]/memory[0], 1.1, memory[1] <= 1.1*memory[0])}
    report('predict', f'Predictions and heatmaps ({what}; small network at 128 px)', rows, checks, a.write, load=load, files=a.files, rounds=a.rounds, peak_MB=f'{memory[0]:.0f} and {memory[1]:.0f}')
