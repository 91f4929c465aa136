"Executes the pages that are made from all the others, nbs/index.ipynb and nbs/lab/api.ipynb, stores their outputs, and makes README.md from the first."
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from cxr_lab.report import write_readme
from cxr_lab.runs import atomic_path

os.chdir(Path(__file__).resolve().parents[1])
os.environ['CXR_LAB_PROGRESS'] = '0'
for path in (Path('nbs/index.ipynb'), Path('nbs/lab/api.ipynb')):
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, timeout=600, kernel_name='python3', record_timing=False, resources={'metadata': {'path': path.parent.as_posix()}},
                   extra_arguments=['--log-level=CRITICAL']).execute()
    notebook.metadata = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}  # as nbdev_clean leaves it
    with atomic_path(path) as temporary: nbformat.write(notebook, temporary)
write_readme('nbs/index.ipynb', 'README.md')
