"Geometry against SciPy, exposure against its formula, randomness against its promises."
import numpy as np
import pytest
import torch
from scipy import ndimage

from cxr_lab import augment
from cxr_lab.augment import NEW_STRESSES, STRESSES, Augment, compare_recipes, expose, move, stress_test
from cxr_lab.model import SmallCNN
from cxr_lab.scores import METRICS, score
from cxr_lab.networks import predict


def images(n, side=33, seed=0): return torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(seed))

def t(*values): return torch.tensor(values, dtype=torch.float32)


# Geometry

def reference(image, angle, factors, shift):
    "The same by SciPy, written from the description: stretch, turn clockwise, shift; then invert."
    side, a = image.shape[0], np.deg2rad(angle)
    turn = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])  # (row, column), rows count downward
    inverse = np.linalg.inv(turn @ np.diag(factors[::-1]))
    center = np.array([(side - 1) / 2] * 2)
    return ndimage.affine_transform(image, inverse, center - inverse @ (center + side * np.array(shift[::-1])), order=1, mode='nearest')

@pytest.mark.parametrize('side', [32, 33])
def test_move_against_scipy(side):
    rng, n = np.random.default_rng(side), 40
    x = images(n, side)
    angle, factors, shift = rng.uniform(-60, 60, n), rng.uniform(.5, 2, (n, 2)), rng.uniform(-.3, .3, (n, 2))
    moved = move(x, *(torch.tensor(v, dtype=torch.float32) for v in (angle, factors, shift)))
    for i in range(n):
        expected = reference(x[i, 0].numpy().astype(float), angle[i], factors[i], shift[i])
        assert np.abs(moved[i, 0].numpy() - expected).max() < 1e-3

def test_directions():
    x = torch.zeros(1, 1, 41, 41); x[0, 0, 20, 34] = 1  # to the right of the center
    grid = torch.arange(41.)
    def spot(angle=0., factors=(1., 1.), shift=(0., 0.)):
        m = move(torch.nn.functional.avg_pool2d(x, 3, 1, 1), t(angle), t(*factors).view(1, 2), t(*shift).view(1, 2))[0, 0]
        return [((m * g).sum() / m.sum()).item() for g in (grid[:, None], grid)]  # row, column of the center of mass
    assert spot() == pytest.approx([20, 34], abs=.1)
    assert spot(angle=90) == pytest.approx([34, 20], abs=.1), 'clockwise: from the right to below'
    assert spot(shift=(.1, 0)) == pytest.approx([20, 38.1], abs=.2) and spot(shift=(0, .1)) == pytest.approx([24.1, 34], abs=.2)
    assert spot(factors=(.5, 1)) == pytest.approx([20, 27], abs=.1) and spot(factors=(1, .5)) == pytest.approx([20, 34], abs=.1)

def neutral(n): return torch.zeros(n), torch.ones(n, 2), torch.zeros(n, 2)

def test_move_neutral_is_identity_and_edges_repeat():
    x = images(3)
    assert torch.allclose(move(x, *neutral(3)), x, atol=1e-5)
    assert torch.allclose(move(torch.full((1, 1, 32, 32), .7), t(30), torch.full((1, 2), .5), t(.2, .2).view(1, 2)), torch.tensor(.7)), 'no black corner tells how an image was moved'

def test_turning_back():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 65), torch.linspace(-1, 1, 65), indexing='ij')
    blob = torch.exp(-8 * ((x - .2)**2 + (y + .1)**2))[None, None]
    there = move(blob, t(25), torch.ones(1, 2), torch.zeros(1, 2))
    assert torch.allclose(move(there, t(-25), torch.ones(1, 2), torch.zeros(1, 2)), blob, atol=.02) and (there - blob).abs().max() > .2


# Exposure

def test_expose_closed_forms():
    x = images(4) * .8 + .1
    one, zero = torch.ones(4), torch.zeros(4)
    assert torch.allclose(expose(x, one, one, zero, zero), x, atol=1e-6)
    gamma = t(.5, 1, 2, 3)
    assert torch.allclose(expose(x, gamma, one, zero, zero), x ** gamma.view(-1, 1, 1, 1), atol=1e-5)
    contrast = t(.3, .5, .8, 1.1)
    out, mean = expose(x, one, contrast, zero, zero), x.mean((2, 3), keepdim=True)
    assert torch.allclose(out, (mean + contrast.view(-1, 1, 1, 1) * (x - mean)).clamp(0, 1), atol=1e-5)
    bright = t(-.2, -.05, .1, .3)
    assert torch.allclose(expose(x, one, one, bright, zero), (x + bright.view(-1, 1, 1, 1)).clamp(0, 1), atol=1e-5)
    g, c, b = t(.7, 1.3, 2, .5), t(.6, 1.2, .9, 1), t(.05, -.1, 0, .2)
    y = x ** g.view(-1, 1, 1, 1)
    expected = (y - y.mean((2, 3), keepdim=True)) * c.view(-1, 1, 1, 1) + y.mean((2, 3), keepdim=True) + b.view(-1, 1, 1, 1)
    assert torch.allclose(expose(x, g, c, b, zero), expected.clamp(0, 1), atol=1e-5), 'the film curve comes first'

def test_noise_has_the_asked_standard_deviation():
    torch.manual_seed(0)
    x = torch.full((3, 1, 128, 128), .5)
    out = expose(x, torch.ones(3), torch.ones(3), torch.zeros(3), t(0, .03, .1))
    assert torch.equal(out[0], x[0]) and out[1].std().item() == pytest.approx(.03, rel=.05) and out[2].std().item() == pytest.approx(.1, rel=.05)

def test_black_and_white_survive_every_gamma():
    x = torch.zeros(2, 1, 8, 8); x[:, :, 4:] = 1
    out = expose(x, t(.1, 10), torch.ones(2), torch.zeros(2), torch.zeros(2))
    assert out.isfinite().all() and out.min() >= 0 and (out[:, :, 4:] == 1).all()


# The whole

@pytest.mark.parametrize('strengths', [(1, 1), (1, 0), (0, 1), (3, 3), (.3, .5)])
def test_range_shape_and_input(strengths):
    for seed in range(5):
        torch.manual_seed(seed)
        x = images(16, seed=seed); before = x.clone()
        out = Augment(*strengths)(x)
        assert out.shape == x.shape and out.dtype == torch.float32 and out.min() >= 0 and out.max() <= 1 and torch.equal(x, before)

def test_zero_strengths_change_nothing():
    x = images(4)
    assert torch.equal(Augment(0, 0)(x), x)
    torch.manual_seed(3); state = torch.get_rng_state(); Augment(0, 0)(x)
    assert torch.equal(state, torch.get_rng_state())

def test_every_image_is_changed_in_its_own_way():
    torch.manual_seed(0)
    for strengths in [(1, 0), (0, 1)]:
        x = images(1).repeat(24, 1, 1, 1)
        out = Augment(*strengths, share=1.)(x)
        assert all(not torch.allclose(out[i], out[j], atol=1e-3) for i in range(24) for j in range(i)) and not any(torch.allclose(o, x[0], atol=1e-3) for o in out)

def test_random_numbers_come_from_torch_only():
    x = images(8)
    def once(seed): torch.manual_seed(seed); return Augment()(x)
    assert torch.equal(once(1), once(1)) and not torch.equal(once(1), once(2))
    np.random.seed(0); a = once(1); np.random.seed(1)
    assert torch.equal(a, once(1))

def test_parameters_stay_within_what_is_promised(monkeypatch):
    seen = {}
    monkeypatch.setattr(augment, 'move', lambda x, *v: (seen.setdefault('move', []).append(v), x)[1])
    monkeypatch.setattr(augment, 'expose', lambda x, *v: (seen.setdefault('expose', []).append(v), x)[1])
    torch.manual_seed(0); Augment()(torch.zeros(20000, 1, 2, 2))
    angle, factors, shift = seen['move'][0]
    gamma, contrast, brightness, noise = seen['expose'][0]
    for values, low, high in [(angle, -12, 12), (factors, .778, 1.285), (shift, -.08, .08), (gamma, .49, 2.02), (contrast, .49, 1.65), (brightness, -.2, .2), (noise, 0, .06)]:
        assert low <= values.min() and values.max() <= high and (values.max() - values.min()) > .85 * (high - low), (low, high)
    assert factors.log().mean().abs() < .01 and abs(np.corrcoef(factors.T.numpy())[0, 1]) < .05, 'no bias to larger, width and height independent'

def test_share_is_the_share_of_changed_images():
    torch.manual_seed(0)
    x = images(1, 16).repeat(2000, 1, 1, 1)
    for strengths in [(1, 0), (0, 1)]:
        for share in (0., .3, .85, 1.):
            out = Augment(*strengths, share=share)(x)
            assert ((out - x).abs() > 1.1e-4).flatten(1).any(1).float().mean().item() == pytest.approx(share, abs=.04)
    for share in (-.1, 1.1, float('nan')):
        with pytest.raises(ValueError, match='share='): Augment(share=share)

def test_repr_names_the_strengths_so_that_recipes_differ():
    assert 'geometric=1.0, photometric=0.5' in repr(Augment(1., .5)) and repr(Augment(share=.5)) != repr(Augment()) and len({repr(Augment(a, b)) for a in (0., 1.) for b in (0., 1.)}) == 4

@pytest.mark.parametrize('strengths', [(-.1, 1), (1, -1), (3.1, 0), (0, float('nan'))])
def test_impossible_strengths(strengths):
    with pytest.raises(ValueError, match='strengths are 0 to 3'): Augment(*strengths)


# Stress test and tables

def test_stress_test_scores_the_changed_images_of_each_network(tiny):
    torch.manual_seed(0)
    networks = [SmallCNN().eval(), SmallCNN().eval()]
    rows = tiny.rows('validation')
    result = stress_test(networks, tiny.pixels[rows], tiny.labels[rows])
    assert list(result.index) == [(name, i) for name in STRESSES for i in (0, 1)] and list(result.columns) == list(METRICS)
    for i, network in enumerate(networks):
        for k, v in score(tiny.labels[rows], predict(network, tiny.pixels[rows])).items():
            assert np.isnan(result.loc[('unchanged', i), k]) if v is None else result.loc[('unchanged', i), k] == pytest.approx(v)
    alone = stress_test(networks[1:], tiny.pixels[rows], tiny.labels[rows])
    assert alone.droplevel('model').equals(result.xs(1, level='model')), 'noise is the same for every network'
    others = stress_test(networks[:1], tiny.pixels[rows], tiny.labels[rows], NEW_STRESSES)
    assert list(others.index.get_level_values('stress')) == list(NEW_STRESSES)

def test_stresses_do_what_their_names_say():
    x = images(2, 32) * .3 + .2
    x[:, :, 10:22, 10:22] = .9
    change = {k: f(x) for k, f in STRESSES.items()}
    assert torch.equal(change['unchanged'], x) and all(c.shape == x.shape and not torch.allclose(c, x, atol=.01) for k, c in change.items() if k != 'unchanged')
    assert change['gamma 2'].mean() < x.mean() < change['gamma 0.5'].mean() and change['darker'].mean() < x.mean() < change['brighter'].mean()
    assert change['half the contrast'].std() < .6 * x.std() and change['contrast 1.5'].std() > 1.2 * x.std()
    def side(c, axis): return (c[0, 0] > .7).any(axis).sum().item()
    for name, wide, high in [('narrower chest', 0, 1), ('wider chest', 1, 0), ('smaller', -1, -1), ('larger', 1, 1)]:
        shape = [side(change[name], 0) - side(x, 0), side(change[name], 1) - side(x, 1)]
        assert np.sign(shape[0] - shape[1]) == np.sign(wide - high) and (wide != high or np.sign(shape[0]) == wide), name

def test_new_stresses_do_what_their_names_say_and_are_not_in_the_augmentation():
    x = images(2, 64) * .3 + .2
    x[:, :, 20:44, 20:44] = .9
    change = {k: f(x) for k, f in NEW_STRESSES.items()}
    assert len(change) >= 4 and not set(NEW_STRESSES) & set(STRESSES)
    for k, c in change.items(): assert c.shape == x.shape and c.dtype == x.dtype and 0 <= c.min() and c.max() <= 1 and not torch.allclose(c, x, atol=.01), k
    def rough(c): return c.diff(dim=-1).abs().mean()
    assert rough(change['blurred']) < .7 * rough(x) and rough(change['sharpened']) > 1.5 * rough(x)
    assert torch.allclose(change['shaded'][..., 0], x[..., 0]) and torch.allclose(change['shaded'][..., -1], x[..., -1] / 2)
    inside = change['black frame'][..., 5:-5, 5:-5]
    assert torch.equal(inside, x[..., 5:-5, 5:-5]) and change['black frame'].sum() == pytest.approx(inside.sum().item(), rel=1e-6)
    new = change['a letter'] != x
    assert (change['a letter'] >= x).all() and change['a letter'].max() > .9 and new[..., :32, :32].sum() == new.sum() and .002 < new.float().mean() < .05
    assert .02 < (change['JPEG'] - x).abs().mean() < .15, 'a poor file, not another picture'

def test_compare_recipes():
    import pandas as pd
    r = pd.DataFrame([{f'test_{k}': v for k in METRICS} for v in (.5, .7)])
    assert compare_recipes({'x': r, 'y': r[:1]}).loc[:, 'f1'].tolist() == ['0.600 ± 0.141', '0.500']
