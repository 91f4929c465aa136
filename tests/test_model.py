"Models by name, gray input, files that are opened without trust."
import json, os, pickle, struct, warnings
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from cxr_lab import model as lab
from cxr_lab.model import SmallCNN, Standardize, build_model, layer_table, load_model, overfit_one_batch, receptive_field
from cxr_lab.networks import save_model, to_float

BACKBONES = ('resnet18', 'mobilenet_v3_small', 'shufflenet_v2_x0_5', 'mnasnet0_5', 'densenet121', 'efficientnet_b0')  # the fast ones

@pytest.fixture(scope='module')
def backbones():
    torch.manual_seed(0)
    return {name: build_model(name).eval() for name in BACKBONES}


# Shapes and input

@pytest.mark.parametrize('size', [32, 64, 97, 128])
@pytest.mark.parametrize('n', [1, 3])
def test_small_shapes(size, n):
    m, x = SmallCNN().eval(), torch.rand(n, 1, size, size)
    assert m(x).shape == (n, 2) and m.embed(x).shape == (n, m.head.in_features) and m.features(x).shape == (n, m.head.in_features, -(-size // 16), -(-size // 16))
    assert .1e6 < sum(p.numel() for p in m.parameters()) < .5e6
    assert torch.equal(m.head(m.embed(x)), m(x))

def test_to_float():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    out = to_float(x)
    assert out.dtype == torch.float32 and out.min() == 0 and out.max() == 1 and x.dtype == torch.uint8 and x.max() == 255
    for bad in (x.float(), x.int()):
        with pytest.raises(TypeError, match='pixels are uint8'): to_float(bad)

@pytest.mark.parametrize('name', ['small', 'resnet18'])
def test_wrong_input_is_refused(name, backbones):
    m = backbones.get(name) or build_model(name).eval()
    with pytest.raises(TypeError, match='float from 0 to 1, got torch.uint8; use to_float'): m(torch.zeros(1, 1, 64, 64, dtype=torch.uint8))
    for shape in [(1, 3, 64, 64), (1, 64, 64), (64, 64), (1, 64, 64, 1)]:
        with pytest.raises(ValueError, match=r'takes \(N,1,H,W\), got'): m(torch.zeros(shape))

@pytest.mark.parametrize('factor,shift,warned', [(1, 0, False), (255, 0, True), (1, -.5, True), (2, 0, True), (.2, 0, False)])
def test_a_wrong_range_is_warned_about(factor, shift, warned):
    m, x = SmallCNN().eval(), torch.linspace(0, 1, 1024).view(1, 1, 32, 32) * factor + shift
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        m(x)
    assert any('its answer means nothing' in str(w.message) for w in caught) == warned

def test_standardize():
    x = torch.rand(2, 1, 4, 4)
    assert torch.allclose(Standardize(.4, .2)(x), (x - .4) / .2)

def test_layer_table_counts_everything_and_changes_nothing():
    m = SmallCNN()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    table = layer_table(m, torch.rand(1, 1, 64, 64))
    assert m.training and all(torch.equal(v, before[k]) for k, v in m.state_dict().items()) and not any(x._forward_hooks for x in m.modules())
    assert table.parameters.sum() == sum(p.numel() for p in m.parameters()) and table['output (C,H,W)'].iloc[-1] == (2,)
    with pytest.raises(ValueError): layer_table(m, torch.rand(1, 3, 64, 64))
    assert m.training and not any(x._forward_hooks for x in m.modules())

def test_receptive_field_against_gradients():
    "Which input pixels one output position depends on, found by differentiating a linear version of the network."
    for net in (SmallCNN(), nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.Conv2d(2, 2, 5, 1, 2), nn.Conv2d(2, 1, 3, 3, 1))):
        chain = [c for c in net.modules() if isinstance(c, nn.Conv2d)]
        for c in chain: nn.init.constant_(c.weight, 1e-2)
        field, jump = receptive_field(net)
        x = torch.zeros(1, 1, 4 * field, 4 * field, requires_grad=True)
        out = x
        for c in chain: out = c(out)
        middle, sides = out.shape[-1] // 2, []
        for at in (middle, middle + 1):
            g, = torch.autograd.grad(out[0, :, at, at].sum(), x, retain_graph=True)
            seen = g[0, 0].abs().sum(0).nonzero().flatten()
            sides.append((seen.min().item(), seen.max().item()))
        assert sides[0][1] - sides[0][0] + 1 == field and sides[1][0] - sides[0][0] == jump
    with pytest.raises(ValueError, match='only square, undilated'): receptive_field(nn.Conv2d(1, 1, (3, 5)))
    with pytest.raises(ValueError, match='only square, undilated'): receptive_field(nn.Conv2d(1, 1, 3, dilation=2))

def test_one_batch_is_learned_and_noise_labels_too():
    torch.manual_seed(0)
    losses = overfit_one_batch(SmallCNN(), torch.rand(12, 1, 32, 32), torch.arange(12) % 2)
    assert len(losses) == 40 and losses[-1] < .1 < losses[0]


# Models by name

@pytest.mark.parametrize('name', BACKBONES)
def test_backbone_takes_gray_and_gives_two_logits(name, backbones):
    m = backbones[name]
    assert m(torch.rand(2, 1, 96, 96)).shape == (2, 2)
    m.train()
    out = m(torch.rand(2, 1, 96, 96)); m.eval()
    assert out.shape == (2, 2) and out.requires_grad

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['squeezenet1_1', 'googlenet', 'inception_v3', 'alexnet'])
def test_unusual_backbones_work_or_are_refused_by_name(name):
    "A last layer that is no linear one, or more than one output in training: two logits, or a `ValueError` at once."
    try: m = build_model(name)
    except ValueError as e: assert name in str(e); return
    x = torch.rand(2, 1, 299 if name == 'inception_v3' else 128, 299 if name == 'inception_v3' else 128)
    for training in (True, False): assert tuple(m.train(training)(x).shape) == (2, 2)

@pytest.mark.parametrize('name', BACKBONES)
def test_gray_equals_the_original_on_replicated_channels(name, monkeypatch):
    torch.manual_seed(1)
    original = torchvision.models.get_model(name, weights=None)
    for p in original.parameters(): p.data += torch.randn_like(p) * .01
    reference = torchvision.models.get_model(name, weights=None)
    reference.load_state_dict(original.state_dict())
    gray = lab.Backbone(original).eval()
    gray.scale = nn.Identity()
    linear = [n for n, c in reference.named_modules() if isinstance(c, nn.Linear)][-1]
    parent, _, leaf = linear.rpartition('.')
    setattr(reference.get_submodule(parent), leaf, gray.network.get_submodule(linear))
    x = torch.randn(2, 1, 96, 96)
    with torch.no_grad(): a, b = gray(x), reference.eval()(x.repeat(1, 3, 1, 1))
    assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())

@pytest.mark.parametrize('name', ['small ', 'Small', 'resnet', 'resnet19', '', 'fcn_resnet50', '../x'])
def test_unknown_names(name):
    with pytest.raises(ValueError, match='unknown model .* known: small, .*resnet18'): build_model(name)

def test_small_has_no_pretrained_weights():
    with pytest.raises(ValueError, match='no pretrained weights'): build_model('small', pretrained=True)

def test_pretrained_offline_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    def offline(*a, **k): raise URLError('Name or service not known')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    with pytest.raises(OSError, match=r'weights of resnet18 could not be downloaded \(Name or service not known\).*pretrained=False'): build_model('resnet18', pretrained=True)

def test_pretrained_starts_from_the_weights(monkeypatch):
    "As if torchvision had downloaded them: they arrive, summed over the color channels."
    torch.manual_seed(5)
    trained = torchvision.models.resnet18(weights=None)
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, 'get_state_dict', lambda self, *a, **k: trained.state_dict())
    m = build_model('resnet18', pretrained=True)
    assert torch.equal(m.network.layer4[1].conv2.weight, trained.layer4[1].conv2.weight)
    assert torch.allclose(m.network.conv1.weight, trained.conv1.weight.sum(1, keepdim=True)) and m.network.fc.out_features == 2


# Files

@pytest.mark.parametrize('name', ['small', 'resnet18'])
def test_round_trip(name, backbones, tmp_path):
    m = backbones.get(name) or build_model(name).eval()
    path, x = tmp_path/'m.safetensors', torch.rand(2, 1, 64, 64)
    save_model(path, m, dict(model=name, image_size=64, threshold=.25, nested={'a': [1, 'ü']}))
    again, info = load_model(path)
    assert not again.training and torch.equal(again(x), m(x))
    assert info == dict(model=name, image_size=64, threshold=.25, nested={'a': [1, 'ü']}, classes=['NORMAL', 'PNEUMONIA'])
    assert sorted(os.listdir(tmp_path)) == ['m.safetensors']

def test_the_same_model_is_the_same_bytes(tmp_path):
    m = SmallCNN()
    for i in range(12): save_model(tmp_path/f'{i}.safetensors', m, dict(model='small', a=1) if i % 2 else dict(a=1, model='small'))
    assert len({p.read_bytes() for p in tmp_path.iterdir()}) == 1

def test_a_file_must_say_what_it_is(tmp_path):
    with pytest.raises(ValueError, match='must name the architecture'): save_model(tmp_path/'m.safetensors', SmallCNN(), {})
    assert not os.listdir(tmp_path)

class Evil:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, 'w')

def test_a_pickle_is_not_executed(tmp_path):
    mark, bad = tmp_path/'executed', tmp_path/'m.safetensors'
    pickle.loads(pickle.dumps(Evil(mark))).close()
    assert mark.exists(), 'the pickle does what it should'
    mark.unlink()
    for write in (lambda: bad.write_bytes(pickle.dumps(Evil(mark))), lambda: torch.save({'state_dict': Evil(mark)}, bad), lambda: torch.save(Evil(mark), bad, _use_new_zipfile_serialization=False)):
        write()
        with pytest.raises(ValueError, match='m.safetensors is no safetensors file.*only models saved by cxr_lab'): load_model(bad)
        assert not mark.exists()

def written(tmp_path): save_model(tmp_path/'m.safetensors', SmallCNN(), dict(model='small')); return tmp_path/'m.safetensors'

@pytest.mark.parametrize('how', ['empty', 'seven bytes', 'header cut', 'weights cut', 'header huge', 'header no JSON', 'text'])
def test_corrupt_files_are_refused(tmp_path, how):
    path = written(tmp_path)
    content = path.read_bytes()
    path.write_bytes({'empty': b'', 'seven bytes': content[:7], 'header cut': content[:60], 'weights cut': content[:-100], 'header huge': struct.pack('<Q', 2**62) + content[8:],
                      'header no JSON': content[:8] + b'x' + content[9:], 'text': b'<html>not found</html>' * 10}[how])
    with pytest.raises(ValueError, match='m.safetensors is no safetensors file'): load_model(path)

def test_missing_file_and_folder(tmp_path):
    for p in (tmp_path/'none.safetensors', tmp_path):
        with pytest.raises(FileNotFoundError, match='no model file'): load_model(p)

def resaved(path, meta, tensors=None): save_file(tensors if tensors is not None else {k: v.contiguous() for k, v in SmallCNN().state_dict().items()}, path, meta)

def test_foreign_files_are_refused(tmp_path):
    path, good = tmp_path/'m.safetensors', json.dumps({'model': 'small'})
    for meta in (None, {'format': 'pt'}, {'cxr_lab.model.2': good}):
        resaved(path, meta)
        with pytest.raises(ValueError, match='is a safetensors file, but not a cxr_lab model'): load_model(path)
    for tensors in ({'x': torch.zeros(1)}, {}):
        resaved(path, {'cxr_lab.model.1': good}, tensors)
        with pytest.raises(ValueError, match="m.safetensors: the weights do not fit the model 'small'"): load_model(path)
    resaved(path, {'cxr_lab.model.1': json.dumps({'model': 'resnet18'})})
    with pytest.raises(ValueError, match="do not fit the model 'resnet18'"): load_model(path)
    resaved(path, {'cxr_lab.model.1': json.dumps({'model': 'os.system'})})
    with pytest.raises(ValueError, match="does not name a model that can be built .unknown model 'os.system'"): load_model(path)

@pytest.mark.parametrize('text', ['', '{', '{}', '[]', 'null'])
def test_a_damaged_description_is_refused(tmp_path, text):
    resaved(tmp_path/'m.safetensors', {'cxr_lab.model.1': text})
    with pytest.raises(ValueError, match='does not name a model that can be built'): load_model(tmp_path/'m.safetensors')

def test_weights_do_not_depend_on_the_memory_layout(tmp_path):
    m = SmallCNN().to(memory_format=torch.channels_last).eval()
    save_model(tmp_path/'m.safetensors', m, dict(model='small'))
    x = torch.rand(2, 1, 48, 48)
    assert torch.allclose(load_model(tmp_path/'m.safetensors')[0](x), m(x), atol=1e-6)
    assert np.isfinite(m(x).detach().numpy()).all()
