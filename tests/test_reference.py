"The reference lung segmentation: its download, its weights file of 2017 (written here), its preprocessing and cleaning against scikit-image."
import http.server, inspect, json, os, pickle, shutil, socket, subprocess, threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from cxr_lab import reference
from cxr_lab.reference import (clean_reference, equalize, fetch_reference, git_blob_id, load_reference, prepare_reference, reference_statistics, reference_unet,
                               segment_reference)

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
h5py = pytest.importorskip('h5py')

# The file as Keras 2.0.4 wrote it, made without Keras

CHANNELS = [(1, 32), (32, 32), (32, 64), (64, 64), (64, 64), (64, 64), (64, 128), (128, 128), (128, 256),
            (256, 256), (256, 256), (384, 256), (256, 256), (256, 256), (320, 256), (256, 128), (128, 128), (192, 128), (128, 64), (64, 64), (96, 64), (64, 1)]

def old_config(last='sigmoid', **conv_options):
    "`model_config` of the reference as Keras 2.0.4 put it."
    layers, levels = [], []
    def add(kind, prefix, inputs, **config):
        name = f'{prefix}_{1 + sum(l["class_name"] == kind for l in layers)}'
        layers.append(dict(class_name=kind, name=name, config=dict(name=name, **config), inbound_nodes=[[[i, 0, 0, {}] for i in inputs]] if inputs else []))
        return name
    def conv(x, *widths, activation='relu'):
        for width in widths:
            x = add('Conv2D', 'conv2d', [x], trainable=True, filters=width, kernel_size=[3, 3], strides=[1, 1], padding='same', data_format='channels_last', dilation_rate=[1, 1],
                    activation=activation, use_bias=True, bias_initializer=dict(class_name='Zeros', config={}), kernel_regularizer=None, bias_regularizer=None,
                    kernel_initializer=dict(class_name='VarianceScaling', config=dict(scale=1., mode='fan_avg', distribution='uniform', seed=None)),
                    activity_regularizer=None, kernel_constraint=None, bias_constraint=None, **conv_options)
        return x
    x = add('InputLayer', 'input', [], batch_input_shape=[None, 256, 256, 1], dtype='float32', sparse=False)
    for width in (32, 64, 64, 128):
        levels.append(conv(x, width, width))
        x = add('MaxPooling2D', 'max_pooling2d', levels[-1:], trainable=True, pool_size=[2, 2], padding='valid', strides=[2, 2], data_format='channels_last')
    x = conv(x, 256)
    for width in (256, 256, 128, 64):
        x = conv(add('UpSampling2D', 'up_sampling2d', [x], trainable=True, size=[2, 2], data_format='channels_last'), width, width)
        x = conv(add('Concatenate', 'concatenate', [levels.pop(), x], trainable=True, axis=-1), width)
    x = conv(x, 1, activation=last)
    return dict(class_name='Model', config=dict(name='model_1', layers=layers, input_layers=[['input_1', 0, 0]], output_layers=[[x, 0, 0]]))

def write_old(path, weights, config):
    "Groups, names and attributes as Keras 2.0.4 laid them out; bytes, not str."
    with h5py.File(path, 'w') as f:
        f.attrs.update(keras_version=b'2.0.4', backend=b'tensorflow', model_config=json.dumps(config).encode(),
                       training_config=json.dumps(dict(loss='binary_crossentropy', optimizer_config=dict(class_name='Adam', config={}))).encode())
        g, weights = f.create_group('model_weights'), iter(weights)
        g.attrs.update(keras_version=b'2.0.4', backend=b'tensorflow', layer_names=[l['name'].encode() for l in config['config']['layers']])
        for layer in config['config']['layers']:
            group, names = g.create_group(layer['name']), [f'{layer["name"]}/{w}:0'.encode() for w in ('kernel', 'bias')] if layer['class_name'] == 'Conv2D' else []
            group.attrs['weight_names'] = np.array(names, 'S' if names else 'S1')
            for name, array in zip(names, next(weights) if names else ()): group[name.decode()] = array
        f.create_group('optimizer_weights').attrs['weight_names'] = np.array([], 'S1')
    return path

@pytest.fixture(scope='module')
def weights():
    "Kernels (3,3,in,out) and biases; the output varies, and not so steeply that rounding would show."
    rng = np.random.default_rng(0)
    return [(rng.normal(0, np.sqrt((2 if b > 1 else .05)/9/a), (3, 3, a, b)).astype(np.float32), rng.normal(0, .1, b).astype(np.float32)) for a, b in CHANNELS]

@pytest.fixture(scope='module')
def old_file(weights, tmp_path_factory): return write_old(tmp_path_factory.mktemp('old')/'trained_model.hdf5', weights, old_config())

@pytest.fixture
def copy(old_file, tmp_path): return shutil.copy(old_file, tmp_path/'copy.hdf5')

@pytest.fixture(scope='module')
def image(): return np.random.default_rng(1).normal(size=(1, 256, 256, 1)).astype(np.float32)

@pytest.fixture(scope='module')
def expected(weights, image):
    "The same network in PyTorch."
    arrays = iter(weights)
    def conv(x, n=1, activation=torch.relu):
        for kernel, bias in (next(arrays) for _ in range(n)):
            x = activation(F.conv2d(x, torch.from_numpy(kernel).permute(3, 2, 0, 1), torch.from_numpy(bias), padding=1))
        return x
    x, levels = torch.from_numpy(image).permute(0, 3, 1, 2), []
    for _ in range(4):
        levels.append(conv(x, 2))
        x = F.max_pool2d(levels[-1], 2)
    x = conv(x)
    for _ in range(4): x = conv(torch.cat([levels.pop(), conv(F.interpolate(x, scale_factor=2), 2)], 1))
    return conv(x, activation=torch.sigmoid).permute(0, 2, 3, 1).numpy()

def test_expected_output_varies(expected): assert expected.std() > .02 and .01 < expected.mean() < .99

# Opening it

@pytest.fixture
def keras():
    import keras
    return keras

@pytest.fixture
def opened(keras, monkeypatch):
    "What load_model returned, or raised, in turn."
    calls, load_model = [], keras.models.load_model
    def spy(*args, **kwargs):
        assert kwargs['safe_mode'] is True and kwargs['compile'] is False
        try: calls.append(load_model(*args, **kwargs))
        except Exception as e: calls.append(e); raise
        return calls[-1]
    monkeypatch.setattr(keras.models, 'load_model', spy)
    return calls

@pytest.fixture
def never(keras, monkeypatch): monkeypatch.setattr(keras.models, 'load_model', lambda *a, **k: pytest.fail('Keras was given the file'))

def test_architecture():
    model = reference_unet()
    assert [w.shape for w in model.weights] == [s for a, b in CHANNELS for s in ((3, 3, a, b), (b,))]
    assert model.input_shape == model.output_shape == (None, 256, 256, 1)

def test_file_that_keras_opens(old_file, image, expected, opened):
    model = load_reference(old_file)
    assert model is opened[0]
    assert np.abs(model.predict_on_batch(image) - expected).max() < 1e-6

def test_file_that_keras_refuses(weights, tmp_path, image, expected, opened):
    model = load_reference(write_old(tmp_path/'x.hdf5', weights, old_config(dim_ordering='tf')))  # an option that Keras has forgotten
    assert isinstance(opened[0], Exception)
    assert np.abs(model.predict_on_batch(image) - expected).max() < 1e-6

def test_file_that_todays_keras_writes(keras, tmp_path, weights, opened):
    model = reference_unet()
    model.set_weights([a for pair in weights for a in pair])
    model.save(tmp_path/'new.h5')
    again = load_reference(tmp_path/'new.h5')
    assert again is opened[0] and all(np.array_equal(a, b) for a, b in zip(again.get_weights(), model.get_weights()))

def test_name_does_not_matter(old_file, tmp_path, weights):
    model = load_reference(shutil.copy(old_file, tmp_path/'weights.bin'))  # load_model goes by the suffix
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), [a for pair in weights for a in pair]))

# Files that may run code: Keras never sees them

def edit(path, change):
    with h5py.File(path, 'r+') as f:
        config = json.loads(f.attrs['model_config'])
        change(config['config']['layers'])
        f.attrs['model_config'] = json.dumps(config).encode()
    return path

def lambda_layer(layers): layers[3] = dict(layers[3], class_name='Lambda', config=dict(name='x', function=['4wEAAAAAAAAA', None, None], function_type='lambda'))
def lambda_activation(layers): layers[1]['config']['activation'] = dict(class_name='__lambda__', config=dict(code='4wEAAAAAAAAA'))
def foreign_module(layers): layers[1]['config']['kernel_initializer'] = dict(module='subprocess', class_name='Zeros', config={})
def foreign_class(layers): layers[1]['config']['kernel_initializer'] = dict(module='os', class_name='system', config=dict(command='true'))
def tf_op(layers): layers[2]['class_name'] = 'TFOpLambda'
def inside_inputs(layers): layers[5]['inbound_nodes'][0][0][3]['mask'] = dict(class_name='function', config='eval')

@pytest.mark.parametrize('change, named', [(lambda_layer, 'Lambda'), (lambda_activation, '__lambda__'), (foreign_module, r'subprocess\.Zeros'), (foreign_class, r'os\.system'),
                                           (tf_op, 'TFOpLambda'), (inside_inputs, 'function')])
def test_unknown_kinds_are_refused(copy, never, change, named):
    with pytest.raises(ValueError, match=f'copy.hdf5 .*holds {named}, .*may run code'): load_reference(edit(copy, change))

def test_pickle_is_not_opened(tmp_path, never):
    class Bomb:
        def __reduce__(self): return (pytest.fail, ('the pickle was run',))
    (tmp_path/'p.hdf5').write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match='p.hdf5 is not an HDF5 file .*pickle'): load_reference(tmp_path/'p.hdf5')

# Other files

@pytest.mark.parametrize('content', [b'', b'<!DOCTYPE html>', b'PK\x03\x04keras', b'version https://git-lfs'])
def test_no_hdf5(tmp_path, never, content):
    (tmp_path/'x.hdf5').write_bytes(content)
    with pytest.raises(ValueError, match='x.hdf5 is not an HDF5 file'): load_reference(tmp_path/'x.hdf5')

def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError): load_reference(tmp_path/'nothing.hdf5')

@pytest.mark.parametrize('share', [.0001, .5, .999])
def test_truncated(copy, never, share):
    content = copy.read_bytes()
    copy.write_bytes(content[:int(len(content)*share)])
    with pytest.raises(ValueError, match='copy.hdf5 is truncated'): load_reference(copy)

def test_without_model(copy, tmp_path, never):
    with h5py.File(copy, 'r+') as f: del f.attrs['model_config']
    with pytest.raises(ValueError, match='not saved by Keras as a whole model'): load_reference(copy)
    with h5py.File(tmp_path/'data.hdf5', 'w') as f: f['x'] = np.zeros(3)
    with pytest.raises(ValueError, match='data.hdf5 .*not saved by Keras'): load_reference(tmp_path/'data.hdf5')

def test_config_is_no_json(copy, never):
    with h5py.File(copy, 'r+') as f: f.attrs['model_config'] = b'not json'
    with pytest.raises(ValueError, match='copy.hdf5'): load_reference(copy)
    with h5py.File(copy, 'r+') as f: f.attrs['model_config'] = b'['*60_000
    with pytest.raises(ValueError, match='copy.hdf5'): load_reference(copy)

def array(f, i=2, name='kernel'): return f[f'model_weights/conv2d_{i}'], f'conv2d_{i}/{name}:0'

def wrong_kernel(f): group, name = array(f); del group[name]; group[name] = np.zeros((5, 5, 32, 32), np.float32)
def wrong_type(f): group, name = array(f); del group[name]; group[name] = np.zeros((3, 3, 32, 32), np.int32)
def missing_array(f): group, name = array(f); del group[name]
def fewer_layers(f): f['model_weights'].attrs['layer_names'] = f['model_weights'].attrs['layer_names'][:-1]
def other_order(f):
    names = f['model_weights'].attrs['layer_names']
    f['model_weights'].attrs['layer_names'] = names[::-1]
def elsewhere(f): group, name = array(f); del group[name]; group[name] = h5py.ExternalLink('other.hdf5', 'x')
def virtual(f):
    group, name = array(f)
    layout = h5py.VirtualLayout((3, 3, 32, 32), 'f4')
    layout[:] = h5py.VirtualSource('other.hdf5', 'x', (3, 3, 32, 32), 'f4')
    del group[name]
    group.create_virtual_dataset(name, layout)

@pytest.mark.parametrize('change, message', [(wrong_kernel, r'conv2d_2/kernel:0 is \(5, 5, 32, 32\) float32, expected \(3, 3, 32, 32\)'), (wrong_type, 'int32, expected'),
                                             (missing_array, 'copy.hdf5'), (fewer_layers, '42 arrays of weights, expected 44'), (other_order, r'conv2d_22/kernel:0 is'),
                                             (elsewhere, 'not an array in the file itself'), (virtual, 'not an array in the file itself')])
def test_other_weights(copy, tmp_path, never, change, message):
    with h5py.File(tmp_path/'other.hdf5', 'w') as f: f['x'] = np.zeros((3, 3, 32, 32), np.float32)
    with h5py.File(copy, 'r+') as f: change(f)
    with pytest.raises(ValueError, match=message): load_reference(copy)

def test_not_finite(copy, never):
    with h5py.File(copy, 'r+') as f: group, name = array(f, name='bias'); group[name][3] = np.nan
    with pytest.raises(ValueError, match='conv2d_2/bias:0 .*NaN'): load_reference(copy)

def test_same_weights_in_another_network(weights, tmp_path, opened):
    with pytest.raises(ValueError, match='computes something else'): load_reference(write_old(tmp_path/'x.hdf5', weights, old_config(last='tanh')))
    assert opened

# Preprocessing, held against scikit-image

def as_published(images):
    "The reference's preprocessing of (N,H,W) uint8 as its repository describes it, on today's scikit-image."
    exposure, transform = pytest.importorskip('skimage.exposure', reason='scikit-image is a development dependency'), pytest.importorskip('skimage.transform')
    x = np.array([exposure.equalize_hist(transform.resize(i/255, (256, 256))) for i in images])
    return ((x - x.mean())/x.std())[..., None]

def radiograph(seed, size=256, low=0, high=255):
    "A smooth picture with noise, (1,H,W) uint8, all of low to high used."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]/size
    picture = np.sin(9*x + seed) + np.cos(7*y*x) + rng.normal(0, .1, (size, size))
    picture = (picture - picture.min())/np.ptp(picture)
    return (low + picture**(1 + seed % 3)*(high - low)).round().astype(np.uint8)[None]

@pytest.mark.parametrize('low, high', [(0, 255), (0, 128), (60, 61), (3, 250), (100, 164)])
def test_equalize_is_scikit_images(low, high):
    exposure = pytest.importorskip('skimage.exposure')
    image = radiograph(1, low=low, high=high)
    assert np.abs(equalize(image) - exposure.equalize_hist(image[0]/255)).max() < 1e-12

def test_prepared_as_published():
    images = np.stack([radiograph(i, low=9*i, high=255 - 20*i) for i in range(4)])
    x = prepare_reference(images)
    assert x.shape == (4, 256, 256, 1) and x.dtype == np.float32
    assert np.abs(x - as_published(images[:, 0])).max() < 1e-5

def test_golden():
    "Numbers worked out by scikit-image 0.26, so that the test holds something where that is not installed."
    image = (np.add.outer(np.arange(256)**2, 3*np.arange(256)) % 251).astype(np.uint8)[None]
    assert np.allclose(equalize(image)[[0, 10, 100, 200, 255], [0, 50, 100, 150, 255]], GOLDEN, atol=1e-9)

def test_resized(real_data):
    "224 to 256 pixels: the same but for the outermost rows, where scikit-image mirrors and OpenCV repeats."
    files = sorted((real_data/'chest_xray'/'train').glob('*/*.jpeg'))[::700]
    images = np.stack([np.asarray(Image.open(f).convert('L')) for f in files])
    d = np.abs(prepare_reference(images[:, None]) - as_published(images))
    assert d.mean() < 5e-4 and np.quantile(d, .999) < .02

def test_large_images_are_averaged():
    image = np.kron(radiograph(2)[0], np.ones((4, 4), np.uint8))[None]
    assert np.allclose(equalize(image), equalize(radiograph(2)), atol=1e-9)

def test_standardized_over_the_data_set():
    images = np.stack([radiograph(i, 64) for i in range(5)])
    mean, std = reference_statistics(images)
    whole = prepare_reference(images)
    assert abs(whole.mean()) < 1e-5 and abs(whole.std() - 1) < 1e-5
    assert np.array_equal(np.concatenate([prepare_reference(images[i:i + 2], mean, std) for i in (0, 2, 4)]), whole)

def test_preparing_leaves_the_input_alone():
    images = np.stack([radiograph(i, 64) for i in range(2)])
    images.flags.writeable = False
    prepare_reference(images)

def test_bad_input():
    good = np.stack([radiograph(0, 64)])
    with pytest.raises(ValueError, match='uint8'): prepare_reference(good/255)
    with pytest.raises(ValueError, match='uint8'): prepare_reference(good[:, 0])
    with pytest.raises(ValueError, match='uint8'): prepare_reference(good.repeat(3, 1))
    with pytest.raises(ValueError, match='no images'): prepare_reference(good[:0])
    with pytest.raises(ValueError, match='both'): prepare_reference(good, mean=.5)
    with pytest.raises(ValueError, match='contrast'): prepare_reference(np.full((2, 1, 64, 64), 7, np.uint8))
    assert np.isfinite(prepare_reference(np.full((2, 1, 64, 64), 7, np.uint8), .5, .3)).all()  # one blank image in a good data set is no error

# Masks

def cleaned_by_scikit_image(probability):
    morphology = pytest.importorskip('skimage.morphology', reason='scikit-image is a development dependency')
    size = {'max_size': 1310} if 'max_size' in inspect.signature(morphology.remove_small_objects).parameters else {'min_size': 1310.72}
    mask = morphology.remove_small_objects(probability > .5, **size)
    size = {'max_size': 1310} if 'max_size' in inspect.signature(morphology.remove_small_holes).parameters else {'area_threshold': 1310.72}
    return morphology.remove_small_holes(mask, **size)

@pytest.mark.parametrize('seed', range(6))
def test_cleaned_as_scikit_image_does(seed):
    rng = np.random.default_rng(seed)
    noise = torch.from_numpy(rng.normal(size=(1, 1, 256, 256)))
    for _ in range(3): noise = F.avg_pool2d(noise, 2*seed + 5, 1, seed + 2)
    probability = torch.sigmoid(noise/noise.std()).numpy()[0, 0]
    assert np.array_equal(clean_reference(probability), cleaned_by_scikit_image(probability))

@pytest.mark.parametrize('area, kept', [(1310, False), (1311, True)])
def test_size_limit(area, kept):
    p = np.zeros((256, 256))
    p[10:].flat[:256*5 + area % 256] = 1  # rows, then the rest
    assert (p > 0).sum() == area and clean_reference(p).any() == kept
    assert clean_reference(1 - p).all() == (not kept)

def test_corners_do_not_join():
    p = np.zeros((256, 256))
    p[:30, :30] = p[30:60, 30:60] = 1  # 900 pixels each
    assert not clean_reference(p).any()

def test_nothing_and_everything():
    assert not clean_reference(np.zeros((256, 256))).any() and clean_reference(np.ones((256, 256))).all()

class Bright:
    "In place of the network: lung is what is darker than the data set's mean."
    def __init__(self): self.sizes = []
    def predict_on_batch(self, x): self.sizes.append(len(x)); return 1/(1 + np.exp(x))

def test_every_image_gets_a_mask():
    images = np.stack([radiograph(i, 64) for i in range(5)] + [np.zeros((1, 64, 64), np.uint8)])
    masks = segment_reference(Bright(), images, batch_size=4)
    assert masks.shape == (6, 256, 256) and masks.dtype == bool and masks[:5].any((1, 2)).all()
    assert np.array_equal(masks, segment_reference(model := Bright(), images, batch_size=1)) and model.sizes == [1]*6
    assert np.array_equal(masks, [clean_reference(p[..., 0]) for p in Bright().predict_on_batch(prepare_reference(images))])

# The download

@pytest.mark.parametrize('content', [b'', b'hello\n', bytes(range(256))*9000])
def test_git_blob_id(tmp_path, content):
    (tmp_path/'x').write_bytes(content)
    if shutil.which('git'): assert git_blob_id(tmp_path/'x') == subprocess.run(['git', 'hash-object', 'x'], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    if not content: assert git_blob_id(tmp_path/'x') == 'e69de29bb2d1d6434b8b29ae775ad8c2e48c5391'

GOLDEN = [0.00396728515625, 1.0, 0.03880780029296876, 0.16176391601562504, 0.1168680419921875]

CONTENT = np.random.default_rng(0).bytes(300_000)

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        server = self.server
        server.asked.append(self.headers.get('Range'))
        start = int(self.headers['Range'].split('=')[1].rstrip('-')) if self.headers.get('Range') else 0
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(server.content) - start))
        self.end_headers()
        stop, server.stop = server.stop, None
        self.wfile.write(server.content[start:stop])
        self.close_connection = True

@pytest.fixture
def server(monkeypatch, tmp_path):
    "A server with the right file in a world where `REFERENCE` asks for that."
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.content, server.asked, server.stop = CONTENT, [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path/'right').write_bytes(CONTENT)
    monkeypatch.setitem(reference.REFERENCE, 'url', f'http://127.0.0.1:{server.server_address[1]}/trained_model.hdf5')
    monkeypatch.setitem(reference.REFERENCE, 'blob', git_blob_id(tmp_path/'right'))
    yield server
    server.shutdown()
    server.server_close()

def names(folder): return sorted(p.name for p in folder.iterdir()) if folder.exists() else []

def test_fetch_once(server, tmp_path):
    path = fetch_reference(tmp_path/'w')
    assert path == tmp_path/'w'/'trained_model.hdf5' and path.read_bytes() == CONTENT and names(tmp_path/'w') == ['trained_model.hdf5']
    assert fetch_reference(tmp_path/'w') == path and len(server.asked) == 1

def test_another_file_arrives(server, tmp_path):
    server.content = CONTENT[:-1] + b'!'
    with pytest.raises(ValueError, match='sent another file.*expected [0-9a-f]{40}.*by hand'): fetch_reference(tmp_path/'w')
    assert names(tmp_path/'w') == []

def test_damaged_file_is_fetched_again(server, tmp_path):
    (tmp_path/'w').mkdir()
    (tmp_path/'w'/'trained_model.hdf5').write_bytes(CONTENT[:1000])
    assert fetch_reference(tmp_path/'w').read_bytes() == CONTENT

def test_broken_connection_is_continued(server, tmp_path):
    server.stop = 100_000
    with pytest.raises(OSError, match='Try again|next try'): fetch_reference(tmp_path/'w')
    assert 'trained_model.hdf5' not in names(tmp_path/'w')
    assert fetch_reference(tmp_path/'w').read_bytes() == CONTENT and names(tmp_path/'w') == ['trained_model.hdf5']

def test_offline(monkeypatch, tmp_path):
    with socket.socket() as s:  # bound and not listening: nothing answers there, and nobody else gets the port
        s.bind(('127.0.0.1', 0))
        monkeypatch.setitem(reference.REFERENCE, 'url', f'http://127.0.0.1:{s.getsockname()[1]}/trained_model.hdf5')
        with pytest.raises(OSError, match='could not be downloaded.*network.*by hand.*load_reference'): fetch_reference(tmp_path/'w')
    assert names(tmp_path/'w') == []

# Where the weights are not at hand

@pytest.fixture
def asked(chests, tmp_path, monkeypatch):
    "A call of `reference_or_trained` in an empty cache, on phantoms, at a sixteenth of the side."
    import cv2
    from cxr_lab.lungs import pack
    monkeypatch.setenv('CXR_LAB_CACHE', str(tmp_path))
    data, outlines, have = chests
    large = pack(cv2.resize(m.astype(np.uint8), (256, 256)) > 0 for m in outlines[:])
    use = np.zeros(len(data.index), bool)
    use[data.rows('train')[:12]] = use[data.rows('validation')[:3]] = True
    recipe = dict(size=256, by=16, shown=24, batch_size=4, lr=1e-4, seed=0)
    def loss(y, p): return reference.import_keras().losses.binary_crossentropy(y, p)
    def same(a, b): return (a == b).mean((1, 2))
    def ask(use=use): return reference.reference_or_trained(data, data.pixels, large, use, recipe, loss, same)
    return data, use, ask

def test_its_design_is_trained_once_where_its_weights_are_not(asked, monkeypatch):
    data, use, ask = asked
    first = ask()
    history = first.card['history']
    assert first.card['title'] == 'the architecture of lung-segmentation-2d, trained here' and len(history) == 2
    assert history[1]['loss'] < history[0]['loss'] and 0 < history[1]['dice'] < 1
    assert set(first.card['held_out']) == set(data.index.patient[data.rows('validation')[:3]])
    p = first(data.pixels[:3])
    assert p.shape == (3, 256, 256) and 0 < p.min() and p.max() < 1
    mean, std = reference_statistics(data.pixels[np.flatnonzero(use & (data.index.split == 'train'))])
    assert np.allclose(first.prepare(data.pixels[:2]), prepare_reference(data.pixels[:2], mean, std))
    monkeypatch.setattr('keras.utils.set_random_seed', lambda *a: pytest.fail('trained again'))
    assert ask().digest == first.digest
    assert first.network.count_params() == reference_unet().count_params()

def test_published_weights_are_used_where_they_are(asked, tmp_path):
    data, _, ask = asked
    (tmp_path/'weights').mkdir()
    reference_unet().save(tmp_path/'weights'/'trained_model.hdf5')
    assert ask().card['title'] == 'lung-segmentation-2d' and not (tmp_path/'reference').exists()

def test_without_weights_and_outlines_there_is_nothing(asked):
    data, use, ask = asked
    assert ask(use & False) is None

def test_pinned(): assert reference.REFERENCE['blob'] == 'fdb8dfcedc9512e8d2d3146b2ce32e35faaf2d34' and 'imlab-uiip/lung-segmentation-2d' in reference.REFERENCE['url']
