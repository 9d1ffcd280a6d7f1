"""The encoder file, what it holds and refuses; and what an encoder sees of images of any kind."""

import json
import os
import resource
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save

from mocosfl_jax.config import Config
from mocosfl_jax.config.network import model_of
from mocosfl_jax.data.sources import load_dataset
from mocosfl_jax.encoder import Encoder, load_encoder
from mocosfl_jax.errors import InputError
from mocosfl_jax.models.split import Encoded, Variables
from mocosfl_jax.run.encoder_file import encoder_step, save_encoder

SIZE = 8
CONFIG = Config(
    dataset="folder:/home/ada/patients",
    image_size=SIZE,
    mean=(0.1, 0.4, 0.7),
    std=(0.2, 0.3, 0.5),
    width=4,
    blocks_per_stage=(1, 1),
    stem="3x3s1",
    cut=2,
    bottleneck="C4S2",
    head="largeV2",
    head_width=8,
)
OLD_FILE = Path(__file__).with_name("version_0_1") / "persistent.safetensors"

# --------------------------------------------------------------------------------------- images


@dataclass(eq=False)
class Mirror:
    """Stands in for a network: its features are the pixels, its embedding three of them."""

    traced: list[int] = field(default_factory=list)
    image_size: int = SIZE

    def encode(self, variables: Variables, images_BHWC: jax.Array) -> Encoded:
        self.traced.append(len(images_BHWC))
        return Encoded(images_BHWC.reshape(len(images_BHWC), -1), images_BHWC[:, 1, 2])


def mirror(mean=(0, 0, 0), std=(1, 1, 1)) -> Encoder:
    return Encoder(Mirror(), Variables({}, {}, {}), mean, std)


def squares(images) -> np.ndarray:
    """What the encoder sees, uint8 (n, SIZE, SIZE, 3)."""
    return np.rint(mirror()(images) * 255).astype(np.uint8).reshape(-1, SIZE, SIZE, 3)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One picture of each kind, in the order of their names."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.fromarray(noise(11, 17, 3)).save(folder / "a_rgb.png")
    Image.fromarray(noise(17, 11)).save(folder / "b_grey.png")
    palette = Image.fromarray(noise(9, 13, 3)).quantize(7)
    palette.save(folder / "c_palette.png", transparency=2)
    deep = (noise(12, 10).astype(np.uint16) << 8) + noise(12, 10)
    Image.fromarray(deep).save(folder / "d_16_bits.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(noise(10, 19, 3)).save(folder / "e_turned.jpg", exif=exif)
    Image.fromarray(noise(10, 9, 4)).save(folder / "f_rgba.png")
    return folder


def test_files_and_pictures_are_seen_as_training_saw_them(folder):
    options = dict(data_dir=None, train_split=None, test_split=None, seed=0)
    dataset = load_dataset(f"folder:{folder}", image_size=SIZE, holdout_fraction=0.0, **options)
    paths = sorted(folder.iterdir())
    assert len(np.unique(dataset.train.images, axis=0)) == len(paths) == 6
    np.testing.assert_array_equal(squares(paths), dataset.train.images)
    np.testing.assert_array_equal(squares([Image.open(p) for p in paths]), dataset.train.images)


def test_kinds_of_images_mix_in_any_sequence(folder):
    """Arrays of 8-bit pictures are those pictures."""
    rgb, grey, rgba = (folder / name for name in ("a_rgb.png", "b_grey.png", "f_rgba.png"))
    arrays = [np.asarray(Image.open(path)) for path in (rgb, grey, rgba)]
    want = squares([rgb, grey, rgba, grey])
    mixed = (str(rgb), arrays[1], Image.open(rgba), arrays[1][..., None])
    np.testing.assert_array_equal(squares(mixed), want)
    np.testing.assert_array_equal(squares(np.array([str(rgb), str(grey)])), want[:2])
    np.testing.assert_array_equal(squares([*arrays, grey]), want)
    stack = noise(3, SIZE, SIZE, 3)
    np.testing.assert_array_equal(squares(stack), stack)
    np.testing.assert_array_equal(squares(list(jnp.asarray(stack))), stack)


def test_features_and_embedding_are_normalised():
    stack, mean, std = noise(3, SIZE, SIZE, 3), (0.1, 0.4, 0.7), (0.2, 0.3, 0.5)
    want = (stack / 255 - np.array(mean)) / np.array(std)
    encoder = mirror(mean, std)
    np.testing.assert_allclose(encoder(stack), want.reshape(3, -1), rtol=1e-4, atol=1e-5)
    unit = want[:, 1, 2] / np.linalg.norm(want[:, 1, 2], axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.embed(stack), unit, rtol=1e-4, atol=1e-5)


def test_numbers_of_images_share_a_few_programs():
    encoder = mirror()
    images = noise(300, SIZE, SIZE, 3)
    for number in (1, 2, 3, 7, 8, 9, 31, 33, 100, 129, 200, 255, 256, 257, 300):
        want = images[:number].reshape(number, -1) / 255.0
        np.testing.assert_allclose(encoder(images[:number]), want, rtol=1e-6)
    assert encoder.model.traced == [1, 8, 32, 128, 256]


@pytest.mark.parametrize(
    "images, named",
    [
        (None, "images"),
        ("picture.png", "images"),
        (Path("picture.png"), "images"),
        (Image.new("RGB", (4, 5)), "images"),
        ([], "images"),
        ((image for image in [noise(4, 5, 3)]), "images"),
        ({0: noise(4, 5, 3)}, "images"),
        (np.uint8(3), "images"),
        (noise(4, 5), "images"),
        (noise(4, 5, 3), "images"),
        (noise(0, 8, 8, 3), "images"),
        ([noise(4, 5, 3), None], "images[1]"),
        ([noise(4, 5, 3), 3.5], "images[1]"),
        ([noise(3, 4, 5)], "images[0]"),
        ([noise(4, 5, 2)], "images[0]"),
        ([noise(0, 4, 3)], "images[0]"),
        ([noise(4, 0)], "images[0]"),
        ([noise(7)], "images[0]"),
        ([noise(2, 4, 5, 3)], "images[0]"),
        ([[[1, 2], [3]]], "images[0]"),
        ([noise(4, 5, 3) / 255.0], "images[0]"),
        (noise(2, 8, 8, 3) / 255.0, "images[0]"),
        (noise(2, 3, 8, 8), "images[0]"),
        ([Image.new("RGB", (0, 4))], "images[0]"),
        ([Image.new("F", (4, 5))], "images[0]"),
        ([noise(4, 5, 3), "no\nfile.png"], "no\\nfile.png"),
        ([Path("no_file.png")], "no_file.png"),
        ([__file__], __file__),
        ([Path(__file__).parent], str(Path(__file__).parent)),
    ],
)
def test_other_images_are_refused_in_one_line(images, named):
    with pytest.raises(InputError) as error:
        mirror()(images)
    text = str(error.value)
    assert text.startswith(f"{named} = ") and len(text.splitlines()) == 1


def test_a_damaged_picture_is_named(folder, tmp_path):
    cut = tmp_path / "cut.png"
    cut.write_bytes((folder / "a_rgb.png").read_bytes()[:-200])
    for image, named in ((cut, str(cut)), (Image.open(cut), "images[1]")):
        with pytest.raises(InputError) as error:
            mirror()([folder / "a_rgb.png", image])
        assert str(error.value).startswith(f"{named} = ")


# ----------------------------------------------------------------------------------------- file


@pytest.fixture(scope="module")
def variables() -> Variables:
    """Not as they are initialised: the running statistics of the head count too."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model_of(CONFIG).init, jax.random.key(1))
    return jax.tree.map(lambda leaf: rng.uniform(0.1, 0.9, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def file(variables, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("run") / "encoder.safetensors"
    save_encoder(file, CONFIG, variables, 17)
    return file


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "numpy") as stored:
        return stored.metadata()


def described(file: Path) -> dict:
    return json.loads(metadata_of(file)["mocosfl_jax"])


def rewritten(file: Path, target: Path, description: dict, tensors: dict | None = None) -> Path:
    """The file with other metadata or tensors."""
    content = save(tensors or load_file(file), {"mocosfl_jax": json.dumps(description)})
    target.write_bytes(content)
    return target


def test_a_saved_encoder_is_the_network(file, variables):
    encoder = load_encoder(file.parent)
    images = noise(3, SIZE, SIZE, 3)
    normalised = (images / 255 - np.array(CONFIG.mean)) / np.array(CONFIG.std)
    want = jax.jit(model_of(CONFIG).encode)(variables, jnp.asarray(normalised, jnp.float32))
    np.testing.assert_allclose(encoder(images), want.features, rtol=1e-3, atol=1e-5)
    unit = want.embedding / np.linalg.norm(want.embedding, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.embed(images), unit, rtol=1e-3, atol=1e-5)
    assert encoder.step == encoder_step(file) == 17


def test_a_file_holds_what_encoding_needs_and_no_more(file):
    network = "backbone blocks_per_stage width stem cut bottleneck head head_width image_size"
    assert metadata_of(file).keys() == {"mocosfl_jax"}
    description = described(file)
    assert description.keys() == {"fields", "step", "version"}
    assert description["fields"].keys() == {*network.split(), "compute_dtype", "mean", "std"}
    assert b"patients" not in file.read_bytes()


def test_a_file_is_written_alike_and_with_the_users_mode(file, variables, tmp_path):
    umask = os.umask(0o027)
    try:
        save_encoder(tmp_path / "other", CONFIG, variables, 17)
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "other").stat().st_mode) == 0o640
    assert (tmp_path / "other").read_bytes() == file.read_bytes()


def test_a_failed_write_leaves_the_old_file(file, variables, tmp_path):
    target = tmp_path / "encoder.safetensors"
    target.write_bytes(file.read_bytes())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            save_encoder(target, CONFIG, variables, 18)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_bytes() == file.read_bytes()


# ------------------------------------------------------------------- files of other versions


def old_file(target: Path, drop: tuple[str, ...] = (), **changes) -> Path:
    """The file of version 0.1.0 with other fields in its config."""
    config = json.loads(metadata_of(OLD_FILE)["config"]) | changes
    config = {name: value for name, value in config.items() if name not in drop}
    target.write_bytes(save(load_file(OLD_FILE), {"config": json.dumps(config)}))
    return target


def test_a_file_of_version_0_1_says_no_step():
    assert encoder_step(OLD_FILE) is None
    assert load_encoder(OLD_FILE).step is None


def test_an_old_file_needs_only_what_encoding_needs(tmp_path):
    """A removed field means what it meant to version 0.1.0: its default."""
    whole = load_encoder(OLD_FILE)
    others = {"temperature": "hot", "ema": None, "queue_length": -1, "gone": 3}
    dropped = ("dataset", "loss", "bottleneck", "backbone", "compute_dtype", "cut")
    part = load_encoder(old_file(tmp_path / "part", dropped, **others))
    assert repr(replace(part, variables=None)) == repr(replace(whole, variables=None))


@pytest.mark.parametrize("name", ["blocks_per_stage", "stem", "head_width", "image_size", "mean"])
def test_a_missing_field_without_a_default_is_named(name, tmp_path):
    with pytest.raises(InputError, match=f"'{name}' is missing"):
        load_encoder(old_file(tmp_path / "old", (name,)))


def test_a_field_of_a_newer_version_is_named(file, tmp_path):
    description = described(file) | {"version": "7.2.0", "colour": "teal"}
    load_encoder(rewritten(file, tmp_path / "new", description))
    description["fields"]["attention"] = 4
    newer = rewritten(file, tmp_path / "newer", description)
    with pytest.raises(InputError, match=r"newer version .* 'attention' \(7\.2\.0, "):
        load_encoder(newer)
    assert encoder_step(newer) == 17


# ------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize(
    "name, value",
    [
        ("width", "4"),
        ("width", None),
        ("width", 6),
        ("width", 10**9),
        ("width", 10**400),
        ("cut", 4),
        ("cut", 1),
        ("head", "V9"),
        ("head", "V2"),
        ("head_width", 2**40),
        ("bottleneck", "C4"),
        ("bottleneck", "none"),
        ("backbone", "resnet50"),
        ("blocks_per_stage", [1, 2]),
        ("blocks_per_stage", [1, 10**9]),
        ("blocks_per_stage", 2),
        ("image_size", 8.0),
        ("compute_dtype", "int8"),
        ("mean", [0.5, 0.5]),
        ("mean", [0.5, float("nan"), 0.5]),
        ("std", [0.5, 0.0, 0.5]),
        ("std", [[0.5], 0.5, 0.5]),
    ],
)
def test_an_impossible_network_is_refused_in_one_line(name, value, file, tmp_path):
    description = described(file)
    description["fields"][name] = value
    refused(rewritten(file, tmp_path / "bad", description))


def refused(file: Path) -> str:
    with pytest.raises(InputError) as error:
        load_encoder(file)
    text = str(error.value)
    assert text.startswith(f"{file} = ") and len(text.splitlines()) == 1
    return text


def test_tensors_of_another_network_are_named(file, tmp_path):
    name, whole = "server/head/norm/scale", load_file(file)
    others = [
        {key: value for key, value in whole.items() if key != name},
        whole | {name: whole[name][:-1]},
        whole | {name: whole[name].astype(np.float64)},
        whole | {name: whole[name].view(np.int32)},
    ]
    for tensors in others:
        assert name in refused(rewritten(file, tmp_path / "bad", described(file), tensors))
    extra = whole | {"server/unit9/bias": np.zeros(2, np.float32)}
    assert "server/unit9/bias" in refused(rewritten(file, tmp_path / "bad", described(file), extra))


def test_damaged_files_are_refused_in_one_line(file, tmp_path):
    damaged, content = tmp_path / "damaged.safetensors", file.read_bytes()
    for length in (0, 5, 8, 100, len(content) // 2, len(content) - 1):
        damaged.write_bytes(content[:length])
        refused(damaged)
        assert encoder_step(damaged) is None
    for metadata in (None, {"format": "np"}, {"config": "3"}, {"mocosfl_jax": "[]"}):
        damaged.write_bytes(save(load_file(file), metadata))
        refused(damaged)
        assert encoder_step(damaged) is None
    (tmp_path / "folder" / "encoder.safetensors").mkdir(parents=True)
    with pytest.raises(InputError, match=r"folder/encoder\.safetensors = "):
        load_encoder(tmp_path / "folder")
    assert encoder_step(tmp_path / "folder") is None
    assert encoder_step(tmp_path / "missing") is None


def test_a_byte_flipped_in_the_header_gives_an_encoder_or_one_line(file, tmp_path):
    """A digit may become another one, which nobody can see; nothing else passes."""
    damaged, content = tmp_path / "damaged.safetensors", file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(3)
    for place in rng.integers(0, header, 60):
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.integers(8)
        damaged.write_bytes(flipped)
        encoder_step(damaged)
        try:
            load_encoder(damaged)
        except InputError as error:
            assert len(str(error).splitlines()) == 1
