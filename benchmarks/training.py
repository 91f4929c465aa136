"""Training the small network at 128 px with augmentation: cxr_lab.trainer.fit, one training per core side by side,
and the loop that most tutorials write, on the same images."""
import os, time
from functools import partial

from common import arguments, dataset, image_folder, report

def ours(data, folder, epochs, batch, seed):
    "Images per second of one training: while it trains, and of the whole call (validation, checkpoints and the rest)."
    import pytorch_lightning as pl
    from cxr_lab.augment import Augment
    from cxr_lab.model import build_model
    from cxr_lab.train import PARTS
    from cxr_lab.trainer import fit
    class Clock(pl.Callback):
        times = []
        def on_train_epoch_start(self, *_): self.begin = time.perf_counter()
        def on_validation_start(self, *_): self.times.append(time.perf_counter() - self.begin)
    place = folder/f'{time.time_ns()}-{seed}'
    place.mkdir()
    clock, begin = Clock(), time.perf_counter()
    fit(build_model('small'), data, place, dict(model='small', image_size=128, aspect='stretch', trained_on='benchmark'), PARTS,
        seed=seed, epochs=epochs, batch_size=batch, lr=3e-3, weight_decay=.02, augment=Augment(), patience=epochs,
        callbacks=[clock])
    n = len(data.rows('train'))//batch*batch*epochs
    return n/sum(clock.times), n/(time.perf_counter() - begin)

def together(data, folder, epochs, batch, processes):
    "Images per second of as many trainings at once."
    from cxr_lab.cores import in_processes
    train = partial(ours, data, folder, epochs, batch)
    in_processes(partial(ours, data, folder, 1, batch), range(processes), 'warm', processes)  # imports, page cache
    rates = in_processes(train, range(processes), 'trainings', processes)
    return tuple(map(sum, zip(*rates)))

def tutorial(root, batch, workers, images):
    "Images per second of a plain loop: NCHW, a file read and augmented at a time, AdamW, cross-entropy."
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, Subset
    from torchvision import transforms as T
    from torchvision.datasets import ImageFolder
    from cxr_lab.model import build_model
    torch.manual_seed(0)
    transform = T.Compose([T.Grayscale(1), T.Resize((128, 128)), T.RandomAffine(12, (.08, .08), (.86, 1.16)), T.ColorJitter(.3, .4), T.ToTensor()])
    folder = ImageFolder(root/'train', transform)
    chosen = torch.randperm(len(folder), generator=torch.Generator().manual_seed(0))[:images]
    loader = DataLoader(Subset(folder, chosen.tolist()), batch, shuffle=True, drop_last=True, num_workers=workers)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model, criterion = build_model('small').to(device), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    begin, n, running, right = time.perf_counter(), 0, 0., 0
    for inputs, labels in loader:
        inputs, labels = inputs.to(device), labels.to(device)
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = criterion(outputs, labels)
        loss.backward()
        optimizer.step()
        running += loss.item()*len(inputs)
        right += (outputs.argmax(1) == labels).sum().item()
        n += len(inputs)
    return n/(time.perf_counter() - begin)

if __name__ == '__main__':
    a = arguments(__doc__, images=(5216, 'training images'), epochs=(2, 'epochs of fit'), plain=(2048, 'images of the plain loop'), batch=(64, 'images per batch'))
    load = round(os.getloadavg()[0], 1)
    os.environ.pop('OMP_NUM_THREADS', None)  # the plain loop takes the threads that PyTorch gives it
    from cxr_lab.cores import cores
    from cxr_lab.trainer import default_precision, on_accelerator
    precision, n = default_precision({}), 1 if on_accelerator({}) else cores()  # a GPU trains one at a time
    with image_folder(a.images) as (root, what, work):
        data, _ = dataset(root)
        (work/'fit').mkdir()
        numbers = sorted({1, n, 2*n})
        rates = {k: together(data, work/'fit', a.epochs, a.batch, k) for k in numbers}
        plain = {workers: tutorial(root, a.batch, workers, a.plain) for workers in (0, cores())}
    best = max(plain, key=plain.get)
    rows = [{'loop': f'cxr_lab.trainer.fit, {k} at a time, {precision}', 'images/s': rate, 'images/s, validation and checkpoints included': whole} for k, (rate, whole) in rates.items()]
    rows.append({'loop': f'plain loop, {best} loader processes', 'images/s': plain[best], 'images/s, validation and checkpoints included': ''})
    rate, bar = rates[n][0], 1000 if precision == 'bf16-mixed' else 700
    checks = {f'images/s, {n} trainings at a time': (rate, bar, rate >= bar),
              'times as fast as the plain loop': (rate/plain[best], 4.5, rate >= 4.5*plain[best]),
              f'{2*n} trainings at a time, relative to {n}': (rates[2*n][0]/rate, .97, rates[2*n][0] >= .97*rate)}
    report('training', f'Training at 128 px with augmentation ({what})', rows, checks, a.write, load=load, images=a.images, epochs=a.epochs, plain=a.plain, batch=a.batch)
