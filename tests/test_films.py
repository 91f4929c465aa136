"X-rays from files: what each form becomes, compared with lesson 00 and with pydicom's own recipes; which files of a folder are read."
import ast, io, logging, os, sys, warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian, HTJ2KLossless, ImplicitVRLittleEndian, JPEG2000, JPEG2000Lossless,
                         JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLosslessSV1, JPEGLSLossless, RLELossless)

from cxr_lab import films
from cxr_lab.films import (ASPECTS, Refused, SUFFIXES, film_square, find_films, open_image, read_film,
                           read_file, read_pixels, read_start, square, to_gray)
from cxr_lab.images import pixel_cache
from cxr_lab.phantom import make_phantom
from layouts import encoded, gray

XRAY = make_phantom(5, 1, size=96).image
DEEP = (300 + 14. * XRAY + np.arange(96)).astype(np.uint16)  # 12 bits
EXAMPLES = Path(pydicom.__file__).parent/'data'/'test_files'

def dicom(a, bits=None, syntax=ExplicitVRLittleEndian, stream=None, **header):
    "A DICOM file that stores `a` as it is, or holds a compressed stream."
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax == RLELossless and stream is None else syntax
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientName, ds.PatientID = '1.2.840.10008.5.1.4.1.1.1.1', '1.2.3.4', 'Doe^Jane', 'ID-4711'
    ds.Rows, ds.Columns, ds.SamplesPerPixel = *a.shape[:2], 3 if a.ndim == 3 else 1
    ds.PhotometricInterpretation, ds.PixelRepresentation = 'RGB' if a.ndim == 3 else 'MONOCHROME2', int(a.dtype.kind == 'i')
    if a.ndim == 3: ds.PlanarConfiguration = 0
    ds.BitsAllocated, ds.BitsStored = 8 * a.itemsize, bits or 8 * a.itemsize
    ds.HighBit = ds.BitsStored - 1
    if stream is None: ds.PixelData = (a.astype(a.dtype.newbyteorder('>')) if syntax == ExplicitVRBigEndian else a).tobytes()
    else: ds.PixelData = encapsulate([stream])
    ds['PixelData'].VR = 'OB' if stream is not None or a.itemsize == 1 else 'OW'
    for key, value in header.items(): setattr(ds, key, value)
    if stream is not None: ds['PixelData'].is_undefined_length = True
    elif syntax == RLELossless: ds.compress(RLELossless)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # some of what is written here is meant to be wrong
        ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()

def table(data, bits, first=0, vr='US', **more):
    "A lookup table for a header."
    item = pydicom.Dataset()
    item.LUTDescriptor = [len(data) % 65536, first, bits]
    item.add_new('LUTData', vr, [int(v) for v in data] if vr == 'US' else np.asarray(data, '<u2').tobytes())
    for key, value in more.items(): setattr(item, key, value)
    return pydicom.Sequence([item])

def same(a, b): return a.shape == b.shape and a.dtype == b.dtype and (a == b).all()


# Forms of an image

RAMP = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))

RGB = np.dstack([RAMP] * 3)

FORMS = {'gray JPEG': (encoded(RAMP, quality=95), 3), 'RGB JPEG': (encoded(RGB, quality=95), 3), 'CMYK JPEG': (encoded(Image.fromarray(RGB).convert('CMYK'), quality=95), 6),
         'gray PNG': (encoded(RAMP, 'PNG'), 0), 'RGB PNG': (encoded(RGB, 'PNG'), 1), '16-bit PNG': (encoded(RAMP.astype(np.uint16) * 257, 'PNG'), 1),
         '16-bit TIFF': (encoded(RAMP.astype(np.uint16) * 257, 'TIFF'), 1), '12 bits in 16': (encoded(RAMP.astype(np.uint16) << 4, 'PNG'), 1),
         '32-bit TIFF': (encoded(RAMP.astype(np.int32) << 4, 'TIFF'), 1), 'palette PNG': (encoded(Image.fromarray(RAMP).convert('P'), 'PNG'), 1),
         'palette GIF': (encoded(Image.fromarray(RAMP), 'GIF'), 1), 'opaque RGBA': (encoded(np.dstack([RGB, np.full_like(RAMP, 255)]), 'PNG'), 1),
         'opaque gray + alpha': (encoded(Image.merge('LA', [Image.fromarray(RAMP), Image.new('L', (64, 48), 255)]), 'PNG'), 1),
         'CMYK TIFF': (encoded(Image.fromarray(RGB).convert('CMYK'), 'TIFF'), 1), 'bilevel PNG': (encoded(Image.fromarray(RAMP > 127), 'PNG'), None)}

@pytest.mark.parametrize('name', FORMS)
@pytest.mark.parametrize('aspect', ASPECTS)
def test_every_form_becomes_the_same_uint8(name, aspect):
    content, tolerance = FORMS[name]
    out = read_pixels(content, 32, aspect)
    assert out.shape == (1, 32, 32) and out.dtype == np.uint8
    truth = RAMP if tolerance is not None else (RAMP > 127).astype(np.uint8) * 255
    difference = np.abs(out.astype(int) - square(Image.fromarray(truth), 32, aspect)).max()
    assert difference <= (tolerance or 0)

def test_transparent_is_black():
    clear = np.dstack([np.full((8, 8, 3), 200, np.uint8), np.zeros((8, 8), np.uint8)])
    assert not np.asarray(to_gray(Image.fromarray(clear))).any()
    palette = Image.fromarray(np.full((8, 8), 200, np.uint8)).convert('P')
    assert not open_image(encoded(palette, 'PNG', transparency=palette.getpixel((0, 0)))).getbbox()

def test_a_black_16_bit_image_stays_black_and_8_bits_are_not_stretched():
    assert not np.asarray(to_gray(Image.fromarray(np.zeros((4, 4), np.uint16)))).any()
    assert np.asarray(to_gray(Image.fromarray(np.full((4, 4), 90, np.uint16)))).max() == 90
    assert np.asarray(to_gray(Image.fromarray(np.array([[-5, 300]], np.int32)))).tolist() == [[0, 150]]

@pytest.mark.parametrize('w,h,size', [(2000, 1500, 128), (2000, 1500, 64), (1600, 1000, 224), (900, 2000, 128), (257, 256, 128), (3000, 700, 128)])
def test_reduced_decoding_loses_nothing(w, h, size):
    "Against decoding every pixel: not more than rounding, also where there is fine detail."
    rng = np.random.default_rng(0)
    fine = gray(w, h).astype(int) + rng.integers(-30, 30, (h, w)) + 20 * (np.indices((h, w)).sum(0) // 8 % 2)
    content = encoded(fine.clip(0, 255).astype(np.uint8), quality=90)
    for aspect in ASPECTS:
        full, reduced = square(open_image(content), size, aspect).astype(int), read_pixels(content, size, aspect).astype(int)
        assert np.abs(full - reduced).mean() < 1 and np.abs(full - reduced).max() <= 8
    assert min(open_image(content, at_least=2 * size).size) >= min(2 * size, h, w), 'never below what is needed'

def test_large_jpegs_are_decoded_at_reduced_scale():
    assert open_image(encoded(gray(2000, 1600)), at_least=256).size == (500, 400)

def test_aspect_rules():
    wide = np.zeros((20, 40), np.uint8); wide[:, 10:30] = 200
    image = Image.fromarray(wide)
    assert (square(image, 20, 'crop') == 200).mean() > .85, 'the middle square'
    pad = square(image, 20, 'pad')[0]
    assert not pad[:5].any() and not pad[15:].any() and pad[5:15, 7:13].min() == 200
    stretch = square(image, 20)[0]
    assert stretch[:, 7:13].min() == 200 and not stretch[:, :3].any()
    tall = square(Image.fromarray(wide.T.copy()), 20, 'pad')[0]
    assert (tall == pad.T).all()
    with pytest.raises(ValueError, match="aspect='fit'; known: stretch, pad, crop"): square(image, 20, 'fit')
    for aspect in ASPECTS: assert square(Image.fromarray(np.full((1, 500), 9, np.uint8)), 16, aspect).max() == 9, 'a line of pixels does not vanish'

def test_luma_is_what_a_jpeg_stores():
    "Colors too: the first component of the file, not a detour over RGB with its rounding; the same at every scale."
    rng = np.random.default_rng(0)
    colors = Image.fromarray(np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((16, 16, 1))).astype(np.uint8))
    content = encoded(colors, quality=95)
    stored = Image.open(io.BytesIO(content)); stored.draft('YCbCr', None)
    assert (np.asarray(open_image(content)) == np.asarray(stored)[..., 0]).all()
    assert np.abs(np.asarray(open_image(content)).astype(int) - np.asarray(colors.convert('L'))).mean() < 3, 'and that is luma'

def test_white_may_be_zero():
    "TIFF, photometric interpretation 0: the numbers are of darkness."
    for bits, a in ((8, RAMP), (16, RAMP.astype(np.uint16) * 257)):
        negative = encoded(Image.fromarray(a if bits == 8 else a.max() - a), 'TIFF', tiffinfo={262: 0})  # with 8 bits Pillow turns the numbers around by itself
        assert np.abs(np.asarray(open_image(negative)).astype(int) - RAMP).max() <= 1, bits

def test_a_truncated_large_jpeg_is_found_at_reduced_scale_too():
    content = encoded(np.random.default_rng(0).integers(0, 255, (1000, 1400), np.uint8), quality=60)
    for cut in (.3, .9, .999):
        with pytest.raises(ValueError, match='damaged image'): open_image(content[:int(cut * len(content))], at_least=64)

@pytest.mark.filterwarnings('ignore')
def test_damaged_bytes_never_raise_anything_but_value_error():
    rng, forms = np.random.default_rng(0), {}
    for form, options in [('JPEG', {}), ('PNG', {}), ('TIFF', {}), ('GIF', {}), ('BMP', {}), ('WEBP', {}), ('PPM', {}), ('TIFF', dict(compression='tiff_lzw'))]:
        forms[form + str(options)] = encoded(gray(), form, **options)
    unexpected = {}
    for name, content in forms.items():
        for trial in range(150):
            bad = bytearray(content)
            for _ in range(rng.integers(1, 6)): bad[rng.integers(min(len(bad), 200 if trial % 2 else len(bad)))] = rng.integers(256)
            try: out = read_pixels(bytes(bad), 16)
            except ValueError: continue
            except Exception as e: unexpected[f'{name} {type(e).__name__}'] = str(e)
            else: assert out.shape == (1, 16, 16) and out.dtype == np.uint8
    assert not unexpected

def test_reading_the_start_of_a_file(tmp_path):
    (tmp_path/'a').write_bytes(b'0123456789'); (tmp_path/'b').touch()
    assert read_start(tmp_path/'a', 4) == (10, b'0123') and read_start(tmp_path/'a', 40) == (10, b'0123456789') and read_file(tmp_path/'a', 10) == b'0123456789'
    for wrong, match in [((tmp_path/'a', 9), '10 bytes, more than 9'), ((tmp_path/'b',), 'empty'), ((tmp_path,), 'a folder'), (('a\0b',), 'no such file'), (('\ud800',), 'no such file')]:
        with pytest.raises(ValueError, match=match): read_file(*wrong)


# Pictures

@pytest.mark.parametrize('aspect', ASPECTS)
def test_the_pixel_cache_of_lesson_00(phantom_images, phantom_index, tmp_path, aspect):
    index = phantom_index[::4].reset_index(drop=True)
    for size in (32, 48):
        cache = pixel_cache(phantom_images, index, size, aspect, folder=tmp_path)
        for path, pixels in zip(index.path, cache): assert same(film_square(phantom_images/path, size, aspect), pixels)

@pytest.mark.parametrize('aspect', ASPECTS)
def test_large_pictures_take_the_same_reduced_path(aspect):
    rng = np.random.default_rng(0)
    fine = rng.integers(0, 256, (600, 800), np.uint8)
    color = Image.fromarray(np.dstack([fine, 255 - fine, np.roll(fine, 7)]))
    for content in (encoded(fine, 'JPEG'), encoded(color, 'JPEG'), encoded(color, 'JPEG', progressive=True), encoded(fine, 'PNG'), encoded(color.convert('P'), 'PNG'), encoded(color.convert('CMYK'), 'JPEG'),
                    encoded(fine.astype(np.uint16) * 200, 'PNG'), encoded(color.convert('RGBA'), 'PNG'), encoded(Image.fromarray(fine > 99), 'PNG')):
        assert same(film_square(content, 64, aspect), read_pixels(content, 64, aspect))
    film = read_film(encoded(fine, 'JPEG'), at_least=128)
    assert (film.width, film.height) == (800, 600) and min(film.pixels.shape) < 300 and same(film.square(64, aspect), film_square(encoded(fine, 'JPEG'), 64, aspect))
    assert read_film(encoded(fine, 'PNG')).pixels.shape == (600, 800)

def test_real_images_are_those_of_the_cache(real_data):
    for path in sorted((real_data/'chest_xray'/'test'/'NORMAL').glob('*.jpeg'))[:6]:
        for aspect in ASPECTS: assert same(film_square(path, 128, aspect), read_pixels(path.read_bytes(), 128, aspect))

@pytest.mark.parametrize('content, note', [
    (encoded(XRAY, 'PNG'), None), (encoded(XRAY.astype(np.uint16) * 256, 'PNG'), '16 bit scaled to 8'), (encoded(Image.fromarray(XRAY).convert('RGB'), 'PNG'), 'color turned to gray'),
    (encoded(XRAY, 'TIFF'), None), (encoded(XRAY, 'TIFF', compression='tiff_lzw'), None), (encoded(XRAY.astype(np.uint16) * 256, 'TIFF'), '16 bit scaled to 8'), (encoded(XRAY, 'TIFF', tiffinfo={262: 0}), None),  # Pillow turns 8 bits around, writing and reading
   
    (encoded(65535 - XRAY.astype(np.uint16) * 256, 'TIFF', tiffinfo={262: 0}), 'inverted: white is zero')])
def test_forms_of_one_picture(content, note):
    film = read_film(content)
    tolerance = 1 if note in ('color turned to gray', 'inverted: white is zero') else 0
    assert film.pixels.dtype == np.uint8 and film.pixels.shape == (96, 96) and film.format in ('PNG', 'TIFF') and np.abs(film.pixels.astype(int) - XRAY).max() <= tolerance
    assert (note in film.notes) if note else film.notes == ()

def test_content_decides_not_the_name(tmp_path):
    for suffix, said in SUFFIXES.items():
        for form, content in dict(JPEG=encoded(XRAY, 'JPEG'), PNG=encoded(XRAY, 'PNG'), TIFF=encoded(XRAY, 'TIFF'), DICOM=dicom(XRAY)).items():
            path = tmp_path/f'x{suffix.upper()}'
            path.write_bytes(content)
            film = read_film(path)
            assert film.format == form and film.notes == read_film(content, name=path.name).notes == ((f'{form}, though its name says {said}',) if form != said else ())
    assert read_film(encoded(XRAY, 'PNG'), name='no suffix').notes == read_film(bytearray(encoded(XRAY, 'PNG'))).notes == ()

def test_several_pictures_in_one_file():
    more = dict(save_all=True, append_images=[Image.fromarray(255 - XRAY)])
    with pytest.raises(Refused, match='has several pages; one is needed'): read_film(encoded(XRAY, 'TIFF', **more))
    with pytest.raises(Refused, match='an animation of 2 pictures'): read_film(encoded(XRAY, 'PNG', **more))
    film = read_film(encoded(XRAY, 'MPO', **more))  # as telephones save photographs, with a preview behind the picture
    assert film.format == 'JPEG' and film.notes == ('first of several pictures in the file',) and np.abs(film.pixels.astype(int) - XRAY).mean() < 3

def test_other_forms_are_refused():
    for content in (encoded(XRAY, 'GIF'), encoded(XRAY, 'BMP'), encoded(XRAY, 'WEBP'), encoded(XRAY, 'EPS'), b'%PDF-1.7', b'<html>404</html>', b'\xff', b'\0' * 500):
        with pytest.raises(Refused, match='^neither JPEG, PNG, TIFF nor DICOM$'): read_film(content)

def test_orders_of_the_caller_are_errors_of_the_caller():
    with pytest.raises(ValueError, match="aspect='fit'"): film_square(encoded(XRAY, 'PNG'), 32, 'fit')
    with pytest.raises(TypeError): read_film(None)
    with pytest.raises(Refused, match='96 x 96 pixels, more than 9,000'): read_film(encoded(XRAY, 'PNG'), max_pixels=9000)
    with pytest.raises(Refused, match='bytes, more than 100'): read_film(encoded(XRAY, 'PNG'), max_bytes=100)


# DICOM

SYNTAXES = [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless]

@pytest.mark.parametrize('syntax', SYNTAXES, ids=lambda s: s.name)
def test_a_known_array_gives_the_same_as_its_png(syntax):
    for a, bits in [(XRAY, 8), (DEEP, 12), (DEEP * 16, 16), (DEEP // 3, 12), (XRAY.astype(np.uint16), 12)]:
        film, picture = read_film(dicom(a, bits, syntax)), read_film(encoded(a, 'PNG'))
        assert same(film.pixels, picture.pixels) and film.format == 'DICOM' and (film.width, film.height) == (96, 96)
        for aspect in ASPECTS: assert same(film_square(dicom(a, bits, syntax), 40, aspect), film_square(encoded(a, 'PNG'), 40, aspect))
    assert same(read_film(dicom(XRAY)).pixels, XRAY)
    rgb = np.dstack([XRAY, 255 - XRAY, XRAY // 2])
    if syntax != ExplicitVRBigEndian: assert same(read_film(dicom(rgb, syntax=syntax)).pixels, read_film(encoded(rgb, 'PNG')).pixels)

def test_streams_of_pillow():
    "A JPEG within DICOM is the JPEG; lossless JPEG 2000 is the array."
    jpeg = encoded(XRAY, 'JPEG', quality=80)
    assert same(read_film(dicom(XRAY, syntax=JPEGBaseline8Bit, stream=jpeg)).pixels, read_film(jpeg).pixels)
    for a, bits in [(XRAY, 8), (DEEP * 16, 16)]:
        stream = encoded(a, 'JPEG2000', irreversible=False, no_jp2=True)
        assert same(read_film(dicom(a, bits, JPEG2000Lossless, stream)).pixels, read_film(encoded(a, 'PNG')).pixels)
    rgb = np.dstack([XRAY, 255 - XRAY, XRAY // 2])
    color = read_film(dicom(rgb, syntax=JPEGBaseline8Bit, stream=encoded(rgb, 'JPEG', quality=95), PhotometricInterpretation='YBR_FULL_422'))
    assert np.abs(color.pixels.astype(int) - read_film(encoded(rgb, 'PNG')).pixels).mean() < 2 and color.notes == ('color turned to gray',)

def recipe(ds, a):
    "0 to 255 by pydicom's own functions, of which the result is scaled over the range that they document."
    x = apply_modality_lut(a, ds)
    y = apply_voi_lut(x, ds).astype(float)
    ends = np.array([0, 2**ds.BitsStored - 1]) - (ds.PixelRepresentation << ds.BitsStored - 1)
    if 'ModalityLUTSequence' in ds: ends = np.array([0, 2**ds.ModalityLUTSequence[0].LUTDescriptor[2] - 1])
    elif 'VOILUTSequence' in ds: ends = np.array([0, 2**ds.VOILUTSequence[0].LUTDescriptor[2] - 1])
    elif 'RescaleSlope' in ds: ends = np.sort(ends * float(ds.RescaleSlope) + float(ds.RescaleIntercept))
    share = (y - ends[0]) / (ends[1] - ends[0])
    return 255 * (1 - share if ds.PhotometricInterpretation == 'MONOCHROME1' else share)

CURVE = (4095 * np.linspace(0, 1, 3000)**2).astype(int)
RECIPES = {'linear': dict(WindowCenter=1900, WindowWidth=2500), 'linear exact': dict(WindowCenter=1900, WindowWidth=2500, VOILUTFunction='LINEAR_EXACT'), 'sigmoid': dict(WindowCenter=1900, WindowWidth=900, VOILUTFunction='SIGMOID'),
           'several windows': dict(WindowCenter=[1500, 9], WindowWidth=[1000, 9]), 'rescaled': dict(RescaleSlope=2.5, RescaleIntercept=-1000, WindowCenter=3000, WindowWidth=5000), 'narrow': dict(WindowCenter=2000, WindowWidth=1),
           'inverted': dict(WindowCenter=1900, WindowWidth=2500, PhotometricInterpretation='MONOCHROME1'), 'table': dict(VOILUTSequence=table(CURVE, 12, 500)), 'table as words': dict(VOILUTSequence=table(CURVE, 12, 500, 'OW')),
           'table before window': dict(VOILUTSequence=table(CURVE, 12), WindowCenter=1, WindowWidth=1), 'table and window': dict(ModalityLUTSequence=table(CURVE * 16, 16, ModalityLUTType='US'), WindowCenter=32000, WindowWidth=48000)}

@pytest.mark.parametrize('name', RECIPES)
@pytest.mark.parametrize('syntax', SYNTAXES[:3], ids=lambda s: s.name)
def test_recipes_against_pydicom(name, syntax):
    if name == 'table as words' and syntax == ExplicitVRBigEndian: pytest.skip('the table of this test is little-endian')
    content = dicom(DEEP, 12, syntax, **RECIPES[name])
    ds = pydicom.dcmread(io.BytesIO(content))
    film = read_film(content)
    assert np.abs(film.pixels - recipe(ds, DEEP)).max() <= 1.01, 'pixels are cut to 8 bits, as lesson 00 cuts 16 to 8'
    assert film.pixels.std() > 20
    assert any('of the header applied' in n for n in film.notes) and ('inverted from MONOCHROME1' in film.notes) == (name == 'inverted')

def test_big_endian_table_as_words():
    words = table(CURVE, 12, 500, 'OW')
    words[0]['LUTData'].value = CURVE.astype('>u2').tobytes()
    assert same(read_film(dicom(DEEP, 12, ExplicitVRBigEndian, VOILUTSequence=words)).pixels, read_film(dicom(DEEP, 12, VOILUTSequence=RECIPES['table']['VOILUTSequence'])).pixels)

def test_an_8_bit_table_longer_than_256():
    "As many digital radiographs have."
    curve = (255 * np.linspace(0, 1, 4096)**.5).astype(int)
    assert same(read_film(dicom(DEEP, 12, VOILUTSequence=table(curve.tolist(), 8))).pixels, curve[DEEP].astype(np.uint8))

def test_a_window_over_everything_changes_nothing():
    assert same(read_film(dicom(XRAY, WindowCenter=128, WindowWidth=256)).pixels, XRAY)
    assert same(read_film(dicom(DEEP, 12, WindowCenter=2048, WindowWidth=4096)).pixels, read_film(encoded(DEEP, 'PNG')).pixels)

@pytest.mark.parametrize('bits', [12, 16])
def test_values_with_a_sign(bits):
    signed = DEEP.astype(np.int16) // 2 - 1000
    assert signed.min() < 0
    for syntax in SYNTAXES: assert same(read_film(dicom(signed, bits, syntax)).pixels, read_film(encoded((signed - signed.min()).astype(np.uint16), 'PNG')).pixels)
    ds = pydicom.dcmread(io.BytesIO(dicom(signed, bits, WindowCenter=800, WindowWidth=2000)))
    assert np.abs(read_film(dicom(signed, bits, WindowCenter=800, WindowWidth=2000)).pixels - recipe(ds, signed)).max() <= 1.01
    positive = DEEP.astype(np.int16) % 2048
    assert same(read_film(dicom(positive, bits)).pixels, read_film(encoded(positive.astype(np.uint16), 'PNG')).pixels)

def test_monochrome1_and_falling_slopes_are_inverted_once():
    plain = read_film(dicom(DEEP, 12)).pixels
    assert same(read_film(dicom(DEEP, 12, PhotometricInterpretation='MONOCHROME1')).pixels, 255 - plain)
    assert same(read_film(dicom(DEEP, 12, RescaleSlope=-1, RescaleIntercept=4095)).pixels, 255 - plain)
    assert same(read_film(dicom(DEEP, 12, RescaleSlope=-2, RescaleIntercept=0, PhotometricInterpretation='MONOCHROME1')).pixels, plain)
    assert same(read_film(dicom(DEEP, 12, RescaleSlope=3, RescaleIntercept=-1024)).pixels, plain), 'without a window a rescaling changes no picture'

def test_padding_is_black_and_not_the_brightest_value():
    a = DEEP.copy()
    a[:20] = 65535
    for header in (dict(PixelPaddingValue=65535), dict(PixelPaddingValue=65535, PixelPaddingRangeLimit=60000), dict(PixelPaddingValue=65535, PhotometricInterpretation='MONOCHROME1')):
        film = read_film(dicom(a, 16, **header))
        whole = read_film(dicom(DEEP, 16)).pixels
        assert not film.pixels[:20].any() and same(film.pixels[20:], (255 - whole if 'MONOCHROME1' in header.values() else whole)[20:])

@pytest.mark.parametrize('header', [dict(WindowCenter=100, WindowWidth=0), dict(WindowCenter=100), dict(WindowWidth=5), dict(WindowCenter=1, WindowWidth=-5, VOILUTFunction='SIGMOID'), dict(WindowCenter=1, WindowWidth=9, VOILUTFunction='CUBIC')])
def test_an_unusable_window_is_ignored_and_noted(header):
    film = read_film(dicom(DEEP, 12, **header))
    assert same(film.pixels, read_film(dicom(DEEP, 12)).pixels) and 'unusable window of the header ignored' in film.notes

def test_what_the_header_says_against_it():
    assert read_film(dicom(XRAY, Modality='DX', ViewPosition='AP')).notes == ()
    assert read_film(dicom(XRAY, Modality='CT', ViewPosition='ll')).notes == ('its header says computed tomography', 'its header says lateral view')
    assert read_film(dicom(XRAY, Modality='DOE JANE', ViewPosition='DOE JANE')).notes == ()

@pytest.mark.parametrize('header, reason', [
    (dict(NumberOfFrames='2'), 'has 2 frames'), (dict(Rows=97), 'declares 96 x 97 pixels, but holds fewer'), (dict(Rows=0), 'claims to have no pixels'), (dict(Rows=65535, Columns=65535), '65535 x 65535 pixels, more than'),
    (dict(BitsAllocated=32), 'BitsAllocated .* neither 8 nor 16'), (dict(BitsStored=7, HighBit=6), 'BitsStored .* not 8 to'), (dict(BitsStored=17), 'BitsStored'), (dict(HighBit=15, BitsStored=12), 'from the lowest on'),
    (dict(SamplesPerPixel=4), 'SamplesPerPixel .* neither 1 nor 3'), (dict(PhotometricInterpretation='PALETTE COLOR'), 'none of MONOCHROME1, MONOCHROME2'), (dict(PixelRepresentation=2), 'PixelRepresentation'),
    (dict(SamplesPerPixel=3, PhotometricInterpretation='RGB'), 'color with more than 8 bits'), (dict(RescaleSlope=float('nan'), RescaleIntercept=0), 'RescaleSlope .* finite'), (dict(WindowCenter=float('inf'), WindowWidth=1), 'WindowCenter .* finite'),
    (dict(VOILUTSequence=table([1, 2, 3], 12, LUTDescriptor=[4000, 0, 12])), 'lookup table'), (dict(VOILUTSequence=table([1, 2], 4)), 'lookup table')])
def test_headers_that_are_refused(header, reason):
    with pytest.raises(Refused, match=reason): read_film(dicom(DEEP, **header))

@pytest.mark.parametrize('syntax, package', [(JPEGLosslessSV1, 'python-gdcm'), (JPEGLSLossless, 'python-gdcm'), (HTJ2KLossless, 'pylibjpeg-openjpeg'), (JPEGExtended12Bit, 'pylibjpeg-libjpeg'), (JPEG2000, 'python-gdcm')])
def test_without_a_decoder_it_is_said_what_to_install(monkeypatch, syntax, package):
    decoder = pydicom.pixels.get_decoder(syntax)
    monkeypatch.setattr(decoder, '_available', {k: v for k, v in decoder._available.items() if k == 'pillow' and syntax == JPEGExtended12Bit})
    with pytest.raises(Refused, match=f'compressed as (JPEG|High).*no decoder for that is installed .*{package}'): read_film(dicom(DEEP, 12, syntax, b'\xff\xd8\xff\xd9'))

def test_the_examples_of_pydicom():
    "Files of real devices: where pydicom shows one gray picture of 8 to 16 bits, so does read_film, and it is the same one."
    compared = 0
    for path in sorted(EXAMPLES.glob('*.dcm')):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try:
                ds = pydicom.dcmread(path)
                a = ds.pixel_array
            except Exception: a = None
            usable = a is not None and ds.PhotometricInterpretation.startswith('MONO') and a.ndim == 2 and 8 <= ds.BitsStored <= ds.BitsAllocated <= 16
            shown = usable and apply_voi_lut(apply_modality_lut(a, ds), ds).astype(float)
        if not usable: continue
        film = read_film(path)
        assert film.pixels.shape == a.shape and np.corrcoef(film.pixels.ravel(), shown.ravel())[0, 1] > .999, path.name
        compared += 1
    assert compared >= 12

def test_nothing_of_the_patient_gets_out(recwarn, caplog, capfd):
    "Not in notes, messages, warnings, logs or on the terminal, for files that pydicom complains about."
    caplog.set_level(logging.DEBUG)
    spoiled = [dicom(XRAY) + b'excess', dicom(XRAY, SpecificCharacterSet='Doe^Jane'), dicom(XRAY, WindowCenter='4711'), dicom(XRAY, Modality='Doe^Jane'), dicom(XRAY)[:4000], dicom(XRAY, syntax=JPEG2000, stream=b'\xff\x4f\xff\x51Doe^Jane ID-4711' * 9),
               dicom(XRAY, PixelData=XRAY.tobytes() + b'Doe^Jane ID-4711'), dicom(XRAY, PhotometricInterpretation='Doe^Jane'), dicom(XRAY, VOILUTFunction='Doe^Jane', WindowCenter=1, WindowWidth=2),
               dicom(XRAY, syntax=JPEGBaseline8Bit, stream=encoded(XRAY, 'JPEG', comment=b'Doe^Jane')[:-500]), dicom(XRAY).replace(b'1.2.840.10008.1.2.1\0', b'1.2.840.10008.Doe^J\0'), dicom(XRAY).replace(b'CS\x0c\0MONOCHROME2 ', b'CS\x0c\0Doe^Jane    '),
               dicom(XRAY).replace(b'US\x02\0\x60\0', b'DS\x02\0ID')]
    caplog.clear(), recwarn.clear()  # pydicom complained while the files were written, too
    said = []
    for content in spoiled:
        try: said += read_film(content, name='Doe^Jane ID-4711.png').notes
        except Refused as e: said += [str(e)]
    assert len(said) >= len(spoiled) - 3 and 'irregular header' in said
    out, err = capfd.readouterr()
    everything = ' '.join([*said, out, err, caplog.text, *(str(w.message) for w in recwarn)])
    for secret in ('Doe', 'Jane', 'ID-4711'): assert secret not in everything
    assert not out and not err and not [w for w in recwarn if 'pydicom' in w.filename or 'PIL' in w.filename]

def test_others_keep_their_log(caplog):
    "Reading a film hushes pydicom in this thread while it lasts, no longer and nowhere else."
    log = logging.getLogger('pydicom')
    read_film(dicom(XRAY, PixelData=XRAY.tobytes() + b'excess of data'))
    log.warning('of somebody else')
    assert [r.message for r in caplog.records] == ['of somebody else']

def test_threads_agree():
    from concurrent.futures import ThreadPoolExecutor
    contents = [dicom(DEEP, 12, s, **r) for s in SYNTAXES for r in ({}, RECIPES['linear'])] + [encoded(DEEP, 'PNG'), dicom(XRAY, PixelData=XRAY.tobytes() + b'excess')] * 2
    filters = list(warnings.filters)
    alone = [read_film(c) for c in contents]
    with ThreadPoolExecutor(4) as pool: together = list(pool.map(read_film, contents * 5))
    for i, film in enumerate(together): assert same(film.pixels, alone[i % len(alone)].pixels) and film.notes == alone[i % len(alone)].notes
    assert [f for f in warnings.filters if f not in filters] == warnings.filters[:len(warnings.filters) - len(filters)] and len(warnings.filters) <= len(filters) + 1


# Files and folders

def listed(paths): return [(str(p.path), str(p)) if isinstance(p, Refused) else str(p) for p in find_films(paths)]

@pytest.fixture
def ward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('b/2.png', 'b/10.JPG', 'a/x.dcm', 'a/IM1', 'c/.hidden.png', '.git/x.png', 'a/1.2.840.113619', 'root.tif', 'notes.txt', 'DICOMDIR', 'empty.png'):
        path = Path('ward')/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'' if name == 'empty.png' else b'text' if name == 'notes.txt' else dicom(XRAY) if name[:2] == 'a/' or name == 'DICOMDIR' else encoded(XRAY, 'PNG'))
    Path('outside.png').write_bytes(encoded(XRAY, 'PNG'))
    return Path('ward')

IN_WARD = ['ward/a/1.2.840.113619', 'ward/a/IM1', 'ward/a/x.dcm', 'ward/b/10.JPG', 'ward/b/2.png', 'ward/empty.png', 'ward/root.tif']

def test_folders_come_in_order_and_without_what_is_no_film(ward): assert listed(['ward']) == listed('ward') == listed([ward]) == IN_WARD

def test_files_are_passed_on_whatever_they_are(ward):
    assert listed(['ward/notes.txt', 'nowhere.png', 'ward/b']) == ['ward/notes.txt', 'nowhere.png', 'ward/b/10.JPG', 'ward/b/2.png']
    with pytest.raises(Refused, match='^there is no such file$'): read_film('nowhere.png')

def test_patterns(ward):
    assert listed('ward/b/*.png') == ['ward/b/2.png'] and listed('ward/?/*') == IN_WARD[:5] and listed('ward/**/*.png') == ['ward/b/2.png', 'ward/empty.png'] and listed('ward/**') == IN_WARD
    assert listed('ward/[ab]') == IN_WARD[:5] and listed([str(ward.absolute())[:-4] + 'w*/b/2*'])[0].endswith('/ward/b/2.png')
    for nothing in ('ward/*.bmp', 'none/*', 'ward/**x', '*.txt'): assert listed(nothing) == [(nothing, 'matches no film')]
    (ward/'b'/'odd[1]*.png').write_bytes(b'')
    assert listed('ward/b/odd[1]*.png') == ['ward/b/odd[1]*.png'], 'a file with that very name comes first'

@pytest.mark.skipif(os.name == 'nt', reason='needs symbolic links')
def test_links_are_not_followed_out_of_a_folder(ward, tmp_path):
    for name, target in {'out.png': '../outside.png', 'in.png': 'b/2.png', 'up': '..', 'b/again': '../b', 'gone.png': 'nowhere.png', 'loop.png': 'loop.png', 'zero.png': '/dev/zero', 'root': '/', 'sideways.png': '../ward-other/x.png'}.items():
        os.symlink(target, ward/name)
    Path('ward-other').mkdir()
    Path('ward-other/x.png').write_bytes(encoded(XRAY, 'PNG'))
    out, nowhere = 'a symbolic link that leads out of the folder', 'a symbolic link that leads nowhere'
    expected = {**{p: p for p in IN_WARD}, 'ward/in.png': 'ward/in.png', 'ward/out.png': ('ward/out.png', out), 'ward/up': ('ward/up', out), 'ward/gone.png': ('ward/gone.png', nowhere), 'ward/loop.png': ('ward/loop.png', nowhere),
                'ward/zero.png': ('ward/zero.png', out), 'ward/root': ('ward/root', out), 'ward/sideways.png': ('ward/sideways.png', out)}
    assert listed('ward') == [expected[k] for k in sorted(expected)]
    assert dict(p for p in listed('ward/**/*.png') if isinstance(p, tuple)) == {k: v[1] for k, v in expected.items() if isinstance(v, tuple) and k.endswith('.png')}
    assert listed('ward/out.png') == ['ward/out.png'] and read_film('ward/out.png').format == 'PNG', 'named itself, it is what the user wants'
    os.symlink('ward', 'link')
    assert [p for p in listed('link') if isinstance(p, str)] == ['link' + p[4:] for p in sorted([*IN_WARD, 'ward/in.png'])], 'so is a folder'

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='names of any bytes')
def test_names_of_any_bytes(tmp_path):
    names = [b'a\nb.png', b'\xff\xfe.png', 'ä ö.png'.encode(), b'<b>"\'&.png', b'-rf.png', b'$(x).png', b'\x1b[31m.png', b'=1+1.png']
    for name in names:
        with open(os.fsencode(tmp_path) + b'/' + name, 'wb') as f: f.write(encoded(XRAY, 'PNG'))
    found = list(find_films(tmp_path))
    assert [os.fsencode(p.name) for p in found] == sorted(names)
    for path in found: assert same(read_film(path).pixels, XRAY)
    for path in (tmp_path/'a\0b.png', tmp_path/'\ud800.png', tmp_path/('x' * 5000)):
        assert list(find_films([path])) == [path]
        with pytest.raises(Refused, match='^(there is no such file|cannot be read .File name too long.)$'): read_film(path)

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='pipes and devices')
def test_only_ordinary_files_are_opened(tmp_path):
    import socket
    os.mkfifo(tmp_path/'pipe.png')
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path/'s'))
        for path in (tmp_path/'pipe.png', tmp_path/'s', '/dev/zero', '/dev/null'):
            with pytest.raises(Refused, match='^not an ordinary file'): read_film(path)
    with pytest.raises(Refused, match='^a folder, not a file$'): read_film(tmp_path)
    os.mkfifo(tmp_path/'no suffix')
    assert listed(tmp_path) == [str(tmp_path/'pipe.png')], 'a pipe is not waited for'

def test_large_files_are_not_read(tmp_path):
    path = tmp_path/'x.png'
    with open(path, 'wb') as f: f.truncate(50 << 30)
    with pytest.raises(Refused, match='the file has 53,687,091,200 bytes'): read_film(path)
    path.write_bytes(b'')
    for empty in (path, b''):
        with pytest.raises(Refused, match='^the file is empty$'): read_film(empty)
    if Path('/proc/self/environ').exists():  # says it has no bytes, and has some
        with pytest.raises(Refused, match='empty'): read_film('/proc/self/environ')

@pytest.mark.skipif(os.name == 'nt' or getattr(os, 'geteuid', int)() == 0, reason='needs files that may not be read')
def test_what_may_not_be_read(ward):
    (ward/'a'/'x.dcm').chmod(0)
    (ward/'b').chmod(0)
    with pytest.raises(Refused, match=r'^cannot be read \(Permission denied\)$'): read_film(ward/'a'/'x.dcm')
    try: assert ('ward/b', 'a folder that cannot be read (Permission denied)') in listed('ward')
    finally: (ward/'b').chmod(0o700)

def test_messages_name_no_path(tmp_path):
    for path in (tmp_path, tmp_path/'none.png'):
        with pytest.raises(Refused) as e: read_film(path)
        assert str(tmp_path) not in str(e.value) and len(str(e.value).splitlines()) == 1

def test_a_folder_of_thousands_is_walked_as_it_is_asked_for(tmp_path):
    deep = tmp_path
    for i in range(60): deep = deep/'d'
    deep.mkdir(parents=True)
    for i in range(500): (tmp_path/f'{i:04}.png').touch()
    (deep/'last.png').touch()
    walk = find_films(tmp_path)
    assert next(walk).name == '0000.png' and sum(1 for _ in walk) == 500

def test_refused_is_one_printable_line():
    e = Refused('a\nb\x1b[0m\u2028' + 'x' * 1000, Path('p'))
    assert str(e).isprintable() and len(str(e)) == 300 and e.path == Path('p') and isinstance(e, ValueError)

def test_memory_and_interrupts_are_not_swallowed(monkeypatch):
    for error in (MemoryError, KeyboardInterrupt):
        def stop(*a, **k): raise error
        with monkeypatch.context() as m:
            m.setattr('cxr_lab.films.decode_image', stop)
            with pytest.raises(error): read_film(encoded(XRAY, 'PNG'))
            m.setattr('cxr_lab.films._decode', stop)
            with pytest.raises(error): read_film(dicom(XRAY))

def test_pydicom_is_not_imported_before_it_is_needed():
    "It would slow down `cxr-lab --help`."
    body = ast.parse(Path(films.__file__).read_text()).body
    assert not [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom)) and 'pydicom' in ast.unparse(n)]
