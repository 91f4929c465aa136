"Trainings that are killed at any moment end with the same bytes; trainings shared by several processes do what one process does."
import inspect, json, os, random, signal, socket, subprocess, sys

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from safetensors import safe_open

from cxr_lab.data import Dataset
from cxr_lab.model import load_model
from cxr_lab.runs import Step, read_json
from cxr_lab.train import PARTS
from cxr_lab.trainer import TRAINER, fit, kept_epoch, make_loader, run_experiment, trainer_settings

FILES = ('predictions.csv', 'model.safetensors', 'log.csv', 'metrics.json', 'recipe.json')

# A process of its own that forks one child for each job: no job sees what another has left in memory, and the libraries are imported once.
# Jobs of one row run side by side.
DRIVER = '''
import json, multiprocessing, os, signal, sys, time
from shutil import rmtree
from pathlib import Path
import numpy as np, pandas as pd, pytorch_lightning as pl, torch
from cxr_lab import train, trainer
from cxr_lab.augment import Augment
from cxr_lab.data import Dataset
from cxr_lab.images import Source
from cxr_lab.networks import predict
from cxr_lab.runs import Step

def die(*_): os.kill(os.getpid(), signal.SIGKILL)

def half_removed(folder):
    if folder.name == 'checkpoints':
        (folder/'best.ckpt').unlink()
        die()
    rmtree(folder)

PLACES = {'step': (trainer.Classifier, 'training_step'), 'validation': (trainer.Classifier, 'validation_step'),
          'saved': (pl.Trainer, 'save_checkpoint'), 'model': (trainer, 'save_model'), 'judge': (train, 'choose_threshold')}

def prepare(place, call):
    "Kills this process at the given call, 'saved': after it; or after as many seconds, wherever it is then."
    if place == 'time': return signal.setitimer(signal.ITIMER_REAL, call)
    if place == 'remove': trainer.shutil.rmtree = half_removed; return
    where, name = PLACES[place]
    function, calls = getattr(where, name), []
    def wrapped(*a, **k):
        calls.append(1)
        if len(calls) == call and place != 'saved': die()
        out = function(*a, **k)
        if len(calls) == call: die()
        return out
    setattr(where, name, wrapped)

def plain():
    "Without batch norm, whose statistics are those of one process's share of a batch."
    torch.manual_seed(0)
    n = torch.nn
    return n.Sequential(n.AvgPool2d(2), n.Conv2d(1, 8, 5), n.ReLU(), n.Conv2d(8, 16, 3, 2), n.ReLU(), n.AdaptiveAvgPool2d(2), n.Flatten(), n.Linear(64, 2))

def work(data, folder, settings, kill=None, plainly=False, environment={}):
    os.environ.update(environment)
    torch.set_num_threads(1)
    folder = Path(folder)
    if plainly:
        net, extra = plain(), trainer.trainer_settings(settings.pop('trainer', ''))
        folder.mkdir(exist_ok=True)
        if kill: prepare(*kill)
        trainer.fit(net, data, folder, dict(model='small'), train.PARTS, seed=1, **settings, **extra)
        return np.save(folder/'p.npy', predict(net, data.pixels))
    step = Step(folder, '00_data', dict(image_size=32, aspect='stretch', val_fraction=.15, seed=0, groups='names'))
    step.record(dataset=dict(fingerprint='f' * 64, kind='phantom'))
    if kill: prepare(*kill)
    trainer.run_experiment(Step(folder, '03_train', {}), data, 'x', settings, train.PARTS, Augment())

if __name__ == '__main__':
    index = pd.read_csv(sys.argv[2], keep_default_na=False, dtype={'path': str, 'patient': str, 'sha256': str})
    data = Dataset(index, np.load(sys.argv[1]), Source('phantom', Path('images')))
    for row in json.loads(sys.stdin.read()):
        started = time.perf_counter()
        processes = [multiprocessing.get_context('fork').Process(target=work, args=(data,), kwargs=job) for job in row]
        for p in processes: p.start()
        for p in processes: p.join(600)
        print(json.dumps([[p.exitcode for p in processes], time.perf_counter() - started]), flush=True)
        for p in processes: p.kill()
'''

@pytest.fixture(scope='module')
def driver(tiny, tmp_path_factory):
    "Does rows of jobs; returns the exit codes of the last row and its seconds."
    here = tmp_path_factory.mktemp('driver')
    (here/'driver.py').write_text(DRIVER)
    np.save(here/'pixels.npy', tiny.pixels)
    tiny.index.to_csv(here/'index.csv', index=False)
    def run(*rows):
        done = subprocess.run([sys.executable, here/'driver.py', here/'pixels.npy', here/'index.csv'], input=json.dumps(rows), capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr[-3000:]
        results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('[[')]
        assert len(results) == len(rows), done.stderr[-3000:]
        return results, done.stderr
    return run

SETTINGS = dict(model='small', epochs=4, batch_size=64, lr=5e-3, weight_decay=.01, seeds=1, seed=4)
STEPS = 4 * 15  # run_experiment makes batches of 8 of 120 images

def job(folder, kill=None, **changes): return [dict(folder=str(folder), settings=SETTINGS | changes, kill=kill)]

def content(folder): return {f: (folder/'03_train/seed_4'/f).read_bytes() for f in FILES}

@pytest.fixture(scope='module')
def whole(driver, tmp_path_factory):
    "An uninterrupted training, the seconds that it takes, and one that is killed in its third epoch and called again."
    folder = tmp_path_factory.mktemp('whole')
    results, err = driver(job(folder/'whole'), job(folder/'killed', ('step', 38)), job(folder/'killed'))
    assert [c for [c], _ in results] == [0, -9, 0], err[-3000:]
    return folder/'whole', results[0][1], folder/'killed'

def same(folder, whole): assert content(folder) == content(whole) and not list(folder.rglob('*.ckpt'))

def test_killed_in_the_middle_of_an_epoch(whole): same(whole[2], whole[0])

RANDOM = random.Random(5)
KILLS = {  # name -> kills, one after the other in the same folder
    **{f'at step {n}': [('step', n)] for n in (RANDOM.randint(2, STEPS) for _ in range(3))},
    'three times by the clock': [('time', share) for share in sorted(RANDOM.uniform(.1, .4) for _ in range(3))],
    'between two checkpoints': [('saved', 1)], 'between two epochs': [('saved', 2)], 'in validation': [('validation', 2)], 'after the last epoch': [('model', 1)],
    'while checkpoints are removed': [('remove', 1)], 'before the metrics': [('judge', 1)], 'before the threshold is in the model file': [('model', 2)]}

@pytest.fixture(scope='module')
def tries(driver, whole, tmp_path_factory):
    "Killed as often as asked, then left alone; and trainings that end early."
    folder = tmp_path_factory.mktemp('tries')
    rows = {name: [*(job(folder/name, (place, at * whole[1] if place == 'time' else at)) for place, at in kills), job(folder/name)] for name, kills in KILLS.items()}
    def early(name, kill=None): return [dict(folder=str(folder/name), settings=dict(epochs=12, batch_size=30, lr=1e-30, weight_decay=0, patience=2), kill=kill, plainly=True)]
    results, err = driver(*(row for group in rows.values() for row in group), early('early'), early('early and killed', ('model', 1)))
    codes = iter([c for [c], _ in results])
    found = {name: [next(codes) for _ in group] for name, group in rows.items()}
    assert list(codes) == [0, -9], err[-3000:]
    (folder/'early and killed').rename(folder/'early and moved')
    results, err = driver(early('early and moved'))
    assert results[0][0] == [0], err[-3000:]
    return folder, found

@pytest.mark.slow
@pytest.mark.parametrize('name', KILLS)
def test_killed_and_called_again_the_same_bytes(whole, tries, name):
    folder, codes = tries
    for code, (place, _) in zip(codes[name], KILLS[name]): assert code in ((-14, 0) if place == 'time' else (-9,)), 'it was killed where it should be; by the clock, it may have been faster'
    assert codes[name][-1] == 0
    same(folder/name, whole[0])

@pytest.mark.slow
def test_a_training_that_had_ended_early_does_not_go_on(tries):
    "Killed after its last checkpoint: nothing is left to train; and a moved folder is continued all the same."
    whole, moved = (tries[0]/n for n in ('early', 'early and moved'))
    assert len(pd.read_csv(whole/'log.csv')) == 3, 'nothing is learnt: two epochs after the first it ends'
    for f in ('log.csv', 'model.safetensors', 'p.npy'): assert (moved/f).read_bytes() == (whole/f).read_bytes(), f


# Which epoch

def test_kept_epoch_breaks_ties_by_loss():
    h = pd.DataFrame(dict(epoch=range(5), val_auroc=[.9, 1, 1, .95, 1], val_loss=[.1, .4, .2, .05, .2]))
    assert kept_epoch(h).epoch == 2 and kept_epoch(h[:2]).epoch == 1 and kept_epoch(h.assign(val_loss=.3)).epoch == 1 and kept_epoch(h.iloc[::-1].assign(val_auroc=.5)).epoch == 3

def test_equally_good_epochs_the_lowest_loss_is_kept(tiny, tmp_path):
    "The disks are made so bright that every epoch ranks all images right."
    easy = np.where(tiny.labels[:, None, None, None] == 1, 200, 40) + np.arange(200)[:, None, None, None] % 7 + np.zeros_like(tiny.pixels)
    data = Dataset(tiny.index, easy.astype(np.uint8), tiny.source)
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(1, 2))
    with torch.no_grad(): net[2].weight.copy_(torch.tensor([[-1.], [1.]]))
    history = fit(net, data, tmp_path, dict(model='small'), PARTS, seed=0, epochs=6, batch_size=30, lr=1e-2, weight_decay=0, patience=2)
    assert (history.val_auroc == 1).all() and len(history) == 6, 'a lower loss is progress'
    assert history.val_loss.is_monotonic_decreasing and kept_epoch(history).epoch == 5
    with safe_open(tmp_path/'model.safetensors', 'pt') as f: assert '"best_epoch": 5' in f.metadata()['cxr_lab.model.1']


# Several processes

@pytest.mark.parametrize('world', [2, 3, 4])
def test_processes_share_the_batches_of_one(tiny, world):
    def epoch(n, rank, of): loader = make_loader(tiny, 'train', n, 1, rank, of); loader.sampler.set_epoch(2); return list(loader)
    one, parts = epoch(36, 0, 1), [epoch(36, r, world) for r in range(world)]
    assert len(one) == 3 and all(len(p) == 3 for p in parts)
    for k, (x, y) in enumerate(one):
        assert torch.equal(torch.stack([p[k][0] for p in parts], 1).flatten(0, 1), x) and torch.equal(torch.stack([p[k][1] for p in parts], 1).flatten(), y)

@pytest.mark.parametrize('batch_size', [4, 9, 18, 35, 100])
@pytest.mark.parametrize('world', [2, 3, 5])
def test_processes_validate_every_image_once(tiny, world, batch_size):
    "In as many batches each: with one more, a process would wait for the others for ever."
    parts = [list(make_loader(tiny, 'validation', batch_size, rank=r, world=world)) for r in range(world)]
    assert len({len(p) for p in parts}) == 1 and max(len(y) for p in parts for _, y in p) <= batch_size and min(len(y) for p in parts for _, y in p) > 0
    seen = np.concatenate([x.numpy() for p in parts for x, _ in p])
    assert sorted(x.tobytes() for x in seen) == sorted(x.tobytes() for x in tiny.pixels[tiny.rows('validation')])

def test_trainer_settings():
    assert trainer_settings('') == {}
    assert trainer_settings('devices=2 num_nodes=3 precision=bf16-mixed accelerator=gpu sync_batchnorm=true') == dict(devices=2, num_nodes=3, precision='bf16-mixed', accelerator='gpu', sync_batchnorm=True)
    assert trainer_settings('devices=0,1 precision=32') == dict(devices='0,1', precision=32)
    for text in ('max_epochs=3', 'devices', 'devices=', '=2', 'callbacks=x', 'devices=2 , precision=16'):
        with pytest.raises(ValueError, match='expected name=value with names among accelerator, devices'): trainer_settings(text)
    assert set(TRAINER) - {'side_by_side'} <= set(inspect.signature(pl.Trainer).parameters)
    assert trainer_settings('side_by_side=4') == {'side_by_side': 4}
    for text in ('side_by_side=0', 'side_by_side=two', 'side_by_side=1.5'):
        with pytest.raises(ValueError, match='side_by_side is 1 or more'): trainer_settings(text)

def test_a_wrong_setting_fails_before_anything_is_made(tiny, tmp_path):
    step = Step(tmp_path, '03_train', {})
    with pytest.raises(ValueError, match="found 'device'"): run_experiment(step, tiny, 'x', SETTINGS | dict(trainer='device=2'), PARTS)
    assert not list(tmp_path.rglob('seed_*'))

PLAIN = dict(epochs=8, batch_size=12, lr=2e-2, weight_decay=.01)

def two(folder, **settings): return [dict(folder=str(folder), settings=settings, plainly=True)]

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

NODES = 'accelerator=cpu devices=1 num_nodes=2'

@pytest.fixture(scope='module')
def shared(driver, tmp_path_factory):
    "One training by one process, by two that Lightning starts, and in bfloat16; an experiment by two processes that were started from outside, as torchrun does, and by one."
    folder, port = tmp_path_factory.mktemp('shared'), str(free_port())
    def rank(r): return dict(TORCHELASTIC_RUN_ID='1', RANK=str(r), LOCAL_RANK='0', GROUP_RANK=str(r), WORLD_SIZE='2', LOCAL_WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    def by(name, **more): return dict(folder=str(folder/name), settings=SETTINGS | dict(seeds=2, epochs=6) | more)
    results, err = driver(two(folder/'one', **PLAIN), two(folder/'two', **PLAIN, trainer='accelerator=cpu devices=2 strategy=ddp_fork'),
                          two(folder/'half', **PLAIN, trainer='accelerator=cpu precision=bf16-mixed'),
                          [by('machines', trainer=NODES) | dict(environment=rank(r)) for r in range(2)], [by('machine')])
    assert [c for c, _ in results] == [[0], [0], [0], [0, 0], [0]], err[-3000:]
    return folder

@pytest.mark.slow
def test_two_processes_train_what_one_trains(shared):
    "Same batches, same gradients: without batch norm only rounding differs."
    one, other = (np.load(shared/n/'p.npy') for n in ('one', 'two'))
    assert one.std() > .002 and np.abs(one - other).max() < 1e-5
    a, b = (pd.read_csv(shared/n/'log.csv') for n in ('one', 'two'))
    columns = ['epoch', 'train_loss', 'train_accuracy', 'val_accuracy', 'val_auroc']  # val_loss: a mean of means over batches, which are others
    assert np.allclose(a[columns], b[columns], atol=1e-5) and np.allclose(a.val_loss, b.val_loss, atol=.05)
    assert sorted(p.name for p in (shared/'two').iterdir()) == ['log.csv', 'model.safetensors', 'p.npy']

@pytest.mark.slow
def test_half_precision_is_near(shared): assert 0 < np.abs(np.load(shared/'one/p.npy') - np.load(shared/'half/p.npy')).max() < .2

@pytest.mark.slow
@pytest.mark.parametrize('seed', [4, 5])
def test_two_machines_train_what_one_trains(shared, seed):
    "One of the processes writes; batch norm and augmentation see halves of a batch."
    a, b = (shared/n/f'03_train/seed_{seed}' for n in ('machine', 'machines'))
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir()) and not list(b.rglob('*.ckpt'))
    one, both = (read_json(d/'metrics.json') for d in (a, b))
    assert both['n'] == one['n'] == 40 and one['test_auroc'] > .6
    for k in ('val_auroc', 'test_auroc'): assert abs(one[k] - both[k]) < .1, (k, one[k], both[k])
    assert read_json(b/'recipe.json')['trainer'] == NODES and 'trainer' not in read_json(a/'recipe.json')
    assert load_model(b/'model.safetensors')[1]['best_epoch'] == both['best_epoch']

@pytest.mark.slow
def test_lesson_by_parameters_only(tmp_path):
    "Lesson 03 in a Jupyter kernel that has computed with threads before, on two processes."
    params = dict(phantoms=160, image_size=64, epochs=2, seeds=2, batch_size=16, trainer='accelerator=cpu devices=2')
    code = f'from cxr_lab.pipeline import run_pipeline; run_pipeline(["00_data", "01_explore", "03_train"], {str(tmp_path/"run")!r}, params={params!r})'
    process = subprocess.Popen([sys.executable, '-c', code], env=os.environ | {'OMP_NUM_THREADS': '2'}, start_new_session=True)
    try: assert process.wait(900) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    folder = tmp_path/'run/03_train'
    assert read_json(folder/'seed_1/recipe.json')['trainer'] == params['trainer']
    assert {'metrics.json', 'predictions.csv', '03_train.ipynb'} <= {p.name for p in folder.iterdir()}
