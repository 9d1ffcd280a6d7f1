"""Image files in folders, and how they become squares."""

import os
import socket
import stat

import numpy as np
import pytest
from PIL import Image

from mocosfl_jax.data.pixels import square_rgb
from mocosfl_jax.data.sources import load_dataset
from mocosfl_jax.errors import InputError
from tests.data_files import (
    OPTIONS,
    inspect,
    load,
    numbered,
    prepare,
    random_images,
    save,
    write_classes,
)

# --------------------------------------------------------------------------------- the folders


def test_folder_with_train_and_val(tmp_path):
    write_classes(tmp_path / "train", {"dog": 3, "ant": 5})
    write_classes(tmp_path / "val", {"ant": 2, "dog": 4})
    write_classes(tmp_path / "test", {"unlabelled": 1})  # as ImageNet's; val goes first
    loaded = load(f"folder:{tmp_path}", image_size=6)
    assert loaded.class_names == ("ant", "dog")
    assert not loaded.info.held_out
    assert loaded.train.labels.tolist() == [0] * 5 + [1] * 3
    assert loaded.test.labels.tolist() == [0] * 2 + [1] * 4
    assert loaded.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    np.testing.assert_array_equal(loaded.train.images[:5], numbered(random_images(5, 6, 6, 3)))


def test_folder_without_test_holds_out(tmp_path):
    write_classes(tmp_path, {"a": 8, "b": 4})
    loaded = load(f"folder:{tmp_path}", image_size=6)
    assert np.bincount(loaded.train.labels).tolist() == [6, 3]
    assert np.bincount(loaded.test.labels).tolist() == [2, 1]
    for label, count in ((0, 8), (1, 4)):
        splits = (loaded.train, loaded.test)
        ids = np.concatenate([s.images[s.labels == label, 0, 0, 0] for s in splits])
        assert sorted(ids) == list(range(count))
    assert load(f"folder:{tmp_path}", image_size=6, holdout_fraction=0.0).test is None


def test_folder_of_images_has_no_labels(tmp_path):
    write_classes(tmp_path, {".": 9})
    loaded = load(f"folder:{tmp_path}", image_size=6)
    assert (loaded.info.num_train, loaded.info.num_test) == (7, 2)
    assert loaded.class_names is None


def test_folder_named_train_may_be_a_class(tmp_path):
    write_classes(tmp_path, {"train": 4, "bus": 4})
    assert inspect(f"folder:{tmp_path}", image_size=6).num_classes == 2


def test_folder_ignores_what_is_no_image(tmp_path):
    write_classes(tmp_path, {"a": 4, "b/deeper": 4, ".cache": 3, "b/.thumbnails": 2})
    for name in ("a/Thumbs.db", "a/notes.txt", "a/.000.png", "README", "a/no_suffix"):
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "a" / "000.png").rename(tmp_path / "a" / "000.PNG")
    info = inspect(f"folder:{tmp_path}", image_size=6)
    assert (info.num_train, info.num_test, info.num_classes) == (6, 2, 2)


def test_folder_passes_over_what_is_no_regular_file(tmp_path, monkeypatch):
    """Opening a FIFO would wait for ever. Links to pictures count, to nothing or to devices not."""
    write_classes(tmp_path, {"a": 3, "b": 3, "b/folder.png": 1})
    os.mkfifo(tmp_path / "a" / "fifo.png")
    for name, target in (("link", "001.png"), ("dangling", "x"), ("loop", "loop.png")):
        (tmp_path / "a" / f"{name}.png").symlink_to(target)
    (tmp_path / "b" / "device.png").symlink_to("/dev/null")
    monkeypatch.chdir(tmp_path / "b")  # the path of a socket must be short
    socket.socket(socket.AF_UNIX).bind("socket.png")
    regular = Image.open

    def open_regular(path):
        assert stat.S_ISREG(os.stat(path).st_mode)
        return regular(path)

    monkeypatch.setattr(Image, "open", open_regular)
    loaded = load(f"folder:{tmp_path}", image_size=6, holdout_fraction=0.0)
    assert loaded.train.labels.tolist() == [0] * 4 + [1] * 4
    assert loaded.train.images[:4, 0, 0, 0].tolist() == [0, 1, 2, 1]


def test_names_of_any_bytes(tmp_path):
    """Neither UTF-8 nor one line: all is read, and messages can be printed."""
    root = tmp_path / os.fsdecode(b"\xff set")
    strange, plain = os.fsdecode(b"caf\xe9\n"), "größe"
    write_classes(root, {strange: 4, plain: 4})
    os.rename(root / strange / "001.png", root / strange / os.fsdecode(b"\xfe\xc2\x85.png"))
    loaded = load(f"folder:{root}", image_size=6)
    assert loaded.class_names == (strange, plain)
    assert (loaded.info.num_train, loaded.info.num_test) == (6, 2)
    (root / strange / os.fsdecode(b"\xfe\xc2\x85.png")).write_bytes(b"no image")
    with pytest.raises(InputError) as error:
        inspect(f"folder:{root}", image_size=6)
    message = str(error.value)
    assert message.startswith(rf"{tmp_path}/\udcff set/caf\udce9\n/\udcfe\x85.png = ")
    assert message.isprintable()


def test_folder_hold_out_by_rule(tmp_path):
    """A tenth of labelled images; without labels nothing, unless a fraction is set."""
    labelled = write_classes(tmp_path / "a", {"x": 20, "y": 30})
    unlabelled = write_classes(tmp_path / "b", {".": 20})
    infos = [
        inspect(f"folder:{root}", image_size=6, holdout_fraction=fraction)
        for root in (labelled, unlabelled)
        for fraction in (None, 0.3, 0.0)
    ]
    assert [info.num_test for info in infos] == [5, 15, 0, 0, 6, 0]
    assert [info.held_out for info in infos] == [True, True, False, False, True, False]


# ----------------------------------------------------------------------------------- the files


def read_one(tmp_path, name, pixels, **options):
    """The pixels that come out of a folder with one image."""
    size = options.pop("image_size", 6)
    save(tmp_path / name, pixels, **options)
    loaded = load(f"folder:{tmp_path}", image_size=size, holdout_fraction=0.0)
    return loaded.train.images[0]


GREY = random_images(6, 6)
RGB = random_images(6, 6, 3)


def test_grey_file(tmp_path):
    np.testing.assert_array_equal(read_one(tmp_path, "a.png", GREY), np.stack([GREY] * 3, -1))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_file_keeps_the_upper_byte(tmp_path, suffix):
    deep = GREY.astype(np.uint16) * 256 + 77
    np.testing.assert_array_equal(read_one(tmp_path, f"a.{suffix}", deep), np.stack([GREY] * 3, -1))


def test_palette_file(tmp_path):
    image = Image.frombytes("P", (6, 6), (GREY // 86).tobytes())
    palette = np.array([[250, 1, 2], [3, 240, 4], [5, 6, 230]], np.uint8)
    image.putpalette(palette.tobytes())
    out = read_one(tmp_path, "a.png", image, transparency=b"\x00\x80")
    np.testing.assert_array_equal(out, palette[GREY // 86])


def test_transparency_is_dropped(tmp_path):
    rgba = np.concatenate([RGB, random_images(6, 6, 1)], axis=-1)
    np.testing.assert_array_equal(read_one(tmp_path, "a.png", rgba), RGB)


def test_exif_orientation_is_applied(tmp_path):
    """Orientation 6: the camera was turned, the picture is upright after a quarter turn right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    out = read_one(tmp_path, "a.png", RGB, exif=exif)
    np.testing.assert_array_equal(out, np.rot90(RGB, -1))


def test_jpeg_is_cropped_at_its_centre(tmp_path):
    """Thirds of red, green and blue: the centre is green, but for the errors of JPEG."""
    thirds = np.zeros((20, 60, 3), np.uint8)
    for i in range(3):
        thirds[:, 20 * i : 20 * i + 20, i] = 255
    out = read_one(tmp_path, "a.jpg", thirds, image_size=20, quality=95, subsampling=0)
    assert np.abs(out.astype(int) - [0, 255, 0])[:, 4:-4].max() < 8


def test_float_pixels_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"a\.tif = .*16 bits"):
        read_one(tmp_path, "a.tif", GREY.astype(np.float32))


def test_broken_header_is_found_before_any_pixel(tmp_path):
    write_classes(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "b" / "001.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(InputError, match=r"b/001\.png = .*: an image file"):
        inspect(f"folder:{tmp_path}", image_size=6)


def test_torn_file_is_found_when_it_is_decoded(tmp_path):
    write_classes(tmp_path, {"a": 3, "b": 3}, size=40)
    torn = tmp_path / "b" / "002.png"
    torn.write_bytes(torn.read_bytes()[:2000])
    inspect(f"folder:{tmp_path}", image_size=6)
    with pytest.raises(InputError, match=r"b/002\.png = .*: an image file"):
        load_dataset(f"folder:{tmp_path}", **{**OPTIONS, "image_size": 6})


def spoil(root, names, content):
    for name in names:
        (root / name).write_bytes(content)


BAD = ["a/001.png", "a/003.png", "b/000.png", "b/002.png", "b/003.png", "b/004.png"]


@pytest.mark.parametrize(("num_bad", "ending"), [(2, ""), (5, ""), (6, ", ...")])
def test_bad_headers_come_together(tmp_path, num_bad, ending):
    write_classes(tmp_path, {"a": 9, "b": 9})
    spoil(tmp_path, BAD[:num_bad], b"\x89PNG no more")
    with pytest.raises(InputError) as error:
        inspect(f"folder:{tmp_path}", image_size=6)
    start = f"{tmp_path} = '{num_bad} pictures': cannot be read"
    assert str(error.value).startswith(f"{start} ({', '.join(BAD[:num_bad][:5])}{ending}); ")
    assert "an image file that Pillow can read is needed" in str(error.value)


def test_torn_pictures_come_together(tmp_path):
    """From both splits, while the labels can still be read."""
    for split, count in (("train", 8), ("val", 5)):
        write_classes(tmp_path / split, {"a": count, "b": count}, size=40)
    names = [f"train/{BAD[1]}", f"train/{BAD[3]}", f"val/{BAD[0]}"]
    spoil(tmp_path, names, (tmp_path / "val/b/000.png").read_bytes()[:2000])
    prepared = prepare(f"folder:{tmp_path}", image_size=6)
    assert prepared.train_labels().tolist() == [0] * 8 + [1] * 8
    with pytest.raises(InputError) as error:
        prepared.load()
    assert f"= '3 pictures': cannot be read ({', '.join(names)}); " in str(error.value)
    assert "truncated" in str(error.value)


def test_header_that_asks_for_too_many_pixels(tmp_path, monkeypatch, recwarn):
    write_classes(tmp_path, {"a": 2, "b": 2})
    save(tmp_path / "a" / "000.png", random_images(6, 7, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 36)
    inspect(f"folder:{tmp_path}", image_size=6)  # up to twice as many: Pillow only warns
    save(tmp_path / "a" / "000.png", random_images(10, 8, 3))
    with pytest.raises(InputError, match=r"a/000\.png = .*80 pixels.* exceeds limit of 72"):
        inspect(f"folder:{tmp_path}", image_size=6)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("layout", "where"),
    [
        ({}, ""),
        ({"train/a": 2}, "/val"),
        ({"train/a": 2, "train/b": 2, "val/a": 2}, "/val"),
        ({"train/a": 2, "val/a": 2, "val/b": 2}, "/val"),
        ({"train/a": 2, "val": 2}, "/val"),
        ({"a": 2, "b": 0}, "/b"),
        ({".": 2, "b": 2}, ""),
        ({"a": 2, "b": 1}, ""),
        ({".": 1}, ""),
    ],
)
def test_bad_layout_names_the_folder(tmp_path, layout, where):
    for name, count in layout.items():
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        write_classes(tmp_path, {name: count})
    if where:
        (tmp_path / where[1:]).mkdir(exist_ok=True)
    with pytest.raises(InputError) as error:
        inspect(f"folder:{tmp_path}", image_size=6)
    assert str(error.value).startswith(f"{tmp_path}{where} = ")


# ---------------------------------------------------------------------------------- the squares


def resized_whole(image, size):
    """Resizes all of an image, however long, and crops the result."""
    short = min(image.size)
    width, height = (size * side // short for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("shape", [(1, 50, 3), (150, 3, 3), (9, 40, 3), (31, 7, 3), (12, 599, 3)])
@pytest.mark.parametrize("size", [5, 16])
def test_squares_of_images_up_to_50_to_1(shape, size):
    image = Image.fromarray(random_images(*shape))
    np.testing.assert_array_equal(square_rgb(image, size), resized_whole(image, size))


@pytest.mark.parametrize("shape", [(2, 102, 3), (1, 600, 3), (301, 3, 3), (1201, 4, 3)])
@pytest.mark.parametrize("size", [6, 16])
def test_squares_of_longer_images(shape, size):
    """The centre stays where it is, up to the rounding of scales."""
    image = Image.fromarray(random_images(*shape))
    difference = square_rgb(image, size).astype(int) - resized_whole(image, size)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("shape", [(1, 30_000), (60_001, 2)])
def test_long_images_are_resized_in_bounded_memory(monkeypatch, shape):
    sizes = []
    resize = Image.Image.resize

    def watched(image, size, *args):
        sizes.append(size)
        return resize(image, size, *args)

    monkeypatch.setattr(Image.Image, "resize", watched)
    assert square_rgb(Image.fromarray(random_images(*shape)), 16).shape == (16, 16, 3)
    ((width, height),) = sizes
    assert width * height <= 16 * 16 * 51
