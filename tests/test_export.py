"A model in another form gives the same answers."
import json, sys

import numpy as np
import pytest
import torch

from cxr_lab.export import export_onnx
from cxr_lab.model import build_model, load_model
from cxr_lab.predict import CAVEAT
from cxr_lab.runs import CLASSES
from predictors import model, saved

@pytest.mark.parametrize('name, size', [('small', 48), pytest.param('resnet18', 64, marks=pytest.mark.slow)])
def test_onnx_agrees_with_pytorch(tmp_path, name, size):
    ort = pytest.importorskip('onnxruntime')
    torch.manual_seed(3)
    net = build_model(name).eval()
    file = saved(tmp_path/'m.safetensors', net, model=name, image_size=size)
    told = export_onnx(file, tmp_path/'m.onnx')
    session = ort.InferenceSession(tmp_path/'m.onnx', providers=['CPUExecutionProvider'])
    for n in (1, 3):
        x = torch.rand(n, 1, size, size)
        with torch.no_grad(): expected = net(x)
        logits, p = session.run(None, {'pixels': x.numpy()})
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        np.testing.assert_allclose(p, expected.softmax(1)[:, 1], atol=1e-4)
    props = session.get_modelmeta().custom_metadata_map
    assert json.loads(props['image_size']) == size and json.loads(props['classes']) == list(CLASSES) and json.loads(props['threshold']) == .45 and props['caveat'] == CAVEAT == told['caveat']
    assert [p.name for p in tmp_path.iterdir() if '.onnx' in p.name] == ['m.onnx']
    assert isinstance(load_model(file)[0].scale, torch.nn.Module)

def test_onnx_without_its_packages(tmp_path, model, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(RuntimeError, match=r"pip install 'cxr_lab\[onnx\]'"): export_onnx(model, tmp_path/'m.onnx')
    assert not (tmp_path/'m.onnx').exists()
