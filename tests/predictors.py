"A small model that tells which half of an image is brighter, and films for it: shared by several tests."
import shutil
from copy import deepcopy
from functools import cache

import pytest
import torch

from cxr_lab.model import build_model, overfit_one_batch
from cxr_lab.networks import save_model
from cxr_lab.predict import Predictor

INFO = dict(model='small', image_size=32, aspect='stretch', threshold=.45, trained_on='phantom')

@cache
def _trained():
    torch.manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(64, 1, 4, 4), (32, 32), mode='bilinear')
    net = build_model('small')
    overfit_one_batch(net, x, (x[:, 0, :, :16].mean((1, 2)) > x[:, 0, :, 16:].mean((1, 2))).long(), 30)
    return net.eval()

def network():
    "Tells which half is brighter: its answers differ from film to film."
    return deepcopy(_trained())

def saved(path, net=None, **info):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(path, net or network(), INFO | info)
    return path

@pytest.fixture(scope='module')
def model(tmp_path_factory): return saved(tmp_path_factory.mktemp('model')/'model.safetensors')

@pytest.fixture(scope='module')
def predictor(model): return Predictor.load(model, device='cpu')

@pytest.fixture(scope='module')
def films(tmp_path_factory, phantom_images):
    "Eleven films in two folders with the same names, and two files that are none."
    root = tmp_path_factory.mktemp('films')
    files = sorted((phantom_images/'test').rglob('*.jpeg'))
    for i in range(11):
        target = root/'ab'[i % 2]/f'film {i // 2}.jpeg'
        target.parent.mkdir(exist_ok=True)
        shutil.copy(files[3 * i], target)
    (root/'a'/'cut.jpeg').write_bytes(files[0].read_bytes()[:600])
    (root/'b'/'page.png').write_text('<html>404</html>')
    return root
