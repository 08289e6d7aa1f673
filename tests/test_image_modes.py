"""Images of every mode that Pillow opens: stage 0 holds their values."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from command_line import answer, greedy, refused, said, small_recipe
from PIL import Image
from torch import nn

from greedy import GreedyTrainer, RunDirectory, UserError, recipes
from greedy.cache import Store
from greedy.data import Reading, dataset_from_torch, load_dataset
from greedy.data.modes import pixel_values

RNG = np.random.default_rng(0)
SIDE = 8
WHITE = np.full(3, 255)


def rgb16(pixels, *chunks):
    """Returns a PNG file of 16 bits a channel, which Pillow does not write: grey with opacity, RGB
    or RGBA by the number of channels."""
    height, width, channels = pixels.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    kind = {2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def tiff(pixels, sample_format=1):
    """Returns a TIFF file of (H, W) or (H, W, 3) with the array's samples."""
    height, width, *rest = pixels.shape
    channels, data = (rest or [1])[0], pixels.tobytes()
    bits = 8 * pixels.dtype.itemsize
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 2 if rest else 1}
    tags |= {273: 0, 277: channels, 278: height, 279: len(data), 339: sample_format}
    start = 8 + 2 + 12 * len(tags) + 4
    extra = struct.pack("<3H", bits, bits, bits) if rest else b""
    tags |= {258: start if rest else bits, 273: start + len(extra)}
    entries = b"".join(
        struct.pack("<HHII", tag, 3 if tag in (258, 339) else 4, 3 if tag == 258 and rest else 1, v)
        for tag, v in sorted(tags.items())
    )
    return (
        b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + extra + data
    )


def saved(image, suffix, **options):
    contents = io.BytesIO()
    image.save(contents, suffix, **options)
    return contents.getvalue()


def photos(folder, contents, suffix, others=None):
    """Writes two classes of five files; ``contents`` are the first class."""
    for name in ("ant", "bird"):
        (folder / name).mkdir(parents=True)
        for number in range(5):
            data = contents if others is None or number else others
            (folder / name / f"{number}.{suffix}").write_bytes(data)
    return f"folder:{folder}"


def prepared(tmp_path, data, **fields):
    """Returns a run with stage 0 written."""
    recipe = tmp_path / "tiny.toml"
    sections = {"data": {"name": data, **fields}, "model": {"hidden_layers": 1}}
    recipe.write_text(small_recipe(**sections, training={"batch_size": 4}))
    wanted = recipes.load(recipe)
    reading = Reading.of(wanted.data)
    trainer = GreedyTrainer.from_recipe(wanted, tmp_path / "run", device="cpu")
    trainer.prepare(load_dataset(data, reading=reading))
    return tmp_path / "run"


def trained(tmp_path, data, **fields):
    run = prepared(tmp_path, data, **fields)
    said("train", "--recipe", tmp_path / "tiny.toml", "--run", run)
    return run


def stage0(run):
    """Returns the first training image, (C, H, W)."""
    return Store(run / "stage0/activations.zarr/train").read_rows(0, 0, 1)[0]


GREY = RNG.integers(0, 256, (SIDE, SIDE), np.uint8)
COLOUR = RNG.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
OPACITY = RNG.integers(0, 256, (SIDE, SIDE), np.uint8)
TWELVE = RNG.integers(0, 4096, (SIDE, SIDE), np.uint16)
DEEP = RNG.integers(0, 65536, (SIDE, SIDE, 3), np.uint16)
INTS = RNG.integers(-100_000, 100_000, (SIDE, SIDE), np.int32)
FLOATS = RNG.random((SIDE, SIDE), np.float32)
PALETTE = Image.fromarray(GREY, "L").convert("P")


def over(colour, opacity, background=WHITE, top=255):
    share = opacity[..., None] / top
    return share * colour + (1 - share) * background * (top // 255)


def with_opacity(mode, pixels):
    image = Image.fromarray(pixels, mode)
    image.putalpha(Image.fromarray(OPACITY))
    return image


def palette_with_opacity():
    image = Image.frombytes("PA", (SIDE, SIDE), np.dstack([GREY, OPACITY]).tobytes())
    image.putpalette([value for i in range(256) for value in (i, 255 - i, 7)])
    return image


GREY3 = np.stack([GREY] * 3, axis=-1)
FILES = {
    "1": (saved(Image.fromarray(GREY > 127), "PNG"), "png", 255 * (GREY3 > 127)),
    "L": (saved(Image.fromarray(GREY), "PNG"), "png", GREY3),
    "1 as text": (
        b"P1 8 8 " + b" ".join(b"%d" % (value < 128) for value in GREY.flat),
        "pbm",
        255 * (GREY3 > 127),
    ),
    "1 in bits": (saved(Image.fromarray(GREY > 127), "PPM"), "pbm", 255 * (GREY3 > 127)),
    "L as text": (b"P2 8 8 255 " + b" ".join(b"%d" % value for value in GREY.flat), "pgm", GREY3),
    "LA": (saved(with_opacity("L", GREY), "PNG"), "png", over(GREY3, OPACITY)),
    "P": (saved(PALETTE, "PNG"), "png", np.asarray(PALETTE.convert("RGB"))),
    "RGB": (saved(Image.fromarray(COLOUR), "PNG"), "png", COLOUR),
    "RGBA": (saved(with_opacity("RGB", COLOUR), "PNG"), "png", over(COLOUR, OPACITY)),
    "PA": (
        saved(palette_with_opacity(), "TIFF"),
        "tif",
        over(np.dstack([GREY, 255 - GREY, np.full_like(GREY, 7)]), OPACITY),
    ),
    "CMYK": (
        saved(Image.fromarray(COLOUR).convert("CMYK"), "TIFF"),
        "tif",
        COLOUR,
    ),
    "YCbCr": (
        saved(Image.fromarray(COLOUR).convert("YCbCr"), "TIFF"),
        "tif",
        np.asarray(Image.fromarray(COLOUR).convert("YCbCr").convert("RGB")),
    ),
    "LAB": (
        saved(Image.fromarray(COLOUR, "LAB"), "TIFF"),
        "tif",
        np.asarray(Image.fromarray(COLOUR, "LAB").convert("RGB")),
    ),
    "I;16": (saved(Image.fromarray(TWELVE), "PNG"), "png", TWELVE),
    "I;16 TIFF": (saved(Image.fromarray(TWELVE), "TIFF"), "tif", TWELVE),
    "I;16B": (
        saved(Image.frombytes("I;16B", (SIDE, SIDE), TWELVE.astype(">u2").tobytes()), "TIFF"),
        "tif",
        TWELVE,
    ),
    "RGBX": (saved(Image.fromarray(np.dstack([COLOUR, GREY]), "RGBX"), "TIFF"), "tif", COLOUR),
    "I": (saved(Image.fromarray(INTS), "TIFF"), "tif", INTS),
    "I unsigned": (tiff((INTS.astype(np.int64) + 2**31).astype("<u4")), "tif", INTS + 2.0**31),
    "I of 16 bits": (tiff((INTS // 4).astype("<i2"), 2), "tif", (INTS // 4).astype("<i2")),
    "F": (saved(Image.fromarray(FLOATS), "TIFF"), "tif", FLOATS),
    "RGB;16": (rgb16(DEEP), "png", DEEP),
    "RGBA;16": (
        rgb16(np.dstack([DEEP, 257 * OPACITY.astype(np.uint16)])),
        "png",
        over(DEEP, OPACITY * 257.0, WHITE, 65535),
    ),
    "RGB;16 TIFF": (tiff(DEEP), "tif", DEEP),
    "RGB;16 with a key": (
        rgb16(DEEP, (b"tRNS", DEEP[0, 0].astype(">u2").tobytes())),
        "png",
        np.where((DEEP[0, 0] == DEEP).all(-1, keepdims=True), 65535, DEEP),
    ),
}


@pytest.mark.parametrize("mode", FILES)
def test_files_of_every_mode_keep_their_values_in_stage_0(tmp_path, mode):
    contents, suffix, expected = FILES[mode]
    run = prepared(tmp_path, photos(tmp_path / "photos", contents, suffix))
    image = stage0(run)
    expected = np.stack([expected] * 3) if expected.ndim == 2 else expected.transpose(2, 0, 1)
    assert image.dtype == (np.float32 if mode[0] in "IF" or "16" in mode else np.uint8)
    tolerance = 0.5 if "A" in mode and "16" not in mode and mode != "LAB" else 1e-6
    np.testing.assert_allclose(image, expected.astype(np.float32), rtol=1e-6, atol=tolerance + 0.1)
    record = RunDirectory.open(run).record(0)
    if image.dtype == np.float32:
        assert record.data_choices.mean == pytest.approx(expected.mean((1, 2)), rel=1e-5)
        assert record.data_choices.std == pytest.approx(expected.std((1, 2)), rel=1e-4)


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "F", "RGBA;16"])
def test_predict_reads_them_as_training_did(tmp_path, mode):
    run = trained(tmp_path, photos(tmp_path / "photos", *FILES[mode][:2]))
    image = stage0(run)
    file = next((tmp_path / "photos").glob("*/*"))
    (prediction,) = answer("predict", "--run", run, file)["predictions"]
    trainer = GreedyTrainer.from_recipe(RunDirectory.open(run).recipe, run, device="cpu")
    x = torch.from_numpy(image[None]).float() / (255 if image.dtype == np.uint8 else 1)
    best = trainer.assemble()(x).softmax(dim=1).max()
    assert prediction["classes"][0]["confidence"] == pytest.approx(float(best), abs=1e-5)


@pytest.mark.parametrize("form", ["LA;16", "PPM", "SGI", "JPEG2000"])
def test_bits_are_never_dropped_without_a_word(tmp_path, form):
    grey = np.dstack([TWELVE, TWELVE])
    contents, suffix = {
        "LA;16": (rgb16(grey), "png"),
        "PPM": (b"P6 8 8 65535\n" + DEEP.astype(">u2").tobytes(), "ppm"),
        "SGI": (saved(Image.fromarray(COLOUR), "SGI", bpc=2), "sgi"),
        "JPEG2000": (saved(Image.fromarray(COLOUR), "JPEG2000"), "jp2"),
    }[form]
    if form == "JPEG2000":
        at = contents.index(b"\xff\x4f\xff\x51") + 42
        contents = contents[:at] + b"\x0f" + contents[at + 1 :]  # says 16 bits
    file = tmp_path / f"deep.{suffix}"
    file.write_bytes(contents)
    told = refused("data", "prepare", photos(tmp_path / "photos", contents, suffix))
    assert "16 bits a channel, which are read from PNG and TIFF in RGB or RGBA alone" in told


def test_pil_images_of_every_mode_keep_their_values(tmp_path):
    deep = {"I;16": TWELVE, "I;16L": TWELVE, "I;16B": TWELVE.astype(">u2"), "I": INTS, "F": FLOATS}
    for mode, values in deep.items():
        image = Image.frombytes(mode, (SIDE, SIDE), values.tobytes())
        read = pixel_values(image)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read[0], values.astype(np.float32))
    rgb = Image.fromarray(COLOUR)
    for mode in ("RGBX", "CMYK", "HSV", "YCbCr", "LAB"):
        image = rgb.convert("RGBA").convert(mode) if mode == "RGBX" else rgb.convert(mode)
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        np.testing.assert_array_equal(pixel_values(image), expected)
    grey = with_opacity("L", GREY)
    colour = with_opacity("RGB", COLOUR)
    for image, pixels in ((grey, GREY[..., None]), (colour, COLOUR)):
        premultiplied = image.convert({"LA": "La", "RGBA": "RGBa"}[image.mode])
        for converted in (image, premultiplied):
            shown = OPACITY > 0 if converted is image else OPACITY > 250
            read = pixel_values(converted, "black").transpose(1, 2, 0)
            expected = over(pixels, OPACITY, np.zeros(pixels.shape[-1]))
            np.testing.assert_allclose(read[shown], expected[shown], atol=2.5)


def test_kinds_of_numbers_are_not_mixed(tmp_path):
    contents, suffix, _ = FILES["I;16"]
    data = photos(tmp_path / "photos", contents, suffix, others=FILES["L"][0])
    told = refused("data", "prepare", data)
    assert "no scale in common" in told
    assert "ant/0.png" in told and "8 bits a channel" in told


def test_predict_refuses_numbers_of_another_kind(tmp_path):
    run = trained(tmp_path, photos(tmp_path / "photos", *FILES["I;16"][:2]))
    (tmp_path / "grey.png").write_bytes(FILES["L"][0])
    result = greedy("predict", "--run", run, tmp_path / "grey.png")
    assert result.exit_code == 1
    assert "grey.png holds 8 bits a channel and the network was trained on" in result.stderr


@pytest.mark.parametrize("mode", ["P", "P with a colour", "L", "RGB", "LA", "RGBA", "GIF"])
def test_what_is_transparent_shows_the_background(tmp_path, mode):
    """The left half is transparent, of any colour."""
    left = np.zeros((SIDE, SIDE), bool)
    left[:, : SIDE // 2] = True
    options, suffix = {}, "png"
    if mode in ("LA", "RGBA"):
        image = Image.new(mode[:-1], (SIDE, SIDE), "#808080")
        image.putalpha(Image.fromarray(np.where(left, 0, 255).astype(np.uint8)))
    elif mode in ("L", "RGB"):
        image = Image.fromarray(np.where(left, 7, 128).astype(np.uint8)).convert(mode)
        options = {"transparency": 7 if mode == "L" else (7, 7, 7)}
    else:
        image = Image.fromarray(np.where(left, 0, 1).astype(np.uint8))
        image.putpalette([7, 7, 7, 128, 128, 128])
        options = {"transparency": b"\0\xff" if mode == "P" else 0}
        suffix = "gif" if mode == "GIF" else "png"
    data = photos(tmp_path / "photos", saved(image, suffix.upper(), **options), suffix)
    run = prepared(tmp_path, data, background="#0a14ff")
    expected = np.where(left, np.array([10, 20, 255])[:, None, None], 128)
    np.testing.assert_array_equal(stage0(run), expected)


def test_predict_has_the_background_too(tmp_path):
    contents, suffix, _ = FILES["RGBA"]
    run = trained(tmp_path, photos(tmp_path / "photos", contents, suffix), background="#0a14ff")
    (tmp_path / "clear.png").write_bytes(contents)
    Image.fromarray(stage0(run).transpose(1, 2, 0)).save(tmp_path / "flat.png")
    files = tmp_path / "clear.png", tmp_path / "flat.png"
    one, other = answer("predict", "--run", run, *files)["predictions"]
    assert one["classes"] == other["classes"]


def test_a_background_is_a_colour():
    for name in ("blurple", "#12", "#11223344"):
        told = refused("train", "--recipe", "demo", "--set", f"data.background={name}")
        assert "be the name of a colour, such as black, or #rrggbb" in told


def test_a_python_data_set_has_the_background_too(tmp_path):
    image = Image.new("RGBA", (SIDE, SIDE), (200, 100, 50, 0))
    samples = [(image, 0), (image, 1)] * 4
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 2))
    trainer = GreedyTrainer(
        network, run_dir=tmp_path / "run", background="black", epochs=1, device="cpu"
    )
    trainer.fit(samples, samples)
    assert not stage0(tmp_path / "run").any()


def test_a_python_data_set_of_16_bit_colour_is_refused(tmp_path):
    (tmp_path / "deep.png").write_bytes(rgb16(DEEP))
    with Image.open(tmp_path / "deep.png") as image:
        samples = [(image, 0)] * 2
        with pytest.raises(UserError, match="holds colour in 16 bits, of which Pillow reads 8"):
            dataset_from_torch(samples, samples)
