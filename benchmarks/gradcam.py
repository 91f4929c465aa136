"Grad-CAM: cxr_lab.maps and the package grad-cam, in turns, on the same model, layer and images; every process's memory apart."
import gc, os, statistics, subprocess, sys, time
from functools import partial

from common import arguments, report

CASES = {'small network, 128 px': ('small', 'blocks', 128), 'resnet18, 224 px': ('resnet18', 'network.layer4', 224)}

def case(name, batch, seed=0):
    "The model with fresh weights, and images."
    import torch
    from cxr_lab.model import build_model
    model, layer, size = CASES[name]
    torch.manual_seed(seed)
    network = build_model(model).eval()
    [m for m in network.modules() if isinstance(m, torch.nn.Linear)][-1].weight.data.abs_()  # fresh weights may leave a class without a map
    return network, layer, torch.rand(batch, 1, size, size)

def ours(cam, x): return cam(x, 1).up                          # raw maps, enlarged to the image
def theirs(cam, targets, x): return cam(x, targets=targets)    # as its documentation calls it: maps scaled to 0..1 each, enlarged by OpenCV

def makers(name, batch):
    "A function from images to maps for each side, made once, as a user who explains a data set would; and the images."
    from pytorch_grad_cam import GradCAM as Peer
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from cxr_lab.maps import GradCAM
    model, layer, x = case(name, batch)
    return dict(ours=lambda: partial(ours, GradCAM(model, layer).__enter__()),
                theirs=lambda: partial(theirs, Peer(model=model, target_layers=[model.get_submodule(layer)]), [ClassifierOutputTarget(1)]*batch)), x

def same(name, batch):
    "Largest difference of the two sides' maps, each scaled to a maximum of 1; the peer subtracts the minimum and scales before it enlarges, so the same is done to the raw maps."
    import cv2, numpy as np
    from cxr_lab.maps import GradCAM
    make, x = makers(name, batch)
    peer = make['theirs']()(x)
    assert peer.reshape(batch, -1).max(1).min() > .9, 'an empty map'
    model, layer, x = case(name, batch)
    with GradCAM(model, layer) as cam: raw = cam(x, 1).raw
    low, high = raw.min((1, 2), keepdims=True), raw.max((1, 2), keepdims=True)
    mine = np.stack([cv2.resize(m, x.shape[2:]) for m in (raw - low)/(high - low + 1e-7)])
    mine -= mine.min((1, 2), keepdims=True)
    return float(np.abs(mine/(mine.max((1, 2), keepdims=True) + 1e-7) - peer).max())

def rates(name, batch, rounds):
    "Images per second of each side: the median over rounds in which the sides take turns."
    make, x = makers(name, batch)
    times, order = {'ours': [], 'theirs': []}, ['ours', 'theirs']
    for side in order:  # one side's hooks must not slow down the other's: made, used and released in turn
        work = make[side]()
        work(x); release(side, work)
    for r in range(rounds):
        for side in order[::1 if r % 2 else -1]:
            work = make[side]()
            begin = time.perf_counter()
            for _ in range(3): work(x)
            times[side].append((time.perf_counter() - begin)/3)
            release(side, work)
    return {side: batch/statistics.median(t) for side, t in times.items()}, statistics.median(b/a for a, b in zip(*times.values()))

def release(side, work):
    if side == 'ours': work.args[0].__exit__(None, None, None)
    else: work.args[0].activations_and_grads.release()

def peak(name, batch, side):
    "MB at the peak of five calls above what a fresh process holds with model, images and libraries in use; Linux only."
    out = subprocess.run([sys.executable, '-c', f'import gradcam; gradcam.measure({name!r}, {batch}, {side!r})'], cwd=os.path.dirname(os.path.abspath(__file__)), capture_output=True, text=True)
    if out.returncode: raise RuntimeError(out.stderr)
    return float(out.stdout.split()[-1])

def measure(name, batch, side):
    "Prints what `peak` returns."
    def status(key):
        with open('/proc/self/status') as f: return next(int(line.split()[1]) for line in f if line.startswith(key))/1024
    make, x = makers(name, batch)
    work = make[side]()
    if side == 'ours': work(x[:1])  # one image first, so that libraries are loaded and threads started
    else: work.func(work.args[0], work.args[1][:1], x[:1])
    gc.collect()
    with open('/proc/self/clear_refs', 'w') as f: f.write('5')  # the highest mark starts at what is held now
    before = status('VmRSS')
    for _ in range(5): work(x)
    print(status('VmHWM') - before)

if __name__ == '__main__':
    a = arguments(__doc__, rounds=(15, 'turns of each side'), small=(64, 'images per batch of the small network'), resnet=(16, 'images per batch of resnet18'))
    load = round(os.getloadavg()[0], 1)
    rows, checks = [], {}
    for name, batch in zip(CASES, (a.small, a.resnet)):
        differ = same(name, batch)
        assert differ < 1e-3, f'{name}: the maps differ by {differ}'
        found, ratio = rates(name, batch, a.rounds)
        memory = {side: peak(name, batch, side) for side in ('ours', 'theirs')}
        rows.append({'model': name, 'layer': CASES[name][1], 'batch': batch, 'cxr_lab, images/s': found['ours'], 'grad-cam, images/s': found['theirs'], 'ratio': ratio,
                     'cxr_lab, peak MB': memory['ours'], 'grad-cam, peak MB': memory['theirs'], 'largest difference of scaled maps': f'{differ:.0e}'})
        checks[f'times as fast, {name}'] = (ratio, 1.5, ratio >= 1.5)
        checks[f'share of its memory, {name}'] = (memory['ours']/memory['theirs'], 1, memory['ours'] <= memory['theirs'])
    report('gradcam', "Grad-CAM, enlarged maps included (grad-cam's as documented, scaled as well)", rows, checks, a.write, load=load, rounds=a.rounds)
