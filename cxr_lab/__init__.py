"Chest X-rays, from files to answers. What one looks for first is here; the modules hold the rest."
__version__ = "0.1.0"

from .edits import start

start()

# name -> module that is imported when the name is asked for: PyTorch alone takes seconds
_MODULES = {
    'Predictor': 'predict', 'predict_files': 'answers', 'load_dataset': 'data',
    'build_model': 'model', 'load_model': 'model', 'GradCAM': 'maps', 'score': 'scores',
    'intervals': 'scores', 'make_phantom': 'phantom', 'run_pipeline': 'pipeline'}
__all__ = ['__version__', *_MODULES]

def __getattr__(name):
    if name not in _MODULES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    return getattr(import_module(f'{__name__}.{_MODULES[name]}'), name)

def __dir__(): return sorted({*globals(), *__all__})
