"Build script: reads `settings.ini`, and ships the lessons (without their outputs) as package data."
import configparser, json
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
_parser = configparser.ConfigParser(delimiters=['='])
_parser.read(HERE/'settings.ini', encoding='utf-8')
cfg = _parser['DEFAULT']

# Parts that not everybody needs, `pip install 'cxr_lab[sweep]'`; who develops tests them all.
extras = {part: cfg[f'{part}_requirements'].split() for part in ('sweep', 'app', 'onnx', 'dev')}
extras['dev'] += extras['sweep'] + extras['app'] + extras['onnx']


class BuildWithNotebooks(build_py):
    "Adds `cxr_lab/notebooks/*.ipynb`, so that `cxr-lab run` works from any folder after `pip install`."
    def run(self):
        super().run()
        if self.editable_mode: return  # the checkout's own nbs/ is used
        target = Path(self.build_lib)/cfg['lib_path']/'notebooks'
        target.mkdir(parents=True, exist_ok=True)
        for source in sorted((HERE/cfg['nbs_path']).glob('[0-9][0-9]_*.ipynb')):
            notebook = json.loads(source.read_text(encoding='utf-8'))
            for cell in notebook['cells']:
                if cell['cell_type'] == 'code': cell.update(outputs=[], execution_count=None)
            (target/source.name).write_text(json.dumps(notebook, indent=1, ensure_ascii=False), encoding='utf-8')


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0', license_files=['LICENSE'],
    long_description=(HERE/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']),
    package_data={cfg['lib_path']: ['weights/*', 'templates/*', 'py.typed']}, python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split()}, cmdclass={'build_py': BuildWithNotebooks},
    zip_safe=False,
    project_urls={'Documentation': f"{cfg['doc_host']}{cfg['doc_baseurl']}", 'Issues': f"{cfg['git_url']}/issues",
                  'Changes': f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md"},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research', 'Intended Audience :: Education',
                 'Programming Language :: Python :: 3', 'Programming Language :: Python :: 3.11',
                 'Programming Language :: Python :: 3.12', 'Programming Language :: Python :: 3.13',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
)
