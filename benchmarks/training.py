"Training the small network at 128 px with augmentation: cxr_lab.train.fit, and the loop that most tutorials write, on the same images."
import os, time

from common import arguments, dataset, image_folder, report

def ours(data, folder, epochs, batch):
    "Images per second: while training, and of the whole call (validation, checkpoints and the rest included)."
    import pytorch_lightning as pl
    from cxr_lab.augment import Augment
    from cxr_lab.model import build_model
    from cxr_lab.train import fit
    class Clock(pl.Callback):
        times = []
        def on_train_epoch_start(self, *_): self.begin = time.perf_counter()
        def on_validation_start(self, *_): self.times.append(time.perf_counter() - self.begin)
    clock, begin = Clock(), time.perf_counter()
    fit(build_model('small'), data, folder, dict(model='small', image_size=128, aspect='stretch', trained_on='benchmark'), seed=0, epochs=epochs, batch_size=batch,
        lr=3e-3, weight_decay=.02, augment=Augment(), patience=epochs, callbacks=[clock])
    n = len(data.rows('train'))//batch*batch
    return n*epochs/sum(clock.times), n*epochs/(time.perf_counter() - begin)

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
    model, criterion = build_model('small'), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    begin, n, running, right = time.perf_counter(), 0, 0., 0
    for inputs, labels in loader:
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
    a = arguments(__doc__, images=(5216, 'training images'), epochs=(3, 'epochs of fit'), plain=(2048, 'images of the plain loop'), batch=(64, 'images per batch'))
    load = round(os.getloadavg()[0], 1)
    with image_folder(a.images) as (root, what, work):
        data, _ = dataset(root)
        (work/'fit').mkdir()
        rate, whole = ours(data, work/'fit', a.epochs, a.batch)
        plain = {workers: tutorial(root, a.batch, workers, a.plain) for workers in (0, os.cpu_count())}
    best = max(plain, key=plain.get)
    rows = [{'loop': 'cxr_lab.train.fit', 'images/s': rate, 'images/s, validation and checkpoints included': whole},
            {'loop': f'plain loop, {best} loader processes', 'images/s': plain[best], 'images/s, validation and checkpoints included': ''}]
    checks = {'images/s while training': (rate, 400, rate >= 400), 'times as fast as the plain loop': (rate/plain[best], 1, rate > plain[best])}
    report('training', f'Training at 128 px with augmentation ({what})', rows, checks, a.write, load=load, images=a.images, epochs=a.epochs, plain=a.plain, batch=a.batch)
