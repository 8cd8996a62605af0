"""Reading images: every sort of bad file, odd files that must work, and real images."""
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_course.core import CourseError
from cxr_course.data import files as files_module
from cxr_course.data import read as read_module
from cxr_course.data.checks import check_dataset
from cxr_course.data.duplicates import find_duplicates, thumbnail
from cxr_course.data.exploration import image_features, quick_read
from cxr_course.data.exploration_page import write_overview
from cxr_course.data.files import blame_file, image_shape
from cxr_course.data.loading import load_dataset
from cxr_course.data.privacy import identity_tags, strip_identity
from cxr_course.data.read import apply_window, read_image
from cxr_course.data.resize import crop_resize, crop_to_aspect, letterbox, resize, to_png
from cxr_course.frame import make_frame

RAMP = np.tile(np.linspace(0, 1, 97, dtype=np.float32),
               (64, 1)) * np.linspace(1, 0.4, 64, dtype=np.float32)[:, None]
EIGHT = (RAMP * 255).round().astype(np.uint8)
pydicom = pytest.importorskip("pydicom")


def dicom(path, stored, **tags):
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID, meta.MediaStorageSOPInstanceUID = (
        ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid(),
    )
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.Rows, ds.Columns = stored.shape[:2]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (3, "RGB") if stored.ndim == 3 else (1, "MONOCHROME2")
    if stored.ndim == 3: ds.PlanarConfiguration = 0
    bits = stored.dtype.itemsize * 8
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = (
        bits, bits, bits - 1, int(stored.dtype.kind == "i"),
    )
    ds.PixelData = stored.tobytes()
    for name, value in tags.items(): setattr(ds, name, value)
    ds.save_as(path, enforce_file_format=True)
    return path


def close(a, b, most=.003):
    return a.dtype == np.float32 and a.shape == b.shape and float(np.abs(a - b).max()) <= most


# ---------------------------------------------------------------- files that must work

@pytest.mark.parametrize("name, make", [
    ("l.png", lambda: Image.fromarray(EIGHT)),
    ("l.tiff", lambda: Image.fromarray(EIGHT)),
    ("la.png", lambda: Image.merge("LA", [Image.fromarray(EIGHT), Image.new("L", EIGHT.shape[::-1], 255)])),
    ("rgb.tiff", lambda: Image.fromarray(EIGHT).convert("RGB")),
    ("rgba.png", lambda: Image.fromarray(EIGHT).convert("RGBA")),
    ("palette.png", lambda: Image.fromarray(EIGHT).convert("P")),
    ("sixteen.png", lambda: Image.fromarray((RAMP * 65535).astype(np.uint16))),
    ("sixteen.tiff", lambda: Image.fromarray((RAMP * 65535).astype(np.uint16))),
    ("float.tiff", lambda: Image.fromarray(RAMP)),
])
def test_modes(tmp_path, name, make):
    make().save(tmp_path / name)
    assert close(read_image(tmp_path / name), RAMP) and image_shape(tmp_path / name) == RAMP.shape


def test_bilevel_is_read(tmp_path):
    Image.fromarray(EIGHT > 99).save(tmp_path / "one.png")
    assert (read_image(tmp_path / "one.png") == (EIGHT > 99)).all()


def test_transparent_is_black(tmp_path):
    alpha = np.full(EIGHT.shape, 255, np.uint8)
    alpha[:10] = 0
    Image.merge("LA", [Image.fromarray(EIGHT), Image.fromarray(alpha)]).save(tmp_path / "a.png")
    x = read_image(tmp_path / "a.png")
    assert (x[:10] == 0).all() and np.abs(x[10:] - RAMP[10:]).max() < .003


def test_float_outside_the_range_is_spread_and_gaps_become_black(tmp_path):
    wild = RAMP * 4000 - 1000
    wild[0, 0] = np.nan
    Image.fromarray(wild).save(tmp_path / "f.tiff")
    x = read_image(tmp_path / "f.tiff")
    assert np.isfinite(x).all() and (x.min(), x.max()) == (0, 1) and x[0, 0] == 0
    assert close(read_image(tmp_path / "f.tiff", window=(-1000, 3000))[1:], RAMP[1:], 1e-5)


def test_a_film_that_says_nothing_is_no_error(tmp_path):
    Image.new("F", (20, 10), 7.).save(tmp_path / "flat.tiff")
    assert (read_image(tmp_path / "flat.tiff") == 0).all()


def test_endings_do_not_matter(tmp_path):
    Image.fromarray(EIGHT).save(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", tmp_path / "x.jpeg")
    assert close(read_image(tmp_path / "x.jpeg"), RAMP)


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_of_a_camera(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(EIGHT).save(tmp_path / "x.jpeg", exif=exif, quality=95)
    x = read_image(tmp_path / "x.jpeg")
    assert x.shape == image_shape(tmp_path / "x.jpeg") == (RAMP.shape if turn < 5 else RAMP.shape[::-1])
    assert read_image(tmp_path / "x.jpeg", at_least=(30, 30)).min() >= 0


def test_unicode_and_spaces_in_names(tmp_path):
    folder = tmp_path / "Röntgen Thorax"
    folder.mkdir()
    Image.fromarray(EIGHT).save(folder / "Bild 1 – ž.png")
    assert close(read_image(folder / "Bild 1 – ž.png"), RAMP)


def test_at_least_never_gives_less(tmp_path):
    big = np.tile(EIGHT, (12, 9))
    Image.fromarray(big).save(tmp_path / "big.jpeg")
    for shape in ((1, 1), (90, 100), (384, 430), (385, 100), (768, 873), (2000, 2000)):
        x = read_image(tmp_path / "big.jpeg", at_least=shape)
        assert all(n >= min(s, b) for n, s, b in zip(x.shape, shape, big.shape))
    assert max(read_image(tmp_path / "big.jpeg", at_least=(90, 100)).shape) < 150


# ---------------------------------------------------------------- DICOM

STORED = (RAMP * 4000).round().astype(np.uint16)


def test_dicom_signed_with_intercept(tmp_path):
    p = dicom(tmp_path / "a.dcm", (STORED.astype(np.int32) - 1024).astype(np.int16), RescaleSlope="1",
              RescaleIntercept="24", WindowCenter=["1000.5", "40"], WindowWidth=["4001", "400"])
    assert close(read_image(p), RAMP)                                  # the first window counts


def test_dicom_without_a_window_shows_all_there_is_but_the_padding(tmp_path):
    padded = STORED + 50
    padded[:, :5] = 0
    p = dicom(tmp_path / "a.dcm", padded.astype(np.uint16), PixelPaddingValue=0)
    x = read_image(p)
    assert (x[:, :5] == 0).all() and x[:, 5:].max() == 1
    assert np.abs(x[:, 5:] - (RAMP[:, 5:] - RAMP[:, 5:].min()) / np.ptp(RAMP[:, 5:])).max() < .002


def test_dicom_tables_for_modality_and_values_of_interest(tmp_path):
    from pydicom.dataset import Dataset
    small = EIGHT.copy()
    modality, voi = Dataset(), Dataset()
    modality.LUTDescriptor, modality.ModalityLUTType, modality.LUTData = (
        [256, 0, 16], "US", np.arange(0, 1024, 4, dtype="<u2").tobytes(),
    )
    voi.LUTDescriptor, voi.LUTData = [1021, 0, 10], (1023 - np.arange(1021)).astype("<u2").tobytes()
    p = dicom(tmp_path / "a.dcm", small, ModalityLUTSequence=[modality], VOILUTSequence=[voi],
              WindowCenter="1", WindowWidth="2")
    # the table takes precedence over the window
    expected = (1023 - 4. * small) / 1023
    assert close(read_image(p), expected.astype(np.float32), .001)


@pytest.mark.parametrize("shape", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_window_agrees_with_pydicom(tmp_path, shape):
    from pydicom.pixels import apply_voi_lut
    p = dicom(tmp_path / "a.dcm", STORED, WindowCenter="1700", WindowWidth="901", VOILUTFunction=shape)
    ds = pydicom.dcmread(p)
    assert np.abs(read_image(p) - apply_voi_lut(ds.pixel_array, ds) / 65535).max() < 1e-4


@pytest.mark.parametrize(
    "photometric, shape, inverted",
    [
        ("MONOCHROME1", None, True),
        ("MONOCHROME1", "INVERSE", True),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME2", "IDENTITY", False),
    ],
)
def test_one_inversion(tmp_path, photometric, shape, inverted):
    p = dicom(tmp_path / "a.dcm", STORED, PhotometricInterpretation=photometric, WindowCenter="2000",
              WindowWidth="4000", VOILUTFunction="LINEAR_EXACT",
              **({"PresentationLUTShape": shape} if shape else {}))
    assert close(read_image(p), 1 - RAMP if inverted else RAMP)
    # the polarity is the file's, whatever the window
    assert close(read_image(p, window=(0, 4000)), 1 - RAMP if inverted else RAMP)


def test_dicom_colour(tmp_path):
    assert close(read_image(dicom(tmp_path / "grey.dcm", np.stack([EIGHT] * 3, -1), WindowCenter="128",
                                  WindowWidth="256")), RAMP, 0.006)
    red = np.stack([EIGHT, EIGHT // 2, EIGHT // 3], -1)
    with pytest.raises(CourseError, match="colour.*red.dcm"): read_image(dicom(tmp_path / "red.dcm", red))


@pytest.mark.parametrize("uid", ["RLELossless", "JPEG2000Lossless", "DeflatedExplicitVRLittleEndian"])
def test_compressed_dicom(tmp_path, uid):
    p, syntax = dicom(tmp_path / "a.dcm", STORED, WindowCenter="2000.5",
                      WindowWidth="4001"), getattr(pydicom.uid, uid)
    ds = pydicom.dcmread(p)
    if uid.startswith("Deflated"): ds.file_meta.TransferSyntaxUID = syntax
    else:
        if uid.startswith("JPEG2000"): pytest.importorskip("openjpeg")
        ds.compress(syntax)
    ds.save_as(tmp_path / "b.dcm", enforce_file_format=True)
    assert close(read_image(tmp_path / "b.dcm"), RAMP)


def test_a_decoder_that_is_missing_is_named(tmp_path):
    from pydicom.pixels import get_decoder
    if get_decoder(pydicom.uid.JPEGLSLossless).is_available: pytest.skip("a JPEG-LS decoder is installed")
    ds = pydicom.dcmread(dicom(tmp_path / "a.dcm", STORED))
    ds.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xf7" + bytes(60)])
    ds["PixelData"].is_undefined_length, ds.file_meta.TransferSyntaxUID = True, pydicom.uid.JPEGLSLossless
    ds.save_as(tmp_path / "b.dcm")
    with pytest.raises(CourseError, match="JPEG-LS.*no installed decoder(.|\n)*b.dcm(.|\n)*pip install"):
        read_image(tmp_path / "b.dcm")


def test_dicom_with_a_window_that_makes_no_sense_names_the_file(tmp_path):
    with pytest.raises(CourseError, match="width(.|\n)*a.dcm"):
        read_image(dicom(tmp_path / "a.dcm", STORED, WindowCenter="5", WindowWidth="0"))


def test_dicom_whose_pixels_are_cut(tmp_path):
    p = dicom(tmp_path / "a.dcm", STORED)
    p.write_bytes(p.read_bytes()[:-2000])
    with pytest.raises(CourseError, match="damaged DICOM(.|\n)*a.dcm"): read_image(p)


@pytest.mark.parametrize(
    "module, make",
    [
        ("pydicom", lambda f: dicom(f / "a.dcm", STORED)),
        ("nibabel", lambda f: nifti(f / "a.nii", EIGHT.T.astype(np.int16))),
    ],
)
def test_without_the_extra_package(tmp_path, monkeypatch, module, make):
    p = make(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        CourseError, match=r"needs the package " + module + r"(.|\n)*pip install 'cxr-course\[dicom\]'"
    ):
        read_image(p)


# ---------------------------------------------------------------- one reader for everything

TAGGED = STORED.copy()
# a lead marker, far outside the window
TAGGED[2:8, 2:12] = 60000
WINDOW = dict(WindowCenter="2000.5", WindowWidth="4001")
ODD = {"inverse": (4000 - STORED, dict(PresentationLUTShape="INVERSE", **WINDOW)), "tag": (TAGGED, WINDOW),
       "rgb": (np.stack([EIGHT] * 3, -1), {}), "mono1": (4000 - STORED,
                                                         dict(PhotometricInterpretation="MONOCHROME1",
                                                              **WINDOW))}


@pytest.mark.parametrize("case", ODD)
def test_whoever_looks_at_a_dicom_file_sees_the_same(tmp_path, case):
    "What a network is trained on, what exploration measures and what the search for duplicates compares."
    stored, tags = ODD[case]
    x = read_image(dicom(tmp_path / "a.dcm", stored.astype(stored.dtype), **tags))
    # bones are white, whatever the file asks for
    assert np.abs(x[10:] - RAMP[10:]).max() < .006
    look = image_features(pd.DataFrame({"path": [str(tmp_path / "a.dcm")]}))
    small = thumbnail(tmp_path / "a.dcm")
    assert look.mean[0] == pytest.approx(x.mean(), abs=1e-6) and look.small[0].mean() / 255 == pytest.approx(
        x.mean(), abs=0.01
    )
    assert small.mean() / 255 == pytest.approx(x.mean(), abs=.01)
    assert (quick_read(tmp_path / "a.dcm") == x).all()


def test_near_duplicates_of_dicom_files_are_found(tmp_path):
    "Each odd file beside the PNG that somebody made of it; and no two different films are called the same."
    rows = []
    for i, (case, (stored, tags)) in enumerate(ODD.items()):
        g = np.random.default_rng(i)
        soft = np.asarray(
            Image.fromarray(g.random((7, 6), dtype=np.float32)).resize((96, 120), Image.Resampling.BICUBIC)
        ).clip(0, 1)
        chest = (soft * 4000).round().astype(np.uint16)
        if case == "tag": chest[2:8, 2:12] = 60000
        if case in ("inverse", "mono1"): chest = 4000 - chest
        if case == "rgb": chest = np.stack([(soft * 255).round().astype(np.uint8)] * 3, -1)
        dicom(tmp_path / f"{case}.dcm", chest, **tags)
        shown = np.where(chest == 60000, 1, soft) if case == "tag" else soft
        Image.fromarray((shown * 255).round().astype(np.uint8)).resize((80, 100)).save(
            tmp_path / f"{case}.png"
        )
        rows += [dict(path=str(tmp_path / f"{case}.{end}"), label="ab"[i % 2], patient=case, split="train")
                 for end in ("dcm", "png")]
    f = make_frame(rows)
    pairs = check_dataset(f).pairs
    assert len(pairs) == len(ODD) and (pairs["patient_a"] == pairs["patient_b"]).all()
    found = find_duplicates(f[f["path"].str.endswith("dcm")], f[f["path"].str.endswith("png")], near=True)
    assert sorted(Path(p).stem for p in found["one"]) == sorted(Path(p).stem
                                                                for p in found["other"]) == sorted(ODD)


def test_a_coloured_dicom_stops_nobody_without_being_named(tmp_path):
    "An RGB-encoded grey film is read; a really coloured one is named, and can be left out."
    for i in range(12):
        chest = np.random.default_rng(i).integers(0, 256, (40, 30), dtype=np.uint8)
        dicom(tmp_path / f"{i}.dcm", np.stack([chest, chest // (3 if i == 5 else 1), chest], -1))
    f = make_frame([dict(path=str(tmp_path / f"{i}.dcm"), label="ab"[i % 2], patient=str(i), split="train")
                    for i in range(12)])
    found = check_dataset(f)
    assert [Path(p).name for p in found.bad["path"]] == ["5.dcm"] and "colour image" in found.bad["error"][0]
    with pytest.raises(CourseError, match="colour image(.|\n)*5.dcm"): write_overview(f, tmp_path / "page")
    text = write_overview(f, tmp_path / "page", skip_bad=True).read_text()
    assert "Greys" in text and len(found.readable) == 11


# ---------------------------------------------------------------- damage, and mistakes of ours

@pytest.mark.parametrize("mistake", [AttributeError, TypeError, ZeroDivisionError, NameError, AssertionError])
@pytest.mark.parametrize("module, name, file", [
    (files_module, "_pil", "a.png"), (files_module, "_dicom", "a.dcm"),
    (read_module, "_show_plain", "a.png"), (read_module, "dicom_display", "a.dcm"),
])
def test_a_mistake_of_ours_is_never_taken_for_a_bad_file(tmp_path, monkeypatch, module, name, file, mistake):
    def wrong(*a, **k): raise mistake("a typing error")
    Image.fromarray(EIGHT).save(tmp_path / "a.png")
    dicom(tmp_path / "a.dcm", STORED)
    monkeypatch.setattr(module, name, wrong)
    f = make_frame([dict(path=str(tmp_path / file), label="x")])
    for look in (read_image, thumbnail, quick_read):
        with pytest.raises(mistake, match="typing error"): look(tmp_path / file)
    with pytest.raises(mistake, match="typing error"): check_dataset(f)
    with pytest.raises(mistake, match="typing error"): image_features(f, skip_bad=True)
    if module is files_module:
        (tmp_path / "t.csv").write_text("path,label\na.png,x\na.dcm,y\n")
        with pytest.raises(mistake, match="typing error"): load_dataset(tmp_path / "t.csv", skip_bad=True)


def test_what_a_library_says_of_damage_is_damage(tmp_path):
    "The same exceptions, raised inside the library that opens the file, are about the file."
    Image.fromarray(EIGHT).save(tmp_path / "a.png")
    for break_it in (lambda: Image.fromarray(object()), lambda: pydicom.Dataset().NoSuchTag):
        with pytest.raises(CourseError, match="damaged(.|\n)*a.png"):
            with blame_file(tmp_path / "a.png", "damaged"): break_it()


def test_a_window_of_width_one(tmp_path):
    "PS3.3 C.11.2.1.2: at width 1 every value is black up to centre - 0.5, and white above."
    x = np.array([1, 1.4, 1.5, 1.5001, 2, 3])
    assert apply_window(x, 2, 1).tolist() == [0, 0, 0, 1, 1, 1] and apply_window(x, 2, 1).dtype == np.float32
    assert apply_window(x, 2, 1, "LINEAR_EXACT").tolist() == pytest.approx([0, 0, 0, .0001, .5, 1], abs=1e-6)
    p = dicom(tmp_path / "a.dcm", STORED, WindowCenter="2000", WindowWidth="1")
    assert (read_image(p) == (STORED > 1999.5)).all()
    with pytest.raises(CourseError, match="at least 1 for LINEAR"): apply_window(x, 2, .5)


# ---------------------------------------------------------------- NIfTI

def nifti(path, x, affine=None, **head):
    nibabel = pytest.importorskip("nibabel")
    im = nibabel.Nifti1Image(x, np.eye(4) if affine is None else affine)
    for k, v in head.items(): im.header[k] = v
    im.to_filename(path)
    return path


def test_nifti_window_of_the_header(tmp_path):
    p = nifti(tmp_path / "a.nii.gz", EIGHT.T[..., None].astype(np.int16), cal_min=0, cal_max=255)
    assert close(read_image(p), RAMP) and image_shape(p) == RAMP.shape


def test_nifti_two(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    nibabel.Nifti2Image(EIGHT.T.astype(np.float32), np.eye(4)).to_filename(tmp_path / "a.nii")
    assert close(read_image(tmp_path / "a.nii", window=(0, 255)), RAMP)


@pytest.mark.parametrize("flip_x", [False, True])
@pytest.mark.parametrize("flip_z", [False, True])
def test_nifti_coronal_is_put_upright(tmp_path, flip_x, flip_z):
    affine = np.array([[-1.0 if flip_x else 1, 0, 0, 0], [0, 0, 1, 0], [0, -1.0 if flip_z else 1, 0, 0],
                       [0, 0, 0, 1]])
    # a film: columns from the patient's right to left, rows from head to foot
    stored = EIGHT.T[:, :, None].astype(np.int16)
    if not flip_x: stored = stored[::-1]
    if not flip_z: stored = stored[:, ::-1]
    assert close(read_image(nifti(tmp_path / "a.nii", np.ascontiguousarray(stored), affine), window=(0, 255)),
                 RAMP)


def test_a_volume_is_refused(tmp_path):
    with pytest.raises(CourseError, match="not one flat image(.|\n)*v.nii"):
        read_image(nifti(tmp_path / "v.nii", np.zeros((8, 9, 10), np.int16)))


# ---------------------------------------------------------------- files that must be refused

def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(CourseError, match="No such file"): read_image(tmp_path / "nothing.png")
    with pytest.raises(CourseError): read_image(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"hello",
        b"<html><body>404</body></html>",
        b"%PDF-1.4",
        bytes(4096),
        b"\x1f\x8b",
        b"\x1f\x8b\x08" + bytes(20),
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"II*\0",
        b"PK\x03\x04",
        bytes(128) + b"DICM",
        bytes(344) + b"n+1\0",
        b"GIF89a" + bytes(50),
    ],
)
def test_rubbish_is_refused_by_name(tmp_path, content):
    (tmp_path / "film.png").write_bytes(content)
    with pytest.raises(CourseError, match="film.png"): read_image(tmp_path / "film.png")
    with pytest.raises(CourseError, match="film.png"): image_shape(tmp_path / "film.png")


def png_header(width, height):
    chunk = (
        lambda kind, data: struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", zlib.crc32(kind + data))
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [10_001, 12_000, 30_000, 2_000_000_000])
def test_a_bomb_is_seen_in_the_header(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    for look in (read_image, image_shape):
        with pytest.raises(CourseError, match="bomb.png|not decoded"): look(tmp_path / "bomb.png")


def test_a_dicom_bomb(tmp_path):
    with pytest.raises(CourseError, match="not decoded"):
        read_image(dicom(tmp_path / "a.dcm", np.zeros((4, 4), np.uint8), Rows=60000, Columns=60000))


def test_multi_page_tiff_is_refused(tmp_path):
    Image.fromarray(EIGHT).save(tmp_path / "two.tiff", save_all=True, append_images=[Image.fromarray(EIGHT)])
    with pytest.raises(CourseError, match="2 images in one file"): read_image(tmp_path / "two.tiff")


def test_colour_is_refused_but_a_small_coloured_mark_is_not(tmp_path):
    rgb = np.stack([EIGHT] * 3, -1)
    rgb[2:5, 2:9] = (0, 0, 255)
    Image.fromarray(rgb).save(tmp_path / "mark.png")
    assert read_image(tmp_path / "mark.png").shape == RAMP.shape
    hue = np.stack([EIGHT, EIGHT[::-1], EIGHT[:, ::-1]], -1)
    for name, mode in (("c.png", "RGB"), ("c.jpeg", "RGB"), ("cmyk.jpeg", "CMYK"), ("pal.png", "P")):
        Image.fromarray(hue).convert(mode).save(tmp_path / name)
        with pytest.raises(CourseError, match=f"colour image(.|\n)*{name}"): read_image(tmp_path / name)


def every_kind(folder):
    Image.fromarray(EIGHT).save(folder / "a.png")
    Image.fromarray(EIGHT).save(folder / "a.jpeg")
    Image.fromarray(EIGHT).save(folder / "p.jpeg", progressive=True)
    Image.fromarray(RAMP).save(folder / "a.tiff")
    dicom(folder / "a.dcm", STORED, WindowCenter="2000", WindowWidth="4000")
    nifti(folder / "a.nii.gz", EIGHT.T.astype(np.int16))
    nifti(folder / "b.nii", EIGHT.T.astype(np.int16))
    return sorted(folder.iterdir())


def test_cut_anywhere(tmp_path):
    "A file cut anywhere gives an image or a CourseError with its name; cut in half it never gives an image."
    for p in every_kind(tmp_path):
        whole = p.read_bytes()
        for keep in {
            0,
            1,
            7,
            100,
            140,
            352,
            400,
            *(len(whole) * k // 8 for k in range(1, 8)),
            len(whole) - 3,
        }:
            p.write_bytes(whole[:keep])
            try: x = read_image(p)
            except CourseError as e: assert p.name in str(e), (p.name, keep)
            else: assert keep > len(whole) * .9 and x.shape == RAMP.shape, (p.name, keep)


def test_damaged_anywhere(tmp_path):
    "Random damage gives a film with numbers from 0 to 1, or a CourseError with the file's name."
    g = np.random.default_rng(0)
    for p in every_kind(tmp_path):
        whole = np.frombuffer(p.read_bytes(), np.uint8)
        for _ in range(60):
            hurt = whole.copy()
            where = g.integers(0, min(len(hurt), g.choice([200, 500, len(hurt)])), g.integers(1, 6))
            hurt[where] = g.integers(0, 256, len(where))
            p.write_bytes(hurt.tobytes())
            try: x = read_image(p)
            except CourseError as e: assert p.name in str(e)
            else:
                assert (
                    x.dtype == np.float32
                    and x.ndim == 2
                    and np.isfinite(x).all()
                    and x.min() >= 0
                    and x.max() <= 1
                )


# ---------------------------------------------------------------- shape

def test_npz_member(tmp_path):
    x = np.stack([EIGHT, EIGHT[::-1], 255 - EIGHT])
    np.savez_compressed(tmp_path / "x.npz", train_images=x, colour=np.stack([x] * 3, -1))
    assert close(read_image(f"{tmp_path / 'x.npz'}::train_images::2"),
                 1 - RAMP) and image_shape(f"{tmp_path / 'x.npz'}::train_images::0") == RAMP.shape
    assert close(read_image(f"{tmp_path / 'x.npz'}::colour::0"), RAMP)
    for member in ("::train_images::3", "::nothing::0", "::train_images::x", "", "::train_images"):
        with pytest.raises(CourseError, match="x.npz"): read_image(f"{tmp_path / 'x.npz'}{member}")


def test_npz_that_changes_is_unpacked_again(tmp_path):
    for value in (10, 200):
        np.savez_compressed(tmp_path / "x.npz", train_images=np.full((2, 5, 6), value, np.uint8))
        os.utime(tmp_path / "x.npz", ns=(value * 10**9, value * 10**9))
        assert read_image(f"{tmp_path / 'x.npz'}::train_images::1").max() == np.float32(value / 255)


def test_an_npz_with_code_inside_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", train_images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CourseError, match="x.npz"): read_image(f"{tmp_path / 'x.npz'}::train_images::0")


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (3, 7), (129, 180), (300, 20)])
@pytest.mark.parametrize("target", [(1, 1), (5, 9), (224, 224), (129, 180)])
def test_every_shape_to_every_shape(shape, target):
    x = np.random.default_rng(0).random(shape, dtype=np.float32)
    for make in (crop_resize, letterbox, resize):
        y = make(x, target)
        assert y.shape == target and y.dtype == np.float32 and y.min() >= 0 and y.max() <= 1
    assert crop_resize(x > 0.5,
                       target).dtype == bool and letterbox((x * 255).astype(np.uint8),
                                                           target).dtype == np.uint8


def test_crop_is_equal_and_a_view():
    x = np.arange(120.).reshape(10, 12)
    y = crop_to_aspect(x, 1)
    assert y.shape == (10, 10) and y.base is not None and y[0, 0] == 1 and y[0, -1] == 10
    assert crop_to_aspect(x, 10 / 12) is x or crop_to_aspect(x, 10 / 12).shape == x.shape


def test_unknown_window(tmp_path):
    Image.fromarray(EIGHT).save(tmp_path / "x.png")
    with pytest.raises(CourseError, match="unknown window"): read_image(tmp_path / "x.png", window="lung")


def test_to_png_leaves_nothing_half_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CourseError): to_png(RAMP, tmp_path / "file" / "x.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
    assert close(read_image(to_png(RAMP, tmp_path / "x.png")), RAMP)


# ---------------------------------------------------------------- identity

def test_no_trace_is_left(tmp_path):
    from pydicom.dataset import Dataset
    inner = Dataset()
    inner.PersonName, inner.PatientName, inner.ReferencedSOPInstanceUID = (
        "Secret^Inner", "Secret^Inner", "1.2.3.4444",
    )
    p = dicom(tmp_path / "a.dcm", STORED, PatientName="Secret^Name", PatientID="Secret4711",
              PatientBirthDate="19610412", StudyDate="20240412", StudyTime="1200",
              InstitutionName="Secret Hospital", ReferringPhysicianName="Secret^Doc",
              StudyInstanceUID="1.2.3.1111", SeriesInstanceUID="1.2.3.2222", ContentSequence=[inner],
              ImageComments="Secret words", PatientAge="063Y", PatientSex="F", ViewPosition="PA",
              WindowCenter="2000", WindowWidth="4000")
    ds = pydicom.dcmread(p)
    ds.private_block(0x0099, "SECRET MAKER", create=True).add_new(1, "LO", "Secret private")
    ds.preamble = b"Secret preamble".ljust(128, b"\0")
    ds.save_as(p)
    found = identity_tags(p)
    assert {"PatientName", "PatientID", "StudyDate", "InstitutionName", "ImageComments", "StudyInstanceUID",
            "private"} <= set(found["name"])
    out = strip_identity(p, tmp_path / "b.dcm", patient="case-1", secret="s")
    raw, clean = out.read_bytes(), pydicom.dcmread(out)
    for word in (b"Secret", b"SECRET", b"19610412", b"20240412", b"1.2.3.1111", b"1.2.3.2222", b"1.2.3.4444"):
        assert word not in raw, word
    assert (clean.PatientID, clean.PatientAge, clean.PatientSex,
            clean.ViewPosition) == ("case-1", "063Y", "F", "PA")
    assert (read_image(out) == read_image(p)).all()
    again = pydicom.dcmread(strip_identity(p, tmp_path / "c.dcm", secret="s"))
    assert again.StudyInstanceUID == clean.StudyInstanceUID                # films of one study stay together
    assert pydicom.dcmread(strip_identity(p, tmp_path / "d.dcm",
                                          secret="other")).StudyInstanceUID != clean.StudyInstanceUID


def test_strip_never_overwrites(tmp_path):
    p = dicom(tmp_path / "a.dcm", STORED)
    with pytest.raises(CourseError, match="overwritten"): strip_identity(p, p)
    strip_identity(p, tmp_path / "b.dcm")
    with pytest.raises(CourseError, match="never overwritten"): strip_identity(p, tmp_path / "b.dcm")
    Image.fromarray(EIGHT).save(tmp_path / "x.png")
    with pytest.raises(CourseError, match="only DICOM"):
        strip_identity(tmp_path / "x.png", tmp_path / "y.dcm")


# ---------------------------------------------------------------- real films

def test_real_films(real_data):
    films = sorted((real_data / "kaggle_full_size").rglob("*.jpeg"))[::8]
    for p in films:
        x = read_image(p)
        assert x.shape == image_shape(p) and 0 <= x.min() and np.ptp(x) > .4 and x.max() <= 1
        assert np.abs(crop_resize(read_image(p, at_least=(224, 224)),
                                  (224, 224)) - crop_resize(x, (224, 224))).mean() < 0.01
    for p in [
        *sorted((real_data / "nih" / "images").iterdir())[::20],
        *sorted((real_data / "covid_qu_ex_layout").rglob("*.png"))[::50],
    ]:
        x = read_image(p)
        assert x.dtype == np.float32 and x.ndim == 2 and x.min() >= 0 and x.max() <= 1
