"Training that can be repeated to the byte and continued where it stopped."
import copy, os, re, signal, time, warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from sklearn import metrics as sk

from cxr_lab import train, trainer
from cxr_lab.augment import Augment
from cxr_lab.data import Dataset
from cxr_lab.kept import only_since, put_aside
from cxr_lab.model import SmallCNN, load_model
from cxr_lab.networks import predict
from cxr_lab.runs import PROGRESS, Step, read_json, read_metrics, read_predictions, versions, write_json
from cxr_lab.scores import METRICS, choose_threshold, intervals, score
from cxr_lab.train import PARTS
from cxr_lab.trainer import (Experiment, Parts, Pixels, Training, default_precision, fit,
                             images_per_step, kept_epoch, make_loader, read_histories,
                             run_experiment, run_experiments, step_seed)

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning:torch', 'ignore::UserWarning:pytorch_lightning')


# Loading

def test_loader_in_order_is_complete(tiny):
    batches = list(make_loader(tiny, 'test', 16))
    assert [len(y) for _, y in batches] == [16, 16, 8]
    assert np.array_equal(torch.cat([x for x, _ in batches]).numpy(), tiny.pixels[tiny.rows('test')]) and np.array_equal(torch.cat([y for _, y in batches]).numpy(), tiny.labels[tiny.rows('test')])

def test_loader_shuffles_by_seed_and_epoch(tiny):
    def order(loader, epoch): loader.sampler.set_epoch(epoch); return list(loader.sampler)
    loader = make_loader(tiny, 'train', 32, shuffle_seed=1)
    a, b = order(loader, 0), order(loader, 1)
    assert sorted(a) == sorted(b) == list(range(120)) and a != b and order(make_loader(tiny, 'train', 32, shuffle_seed=1), 1) == b != order(make_loader(tiny, 'train', 32, shuffle_seed=2), 1)
    assert [len(y) for _, y in loader] == [32, 32, 32]
    with pytest.raises(ValueError, match='batch_size=121: there are only 120 training images'): make_loader(tiny, 'train', 121, shuffle_seed=0)

@pytest.mark.parametrize('images, most, size', [
    (41, 64, 8), (41, 6, 6), (255, 64, 8), (256, 64, 8), (640, 64, 20), (2048, 64, 64), (5000, 64, 64)])
def test_few_images_make_small_batches(images, most, size):
    data = SimpleNamespace(rows=lambda split: np.arange(images if split == 'train' else 1))
    assert images_per_step(data, most) == size

def test_pixels_come_as_they_are(tiny, tmp_path):
    np.save(tmp_path/'p.npy', tiny.pixels)
    mapped = Dataset(tiny.index, np.load(tmp_path/'p.npy', mmap_mode='r'), tiny.source)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        x, y = next(iter(make_loader(mapped, 'validation', 8)))
        p = predict(SmallCNN(), mapped.pixels[:20])
    assert x.dtype == torch.uint8 and y.dtype == torch.int64 and x.shape == (8, 1, 32, 32) and p.shape == (20,)
    assert len(Pixels(mapped, mapped.rows('train'))) == 120

def test_predict_in_batches_leaves_the_mode(tiny):
    torch.manual_seed(0)
    m = SmallCNN()
    p = predict(m, tiny.pixels, 7)
    assert m.training and p.shape == (200,) and p.dtype == np.float64 and ((p >= 0) & (p <= 1)).all() and np.allclose(p, predict(m.eval(), tiny.pixels), atol=1e-6) and not m.training
    with torch.no_grad(): direct = m(torch.from_numpy(tiny.pixels).float() / 255).softmax(1)[:, 1].numpy()
    assert np.allclose(p, direct, atol=1e-5)


# Training

SETTINGS = dict(epochs=3, batch_size=30, lr=5e-3, weight_decay=1e-2)
PARAMS = SETTINGS | dict(model='small', seeds=1, seed=4)

def network(seed=4): torch.manual_seed(seed); return SmallCNN()

def train_once(folder, tiny, seed=4, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    net = network(seed)
    history = fit(net, tiny, folder, dict(model='small'), PARTS, seed=seed, **SETTINGS | changes)
    return net, history

def step_for(folder, name='03_train', **changes):
    data = Step(folder, '00_data', dict(image_size=32, aspect='stretch', val_fraction=.15, seed=0, groups='names') | changes)
    data.record(dataset=dict(fingerprint='f' * 64, kind='phantom'))
    return Step(folder, name, {})

class Stop(Callback):
    "Breaks off at the start of an epoch, as a fault or Ctrl-C would."
    def __init__(self, epoch, how): self.epoch, self.how = epoch, how
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == self.epoch: raise self.how

class Epochs(Callback):
    "Which epochs were trained."
    def __init__(self): self.seen = []
    def on_train_epoch_start(self, trainer, module): self.seen.append(trainer.current_epoch)

@pytest.fixture(scope='module')
def whole(tiny, tmp_path_factory):
    "An uninterrupted training, with augmentation."
    folder = tmp_path_factory.mktemp('whole')
    net, history = train_once(folder, tiny, augment=Augment())
    return folder, predict(net, tiny.pixels), history

def test_what_a_training_leaves(whole):
    folder, p, history = whole
    assert sorted(f.name for f in folder.iterdir()) == ['log.csv', 'model.safetensors']
    assert set(history) == {'epoch', 'train_loss', 'train_accuracy', 'val_loss', 'val_accuracy', 'val_auroc'} and list(history.epoch) == [0, 1, 2] and history.notna().all(axis=None)
    log = pd.read_csv(folder/'log.csv')
    assert np.allclose(log[list(history)], history) and log.val_accuracy.between(0, 1).all()

def test_log_says_what_scikit_learn_says_of_the_kept_epoch(tiny, tmp_path):
    "In 32 bits, as `predict` computes; where a training is of mixed precision, ranks may differ."
    net, history = train_once(tmp_path, tiny, augment=Augment(), precision='32-true')
    p = predict(net, tiny.pixels)
    kept, rows = history.loc[history.val_auroc.idxmax()], tiny.rows('validation')
    assert kept.val_auroc == pytest.approx(sk.roc_auc_score(tiny.labels[rows], p[rows]), abs=1e-5) and kept.val_accuracy == pytest.approx(((p[rows] >= .5) == tiny.labels[rows]).mean(), abs=1e-5)

def test_the_kept_epoch_is_the_one_with_the_highest_validation_auroc(tiny, tmp_path):
    "Something ruins later epochs: the file holds an earlier one."
    class Ruin(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch >= 2:
                with torch.no_grad(): module.network.head.weight.mul_(-50)
    class Keep(Callback):
        weights = {}  # what was validated, averaged or not
        def on_validation_batch_end(self, trainer, module, *a): self.weights[trainer.current_epoch] = {k: v.clone() for k, v in module.network.state_dict().items()}
    keep = Keep()
    net, history = train_once(tmp_path, tiny, epochs=4, callbacks=[Ruin(), keep])
    best = int(history.val_auroc.idxmax())
    loaded, info = load_model(tmp_path/'model.safetensors')
    assert info['best_epoch'] == best < 3 and history.val_auroc.nunique() > 1
    for k, v in loaded.state_dict().items(): assert torch.equal(v, keep.weights[best][k]) and torch.equal(v, net.state_dict()[k]), k
    assert any(not torch.equal(v, keep.weights[3][k]) for k, v in loaded.state_dict().items())

def test_early_stop(tiny, tmp_path):
    _, history = train_once(tmp_path, tiny, epochs=12, lr=1e-9, patience=1, callbacks=[type('Worse', (Callback,), dict(on_train_epoch_end=lambda self, t, m: m.network.head.bias.data.add_(torch.tensor([1., -1.]))))()])
    assert 2 <= len(history) < 12

@pytest.mark.parametrize('batch_size', [120, 60, 40, 30, 24])
def test_very_short_trainings(tiny, tmp_path, batch_size):
    "One epoch of one to five steps."
    _, history = train_once(tmp_path, tiny, epochs=1, batch_size=batch_size)
    assert len(history) == 1 and np.isfinite(history.val_loss).all()

def test_training_learns(tiny, tmp_path):
    net, _ = train_once(tmp_path, tiny, epochs=8, lr=1e-2)
    rows = tiny.rows('test')
    assert score(tiny.labels[rows], predict(net, tiny.pixels[rows]))['auroc'] > .8

def one_cycle(step, steps, start, top, end):
    "Cosine from start to top over the first quarter of the steps, and from there to the end."
    peak = .25 * steps - 1
    share, (a, b) = ((step / peak, (start, top)) if step <= peak
                     else ((step - peak) / (steps - 1 - peak), (top, end)))
    return b + (a - b) * (1 + np.cos(np.pi * share)) / 2

def weighted_loss(net, x, y, class_weights):
    "Cross-entropy by hand, each image with the weight of its class."
    logits = net(x)
    minus_log = logits.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]
    return (class_weights[y] * minus_log).sum() / class_weights[y].sum()

def by_hand(net, data, steps, lr, weight_decay):
    """All training images in each step, in double precision: the loss before each step, and the
    averaged network after it, and the weights of the classes."""
    x, y = (torch.from_numpy(a[data.rows('train')]) for a in (data.pixels / 255., data.labels))
    class_weights = .5 / torch.stack([(y == 0).double().mean(), (y == 1).double().mean()])
    net, losses, averaged = copy.deepcopy(net).double(), [], []
    weights = list(net.parameters())
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(steps):
        loss = weighted_loss(net, x, y, class_weights)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, weights)
        rate = one_cycle(step, steps, lr / 25, lr, lr / 25e4)
        beta, gamma, n = one_cycle(step, steps, .95, .85, .95), .999, step + 1
        with torch.no_grad():
            for w, g, m, v in zip(weights, gradients, first, second):
                w.mul_(1 - rate * weight_decay)
                m.mul_(beta).add_(g, alpha=1 - beta)
                v.mul_(gamma).add_(g**2, alpha=1 - gamma)
                w -= rate * m / (1 - beta**n) / ((v / (1 - gamma**n)).sqrt() + 1e-8)
            mean = copy.deepcopy(net)
            if averaged:  # over a tenth of the steps so far
                for a, before in zip(mean.parameters(), averaged[-1].parameters()):
                    a.copy_(before + (a - before) * 10 / (10 + step))
        averaged.append(mean)
    return losses, averaged, class_weights

@pytest.fixture(scope='module')
def beside(tiny, tmp_path_factory):
    "A training of 12 steps, one an epoch, and the same one by hand."
    settings = dict(lr=.02, weight_decay=.5)  # strong, so that it shows in a few steps
    torch.manual_seed(5)
    net = torch.nn.Sequential(torch.nn.MaxPool2d(4), torch.nn.Flatten(), torch.nn.Linear(64, 8),
                              torch.nn.Tanh(), torch.nn.Linear(8, 2))
    few_ill = tiny.index.label * (np.arange(200) % 2)  # so that the classes' weights differ much
    data = Dataset(tiny.index.assign(label=few_ill), tiny.pixels, tiny.source)
    expected = by_hand(net, data, 12, **settings)
    history = fit(net, data, tmp_path_factory.mktemp('beside'), dict(model='small'), PARTS, seed=0,
                  epochs=12, batch_size=120, patience=12, precision='32-true', **settings)
    return data, net, history, *expected

def test_a_step_is_adamw_at_the_rate_of_one_cycle_on_the_weighted_loss(beside):
    "Class weights, learning rate, momentum and weight decay of each step show in the next loss."
    _, _, history, losses, *_ = beside
    assert len(history) == 12
    assert np.allclose(history.train_loss, losses, rtol=1e-4, atol=0)

def test_what_is_validated_and_kept_is_the_average_of_the_weights(beside):
    data, net, history, _, averaged, class_weights = beside
    rows = data.rows('validation')
    x, y = torch.from_numpy(data.pixels[rows] / 255.), torch.from_numpy(data.labels[rows])
    with torch.no_grad(): losses = [weighted_loss(n, x, y, class_weights).item() for n in averaged]
    assert np.allclose(history.val_loss, losses, rtol=1e-4, atol=0)
    kept = int(kept_epoch(history).epoch)
    assert kept > 2, 'the first ones are hardly averages'
    for w, mean in zip(net.parameters(), averaged[kept].parameters()):
        assert torch.allclose(w.double(), mean, rtol=1e-3, atol=1e-5)

def test_augmentation_is_for_training_only(tiny, tmp_path):
    seen = []
    class Spy(torch.nn.Module):
        def forward(self, x): seen.append((len(x), x.dtype, x.min().item() >= 0 and x.max().item() <= 1)); return x
    train_once(tmp_path, tiny, epochs=1, batch_size=20, augment=Spy())
    assert seen == [(20, torch.float32, True)] * 6

@pytest.mark.parametrize('at', [1, 2])
def test_a_failed_training_continues_to_the_same_bytes(whole, tiny, tmp_path, at):
    with pytest.raises(RuntimeError, match='power'): train_once(tmp_path, tiny, augment=Augment(), callbacks=[Stop(at, RuntimeError('power'))])
    assert (tmp_path/'checkpoints'/'last.ckpt').exists() and not (tmp_path/'model.safetensors').exists() and not (tmp_path/'log.csv').exists()
    torch.manual_seed(99)
    net, history = train_once(tmp_path, tiny, seed=4, augment=Augment(), callbacks=[epochs := Epochs()])
    assert epochs.seen == list(range(at, 3)), 'only what was missing'
    assert np.array_equal(predict(net, tiny.pixels), whole[1])
    for k, v in load_model(tmp_path/'model.safetensors')[0].state_dict().items(): assert torch.equal(v, load_model(whole[0]/'model.safetensors')[0].state_dict()[k]), k
    assert (tmp_path/'log.csv').read_text() == (whole[0]/'log.csv').read_text(), 'the log holds all epochs'

def test_an_interrupted_training_continues_to_the_same_bytes(whole, tiny, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt): train_once(tmp_path, tiny, augment=Augment(), callbacks=[Stop(2, KeyboardInterrupt())])
        assert signal.getsignal(signal.SIGINT) == before, 'Ctrl-C works afterwards'
    finally: signal.signal(signal.SIGINT, before)
    net, _ = train_once(tmp_path, tiny, augment=Augment(), callbacks=[epochs := Epochs()])
    assert epochs.seen == [2] and np.array_equal(predict(net, tiny.pixels), whole[1])

def test_stopped_by_the_end_of_the_first_epoch(whole, tiny, tmp_path):
    "Before there is any checkpoint: starts over."
    with pytest.raises(RuntimeError): train_once(tmp_path, tiny, augment=Augment(), callbacks=[Stop(0, RuntimeError('power'))])
    net, _ = train_once(tmp_path, tiny, augment=Augment())
    assert np.array_equal(predict(net, tiny.pixels), whole[1])

def test_a_training_says_nothing_on_stderr(tiny, tmp_path, capfd):
    train_once(tmp_path/'a', tiny)
    with pytest.raises(RuntimeError): train_once(tmp_path/'b', tiny, callbacks=[Stop(1, RuntimeError('power'))])
    train_once(tmp_path/'b', tiny)
    assert capfd.readouterr().err == ''

def test_other_parts_train_otherwise(tiny, tmp_path):
    "Loss, optimizer, schedule and averaging are those that were handed over."
    asked = []
    def loss(labels): asked.append(('loss', len(labels))); return torch.nn.CrossEntropyLoss()
    def optimizer(weights, lr, weight_decay):
        asked.append(('optimizer', lr, weight_decay))
        return torch.optim.SGD(weights, lr)
    def schedule(optimizer, lr, steps):
        asked.append(('schedule', lr, steps))
        return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.MaxPool2d(4), torch.nn.Flatten(), torch.nn.Linear(64, 2))
    x, y = (torch.from_numpy(a[tiny.rows('train')]) for a in (tiny.pixels, tiny.labels))
    loss_now = torch.nn.functional.cross_entropy(net(x / 255.), y)
    weights = [w - .1 * g for w, g in zip(net.parameters(), torch.autograd.grad(loss_now, list(net.parameters())))]
    fit(net, tiny, tmp_path, dict(model='small'), Parts(None, loss, optimizer, schedule), seed=4,
        epochs=1, batch_size=120, lr=.1, weight_decay=.3, precision='32-true')
    assert asked == [('loss', 120), ('optimizer', .1, .3), ('schedule', .1, 1)]
    for w, expected in zip(net.parameters(), weights): assert torch.allclose(w, expected, atol=1e-6)

def test_seeds_of_steps_do_not_meet():
    seen = {step_seed(seed, step, rank) for seed in range(5) for step in (0, 1, 10_000) for rank in range(4)}
    assert len(seen) == 5 * 3 * 4
    assert step_seed(2, 7) == 2_000_013 and step_seed(2, 7, 1) == 1_002_000_020

def test_things_with_state_say_shortly_what_they_are(tiny, tmp_path):
    e = Experiment('augmented', tiny, Augment())
    training = Training(step_for(tmp_path), e, PARTS, 4, {}, {}, {}, {})
    assert repr(Pixels(tiny, tiny.rows('train'))) == 'Pixels(120 images of (32, 32))'
    assert repr(e) == f"Experiment('augmented', 200 images, {Augment()})"
    assert repr(training) == "Training('augmented', seed 4, in 'seed_4')"


# Experiments

@pytest.fixture
def counted(monkeypatch):
    "How often something is trained."
    calls, original = [], Training._train
    def counting(self):
        if not self.complete(): calls.append(self.seed)
        original(self)
    monkeypatch.setattr(Training, '_train', counting)
    return calls

QUICK = PARAMS | dict(epochs=1, batch_size=20)

def test_experiment_leaves_what_the_contract_says(tiny, tmp_path, counted):
    step = step_for(tmp_path/'run')
    results = run_experiment(step, tiny, 'baseline', QUICK | dict(seeds=2), PARTS)
    assert counted == [4, 5] and list(results.seed) == [4, 5] and (results.experiment == 'baseline').all()
    for row in results.itertuples():
        folder = step.dir/f'seed_{row.seed}'
        assert sorted(p.name for p in folder.iterdir()) == ['log.csv', 'metrics.json', 'model.safetensors', 'predictions.csv', 'recipe.json', 'timing.json']
        p, m = read_predictions(folder/'predictions.csv'), read_metrics(folder/'metrics.json')
        assert len(p) == 200 and dict(zip(p.path, p.label)) == dict(zip(tiny.index.path, tiny.labels)) and m['n'] == 40
        t, v = p[p.split == 'test'], p[p.split == 'validation']
        assert m['threshold'] == choose_threshold(v.label, v.probability)
        for suffix, at in (('', .5), ('_at_validation_threshold', m['threshold'])):
            for k, value in score(t.label, t.probability, at).items(): assert m[f'test_{k}{suffix}'] == value
        for k, (low, high) in intervals(t).items(): assert np.isnan(low) and f'test_{k}_low' not in m or (m[f'test_{k}_low'], m[f'test_{k}_high']) == (low, high)
        net, info = load_model(folder/'model.safetensors')
        assert np.allclose(predict(net, tiny.pixels), p.set_index('path').probability[tiny.index.path], atol=1e-6)
        assert info['threshold'] == m['threshold'] and info['image_size'] == 32 and info['trained_on'] == 'phantom'
        recipe = read_json(folder/'recipe.json')
        assert set(recipe) - set(info['recipe']) == {'code', 'images', 'versions'} and info['recipe'] == {k: recipe[k] for k in info['recipe']}
    assert len(read_histories(step.dir)) == 2 and set(read_histories(step.dir).seed) == {4, 5}
    assert (read_predictions(step.dir/'seed_4/predictions.csv').probability != read_predictions(step.dir/'seed_5/predictions.csv').probability).any()

def test_same_seed_same_bytes(tiny, tmp_path):
    for name in 'ab':
        torch.manual_seed(hash(name) % 1000); np.random.seed(len(name))
        run_experiment(step_for(tmp_path/name), tiny, 'augmented', PARAMS, PARTS, Augment())
    for file in ('predictions.csv', 'log.csv', 'metrics.json'): assert (tmp_path/'a/03_train/seed_4'/file).read_bytes() == (tmp_path/'b/03_train/seed_4'/file).read_bytes(), file

def test_complete_seeds_are_kept_and_other_recipes_are_not(tiny, tmp_path, counted):
    step = step_for(tmp_path/'run')
    def again(experiment='x', data_changes=(), augment=None, **changes):
        counted.clear()
        run_experiment(step_for(tmp_path/'run', **dict(data_changes)), tiny, experiment, QUICK | changes, PARTS, augment)
        return list(counted)
    assert again() == [4] and again() == []
    before = (step.dir/'seed_4/model.safetensors').read_bytes()
    assert again(seeds=2) == [5] and (step.dir/'seed_4/model.safetensors').read_bytes() == before
    assert again(lr=6e-3) == [4] and (step.dir/'seed_4/model.safetensors').read_bytes() != before
    assert again() == [4] and again(augment=Augment()) == [4] and again(augment=Augment(2.)) == [4] and again() == [4]
    assert again(data_changes={'val_fraction': .2}) == [4] and again(data_changes={'val_fraction': .2}) == []
    (step.dir/'seed_4/metrics.json').unlink()
    assert again(data_changes={'val_fraction': .2}) == [4], 'metrics.json marks a seed as complete'

def test_other_patients_are_another_recipe(tiny, tmp_path, counted):
    "Other groups make another validation split of the same images."
    run_experiment(step_for(tmp_path/'run'), tiny, 'x', QUICK, PARTS)
    run_experiment(step_for(tmp_path/'run', groups='image'), tiny, 'x', QUICK, PARTS)
    assert counted == [4, 4]

def test_an_interrupted_experiment_continues(tiny, tmp_path, monkeypatch):
    "The second seed fails in its second epoch; the same call finishes it, and every file is as if nothing had happened."
    params = PARAMS | dict(seeds=2)
    run_experiment(step_for(tmp_path/'a'), tiny, 'x', params, PARTS, Augment())
    trained, original = [], pl.Trainer.fit
    def failing(self, task, **k):
        trained.append(task.seed)
        if task.seed == 5: self.callbacks.append(Stop(1, RuntimeError('power')))
        return original(self, task, **k)
    with monkeypatch.context() as m:
        m.setattr(pl.Trainer, 'fit', failing)  # not `fit` itself: its code is part of the recipe
        with pytest.raises(RuntimeError, match='power'): run_experiment(step_for(tmp_path/'b'), tiny, 'x', params, PARTS, Augment())
    assert trained == [4, 5] and (tmp_path/'b/03_train/seed_4/metrics.json').exists() and not (tmp_path/'b/03_train/seed_5/metrics.json').exists()
    run_experiment(step_for(tmp_path/'b'), tiny, 'x', params, PARTS, Augment())
    for seed in (4, 5):
        for file in ('predictions.csv', 'metrics.json', 'log.csv'): assert (tmp_path/f'a/03_train/seed_{seed}'/file).read_bytes() == (tmp_path/f'b/03_train/seed_{seed}'/file).read_bytes(), (seed, file)
    assert not list((tmp_path/'b').rglob('*.ckpt'))

def several(run, tiny, **changes):
    "Two recipes with two seeds."
    step, params = step_for(run), QUICK | dict(seeds=2, epochs=2) | changes
    return run_experiments(step, [Experiment('plain', tiny), Experiment('augmented', tiny, Augment(), 'augmented')], params, PARTS)

@pytest.mark.parametrize('n', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_trainings_side_by_side_leave_the_same_bytes(n, tiny, tmp_path):
    alone, together = (several(tmp_path/str(k), tiny, trainer=f'side_by_side={k}') for k in (1, n))
    files = [f'{place}seed_{s}/{name}' for place in ('', 'augmented/') for s in (4, 5)
             for name in ('predictions.csv', 'metrics.json', 'log.csv', 'recipe.json', 'model.safetensors')]
    for file in files:
        one, other = ((tmp_path/str(k)/'03_train'/file).read_bytes() for k in (1, n))
        assert one == other, file
    assert 'side_by_side' not in (tmp_path/f'{n}/03_train/seed_4/recipe.json').read_text()
    for name in ('plain', 'augmented'):
        for found in (alone, together):
            assert list(found[name].seed) == [4, 5] and (found[name].experiment == name).all()
    assert not list(tmp_path.rglob('checkpoints'))

def test_trainings_run_in_processes_of_their_own(tiny, tmp_path):
    before = torch.get_num_threads()
    class Tell(torch.nn.Module):
        def forward(self, x):
            (tmp_path/f'{os.getpid()} {torch.get_num_threads()}').touch()
            return x
    torch.set_num_threads(2)
    try:
        for n in (1, 2):
            experiments = [Experiment('told', tiny, Tell())]
            run_experiments(step_for(tmp_path/f'run{n}'), experiments, QUICK | dict(seeds=2, trainer=f'side_by_side={n}'), PARTS)
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)
    told = [p.name.split() for p in tmp_path.iterdir() if p.is_file()]
    assert {threads for _, threads in told} == {'1'}, 'one thread each, here and in workers'
    assert str(os.getpid()) in {pid for pid, _ in told} and len(told) == 3

def test_little_work_starts_no_process(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv('CXR_LAB_CORES', '2')
    asked = []
    def instead(function, items, desc, workers, memory, done):
        asked.append(workers)
        return [function(item) for item in items]
    monkeypatch.setattr(trainer, 'in_processes', instead)
    several(tmp_path/'a', tiny)
    monkeypatch.setattr(trainer, 'SMALL', 2 * 2 * 2 * 120)
    several(tmp_path/'b', tiny)
    several(tmp_path/'c', tiny, trainer='side_by_side=3')
    several(tmp_path/'c', tiny, trainer='side_by_side=1')
    assert asked == [1, None, 3], 'and what is complete is not asked for again'

@pytest.mark.parametrize('other', [('x', 'b'), ('y', '')])
def test_two_experiments_share_neither_name_nor_folder(tiny, tmp_path, other):
    experiments = [Experiment('x', tiny), Experiment(other[0], tiny, None, other[1])]
    with pytest.raises(ValueError, match='same name or the same folder'):
        run_experiments(step_for(tmp_path), experiments, QUICK, PARTS)

def test_one_failure_leaves_the_others_as_they_are(tiny, tmp_path):
    class Fails(torch.nn.Module):
        def forward(self, x): raise RuntimeError('power')
    experiments = [Experiment('good', tiny), Experiment('bad', tiny, Fails(), 'bad')]
    with pytest.raises(RuntimeError, match='power'):
        run_experiments(step_for(tmp_path), experiments, QUICK | dict(trainer='side_by_side=1'), PARTS)
    assert (tmp_path/'03_train/seed_4/metrics.json').exists()
    assert not (tmp_path/'03_train/bad/seed_4/metrics.json').exists()

def test_how_far_a_training_is_can_be_read_from_its_folder(tiny, tmp_path):
    seen, begun = [], {}  # begun: share -> when the first batch was shown
    training = Training(step_for(tmp_path), Experiment('x', tiny), PARTS, 4, SETTINGS | dict(model='small', epochs=2), {}, {}, {})
    class Look(torch.nn.Module):
        def forward(self, x):
            begun.setdefault(training.share(), time.perf_counter())
            if training.share(): seen.append(read_json(training.folder/PROGRESS))
            return x
    assert training.share() == 0
    run_experiments(step_for(tmp_path), [Experiment('x', tiny, Look())], QUICK | dict(epochs=2), PARTS)
    assert set(begun) == {0, .5} and not (training.folder/PROGRESS).exists()
    assert (seen[0]['epoch'], seen[0]['epochs']) == (1, 2)
    took, images = begun[.5] - begun[0], len(tiny.rows('train'))
    assert .3 * took < images / seen[0]['images_per_second'] < 3 * took

@pytest.mark.parametrize('has, accelerator, expected', [
    ({}, 'cpu', '32-true'), ({'avx512_f': True}, 'cpu', '32-true'), ({'avx512_bf16': True}, 'cpu', 'bf16-mixed'),
    ({'amx_bf16': True}, 'cpu', 'bf16-mixed'), ({'avx512_bf16': True}, 'gpu', '32-true')])
def test_precision_follows_the_processor_and_stands_in_the_recipe(has, accelerator, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: has, raising=False)
    assert default_precision({'accelerator': accelerator}) == expected
    monkeypatch.delattr(torch.cpu, 'get_capabilities')
    assert default_precision({'accelerator': accelerator}) == '32-true', 'older PyTorch cannot tell'

def test_on_a_gpu_the_recipe_says_so(tiny, tmp_path, monkeypatch):
    "One training at a time, too: test_gpu.py runs them where there is one."
    def show(todo, workers): raise RuntimeError(str(todo[0].recipe['trainer']))
    monkeypatch.setattr(trainer, '_run', show)
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    with pytest.raises(RuntimeError, match="{'precision': '32-true', 'accelerator': 'gpu'}"): run_experiment(step_for(tmp_path), tiny, 'x', QUICK, PARTS)
    with pytest.raises(RuntimeError, match="'accelerator': 'cpu'"): run_experiment(step_for(tmp_path), tiny, 'x', QUICK | dict(trainer='accelerator=cpu'), PARTS)

def test_mixed_precision_trains_and_is_another_recipe(tiny, tmp_path):
    step = step_for(tmp_path)
    single = run_experiment(step, tiny, 'x', QUICK | dict(trainer='precision=32-true'), PARTS)
    mixed = run_experiment(step, tiny, 'x', QUICK | dict(trainer='precision=bf16-mixed'), PARTS)
    assert read_json(step.dir/'seed_4/recipe.json')['trainer'] == {'precision': 'bf16-mixed'}
    assert single.val_loss[0] != mixed.val_loss[0] == pytest.approx(single.val_loss[0], rel=.2)
    saved = load_model(step.dir/'seed_4/model.safetensors')[0].state_dict().values()
    assert {v.dtype for v in saved} == {torch.float32, torch.int64}, 'weights stay in 32 bits'

def test_what_is_kept_and_what_is_trained_again_is_said(tiny, tmp_path, capsys):
    def told(**changes):
        run_experiment(step_for(tmp_path), tiny, 'x', QUICK | changes, PARTS)
        return capsys.readouterr().out
    assert told() == 'x: 1 to train\n'
    assert re.fullmatch(r'x: 1 kept from \d{4}-\d\d-\d\d \d\d:\d\d: same images, parameters and code\n', told())
    assert told(lr=1e-3) == 'x: 1 to train (changed: lr)\n'
    assert re.fullmatch(r'x: 1 kept .*; 1 to train\n', told(lr=1e-3, seeds=2))

def test_fresh_trains_again(tiny, tmp_path, counted):
    for fresh, expected in ((False, [4]), (False, []), (True, [4]), (False, [])):
        counted.clear()
        run_experiment(step_for(tmp_path), tiny, 'x', QUICK, PARTS, fresh=fresh)
        assert counted == expected

def test_an_edited_network_or_augmentation_is_trained_again(tiny, tmp_path, counted, monkeypatch, capsys):
    "As a reader does it: a definition is changed in the running process."
    def again(augment=None):
        counted.clear()
        run_experiment(step_for(tmp_path), tiny, 'x', QUICK, PARTS, augment)
        return list(counted), capsys.readouterr().out
    assert again()[0] == [4] and again()[0] == []
    original = SmallCNN.__init__
    def wider(self, widths=(16, 24, 48, 128)): original(self, widths)
    with monkeypatch.context() as m:
        m.setattr(SmallCNN, '__init__', wider)
        n_wider = sum(p.numel() for p in SmallCNN().parameters())
        trained, told = again()
        assert trained == [4] and 'changed: ' in told and 'wider' in told
        assert read_metrics(tmp_path/'03_train/seed_4/metrics.json')['n_parameters'] == n_wider
    assert again()[0] == [4], 'and back'
    class Mild(torch.nn.Module):
        def forward(self, x): return x + 0
    class Milder(torch.nn.Module):
        def forward(self, x): return x + 0.
    assert again(Mild())[0] == [4] and again(Mild())[0] == [] and again(Milder())[0] == [4]

def test_an_edited_view_is_trained_again(tiny, tmp_path, counted):
    def a(image): return image
    def b(image): return 255 - image
    def again(view):
        counted.clear()
        run_experiments(step_for(tmp_path), [Experiment('x', tiny, made_by=(view,))], QUICK, PARTS)
        return list(counted)
    assert again(a) == [4] and again(a) == [] and again(b) == [4]

def test_other_pixels_under_the_same_names_are_trained_again(tiny, tmp_path, counted, capsys):
    "Code that reads images may change: the files stay the same, and what the network sees does not."
    run_experiment(step_for(tmp_path), tiny, 'x', QUICK, PARTS)
    inverted = Dataset(tiny.index, 255 - tiny.pixels, tiny.source)
    run_experiment(step_for(tmp_path), inverted, 'x', QUICK, PARTS)
    assert counted == [4, 4] and 'changed: images' in capsys.readouterr().out

def test_other_parts_are_another_recipe(tiny, tmp_path, counted):
    def other(weights, lr, weight_decay): return torch.optim.Adam(weights, lr)
    parts = Parts(**{**vars(PARTS), 'optimizer': other})
    for p in (PARTS, parts, parts): run_experiment(step_for(tmp_path), tiny, 'x', QUICK, p)
    assert counted == [4, 4]

def test_an_edited_score_is_computed_again(tiny, tmp_path, counted, monkeypatch):
    run_experiment(step_for(tmp_path), tiny, 'x', QUICK, PARTS)
    monkeypatch.setattr(train, 'choose_threshold', lambda labels, probabilities: .25)
    run_experiment(step_for(tmp_path), tiny, 'x', QUICK, PARTS)
    assert counted == [4, 4] and read_metrics(tmp_path/'03_train/seed_4/metrics.json')['threshold'] == .25

def test_other_versions_are_named_and_train_nothing(tiny, tmp_path, counted, capsys):
    run_experiment(step_for(tmp_path), tiny, 'x', QUICK, PARTS)
    file = tmp_path/'03_train/seed_4/recipe.json'
    recipe = read_json(file)
    recipe['versions']['torch'] = '1.0'
    write_json(file, recipe)
    run_experiment(step_for(tmp_path), tiny, 'x', QUICK, PARTS)
    assert counted == [4] and f'(made with torch 1.0, now {versions()["torch"]})' in capsys.readouterr().out

def test_what_was_put_aside_is_taken_back(tiny, tmp_path, counted):
    step = step_for(tmp_path)
    run_experiment(step, tiny, 'x', QUICK, PARTS, sub='deep/er')
    put_aside(step.dir)
    assert not (step.dir/'deep/er/seed_4').exists()
    results = run_experiment(step, tiny, 'x', QUICK, PARTS, sub='deep/er')
    assert counted == [4] and len(results) == 1
    put_aside(step.dir)
    run_experiment(step, tiny, 'x', QUICK | dict(lr=1e-3), PARTS, sub='deep/er')
    assert counted == [4, 4], 'taken back, and found to be of another recipe'

def test_what_is_older_than_a_fresh_start_is_trained_again_once(tiny, tmp_path, counted):
    run_experiment(step_for(tmp_path), tiny, 'x', QUICK, PARTS)
    os.utime(tmp_path/'03_train/seed_4/recipe.json', (1, 1))
    with only_since(2):
        for _ in range(2): run_experiment(step_for(tmp_path), tiny, 'x', QUICK, PARTS)
    assert counted == [4, 4]

def test_histories_of_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match='no seed_./log.csv in'): read_histories(tmp_path)
