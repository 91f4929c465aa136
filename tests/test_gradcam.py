"Maps against grad-cam, captum and closed forms; what a call must leave alone; the measures of a map against cases with known answers."
import contextlib, copy, gc, json, re, weakref
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from torch import nn

from cxr_lab.data import index_images
from cxr_lab.gradcam import (auc, baseline_maps, blur, center, cover, deletion_insertion, forgetting, log_odds, lung_mass_ratio, overlay, pick_samples, pointing_game,
                             randomization_check, scale_map, similarity)
from cxr_lab.images import pixel_cache
from cxr_lab.maps import GradCAM, explain, layer_candidates, marked_phantoms, marker_boxes
from cxr_lab.model import SmallCNN, build_model
from cxr_lab.networks import to_float
from cxr_lab.phantom import make_phantom, write_marked

METHODS = ('gradcam', 'gradcam++', 'hirescam')


# Models

def randomize(model, seed=0):
    "Batchnorm statistics as after training: not 0 and 1, so that evaluation and training mode differ."
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.copy_(torch.randn(m.num_features, generator=g) * .2)
            m.running_var.copy_(torch.rand(m.num_features, generator=g) * .5 + .75)
            m.weight.data.copy_(torch.rand(m.num_features, generator=g) * .5 + .75)
            m.bias.data.copy_(torch.randn(m.num_features, generator=g) * .2)
    return model

class Flat(nn.Module):
    "A VGG in little: in-place ReLUs, and a head that knows where things are."
    def __init__(self, size=24, classes=2):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * (size // 2) ** 2, 16), nn.ReLU(inplace=True), nn.Linear(16, classes))

    def forward(self, x): return self.head(self.features(x))

def network(name='small', dtype=torch.float64):
    seed = dict(small=2, flat=3).get(name, 0)
    torch.manual_seed(seed)
    model = randomize(Flat() if name == 'flat' else build_model(name), seed)
    if name != 'flat': [m for m in model.modules() if isinstance(m, nn.Linear)][-1].weight.data += .03  # so that both classes have something to show
    return model.to(dtype).eval()

def images(n=3, size=(64, 64), dtype=torch.float64, seed=0):
    return torch.rand(n, 1, *size, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def without_inplace(model):
    model = copy.deepcopy(model)
    for m in model.modules():
        if hasattr(m, 'inplace'): m.inplace = False
    return model

def maps_of(model, layer, x, target=None, method='gradcam'):
    with GradCAM(model, layer, method) as cam: return cam(x, target)

def close(a, b, tolerance=1e-5, empty=False):
    "Each map of `a` differs from `b` by no more than `tolerance` of that map's maximum, and (without `empty`) not all are zero."
    assert a.shape == b.shape and a.dtype == np.float32 and np.isfinite(a).all() and (b.any() or empty)
    assert (np.abs(a - b).max((1, 2)) <= tolerance * b.max((1, 2))).all(), np.abs(a - b).max((1, 2)) / b.max((1, 2))


# The same maps as others make

def peer(model, layer, x, classes, method):
    "Raw maps (before its scaling) of the package grad-cam, on a copy of the model whose layers do not work in place (it would see overwritten activations)."
    import pytorch_grad_cam as p
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    class Raw({'gradcam': p.GradCAM, 'gradcam++': p.GradCAMPlusPlus, 'hirescam': p.HiResCAM}[method]):
        def get_cam_image(self, *a, **k):
            self.raw = super().get_cam_image(*a, **k)
            return self.raw
    model = without_inplace(model).requires_grad_(True)
    with Raw(model, [model.get_submodule(layer)]) as cam:
        cam(x, [ClassifierOutputTarget(c) for c in classes])
        return np.maximum(cam.raw, 0)

LAYERS = dict(small=['stem', 'blocks.0', 'blocks.1.0.0', 'blocks.1.1.1', 'blocks'], flat=['features.0', 'features.2', 'features.3', 'features'],
              resnet18=['network.layer2', 'network.layer3.1.conv1', 'network.layer4'], mobilenet_v3_small=['network.features.4', 'network.features.8', 'network.features'],
              densenet121=['network.features.denseblock3', 'network.features.transition2'])

@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('name', LAYERS)
def test_equal_to_grad_cam(name, method):
    model, drawn = network(name), 0
    if method == 'gradcam++':  # large logits, where the 1e-6 that grad-cam adds to the denominator (and the paper does not) means nothing
        head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        head.weight.data *= 1e8
    for layer in LAYERS[name]:
        for n, classes in [(1, [0]), (1, [1]), (3, [0, 0, 0]), (3, [1, 1, 1]), (3, [1, 0, 1])][:: 1 if name in ('small', 'flat') else 2]:
            x = images(n, (24, 24) if name == 'flat' else (64, 64), seed=n + len(layer))
            maps = maps_of(model, layer, x, classes[0] if len(set(classes)) == 1 else classes, method)
            close(maps.raw, peer(model, layer, x, classes, method), empty=True)
            drawn += (~maps.zero).sum()
    assert drawn >= 2 * len(LAYERS[name])  # not zero against zero

@pytest.mark.parametrize(('name', 'layer'), [('small', 'blocks.0'), ('resnet18', 'network.layer3'), ('flat', 'features.0')])
def test_equal_to_captum(name, layer):
    from captum.attr import LayerGradCam
    model, x = network(name), images(3, (24, 24) if name == 'flat' else (64, 64))
    still = without_inplace(model)
    drawn = 0
    for target in (0, 1, torch.tensor([1, 0, 1])):
        other = LayerGradCam(still, still.get_submodule(layer)).attribute(x, target, relu_attributions=True)[:, 0].detach().numpy()
        close(maps_of(model, layer, x, target).raw, other, empty=True)
        drawn += other.any()
    assert drawn > 1

def test_linear_head_over_pooling_gives_cam_exactly():
    "Zhou et al. 2016: the class's weights times the feature maps. Grad-CAM is that over the number of positions, and HiResCAM the same."
    model, x = network(), images(4, (80, 48))
    a, w = model.features(x).detach(), model.head.weight.detach()
    for c in (0, 1):
        cam = torch.einsum('k,nkhw->nhw', w[c], a).clamp(min=0) / (5 * 3)
        close(maps_of(model, 'blocks', x, c).raw, cam.numpy(), 1e-6)
        close(maps_of(model, 'blocks', x, c, 'hirescam').raw, cam.numpy(), 1e-6)

def test_hirescam_differs_where_the_head_knows_positions():
    model, x = network('flat'), images(3, (24, 24))
    a, b = (maps_of(model, 'features', x, 1, m).raw for m in ('gradcam', 'hirescam'))
    assert np.abs(a - b).max() > .1 * b.max()

def test_hirescam_sums_to_what_the_layer_adds_to_the_logit():
    "For a head that is linear from the layer on, and without the ReLU: so only where all is positive."
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 100, 2)).double()
    model[3].weight.data.abs_()
    x = images(2, (12, 12))
    with torch.no_grad(): logit = model(x)[:, 1] - model[3].bias[1]
    assert maps_of(model, '0', x, 1, 'hirescam').raw.sum((1, 2)) == pytest.approx(model[3](model[2](model[1](model[0](x))))[:, 1].detach().numpy() - model[3].bias[1].item(), rel=1e-5)
    assert maps_of(model, '1', x, 1, 'hirescam').raw.sum((1, 2)) == pytest.approx(logit.numpy(), rel=1e-5)

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_gradcam_plus_plus_from_the_paper(dtype):
    "Equation 19 of Chattopadhay et al. 2018 on the logit, at its usual size, where no activation is negative."
    model, x = network(dtype=dtype), images(3, dtype=dtype)
    a, w = model.features(x).detach().double(), model.head.weight.detach().double()
    g = (w[1] / 16).clamp(min=0)[None, :, None, None]
    alpha = g / (2 * g + a.sum((2, 3), keepdim=True) * g**2 + 1e-300)
    weights = (alpha * g).expand_as(a).sum((2, 3))
    close(maps_of(model, 'blocks', x, 1, 'gradcam++').raw, torch.einsum('nk,nkhw->nhw', weights, a).numpy(), 1e-3)

def test_images_do_not_influence_each_other():
    model, x = network(), images(5)
    many = maps_of(model, 'blocks.0', x, [0, 1, 1, 0, 1])
    for i, c in enumerate([0, 1, 1, 0, 1]): close(maps_of(model, 'blocks.0', x[i:i + 1], c).raw, many.raw[i:i + 1], 1e-6)

@pytest.mark.parametrize('size', [(64, 96), (96, 64), (50, 71)])
def test_images_that_are_not_square(size):
    model, x = network(), images(2, size)
    maps = maps_of(model, 'blocks.0', x, 1)
    close(maps.raw, peer(model, 'blocks.0', x, [1, 1], 'gradcam'))
    assert maps.up.shape == (2, *size)


# Layers followed by, or made of, operations in place

@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('layer', ['stem.0', 'stem.1', 'stem.2', 'blocks.0.0.1', 'blocks.0.0.2', 'blocks.1.1.2'])
def test_in_place_relu(layer, method):
    "The activations are those that the layer put out, not what the ReLU behind it made of them; also when the layer is that ReLU."
    model, x = network(), images()
    close(maps_of(model, layer, x, 0, method).raw, maps_of(without_inplace(model), layer, x, 0, method).raw, 1e-6)

def test_activations_before_an_in_place_relu_by_hand():
    "DenseNet's features are overwritten by a function, relu(features, inplace=True), that no hook sees."
    model, x = network('densenet121'), images()
    with torch.no_grad(): a = model.network.features(model.scale(x))
    a.requires_grad_()
    logits = model.network.classifier(a.relu().mean((2, 3)))
    g, = torch.autograd.grad(logits[:, 1].sum(), a)
    close(maps_of(model, 'network.features', x, 1).raw, (g.mean((2, 3), keepdim=True) * a).sum(1).relu().detach().numpy())


# Targets and what comes back

def test_target_none_is_the_predicted_class():
    model, x = network(), images(8)
    with torch.no_grad(): logits = model(x)
    model.head.bias.data -= logits.mean(0) * torch.tensor([1., -1.]) - logits.mean(0)[0]  # between the classes
    model.head.bias.data[1] -= (model(x)[:, 1] - model(x)[:, 0]).median().item()
    predicted = model(x).argmax(1).numpy()
    assert 0 < predicted.sum() < 8
    maps = maps_of(model, 'blocks', x)
    assert np.array_equal(maps.classes, predicted) and maps.classes.dtype == np.int64
    close(maps.raw, maps_of(model, 'blocks', x, predicted).raw, 1e-7)

@pytest.mark.parametrize('kind', [list, tuple, np.array, torch.tensor, lambda c: np.array(c, np.uint8), lambda c: torch.tensor(c, dtype=torch.int32)])
def test_target_per_image(kind):
    model, x = network(), images(3)
    maps = maps_of(model, 'blocks', x, kind([1, 0, 1]))
    assert maps.classes.tolist() == [1, 0, 1]
    for i, c in enumerate([1, 0, 1]): close(maps.raw[i:i + 1], maps_of(model, 'blocks', x[i:i + 1], c).raw, 1e-6)
    assert maps_of(model, 'blocks', x, np.int64(1)).classes.tolist() == [1, 1, 1]

def test_target_function():
    "The difference of the logits, through a linear head over pooling: the difference of the maps before their ReLU."
    model, x = network(), images(3)
    maps = maps_of(model, 'blocks', x, lambda logits: logits[:, 1] - logits[:, 0])
    with torch.no_grad(): cam = torch.einsum('k,nkhw->nhw', model.head.weight[1] - model.head.weight[0], model.features(x)).clamp(min=0) / 16
    assert maps.classes is None
    close(maps.raw, cam.numpy(), 1e-6)

@pytest.mark.parametrize('target', [2, -1, 100, [0, 1, 2], [0, -1, 1], [0, 1], [[0, 1, 1]], 1., lambda z: z, lambda z: z.sum(), lambda z: 1.])
def test_target_that_makes_no_sense(target):
    with pytest.raises(ValueError): maps_of(network(), 'blocks', images(3), target)

def test_class_out_of_range_says_what_there_is():
    with pytest.raises(ValueError, match='2.*0 to 1|0.*1.*2'): maps_of(network(), 'blocks', images(1), 2)

def test_what_comes_back():
    model, x = network(), images(3, (64, 96))
    maps = maps_of(model, 'blocks', x, 1)
    assert type(maps.raw) is type(maps.up) is type(maps.probabilities) is type(maps.classes) is np.ndarray
    assert maps.raw.shape == (3, 4, 6) and maps.up.shape == (3, 64, 96) and maps.raw.dtype == maps.up.dtype == np.float32
    assert maps.probabilities.dtype == np.float64 and maps.zero.dtype == bool and maps.zero.shape == (3,) and (maps.raw >= 0).all()
    assert np.allclose(maps.probabilities, model(x).softmax(1).detach().numpy(), atol=1e-12)
    for raw, up in zip(maps.raw, maps.up): assert np.allclose(up, cv2.resize(raw, (96, 64), interpolation=cv2.INTER_LINEAR), atol=1e-5 * raw.max())

def test_float32_and_float64():
    model, x = network(dtype=torch.float32), images(2, dtype=torch.float32)
    single, double = maps_of(model, 'blocks.0', x, 1), maps_of(model.double(), 'blocks.0', x.double(), 1)
    assert single.raw.dtype == double.raw.dtype == np.float32 and single.probabilities.dtype == np.float64
    close(single.raw, double.raw, 1e-3)
    assert not np.array_equal(single.raw, double.raw)

def test_other_numbers_of_channels_and_classes():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).double(), torch.rand(2, 3, 9, 9).double()
    for c in range(5): close(maps_of(model, '1', x, c).raw, peer(model, '1', x, [c, c], 'gradcam'), empty=True)

@pytest.mark.parametrize('method', METHODS)
def test_zero_map_is_flagged_and_stays_zero(method):
    model, x = network(), images(2)
    model.head.weight.data[1] = -model.head.weight.data[1].abs()
    model.head.weight.data[0].abs_()
    nothing, something = maps_of(model, 'blocks', x, 1, method), maps_of(model, 'blocks', x, 0, method)
    assert nothing.zero.all() and not nothing.raw.any() and not nothing.up.any() and not something.zero.any()
    scaled = scale_map(nothing.up)
    assert not scaled.any() and not np.isnan(scaled).any()
    assert np.isnan(lung_mass_ratio(nothing.up, np.ones_like(nothing.up, bool))).all() and not pointing_game(nothing.up, np.ones_like(nothing.up, bool)).any()


# Names of layers

def test_layer_candidates():
    model, x = network(), images(1, (128, 128))
    names = layer_candidates(model, x)
    assert names[-1] == 'blocks' and not {'', 'pool', 'dropout', 'head'} & set(names) and len(set(names)) == len(names)
    assert names.index('stem.0') < names.index('stem') < names.index('blocks.0.0') < names.index('blocks.0') < names.index('blocks.1') < names.index('blocks')
    for n in names: assert maps_of(model, n, x, 1).raw.shape == maps_of(model, n, x, 0).raw.shape
    assert 'blocks' not in layer_candidates(model, images(1, (16, 16))) and 'blocks' not in layer_candidates(model, images(1, (16, 64)))

def test_layer_candidates_are_in_order_of_execution():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.early, self.unused = nn.Conv2d(2, 2, 3), nn.Conv2d(1, 2, 3), nn.Conv2d(1, 1, 1)
            self.head = nn.Linear(2, 2)
        def forward(self, x): return self.head(self.late(self.early(x)).mean((2, 3)))
    model, x = Backwards(), images(2, (9, 9), torch.float32)
    assert layer_candidates(model, x) == ['early', 'late']
    close(maps_of(model, '', x, 1).raw, maps_of(model, 'late', x, 1).raw, 0)

def test_layer_candidates_leave_the_model_as_it_was():
    model = network().train()
    model.blocks.eval()
    with unchanged(model): layer_candidates(model, images())
    with pytest.raises(TypeError), unchanged(model): layer_candidates(model, images().byte())

@pytest.mark.parametrize('name', ['small', 'resnet18', 'densenet121', 'mobilenet_v3_small'])
def test_no_layer_named_is_the_last_candidate(name):
    model, x = network(name), images(2)
    close(maps_of(model, '', x, 1).raw, maps_of(model, layer_candidates(model, x)[-1], x, 1).raw, 0)

@pytest.mark.parametrize('layer', ['block', 'blocks.7', 'Blocks', 'features', 'blocks.', '.', 'conv1'])
def test_wrong_layer_lists_the_candidates(layer):
    with pytest.raises(ValueError, match=r"(?s)'" + layer + r"'.*blocks\.0.*blocks\.1"): maps_of(network(), layer, images(1), 1)

def test_unknown_method_lists_the_methods():
    for method in ('scorecam', 'GradCAM', '', None):
        with pytest.raises(ValueError, match=r'gradcam.*hirescam'): GradCAM(network(), 'blocks', method)

class Twice(nn.Module):
    "One layer is used twice, one never, one in a place where nothing depends on it."
    def __init__(self):
        super().__init__()
        self.first, self.shared, self.unused, self.aside, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3), nn.Linear(4, 2)
    def forward(self, x):
        x = self.first(x)
        self.aside(x)
        return self.head(self.shared(self.shared(x)).relu().mean((2, 3)))

@pytest.mark.parametrize(('layer', 'why'), [('shared', 'once|twice'), ('unused', 'not (reached|called|used)'), ('aside', 'depend'), ('head', r'\(N, ?C, ?h, ?w\)|4')])
def test_layers_that_cannot_be_explained(layer, why):
    model, x = Twice(), images(2, (12, 12), torch.float32)
    with unchanged(model), pytest.raises(ValueError, match=why): maps_of(model, layer, x, 1)
    with GradCAM(model, layer) as cam:
        for _ in range(2):  # the second time, too
            with pytest.raises(ValueError, match=why): cam(x, 1)
    assert maps_of(model, 'first', x, 1).raw.shape == (2, 10, 10)

@pytest.mark.parametrize('head', [nn.Linear(96, 1), nn.Sequential(nn.Linear(96, 1), nn.Flatten(0)), nn.Unflatten(1, (48, 2))])
def test_a_model_with_a_single_logit(head):
    model = network()
    model.head = head.double()
    for target in (None, 0, 1):
        with unchanged(model), pytest.raises(ValueError, match='logit'): maps_of(model, 'blocks', images(2), target)


# What a call leaves alone

KINDS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks', '_forward_hooks_with_kwargs', '_forward_hooks_always_called')

def hooks(model): return {(n, k): list(getattr(m, k)) for n, m in model.named_modules() for k in KINDS if getattr(m, k, None)}

@contextlib.contextmanager
def unchanged(model):
    "Nothing about the model or about autograd differs afterwards, whatever happens inside."
    def look():
        return dict(hooks=hooks(model), flags=[m.training for m in model.modules()], modes=(torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
                    gradients=[(p.requires_grad, id(p.grad)) for p in model.parameters()], keys=[sorted(vars(m)) for m in model.modules()])
    before, state = look(), {k: v.clone() for k, v in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    try: yield
    finally:
        assert look() == before
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert all(map(torch.equal, gradients, (p.grad for p in model.parameters() if p.grad is not None)))

@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('name', ['small', 'resnet18', 'flat'])
def test_the_model_is_left_as_it_was(name, method):
    "Training flags module by module, batchnorm statistics, gradients that were there and gradients that were not, who requires one, hooks."
    model, x = network(name), images(3, (24, 24) if name == 'flat' else (64, 64))
    expected = maps_of(model, '', x, 1, method).raw
    model.train()
    for i, m in enumerate(model.modules()): m.training = i % 3 > 0
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 2 > 0)
        if i % 3 == 1: p.grad = torch.full_like(p, i)
    seen = []
    model.register_forward_hook(lambda *a: seen.append(1))
    with unchanged(model): close(maps_of(model, '', x, 1, method).raw, expected, 0)
    assert seen and hooks(model)

def test_frozen_parameters():
    model, x = network(), images()
    expected = maps_of(model, 'blocks.0', x, 1).raw
    model.requires_grad_(False)
    with unchanged(model): close(maps_of(model, 'blocks.0', x, 1).raw, expected, 0)

@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_whatever_the_caller_does_about_gradients(mode):
    model, x = network(), images()
    for layer in ('stem.2', 'blocks.0', 'blocks', ''):
        expected = maps_of(model, layer, x, 1).raw
        with mode(), unchanged(model):
            close(maps_of(model, layer, x, 1).raw, expected, 0)
            close(maps_of(model, layer, x * 1, lambda z: z[:, 1]).raw, expected, 0)  # a tensor made under the mode
            assert layer_candidates(model, x * 1)[-1] == 'blocks'
    with torch.inference_mode(): inference = images()
    close(maps_of(model, 'stem', inference, 1).raw, maps_of(model, 'stem', x, 1).raw, 0)

def test_the_input_is_left_as_it_was():
    model, x = network(), images().requires_grad_()
    before = x.detach().clone()
    for layer in ('scale', 'blocks'): maps_of(model, layer, x, 1)
    assert torch.equal(x, before) and x.grad is None and x.is_leaf and x.requires_grad
    inplace = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 2)).double()  # what the model itself does to its input is its own affair
    assert maps_of(inplace, '1', images(2, (8, 8)), 1).raw.shape == (2, 6, 6)

class Wall(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 1
    @staticmethod
    def backward(ctx, g): raise AssertionError('a gradient below the target layer')

class Walled(nn.Module):
    def __init__(self, below): super().__init__(); self.below = below
    def forward(self, x): return Wall.apply(self.below(x))

@pytest.mark.parametrize('method', METHODS)
def test_no_gradient_below_the_layer(method):
    model, x = network(), images().requires_grad_()
    expected = maps_of(model, 'blocks.1', x, 0, method).raw
    model.blocks[0] = Walled(model.blocks[0])
    def touched(g): raise AssertionError('a gradient of a parameter')
    for p in model.parameters(): p.register_hook(touched)
    with pytest.raises(AssertionError, match='a gradient'): model(x).sum().backward()
    with unchanged(model): close(maps_of(model, 'blocks.1', x, 0, method).raw, expected, 0)

def kept_for_backward(work):
    "Bytes that autograd keeps, parameters left out."
    total = 0
    def pack(t):
        nonlocal total
        if not isinstance(t, nn.Parameter) and t._base is None: total += t.numel() * t.element_size()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): work()
    return total

def test_less_is_kept_for_backward_than_by_grad_cam():
    model, x = network('resnet18'), images(4)
    ours = kept_for_backward(lambda: maps_of(model, 'network.layer4', x, 1))
    assert ours < .05 * kept_for_backward(lambda: peer(model, 'network.layer4', x, [1] * 4, 'gradcam'))
    assert ours < .2 * kept_for_backward(lambda: maps_of(model, 'network.layer1', x, 1))

def test_channels_last():
    model, x = network(dtype=torch.float32), images(3, dtype=torch.float32)
    for layer in ('stem', 'blocks'):
        plain = maps_of(model, layer, x, 1).raw
        close(maps_of(model, layer, x.contiguous(memory_format=torch.channels_last), 1).raw, plain, 1e-4)
        close(maps_of(copy.deepcopy(model).to(memory_format=torch.channels_last), layer, x.contiguous(memory_format=torch.channels_last), 1).raw, plain, 1e-4)
        close(maps_of(model, layer, x.transpose(2, 3).contiguous().transpose(2, 3), 1).raw, plain, 1e-4)

def test_pixels_instead_of_floats():
    model = network(dtype=torch.float32)
    with unchanged(model), pytest.raises(TypeError): maps_of(model, 'blocks', (images() * 255).byte(), 1)


# The context

def test_only_inside_with():
    model, x = network(), images()
    cam = GradCAM(model, 'blocks')
    with pytest.raises(RuntimeError, match='with'): cam(x, 1)
    assert not hooks(model)
    with cam: expected = cam(x, 1).raw
    with pytest.raises(RuntimeError, match='with'): cam(x, 1)
    with cam: close(cam(x, 1).raw, expected, 0)
    assert not hooks(model)

@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, IndexError])
def test_an_exception_passes_and_the_hooks_go(error):
    model, x = network(), images()
    with unchanged(model), pytest.raises(error, match='own'):
        with GradCAM(model, 'blocks') as cam:
            cam(x, 1)
            raise error('own')

class Breaks(nn.Module):
    def __init__(self, module, error): super().__init__(); self.module, self.error, self.broken = module, error, True
    def forward(self, x):
        if self.broken: raise self.error('within')
        return self.module(x)

@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('where', ['stem', 'head'])  # below and above the layer
def test_an_exception_in_the_model(where, error):
    "The mode of autograd and of the modules are back as soon as the call ends, and the next call works."
    model, x = network().train(), images()
    expected = maps_of(model, 'blocks', x, 1).raw
    setattr(model, where, Breaks(getattr(model, where), error))
    with unchanged(model):
        with GradCAM(model, 'blocks') as cam:
            for mode in (torch.no_grad, torch.enable_grad):
                with mode():
                    flags, enabled = [m.training for m in model.modules()], torch.is_grad_enabled()
                    with pytest.raises(error, match='within'): cam(x, 1)
                    assert torch.is_grad_enabled() == enabled and [m.training for m in model.modules()] == flags
            model.get_submodule(where).broken = False
            close(cam(x, 1).raw, expected, 0)

def test_an_exception_in_the_target_function():
    model, x = network().train(), images()
    def broken(_): raise ZeroDivisionError('mine')
    with unchanged(model), GradCAM(model, 'blocks') as cam:
        with pytest.raises(ZeroDivisionError, match='mine'): cam(x, broken)
        assert model.training and cam(x, 1).raw.any()

def test_the_model_can_be_used_inside_the_context():
    "Answers and gradients of a caller's own forward pass are what they are without it."
    model, x = network(), images()
    def gradients(): return torch.autograd.grad(model(x)[:, 1].sum(), list(model.parameters()))
    answer, expected = model(x), gradients()
    with GradCAM(model, 'blocks') as cam:
        before = cam(x, 1).raw
        assert torch.equal(model(x), answer) and all(map(torch.allclose, gradients(), expected))
        with torch.no_grad(): assert not model(x).requires_grad
        close(cam(x, 1).raw, before, 0)

def test_two_contexts_on_one_model():
    model, x = network(), images()
    low, high = (maps_of(model, n, x, 1).raw for n in ('stem', 'blocks'))
    with GradCAM(model, 'stem') as a, GradCAM(model, 'blocks') as b, GradCAM(model, 'blocks', 'hirescam') as c:
        for _ in range(2):
            for cam, expected in ((a, low), (b, high), (c, high)): close(cam(x, 1).raw, expected, 1e-6)
    assert not hooks(model)

def test_sizes_may_change_from_call_to_call():
    model = network()
    with GradCAM(model) as cam:
        for size, n in [((64, 64), 1), ((96, 64), 4), ((64, 64), 2)]: close(cam(images(n, size), 1).raw, maps_of(model, 'blocks', images(n, size), 1).raw, 1e-6)

def test_repeated_use_does_not_grow():
    model, x = network(dtype=torch.float32), images(4, dtype=torch.float32)
    def tensors(): gc.collect(); return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    def once():
        with GradCAM(model, 'stem') as cam: return cam(x, 1).up.sum() + cam(x).up.sum()
    for _ in range(20): once()
    count, size, objects = tensors(), psutil.Process().memory_info().rss, len(gc.get_objects())
    for _ in range(100): once()
    assert tensors() <= count and len(gc.get_objects()) <= objects + 50 and not hooks(model)
    assert psutil.Process().memory_info().rss - size < 30e6  # what one call keeps for backward, 100 times over, would be 250 MB

def test_nothing_keeps_the_model_alive():
    model = network()
    with GradCAM(model, 'blocks') as cam: maps = cam(images(), 1)
    alive = weakref.ref(model)
    del model, cam
    gc.collect()
    assert alive() is None and maps.up.any()


# Many images

def pixels_of(n=10, size=(64, 64), seed=0):
    p = np.random.default_rng(seed).integers(0, 256, (n, 1, *size), np.uint8)
    p.flags.writeable = False  # as a memory map comes
    return p

@pytest.mark.parametrize('batch', [1, 4, 10, 64])
def test_explain_is_the_class_over_batches(batch):
    model, p, each = network(dtype=torch.float32), pixels_of(), np.arange(10) % 2
    x = to_float(torch.from_numpy(p.copy()))
    for target in (None, 1, each, each.tolist(), torch.from_numpy(each), lambda z: z[:, 1] - z[:, 0]):
        expected = maps_of(model, 'blocks.0', x, target)
        with unchanged(model): found = explain(model, p, target, 'blocks.0', batch_size=batch)
        close(found.raw, expected.raw, 1e-4)
        assert np.allclose(found.probabilities, expected.probabilities, atol=1e-5) and np.array_equal(found.zero, expected.zero)
        assert found.classes is None if callable(target) else np.array_equal(found.classes, expected.classes)
        assert found.up.shape == (10, 64, 64)
    close(explain(model, p, 1, method='hirescam', batch_size=batch).raw, maps_of(model, '', x, 1, 'hirescam').raw, 1e-4)

def test_explain_needs_a_class_for_each_image():
    for wrong in ([1] * 9, [1] * 11, [1, 0]):
        with pytest.raises(ValueError): explain(network(dtype=torch.float32), pixels_of(), wrong, batch_size=4)


# Display

def test_scale_map():
    m = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32) * np.array([3, .001, 0, 1e-30], np.float32)[:, None, None]
    before, s = m.copy(), scale_map(m)
    assert s.shape == m.shape and s.max((1, 2)) == pytest.approx([1, 1, 0, 1]) and np.array_equal(m, before) and s.min() >= 0
    assert np.allclose(s[0], m[0] / m[0].max()) and np.allclose(scale_map(m[1]), s[1]) and scale_map(m[2]).shape == (5, 6) and not scale_map(m[2]).any()
    assert s[0].min() > 0  # the minimum is not subtracted

def test_overlay():
    gray, heat = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5, np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)
    for alpha in (0, .4, 1):
        o = overlay(gray, heat, alpha)
        assert o.shape == (6, 8, 3) and o.dtype == np.uint8
    assert np.array_equal(overlay(gray, heat, 0), np.repeat(gray[..., None], 3, 2))
    assert np.ptp(overlay(gray, heat, .8)[-1, -1].astype(int)) > 10  # in color
    a, b = (overlay(np.full((6, 8), v, np.uint8), np.ones((6, 8)), 1.) for v in (0, 255))
    assert np.array_equal(a, b)  # opaque
    with pytest.raises(ValueError): overlay(gray, heat[:5], .5)


# Measures

def test_lung_mass_ratio():
    rng, masks = np.random.default_rng(0), np.zeros((5, 8, 10), bool)
    masks[:, 2:6, 3:7] = True  # a fifth
    maps = np.ones((5, 8, 10), np.float32)
    maps[1] = masks[1] * rng.random((8, 10))
    maps[2] = ~masks[2]
    maps[3] = 0
    maps[4] = 1 + 2 * masks[4]
    ratio = lung_mass_ratio(maps, masks)
    assert ratio.dtype == np.float64 and ratio == pytest.approx([1, 5, 0, np.nan, 3 / 1.4], nan_ok=True)
    assert lung_mass_ratio(maps * np.float32(1e-20), masks) == pytest.approx(ratio, nan_ok=True)
    assert lung_mass_ratio(maps[:2], np.ones_like(masks[:2])) == pytest.approx([1, 1]) and np.isnan(lung_mass_ratio(maps[:2], np.zeros_like(masks[:2]))).all()
    for wrong in (masks[:4], masks[:, :7], masks.transpose(0, 2, 1), masks[0]):
        with pytest.raises(ValueError): lung_mass_ratio(maps, wrong)

def test_lung_mass_ratio_of_many_pixels_is_exact():
    m = np.full((1, 2048, 2048), .1, np.float32)
    mask = np.zeros(m.shape, bool)
    mask[:, :1000] = True
    assert lung_mass_ratio(m, mask) == pytest.approx([1], abs=1e-6)

def test_pointing_game():
    maps, masks = np.zeros((4, 6, 7), np.float32), np.zeros((4, 6, 7), bool)
    maps[0, 2, 3], maps[1, 5, 6], maps[3, 0, 0] = 1, 1e-9, 1
    masks[:3, 2:4, 3:5] = True
    masks[2] = True
    hits = pointing_game(maps, masks)
    assert hits.dtype == bool and hits.tolist() == [True, False, False, False]
    with pytest.raises(ValueError): pointing_game(maps, masks[:, :5])

def test_auc():
    x = np.linspace(0, 1, 21)
    curves = np.stack([np.ones(21), x, 1 - x, x**2, np.zeros(21)])
    assert auc(curves) == pytest.approx([np.trapezoid(c, x) for c in curves]) and auc(curves)[:3] == pytest.approx([1, .5, .5])
    assert auc(np.array([[0., 1.]])) == pytest.approx([.5])
    rng = np.random.default_rng(0).random((3, 8))
    assert auc(rng) == pytest.approx(np.trapezoid(rng, np.linspace(0, 1, 8)))

class Patch(nn.Module):
    "Reads a patch of 8 x 8: the brighter, the more of class 1."
    def __init__(self): super().__init__(); self.gain = nn.Parameter(torch.tensor(8.)); self.seen = []
    def forward(self, x):
        if x.dtype != torch.float32 or x.max() > 1: raise TypeError('float from 0 to 1')
        self.seen.append(x.detach().clone())
        s = self.gain * (x[:, 0, 4:12, 18:26].mean((1, 2)) - .5)
        return torch.stack([-s, s], 1)

def bright_patches(n=3, noise=20):
    p = np.random.default_rng(0).integers(0, noise, (n, 1, 32, 40)).astype(np.uint8)
    p[:, :, 4:12, 18:26] += 220
    p.flags.writeable = False
    patch = np.zeros((n, 32, 40), np.float32)
    patch[:, 4:12, 18:26] = 1
    return p, patch

def probability(model, p, c):
    with torch.no_grad(): return model(to_float(torch.from_numpy(p.copy()))).double().softmax(1).numpy()[:, c]

@pytest.mark.parametrize('steps', [1, 5, 16])
def test_deletion_and_insertion_end_at_the_image(steps):
    model, (p, patch) = Patch(), bright_patches()
    with unchanged(model):
        for c in (1, 0):
            a, b = (deletion_insertion(model, p, m, np.full(3, c), steps) for m in (patch, 1 - patch))
            for curves in (a, b):
                for k in ('deletion', 'insertion'): assert curves[k].shape == (3, steps + 1) and curves[k].dtype == np.float64
                whole = pytest.approx(probability(model, p, c), abs=1e-6)
                assert curves['deletion'][:, 0] == whole and curves['insertion'][:, -1] == whole
                assert curves['deletion'][:, -1] == pytest.approx(a['deletion'][:, -1], abs=1e-6)  # nothing left of the image, whatever the map
                assert curves['insertion'][:, 0] == pytest.approx(a['insertion'][:, 0], abs=1e-6)
    mixed = deletion_insertion(model, p, patch, np.array([1, 0, 1]), steps)['deletion']
    assert mixed[:, 0] == pytest.approx([probability(model, p, c)[i] for i, c in enumerate((1, 0, 1))], abs=1e-6)

def test_a_perfect_map_wins():
    model, (p, patch) = Patch(), bright_patches(8)
    scores = {}
    for name, m in dict(perfect=patch + 0, inverse=1 - patch, random=baseline_maps(p, 'random', 0)).items():
        curves = deletion_insertion(model, p, m, np.ones(8, int), 20)
        scores[name] = {k: auc(v).mean() for k, v in curves.items()}
    assert scores['perfect']['deletion'] < scores['random']['deletion'] - .1 < scores['inverse']['deletion'] - .2
    assert scores['perfect']['insertion'] > scores['random']['insertion'] + .1 > scores['inverse']['insertion'] + .2

def test_deletion_and_insertion_take_pixels_in_the_order_of_the_map():
    "Every picture shown to the model differs from the image in the highest or in all but the highest pixels, evenly many more from step to step."
    rng, model = np.random.default_rng(1), Patch()
    p = rng.choice(np.array([60, 250], np.uint8), (1, 1, 32, 40))
    ranks = rng.permutation(32 * 40).reshape(1, 32, 40).astype(np.float32)
    deletion_insertion(model, p, ranks, [1], 8)
    seen = (torch.cat(model.seen)[:, 0].numpy() * 255).round().astype(np.uint8)
    counts = {'deletion': [], 'insertion': []}
    for picture in seen:
        gone = picture != p[0, 0]
        inside, outside = ranks[0][gone], ranks[0][~gone]
        if not outside.size or inside.size and inside.min() > outside.max(): counts['deletion'].append(inside.size)
        if not inside.size or outside.size and inside.max() < outside.min(): counts['insertion'].append(inside.size)
    for k, v in counts.items(): assert {*v} >= {160 * s for s in range(1, 8)}, (k, v)
    assert seen.shape == (18, 32, 40)

def test_deletion_and_insertion_refuse_maps_that_do_not_fit():
    p, patch = bright_patches()
    for wrong in (patch[:2], patch[:, :16], patch.transpose(0, 2, 1)):
        with pytest.raises(ValueError): deletion_insertion(Patch(), p, wrong, [1, 1, 1], 4)

def test_baseline_maps():
    p = pixels_of(6, (40, 56))
    for kind in ('random', 'gaussian', 'sobel'):
        m = baseline_maps(p, kind, 0)
        assert m.shape == (6, 40, 56) and m.dtype == np.float32 and (m >= 0).all() and m.any((1, 2)).all()
        assert m == pytest.approx(baseline_maps(p, kind, 0), rel=1e-6)  # OpenCV's magnitude rounds as the memory happens to lie
    r = baseline_maps(p, 'random', 0)
    assert not np.array_equal(r, baseline_maps(p, 'random', 1)) and not np.allclose(r[0], r[1])
    many = baseline_maps(pixels_of(200, (32, 32)), 'random', 3)
    assert many.std() > .05 and np.abs(many.mean(0) / many.mean() - 1).max() < .3  # no place is preferred
    g = baseline_maps(p, 'gaussian', 0)
    assert np.allclose(g[0], g[1]) and np.allclose(g[0], g[0, ::-1], atol=1e-6) and np.allclose(g[0], g[0, :, ::-1], atol=1e-6)
    assert set(map(tuple, np.argwhere(g[0] > .9999 * g[0].max()))) <= {(y, x) for y in (18, 19, 20, 21) for x in (26, 27, 28, 29)} and g[0, 0, 0] < .2 * g[0].max()
    assert (np.diff(g[0, 20:, 28]) <= 0).all() and (np.diff(g[0, 20, 28:]) <= 0).all()
    flat, edge = np.full((1, 1, 40, 56), 90, np.uint8), np.full((1, 1, 40, 56), 90, np.uint8)
    edge[..., 20:] = 200
    assert not baseline_maps(flat, 'sobel', 0).any() and set(np.argwhere(baseline_maps(edge, 'sobel', 0)[0] > 0)[:, 1]) == {19, 20}
    assert baseline_maps(edge.swapaxes(2, 3), 'sobel', 0)[0] == pytest.approx(baseline_maps(edge, 'sobel', 0)[0].T)
    with pytest.raises(ValueError, match='random.*gaussian.*sobel'): baseline_maps(p, 'centre', 0)


def test_cover_takes_the_hottest_part_and_nothing_else():
    p, rng = pixels_of(3, (16, 20)), np.random.default_rng(5)
    m = rng.permutation(3 * 320).reshape(3, 16, 20).astype(np.float32)
    for share in (0, .1, .5, 1):
        out = cover(p, m, share)
        n = round(share * 320)
        for before, after, heat in zip(p[:, 0], out[:, 0], m):
            hot = heat >= np.sort(heat.ravel())[::-1][n - 1] if n else np.zeros(heat.shape, bool)
            assert np.array_equal(after[hot], blur(before)[hot]) and np.array_equal(after[~hot], before[~hot])
    assert out.dtype == np.uint8 and out.shape == p.shape
    with pytest.raises(ValueError): cover(p, m[:2], .1)

def test_center():
    m = np.zeros((3, 10, 20), np.float32)
    m[0, 4, 7], m[1] = 1e-20, 5
    c = center(m)
    assert c[0] == pytest.approx([.45, .375]) and c[1] == pytest.approx([.5, .5]) and np.isnan(c[2]).all()
    assert center(m * 9)[:2] == pytest.approx(c[:2])
    both = np.zeros((1, 10, 10))
    both[0, 0, 0], both[0, 9, 9] = 1, 3
    assert center(both)[0] == pytest.approx([.05 + .75 * .9] * 2)

def test_log_odds_are_what_the_softmax_came_from():
    z = np.linspace(-9, 9, 7)
    assert log_odds(1 / (1 + np.exp(-z))) == pytest.approx(z)


# Forgetting

def test_forgetting_goes_from_the_head_down_and_leaves_the_dice():
    model = network(dtype=torch.float32)
    before, dice = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    changed, names = [], []
    for name in forgetting(model, 3):
        names.append(name)
        changed.append({k for k, v in model.state_dict().items() if not torch.equal(v, before[k])})
    assert torch.equal(torch.get_rng_state(), dice) and names[0] == 'head' and names[-1].startswith('stem')
    assert all(a < b for a, b in zip(changed, changed[1:])) and {k.split('.')[0] for k in changed[0]} == {'head'}
    assert {n + '.weight' for n in names} <= changed[-1]
    twin = network(dtype=torch.float32)
    for _ in forgetting(twin, 3): pass
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))

def test_similarity_against_scipy_and_what_has_none():
    from scipy.stats import spearmanr
    model, p = network(dtype=torch.float32), pixels_of(4)
    a, b = (explain(model, p, 1, layer) for layer in ('blocks', 'blocks'))
    b = type(b)(b.raw[::-1].copy(), b.size, b.classes, b.probabilities)
    rank, ssim = similarity(a, b)
    assert rank == pytest.approx([spearmanr(u.ravel(), v.ravel()).statistic for u, v in zip(a.raw, b.raw)])
    assert (np.abs(ssim) <= 1).all() and similarity(a, a)[0] == pytest.approx(np.ones(4)) and similarity(a, a)[1] == pytest.approx(np.ones(4), abs=1e-4)
    a.raw[1] = 0
    assert np.isnan([s[1] for s in similarity(a, b)]).all() and not np.isnan(similarity(a, b)[0][[0, 2, 3]]).any()

def test_the_check_forgets_in_a_copy():
    model, p = network(dtype=torch.float32), pixels_of(3)
    with unchanged(model): check = randomization_check(model, p, repeats=2)
    assert list(check) == ['repeat', 'forgotten', 'layer', 'image', 'spearman', 'ssim']
    layers = check.layer.nunique()
    assert len(check) == 2 * layers * 3 and check.forgotten.max() == layers and check[check.forgotten == 1].layer.eq('head').all()
    pd.testing.assert_frame_equal(check, randomization_check(model, p, repeats=2))


# Samples

def table(cells):
    "Predictions with these probabilities of NORMAL (n) and PNEUMONIA (p) images."
    rows = [(f'{c}{i}.jpeg', int(c == 'p'), q) for c, v in cells.items() for i, q in enumerate(v)]
    return pd.DataFrame([dict(path=f'test/{p}', patient=p, split='test', label=y, probability=q) for p, y, q in rows])

def test_samples_are_the_median_of_each_cell():
    df = table(dict(n=[.1, .3, .2, .95, .6, .7], p=[.9, .8, .99, .4, .0, .45]))  # threshold .5: 3 TN, 3 FP, 3 TP, 3 FN
    s = pick_samples(df, .5)
    assert list(s.columns) == ['cell', 'path', 'label', 'probability'] and s.cell.tolist() == ['TP', 'FP', 'TN', 'FN']
    assert s.probability.tolist() == [.9, .7, .2, .4] and s.label.tolist() == [1, 0, 0, 1] and s.path.tolist() == ['test/p0.jpeg', 'test/n5.jpeg', 'test/n2.jpeg', 'test/p3.jpeg']
    assert pick_samples(df, .75).set_index('cell').probability.to_dict() == {'TP': .9, 'FP': .95, 'TN': pytest.approx(.3), 'FN': .4}

def test_samples_at_the_threshold_are_positive():
    s = pick_samples(table(dict(n=[.5], p=[.5])), .5)
    assert s.cell.tolist() == ['TP', 'FP']

def test_an_empty_cell_is_absent():
    assert pick_samples(table(dict(n=[.1], p=[.9])), .5).cell.tolist() == ['TP', 'TN']
    assert pick_samples(table(dict(n=[.1], p=[.2])), .5).cell.tolist() == ['TN', 'FN']
    none = pick_samples(table(dict(n=[.1], p=[.2])).iloc[:0], .5)
    assert len(none) == 0 and list(none.columns) == ['cell', 'path', 'label', 'probability']

def test_samples_do_not_depend_on_the_order_of_rows():
    rng = np.random.default_rng(0)
    for seed in range(12):
        n = int(rng.integers(3, 40))
        df = table(dict(n=rng.random(n).round(1), p=rng.random(n).round(1)))  # many ties
        a, b = pick_samples(df, .5), pick_samples(df.sample(frac=1, random_state=seed).set_index(pd.Index(rng.permutation(2 * n))), .5)
        pd.testing.assert_frame_equal(a.reset_index(drop=True), b.reset_index(drop=True))
        for cell, path, label, q in a.itertuples(index=False):
            assert df.set_index('path').loc[path, ['label', 'probability']].tolist() == [label, q]
            members = df[(df.label == label) & ((df.probability >= .5) == (cell in ('TP', 'FP')))].probability.sort_values().to_numpy()
            assert q in (members[(len(members) - 1) // 2], members[len(members) // 2]), (seed, cell)


# A shortcut is found

def test_the_map_is_where_the_answer_comes_from():
    "The same phantoms, sick or not, with the corner's letter or not, independently. A network that learned the letter points at it; one that learned the disease does not."
    n, size = 160, 64
    sick, marked = np.arange(n) % 2, np.arange(n) // 2 % 2
    phantoms = [make_phantom(i, int(s), size, marker=bool(m)) for i, (s, m) in enumerate(zip(sick, marked))]
    x = to_float(torch.from_numpy(np.stack([p.image for p in phantoms])[:, None]))
    both = np.flatnonzero(sick & marked)
    corner = np.stack([cv2.dilate(phantoms[i].marker_mask.astype(np.uint8), np.ones((7, 7))) > 0 for i in both])
    mass, hits = {}, {}
    for what, y in dict(marker=marked, disease=sick).items():
        torch.manual_seed(0)
        model, y = SmallCNN(), torch.from_numpy(y)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for _ in range(16):
            for b in torch.randperm(n).split(16):
                loss = nn.functional.cross_entropy(model(x[b]), y[b])
                optimizer.zero_grad(); loss.backward(); optimizer.step()
        maps = maps_of(model, 'blocks.0', x[both], 1)
        assert (maps.probabilities[:, 1] > .5).mean() > .8, what
        mass[what], hits[what] = np.nanmedian(lung_mass_ratio(maps.up, corner)), pointing_game(maps.up, corner).mean()
    print(mass, hits)
    assert mass['marker'] > 3 and mass['disease'] < 1.2 and hits['marker'] > .6 and hits['disease'] < .2

def test_sets_with_other_letters_are_the_same_children(tmp_path, monkeypatch):
    "Far from the letter they are equal; in its corner, whoever has it is brighter."
    monkeypatch.setenv('CXR_LAB_CACHE', str(tmp_path))
    monkeypatch.setattr('cxr_lab.phantom.write_marked', partial(write_marked, size=64))
    sources = marked_phantoms((1., -1.), n=60)
    (ill, x), (well, z) = ((index, pixel_cache(s.images, index, 64)[:, 0].astype(int)) for s in sources for index in [index_images(s.images)[0]])
    assert ill.drop(columns=['bytes', 'sha256']).equals(well.drop(columns=['bytes', 'sha256'])) and len(ill) == 102
    apart, box = x - z, marker_boxes(102, 64)
    assert not apart[:, 32:, 32:].any()
    brighter = apart[box].reshape(102, -1).sum(1) > 0
    assert (brighter == (ill.label == 1)).all()
    assert all((s.lung_masks/p).with_suffix('.png').is_file() for s in sources for p in ill.path)


# What the lesson has to say

def test_what_grad_cam_is_in_a_hundred_to_two_hundred_words():
    cells = json.loads((Path(__file__).parents[1]/'nbs/06_gradcam.ipynb').read_text(encoding='utf-8'))['cells']
    text, = (t for t in (''.join(c['source']) for c in cells) if t.startswith('## What Grad-CAM is'))
    prose = re.sub(r'(?s)\$\$.*?\$\$|\]\(\S+\)|^## .*?\n', ' ', text)
    assert 100 <= len(prose.split()) <= 200
