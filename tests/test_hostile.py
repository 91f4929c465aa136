"Files made to do harm, and files that were damaged: nothing but a film or a refusal comes out, soon, and without eating the memory."
import io, resource, signal, struct, sys, time, warnings, zlib
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from pydicom.uid import (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless)

from cxr_lab.films import Film, Refused, read_film
from test_films import CURVE, DEEP, EXAMPLES, XRAY, dicom, encoded, table

pytestmark = pytest.mark.skipif(sys.platform == 'win32', reason='needs the signals and limits of Unix')

class Hang(BaseException): "Not an Exception, so that nothing on the way can take it for an error of the file."

@contextmanager
def seconds(limit):
    "Ends Python code that computes longer; C code that does is found when it returns. Waiting for a busy machine does not count."
    def stop(*_): raise Hang(f'more than {limit} s')
    before, start = signal.signal(signal.SIGPROF, stop), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, limit)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert time.process_time() - start < limit

def memory(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)  # bytes at most so far

def check(content, limit=10, **options):
    "Reads it; a film must be sound, a refusal one printable line."
    with seconds(limit):
        try: film = read_film(content, **options)
        except Refused as e:
            assert str(e) and str(e).isprintable() and len(str(e)) <= 300 and 'object at 0x' not in str(e)
            return e
    assert isinstance(film, Film) and film.pixels.dtype == np.uint8 and film.pixels.ndim == 2 and film.pixels.size and all(n.isprintable() for n in film.notes)
    assert film.pixels.shape == (film.height, film.width) and film.pixels.size <= options.get('max_pixels', 1e8)
    return film


# Fuzzing

def seeds():
    "Real files of every form, small."
    a, deep, color = XRAY[:40, :48].copy(), DEEP[:40, :48].copy(), np.dstack([XRAY[:40, :48]] * 3)
    files = [encoded(a, 'JPEG'), encoded(color, 'JPEG', progressive=True), encoded(Image.fromarray(color).convert('CMYK'), 'JPEG', exif=b'Exif\0\0II*\0\x08\0\0\0\0\0'), encoded(a, 'MPO', save_all=True, append_images=[Image.fromarray(a)]),
             encoded(a, 'PNG'), encoded(deep, 'PNG'), encoded(Image.fromarray(color).convert('P'), 'PNG', transparency=3), encoded(Image.fromarray(color).convert('RGBA'), 'PNG'), encoded(a, 'PNG', save_all=True, append_images=[Image.fromarray(255 - a)]),
             *[encoded(deep if c == 'raw' else a, 'TIFF', compression=None if c == 'raw' else c) for c in ('raw', None, 'tiff_lzw', 'tiff_adobe_deflate', 'jpeg', 'packbits')], encoded(Image.fromarray(a > 99), 'TIFF', compression='group4'),
             encoded(a, 'TIFF', save_all=True, append_images=[Image.fromarray(a)]), encoded(deep, 'TIFF', tiffinfo={262: 0}), encoded(a, 'TIFF', big_tiff=True),
             *[dicom(deep, 12, s, **r) for s in (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless)
               for r in (dict(WindowCenter=1900, WindowWidth=2500, PhotometricInterpretation='MONOCHROME1'), dict(PixelPaddingValue=0, RescaleSlope=2, RescaleIntercept=-9))],
             dicom(deep, 12, VOILUTSequence=table(CURVE[:300], 12, 500)), dicom(deep, 16, ModalityLUTSequence=table(CURVE[:300], 16, ModalityLUTType='US', vr='OW')), dicom(color), dicom(color, syntax=RLELossless),
             dicom(a, syntax=JPEGBaseline8Bit, stream=encoded(a, 'JPEG')), dicom(a, syntax=JPEG2000Lossless, stream=encoded(a, 'JPEG2000', no_jp2=True))]
    return files + [(EXAMPLES/f'{name}.dcm').read_bytes() for name in ('MR_small_RLE', 'MR_small_bigendian', 'MR_small_jp2klossless', 'MR_small_implicit', 'SC_rgb_small_odd_jpeg', 'SC_rgb_small_odd_big_endian',
                                                                        'SC_rgb_dcmtk_+eb+cy+s2', 'JPEGLSNearLossless_08', 'test-SR')]

SEEDS = seeds()
WORDS = [b'\0\0', b'\1\0', b'\0\1', b'\xff\xff', b'\xff\xff\xff\xff', b'\0\0\0\x80', b'\xff\xff\xff\x7f', b'\0\0\0\0', b'\xff\xda', b'\xff\xc0', b'\xfe\xff\0\xe0', b'\xfe\xff\xdd\xe0\0\0\0\0', b'SQ\0\0\xff\xff\xff\xff', b'OW', b'US', b'1e999', b'nan', b'acTL', b'IDAT']

def mutate(content, changes):
    "Bit flips, numbers that are edges, truncation, repetition, parts of other files."
    content = bytearray(content)
    for kind, place, size, other in changes:
        n = len(content)
        at = int(place * min(n, 700)) if size % 2 else int(place * n)  # half of them in the header
        if kind == 'flip' and n: content[min(at, n - 1)] ^= 1 << size % 8
        elif kind == 'word': content[at:at + len(WORDS[other % len(WORDS)])] = WORDS[other % len(WORDS)]
        elif kind == 'insert': content[at:at] = WORDS[other % len(WORDS)]
        elif kind == 'cut': del content[at:]
        elif kind == 'drop': del content[at:at + size]
        elif kind == 'repeat': content[at:at] = content[at:at + size] * (1 + other % 40)
        elif kind == 'splice':
            donor = SEEDS[other % len(SEEDS)]
            content[at:at + size] = donor[int(place * len(donor)):][:size * 4]
    return bytes(content)

CHANGE = st.tuples(st.sampled_from(['flip', 'flip', 'flip', 'word', 'word', 'insert', 'cut', 'drop', 'repeat', 'splice']), st.floats(0, 1), st.integers(1, 400), st.integers(0, 10**6))
FUZZ = dict(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))

def fuzz(n):
    outcomes, most = {}, memory()
    @settings(max_examples=n, **FUZZ)
    @given(st.sampled_from(range(len(SEEDS))), st.lists(CHANGE, min_size=1, max_size=4))
    def run(which, changes):
        result = check(mutate(SEEDS[which], changes), max_pixels=4_000_000)
        key = str(result) if isinstance(result, Refused) else f'film of {result.format}'
        outcomes[key] = outcomes.get(key, 0) + 1
    run()
    assert memory() - most < 400e6
    return outcomes

def test_the_seeds_are_sound():
    for content in SEEDS: check(content)
    assert {r.format for r in map(check, SEEDS) if isinstance(r, Film)} == {'JPEG', 'PNG', 'TIFF', 'DICOM'} and sum(isinstance(check(c), Film) for c in SEEDS) > 30

def test_four_hundred_damaged_files():
    outcomes = fuzz(400)
    assert sum(outcomes.values()) >= 400 and sum(n for k, n in outcomes.items() if k.startswith('film')) > 20 and len(outcomes) > 12, outcomes

@pytest.mark.slow
def test_three_thousand_damaged_files():
    outcomes = fuzz(3000)
    assert sum(outcomes.values()) >= 3000 and len(outcomes) > 20, outcomes

def test_cut_anywhere():
    "A picture that ends early is refused, not half gray; only what stands behind the picture may be missing."
    for content in SEEDS:
        if not isinstance(whole := check(content), Film): continue
        for share in (0, .01, .1, .3, .5, .7, .9):
            result = check(content[:int(share * len(content))])
            if isinstance(result, Film): assert (result.pixels == whole.pixels).all(), f'{whole.format} cut at {share}'


# Bombs: little on the disk, much in the memory

def claims(content, width, height, form):
    "The same file with another size in its header."
    if form == 'PNG':
        head = b'IHDR' + struct.pack('>2L', width, height) + content[24:29]
        return content[:12] + head + struct.pack('>L', zlib.crc32(head)) + content[33:]
    if form == 'JPEG':
        at = content.index(b'\xff\xc0') + 5
        return content[:at] + struct.pack('>2H', height, width) + content[at + 4:]
    out = content
    for tag, value in ((256, width), (257, height)):
        at = out.index(struct.pack('<HH', tag, 3)) if struct.pack('<HH', tag, 3) in out else out.index(struct.pack('<HH', tag, 4))
        out = out[:at + 2] + struct.pack('<HLL', 4, 1, value) + out[at + 12:]
    return out

@pytest.mark.parametrize('form', ['PNG', 'JPEG', 'TIFF'])
def test_pictures_that_claim_too_much(form):
    content, before = encoded(XRAY, form), memory()
    assert check(claims(content, 96, 96, form)).width == 96
    for size in ((60_000, 60_000), (65_000, 1_540), (10_001, 10_000)): assert 'claims' in str(check(claims(content, *size, form), 2))
    allowed = check(claims(content, 10_000, 9_000, form))  # the data are not there; the JPEG has its end mark, and libjpeg fills up with gray, as it does for lesson 00
    assert isinstance(allowed, Film if form == 'JPEG' else Refused)
    assert memory() - before < 400e6

def test_dicom_that_claims_too_much():
    before = memory()
    for rows, columns in ((65535, 65535), (10_001, 10_000)):
        for content in (dicom(XRAY, Rows=rows, Columns=columns), dicom(XRAY, Rows=rows, Columns=columns, syntax=JPEGBaseline8Bit, stream=encoded(XRAY, 'JPEG'))): assert 'claims' in str(check(content, 2))
    for content in (dicom(XRAY, Rows=9000, Columns=9000), dicom(XRAY, syntax=JPEGBaseline8Bit, stream=claims(encoded(XRAY, 'JPEG'), 9000, 9000, 'JPEG'))): assert 'declares' in str(check(content, 2))
    for size in ((40_000, 40_000), (97, 96)):
        stream = encoded(XRAY, 'JPEG2000', no_jp2=True)
        assert 'another size' in str(check(dicom(XRAY, syntax=JPEG2000Lossless, stream=stream[:8] + struct.pack('>2L', *size) + stream[16:]), 2))
    assert memory() - before < 200e6

def test_dicom_that_inflates():
    start = dicom(XRAY, syntax=DeflatedExplicitVRLittleEndian)
    meta = 132 + 12 + struct.unpack('<L', start[140:144])[0]  # where the deflated part begins
    deflate, before = zlib.compressobj(1, wbits=-15), memory()
    bomb = start[:meta] + b''.join(deflate.compress(bytes(10 << 20)) for _ in range(40)) + deflate.flush()
    assert len(bomb) < 3_000_000
    assert str(check(bomb)) == 'inflates to more than 134,217,728 bytes' and memory() - before < 450e6

def runs(*segments):
    starts, n = [], 64
    for s in segments: starts.append(n); n += len(s)
    return struct.pack('<16L', len(segments), *starts, *[0] * (15 - len(starts))) + b''.join(segments)

def test_run_lengths_that_unpack_to_too_much():
    good = b''.join(bytes([0x80 + 1 + 0, 0]) for _ in range(72)) + b'\x81\0'  # 72 + 1 runs of 128 zeros for 96 x 96 pixels
    film = check(dicom(XRAY, syntax=RLELossless, stream=runs(good)))
    assert isinstance(film, Film) and not film.pixels.any()
    before = memory()
    for segment, reason in [(b'\x81\0' * 9_000, 'unpack to more pixels'), (b'\x81\0' * 5_000_000, 'longer than what they unpack to'), (b'\x80' * 20_000_000, 'longer than'), (b'', 'damaged')]:
        assert reason in str(check(dicom(XRAY, syntax=RLELossless, stream=runs(segment)), 5))
    assert memory() - before < 300e6

def test_text_and_profiles_that_inflate():
    "Pillow bounds them; that it does is checked here."
    deflate, content = zlib.compressobj(1), encoded(XRAY, 'PNG')
    packed, before = b''.join(deflate.compress(bytes(10 << 20)) for _ in range(30)) + deflate.flush(), memory()
    for name, start in {'zTXt': b'a\0\0', 'iTXt': b'a\0\1\0\0\0', 'iCCP': b'a\0\0'}.items():
        chunk = name.encode() + start + packed
        check(content[:33] + struct.pack('>L', len(chunk) - 4) + chunk + struct.pack('>L', zlib.crc32(chunk)) + content[33:])
        assert memory() - before < 200e6, name

def test_progressive_jpegs_of_endless_passes():
    content = encoded(np.zeros((3000, 3000), np.uint8), 'JPEG', progressive=True)
    at = content.rindex(b'\xff\xda')
    assert isinstance(check(content), Film)
    assert 'passes over' in str(check(content[:at] + content[at:-2] * 3000 + b'\xff\xd9', 2))
    assert isinstance(check(encoded(XRAY, 'JPEG', progressive=True)), Film)


# Structures without an end

def test_tiff_directories_that_go_round():
    content = bytearray(encoded(XRAY, 'TIFF'))
    first = struct.unpack('<L', content[4:8])[0]
    after = first + 2 + 12 * struct.unpack('<H', content[first:first + 2])[0]
    content[after:after + 4] = struct.pack('<L', first)
    assert str(check(bytes(content), 3)) in ('has several pages; one is needed', 'film') or isinstance(check(bytes(content), 3), Film)
    pages = b''.join(struct.pack('<H12sL', 1, struct.pack('<HHLL', 256, 4, 1, 9), len(content) + 18 * (i + 1)) for i in range(300_000))
    content[after:after + 4] = struct.pack('<L', len(content))
    assert isinstance(check(bytes(content) + pages, 3), Refused)

def nested(depth): return (b'\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff' + b'\xfe\xff\0\xe0\xff\xff\xff\xff') * depth

def test_dicom_of_endless_parts():
    content = dicom(XRAY)
    at = content.index(b'\x28\0\x02\0US')
    for extra, fine in [(nested(100_000), False), (b'\x09\0\x01\x10LO\0\0' * 200_000, True), (b'\x09\0\x01\x10LO\xff\xff', False), (b'\x09\0\x01\x10UN\0\0\xfe\xff\xff\xff', False), (b'\x08\0\x05\0CS\xfe\xff' + b'\\' * 65534, True)]:
        result = check(content[:at] + extra + content[at:], 20)
        assert isinstance(result, Film) == fine
    assert isinstance(check(dicom(XRAY, syntax=JPEGBaseline8Bit, stream=b'\0\0').replace(b'\xfe\xff\0\xe0\2\0\0\0\0\0', b'\xfe\xff\0\xe0\2\0\0\0\0\0' * 200_000), 20), Refused)

def test_numbers_of_any_size():
    for header in (dict(RescaleSlope='1e308', RescaleIntercept='-1e308'), dict(RescaleSlope='0', RescaleIntercept='0'), dict(WindowCenter='1e308', WindowWidth='1e308'), dict(WindowCenter='-1e308', WindowWidth='1'), dict(WindowCenter='0', WindowWidth='1e-300', VOILUTFunction='SIGMOID'),
                   dict(WindowCenter='0', WindowWidth='1e-300', VOILUTFunction='LINEAR_EXACT'), dict(RescaleSlope='-1e-300', RescaleIntercept='0'), dict(RescaleSlope='1e308', RescaleIntercept='1e308', WindowCenter='1', WindowWidth='2'), dict(PixelPaddingValue=0, PixelPaddingRangeLimit=65535)):
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            result = check(dicom(DEEP, 12, **header))
        assert isinstance(result, Film), header

def test_warnings_that_are_errors_and_files_of_two_kinds():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert isinstance(check(dicom(XRAY, PixelData=XRAY.tobytes() + b'some excess')), Film)
    both = bytearray(encoded(XRAY, 'TIFF'))
    both[128:132] = b'DICM'
    assert isinstance(check(bytes(both)), Refused)
    tail = encoded(XRAY, 'PNG') + b'<script>' + encoded(XRAY, 'JPEG')
    assert check(tail).format == 'PNG'


# Models: what is in a file is never run

def keras_file(path, layer):
    "A .keras file with one foreign layer, written by hand."
    import json, zipfile
    inputs = dict(module='keras.layers', class_name='InputLayer', config=dict(batch_shape=[None, 32, 32, 1], dtype='float32', name='in'), registered_name=None)
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('metadata.json', json.dumps(dict(keras_version='3.15.1', date_saved='2026-01-01@00:00:00')))
        z.writestr('config.json', json.dumps(dict(module='keras', class_name='Sequential', config=dict(name='s', trainable=True, dtype='float32', layers=[inputs, layer], build_input_shape=[None, 32, 32, 1]), registered_name=None)))
        z.writestr('model.weights.h5', b'')
    return path

def test_code_in_a_keras_file_is_not_run(tmp_path):
    from cxr_lab.lungs import load_segmenter
    mark = tmp_path/'executed'
    command = f'touch {mark}'
    popen = dict(module='subprocess', class_name='Popen', config=dict(args=command, shell=True), registered_name='Popen')
    system = dict(module='os', class_name='function', config='system', registered_name='system')
    layers = [dict(module='keras.layers', class_name='Lambda', config=dict(name='l', function=system, arguments=dict(command=command)), registered_name=None), popen,
              dict(module='keras.layers', class_name='Lambda', config=dict(name='l', function=dict(class_name='__lambda__', config=dict(code='4wEAAAAAAAAA', defaults=None, closure=None))), registered_name=None),
              dict(module='keras.layers', class_name='Dense', config=dict(name='d', units=1, activation=system), registered_name=None), dict(module='keras.layers', class_name='Dense', config=dict(name='d', units=1, kernel_initializer=popen), registered_name=None)]
    for layer in layers:
        with pytest.raises(ValueError, match='x.keras cannot be opened as a Keras model without running code'): load_segmenter(keras_file(tmp_path/'x.keras', layer))
        assert not mark.exists()
