"The oldest packages that settings.ini allows, as pins: `pip install $(python .ci/floors.py)`."
import configparser, re
from pathlib import Path

PARTS = ('requirements', 'sweep_requirements', 'app_requirements', 'onnx_requirements')
NBDEV = ('nbdev', 'fastcore', 'execnb')  # one version of it writes the modules, to the byte

def floors(
    settings,  # mapping of settings.ini's DEFAULT section
) -> list[str]:
    "Every lower bound of the package and its parts as a pin; nbdev and the tools of `dev` as they stand."
    pins = []
    for requirement in ' '.join(settings[part] for part in PARTS).split():
        if re.split('[=<]', requirement)[0] in NBDEV:
            pins.append(requirement)
            continue
        name, bound, version = requirement.partition('>=')
        if not bound or ',' in version:
            raise ValueError(f'{requirement} in settings.ini: expected NAME>=VERSION, '
                             'so that there is a floor to test')
        pins.append(f'{name}=={version}')
    return pins + settings['dev_requirements'].split()

if __name__ == '__main__':
    parser = configparser.ConfigParser(delimiters=['='])
    parser.read(Path(__file__).resolve().parents[1]/'settings.ini', encoding='utf-8')
    print(*floors(parser['DEFAULT']), sep='\n')
