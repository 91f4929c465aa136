"On a CUDA device: the same bytes each time, what the CPU finds, one training at a time. Skipped where there is none."
import numpy as np
import pandas as pd
import pytest
import torch
from pytorch_lightning.callbacks import Callback

from cxr_lab import train
from cxr_lab.augment import Augment
from cxr_lab.data import Dataset, index_images, split_validation
from cxr_lab.gradcam import explain
from cxr_lab.images import find_data, pixel_cache
from cxr_lab.model import build_model, load_model
from cxr_lab.networks import predict
from cxr_lab.predict import Predictor
from cxr_lab.runs import Step, read_json
from cxr_lab.trainer import default_precision, fit, on_accelerator, run_experiment

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA device'),
    pytest.mark.filterwarnings('ignore::UserWarning:torch', 'ignore::UserWarning:pytorch_lightning')]

SIZE = 64
PARAMS = dict(model='small', epochs=12, batch_size=64, lr=3e-3, weight_decay=.02, seeds=2, seed=0)
ON_CPU = 'accelerator=cpu precision=32-true'

@pytest.fixture(scope='module')
def films():
    "600 phantoms, drawn on all cores."
    with pytest.MonkeyPatch.context() as m:
        m.delenv('CXR_LAB_CORES')
        source = find_data('phantom', 600, 0)
        index = split_validation(index_images(source.images, size=SIZE)[0], seed=0)
        return Dataset(index, pixel_cache(source.images, index, SIZE), source)

@pytest.fixture(scope='module')
def trained(films, tmp_path_factory):
    "name -> step and table: twice on the GPU, once on the CPU, with both seeds each."
    def once(name, trainer):
        step = Step(tmp_path_factory.mktemp(name), '00_data', dict(data='phantom', image_size=SIZE, aspect='stretch', seed=0))
        step.record(dataset=dict(fingerprint='f' * 64, kind='phantom'))
        params = PARAMS | ({'trainer': trainer} if trainer else {})
        return step, run_experiment(step, films, 'augmented', params, train.PARTS, Augment())
    return {'gpu': once('gpu', ''), 'again': once('again', ''), 'cpu': once('cpu', ON_CPU)}

FILES = [f'seed_{seed}/{name}' for seed in (0, 1)
         for name in ('predictions.csv', 'metrics.json', 'model.safetensors', 'log.csv')]

@pytest.mark.parametrize('file', FILES)
def test_two_trainings_leave_the_same_bytes(trained, file):
    one, two = ((trained[name][0].dir/file).read_bytes() for name in ('gpu', 'again'))
    assert one == two

def test_a_training_on_the_gpu_is_as_good_as_one_on_the_cpu(trained):
    of = {name: table[['val_auroc', 'test_auroc', 'seconds']] for name, (_, table) in trained.items()}
    print(pd.concat(of).round(4))
    assert of['cpu'].val_auroc.min() > .75, 'a network that has learned nothing proves nothing'
    for split in ('val_auroc', 'test_auroc'): assert of['gpu'][split].mean() > of['cpu'][split].mean() - .01

def test_the_recipe_says_where_and_how_precisely(trained):
    recipes = {name: read_json(step.dir/'seed_0/recipe.json') for name, (step, _) in trained.items()}
    assert recipes['gpu']['trainer'] == dict(accelerator='gpu', precision='32-true')
    assert recipes['cpu']['trainer'] == dict(accelerator='cpu', precision='32-true')
    assert on_accelerator({}) and default_precision({}) == '32-true'

class PowerFails(Callback):
    def on_train_epoch_start(self, run, _):
        if run.current_epoch == 2: raise RuntimeError('the power has failed')

def test_interrupted_it_goes_on_as_if_nothing_had_happened(films, tmp_path):
    knobs = dict(seed=0, epochs=4, batch_size=32, lr=3e-3, weight_decay=.02, augment=Augment())
    def once(folder, **more):
        torch.manual_seed(0)
        return fit(build_model('small'), films, tmp_path/folder, dict(model='small'), train.PARTS, **knobs, **more)
    whole = once('whole')
    with pytest.raises(RuntimeError, match='power'): once('broken', callbacks=[PowerFails()])
    assert once('broken').equals(whole)
    for name in ('model.safetensors', 'log.csv'): assert (tmp_path/'whole'/name).read_bytes() == (tmp_path/'broken'/name).read_bytes()

@pytest.fixture(scope='module')
def file(trained): return trained['gpu'][0].dir/'seed_0/model.safetensors'

def test_answers_and_maps_are_those_of_the_cpu(file, films):
    "To what TF32 leaves of a convolution's 32 bits."
    (cpu, _), (gpu, _) = load_model(file), load_model(file)
    gpu.cuda()
    seen = films.pixels[films.rows('test')]
    p = predict(cpu, seen)
    assert np.ptp(p) > .2, 'answers that do not differ prove nothing'
    np.testing.assert_allclose(predict(gpu, seen), p, atol=2e-3)
    for method in ('gradcam', 'gradcam++', 'hirescam'):
        a, b = (explain(net, seen, 1, method=method) for net in (cpu, gpu))
        apart = np.abs(a.raw - b.raw).max((1, 2)) / a.raw.max((1, 2)).clip(1e-6)
        print(method, 'largest difference, of a map\'s maximum:', apart.max())
        assert np.quantile(apart, .95) < .02, method
    assert next(gpu.parameters()).is_cuda

def test_predict_on_the_gpu(file, films):
    on_cpu, on_gpu = Predictor.load(file, device='cpu'), Predictor.load(file, device='cuda')
    assert Predictor.load(file).device.type == 'cuda', 'auto takes it'
    paths = [films.source.images/films.index.path[i] for i in films.rows('test')[:40]]
    a, b = on_cpu.predict(paths), on_gpu.predict(paths)
    assert a.path.equals(b.path) and not b.error.any()
    np.testing.assert_allclose(b.probability, a.probability, atol=2e-3)
    one, other = on_cpu.explain(paths[0]), on_gpu.explain(paths[0])
    assert np.abs(one.heat - other.heat).max() < .02
