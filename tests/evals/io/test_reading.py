"""The one reader of pictures: real files of every mode, turned, broken, and by every command the same."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _paths import ROOT
from PIL import Image

from tokenprune.cli import main
from tokenprune.evals.io.picture_reader import BadPicture, read_frames, read_picture

COLOURS = np.random.default_rng(1).integers(0, 256, (9, 11, 3), dtype=np.uint8)
RAMP = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)


def same(one: Any, other: Any) -> bool:
    return np.array_equal(one, other)


def levels(picture: Image.Image) -> np.ndarray:
    """The grey levels `[H, W]` of a picture that has no colour."""
    assert picture.mode == "RGB"
    values = np.asarray(picture)
    assert (values == values[..., :1]).all()
    return values[..., 0]


def saved(path: Path, picture: Image.Image, **options: Any) -> Path:
    picture.save(path, **options)
    return path


WIDE = RAMP.astype(np.uint16) * 257


@pytest.mark.parametrize("ending", ["png", "tif", "pgm", "jp2"])
def test_sixteen_bits_are_scaled_by_sixteen(ending, tmp_path):
    """A dark one stays dark: the file says its bits, whatever the levels are."""
    for share in (1, 4, 200):
        dim = WIDE // share
        path = saved(tmp_path / f"{share}.{ending}", Image.fromarray(dim))
        assert same(levels(read_picture(path)), dim >> 8)


def test_grey_and_colour_in_sixteen_bits_are_scaled_alike(tmp_path):
    import struct
    import zlib

    noise = np.random.default_rng(0).integers(0, 65536, (16, 16), dtype=np.uint16)
    path = saved(tmp_path / "grey.png", Image.fromarray(noise))
    body = b"".join(b"\0" + row.repeat(3).astype(">u2").tobytes() for row in noise)
    chunks = ((b"IHDR", struct.pack(">2I5B", 16, 16, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(body)), (b"IEND", b""))
    made = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    assert same(levels(read_picture(path)), levels(read_picture(b"\x89PNG\r\n\x1a\n" + made)))


def tiff(values: bytes, bits: int, kind: int = 1, photometric: int = 1, order: str = "<") -> bytes:
    """A grey TIFF of 16 x 16, one strip, nothing compressed."""
    import struct

    fields = (
        (256, 3, 16), (257, 3, 16), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8), (277, 3, 1),
        (278, 3, 16), (279, 4, len(values)), (339, 3, kind),
    )  # fmt: skip
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(values))
    entries = b"".join(
        struct.pack(f"{order}HHI{'H2x' if form == 3 else 'I'}", tag, form, 1, value) for tag, form, value in fields
    )
    return head + values + struct.pack(f"{order}H", len(fields)) + entries + b"\0\0\0\0"


def test_tiffs_of_every_depth():
    pairs = (RAMP.astype(np.uint16) * 16).reshape(-1, 2)  # twelve bits: two levels in three bytes
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    assert same(levels(read_picture(tiff(packed.astype(np.uint8).tobytes(), 12))), RAMP)
    for order in "<>":
        wide = WIDE.astype(f"{order}u2").tobytes()
        assert same(levels(read_picture(tiff(wide, 16, order=order))), RAMP)
    assert same(levels(read_picture(tiff(WIDE.tobytes(), 16, photometric=0))), 255 - RAMP)
    huge = (RAMP.astype(np.uint32) * 16843009).tobytes()  # the whole of 32 bits, unsigned
    assert same(levels(read_picture(tiff(huge, 32))), RAMP)
    signed = RAMP.astype(np.int32) * 257 - 32768
    assert same(levels(read_picture(tiff(signed.astype("<i2").tobytes(), 16, kind=2))), RAMP)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP / np.float32(255), RAMP),  # 0..1
        ((RAMP > 99).astype(np.float32), (RAMP > 99) * 255),
        (RAMP.astype(np.float32), RAMP),  # whole numbers of eight bits, as floats
        (RAMP.astype(np.float32) * 257, RAMP),  # and of sixteen
        (RAMP / np.float32(127.5) - 1, RAMP),  # -1..1: by its range
        (RAMP.astype(np.float32) * 1e6 + 5e8, RAMP),
        (RAMP / np.float32(250), RAMP),  # a hair above 1 is no reason to be black
        (np.full((16, 16), -3, np.float32), RAMP * 0),
        (RAMP.astype(np.int32), RAMP),
        (RAMP.astype(np.int32) * 257, RAMP),
        (RAMP.astype(np.int32) * 8_000_000, RAMP),
        (RAMP.astype(np.int32) - 128, RAMP),
    ],
)  # fmt: skip
def test_floats_and_whole_numbers_go_by_their_range(values, expected, tmp_path):
    path = saved(tmp_path / "x.tif", Image.fromarray(values))
    assert Image.open(path).mode in ("F", "I")
    assert same(levels(read_picture(path)), expected)
    assert same(levels(read_picture(Image.fromarray(values))), expected)
    assert same(levels(read_picture(values)), expected)
    assert same(levels(read_picture(values.astype(np.float64))), levels(read_picture(values.astype(np.float32))))


def test_arrays():
    assert same(read_picture(COLOURS), COLOURS)
    assert same(read_picture(COLOURS.astype(np.uint16) * 257), COLOURS)
    assert same(read_picture(COLOURS / 255), COLOURS)
    with_alpha = np.dstack([COLOURS, COLOURS[..., 0] // 2])
    assert same(read_picture(with_alpha), COLOURS)
    assert same(read_picture(RAMP[..., None]), read_picture(RAMP))
    assert same(levels(read_picture(RAMP > 99)), (RAMP > 99) * 255)
    for wrong in (np.zeros((3, 5, 7)), np.zeros(4), np.array(["a"]), 3):
        with pytest.raises(BadPicture, match=r"cannot be read as a picture .* is none; \[H, W\]"):
            read_picture(wrong)
    for odd in (np.nan, np.inf):
        with pytest.raises(BadPicture, match="no finite numbers"):
            read_picture(np.full((2, 2), odd))


def test_frames_are_scaled_together():
    clip = np.stack([np.zeros((4, 4, 3)), np.ones((4, 4, 3)), np.full((4, 4, 3), 200.0)])
    assert [np.asarray(frame).max() for frame in read_frames(clip)] == [0, 1, 200]
    grey = [Image.fromarray(frame[..., 0].astype(np.float32)) for frame in clip]
    assert [np.asarray(frame).max() for frame in read_frames(grey)] == [0, 1, 200]
    assert np.asarray(read_picture(grey[1])).max() == 255, "alone it is a picture of floats in 0..1"
    moving = io.BytesIO()
    stills = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    stills[0].save(moving, "PNG", save_all=True, append_images=stills[1:])
    assert [frame.getpixel((0, 0)) for frame in read_frames(moving.getvalue())] == [(255, 0, 0), (0, 0, 255)]
    assert read_picture(moving.getvalue()).getpixel((0, 0)) == (255, 0, 0)


def palette(transparent: bool) -> Image.Image:
    drawn = Image.fromarray(COLOURS).quantize(16)
    if transparent:
        drawn.info["transparency"] = 3
    return drawn


@pytest.mark.parametrize(
    ("picture", "ending"),
    [
        (Image.fromarray(COLOURS), "png"),
        (Image.fromarray(COLOURS[..., 0]), "png"),
        (Image.fromarray(COLOURS[..., 0] > 99), "png"),
        (Image.fromarray(np.dstack([COLOURS, COLOURS[..., 0]])), "png"),
        (Image.fromarray(np.ascontiguousarray(COLOURS[..., :2]), "LA"), "png"),
        (palette(False), "png"),
        (palette(True), "png"),
        (palette(True), "gif"),
        (Image.fromarray(COLOURS).convert("CMYK"), "jpg"),
        (Image.fromarray(COLOURS).convert("CMYK"), "tif"),
        (Image.fromarray(COLOURS), "webp"),
    ],
    ids=["RGB", "L", "1", "RGBA", "LA", "P", "P-transparent", "gif", "CMYK-jpg", "CMYK-tif", "webp"],
)
def test_eight_bits_are_converted_as_ever(picture, ending, tmp_path):
    """Transparency is left out, and the colour written beneath it shows."""
    path = saved(tmp_path / f"x.{ending}", picture)
    with Image.open(path) as opened:
        expected = np.asarray(opened.convert("RGB"))
    for source in (path, str(path), path.read_bytes(), {"bytes": path.read_bytes(), "path": None}, Image.open(path)):
        found = read_picture(source)
        assert type(found) is Image.Image and found.mode == "RGB" and same(found, expected)
    assert read_picture(found) is found


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["rgb.jpg", "rgb.tif", "grey.tif", "wide.png", "wide.tif", "float.tif"])
def test_pictures_stand_as_the_camera_says(orientation, kind, tmp_path):
    upright = np.zeros((16, 24), np.uint8)
    upright[:8, :16] = 255
    turns = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: np.transpose,
             6: np.rot90, 7: lambda x: np.rot90(x, 2).T, 8: lambda x: np.rot90(x, -1)}  # fmt: skip
    stored = np.ascontiguousarray(turns[orientation](upright))
    wide = {
        "rgb": stored,
        "grey": stored,
        "wide": stored.astype(np.uint16) * 257,
        "float": stored.astype(np.float32) / 255,
    }
    picture = Image.fromarray(wide[kind.partition(".")[0]])
    picture = picture.convert("RGB") if kind.startswith("rgb") else picture
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / kind, picture, exif=exif)
    found = read_picture(path)
    assert np.abs(np.asarray(found)[..., 0].astype(int) - upright).max() <= 2  # JPEG
    assert same(read_picture(Image.open(io.BytesIO(path.read_bytes()))), found)
    assert read_picture(found) is found, "it is not turned twice"


def broken(folder: Path) -> list[Path]:
    """Files that are no pictures, or half of one."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    files = []
    for name in ("half.png", "half.jpg", "half.tif", "half.webp", "half.bmp"):
        noise.save(folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[: (folder / name).stat().st_size // 2])
        files.append(folder / name)
    for name, content in (("empty.png", b""), ("text.jpg", b"no picture"), ("head.png", b"\x89PNG\r\n\x1a\n trunc")):
        (folder / name).write_bytes(content)
        files.append(folder / name)
    return files


def test_a_broken_file_is_named(tmp_path):
    for path in broken(tmp_path):
        for read in (read_picture, read_frames):
            with pytest.raises(BadPicture) as error:
                read(path)
            assert str(error.value).startswith(f"{path} cannot be read as a picture ("), path
            with pytest.raises(BadPicture, match="^it cannot be read as a picture"):
                read(path.read_bytes(), "it")
        with pytest.raises(BadPicture, match=f"^{path} cannot"):
            read_picture({"path": str(path), "bytes": path.read_bytes()})
        if path.name == "half.jpg":  # opened by somebody else, and read late
            with pytest.raises(BadPicture, match=f"^{path} cannot"):
                read_picture(Image.open(path))
    for read in (read_picture, read_frames):
        with pytest.raises(FileNotFoundError, match="^There is no picture .*none.png"):
            read(tmp_path / "none.png")
    with pytest.raises(FileNotFoundError, match="There is no picture .*none.png"):
        read_picture({"path": str(tmp_path / "none.png"), "bytes": None})


def odd_pictures(folder: Path) -> list[Path]:
    """A 16-bit and a float picture, and one that lies on its side; dark but for a bright upper left."""

    def upright(dark: int) -> np.ndarray:
        values = np.full((42, 56), dark, np.uint8)
        values[:14, :28] = 250
        return values

    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(upright(42))))
    return [
        saved(folder / "wide.png", Image.fromarray(upright(40).astype(np.uint16) * 257)),
        saved(folder / "float.tif", Image.fromarray(upright(41) / np.float32(255))),
        saved(folder / "turned.png", turned, exif=exif),
    ]


def check_odd(picture: Any) -> None:
    values = np.asarray(picture)
    assert picture.mode == "RGB" and values.shape == (42, 56, 3)
    dark = values[-1, -1, 0]
    assert dark in (40, 41, 42)
    assert (values[:14, :28] == 250).all() and (values[14:] == dark).all() and (values[:, 28:] == dark).all()


def asked_about(folder: Path, files: list[Path]) -> None:
    """A folder that `tune` takes and a task file that everything takes."""
    lines = [{"image": file.name, "question": "what", "answer": "it"} for file in files]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "own.yaml").write_text("data: questions.jsonl")


def test_what_hands_over_pictures_reads_them_so(tmp_path):
    from tokenprune.evals.tasks.lmms_media import Media, document
    from tokenprune.evals.tasks.load import load_task
    from tokenprune.evals.tasks.unlabelled import draw_samples

    files = odd_pictures(tmp_path)
    asked_about(tmp_path, files)
    for data in (tmp_path, tmp_path / "own.yaml"):
        for sample in sum(draw_samples(str(data), 2, 1, 0), []):
            check_odd(sample.image)
    for sample in load_task(str(tmp_path / "own.yaml")).load(0, 3):
        check_odd(sample.image)
    for file in files:
        check_odd(Media().part(str(file))["image"])
        check_odd(Media().part(Image.open(file))["image"])
        check_odd(Media().part([Image.open(file), Image.open(file)])["video"][1])
        # tasks of lmms-eval convert pictures themselves, after this
        seen = document([{"image": Image.open(file), "many": [Image.open(file)], "text": "t"}], 0, "task")
        for shown in (seen["image"], *seen["many"]):
            check_odd(Media().part(shown.convert("RGB"))["image"])


def test_what_takes_pictures_reads_them_so(tmp_path, tiny_folder, monkeypatch):
    from tokenprune.evals import single_image as single
    from tokenprune.evals.models.chat_template import one_turn, pack
    from tokenprune.evals.report import overlay

    class Processor:
        chat_template = None

        def __call__(self, **given: Any) -> dict[str, Any]:
            return given

    files = odd_pictures(tmp_path)
    for (picture,) in pack(Processor(), [one_turn("q", Image.open(file)) for file in files])["images"]:
        check_odd(picture)
    for frame in pack(Processor(), [one_turn("q", [Image.open(file) for file in files])])["videos"][0][0]:
        check_odd(frame)
    shown: list[Any] = []
    monkeypatch.setattr(single, "seen_views", lambda loaded, inputs, image: shown.append(image) or [])
    monkeypatch.setattr(single, "draw_places", lambda *args: Image.new("RGB", (9, 9)))
    for file in files:
        check_odd(overlay.dim_dropped(Image.open(file), list(range(12)), (3, 4)))
        argv = ["run", "--model", tiny_folder, "--method", "uniform@9", "--max-new-tokens", "2", "--image", str(file)]
        assert main([*argv, "--question", "what", "--output", str(tmp_path / "o.png")]) == 0
        check_odd(shown.pop())


def test_every_command_names_a_broken_file(tmp_path, tiny_folder, capsys):
    from tokenprune.evals.tasks.lmms_media import Media, document, naming_document

    good = [saved(tmp_path / f"{i}.png", Image.new("RGB", (42, 42), (i, 0, 0))) for i in range(4)]
    for half in broken(tmp_path):
        asked_about(tmp_path, [half, *good])
        argv = ["tune", "vflowopt", "--model", tiny_folder, "--data", str(tmp_path), "--budget", "0.5"]
        assert main([*argv, "--samples", "3", "--held-out", "2", "--output", str(tmp_path / "study")]) == 2
        assert f"{half} cannot be read as a picture" in capsys.readouterr().err.replace("\n", "")
        argv = ["run", "--model", tiny_folder, "--method", "uniform@9", "--image", str(half), "--question", "what"]
        assert main(argv) == 2
        assert f"{half} cannot be read as a picture" in capsys.readouterr().err.replace("\n", "")
        with pytest.raises(BadPicture, match=f"^{half} cannot"):
            Media().part(str(half))
    half = tmp_path / "half.jpg"
    asked_about(tmp_path, [*good, half])
    argv = ["eval", "--model", tiny_folder, "--tasks", str(tmp_path / "own.yaml"), "--method", "none", "--no-timing"]
    assert main([*argv, "--output", str(tmp_path / "run")]) in (0, 1)
    rows = [json.loads(line) for file in (tmp_path / "run").rglob("*.jsonl") for line in file.read_text().splitlines()]
    (said,) = {row["error"] for row in rows if "error" in row}
    assert said.startswith(f"BadPicture: {half} (sample 4 of {tmp_path / 'own.yaml'}) cannot be read as a picture")

    class Docs:
        def __getitem__(self, number: int) -> Any:
            return {"image": Image.open(half).convert("RGB")}

    with pytest.raises(BadPicture, match=r"^Document 7 of lmms:x holds a picture that cannot be read \("):
        document(Docs(), 7, "lmms:x")
    with pytest.raises(BadPicture, match="^Document 7 of lmms:x"), naming_document(7, "lmms:x"):
        Image.open(half).convert("RGB")


OWN_ARRAYS = {"evals/report/overlay.py", "evals/diagnose/samples.py", "evals/pocket_training/measure.py"} | {
    f"evals/pocket/{name}.py" for name in ("easy_vqa", "scenes", "suite", "mixed_suite")
}
"""Files that make pictures from arrays that they have drawn themselves."""
STORED = {"evals/pocket/suite.py"}
"""Files whose data sets hold pictures that we drew, in eight bits."""


READERS = ("ImageOps", "ImageSequence", "ImageFile", "load_image", "load_images", "cv2", "imageio", "skimage")
ALWAYS = ("convert", "exif_transpose", "imread", "imdecode", "decode_image", "decode_example")


def openings(source: str, place: str) -> list[str]:
    """What in a file opens or converts a picture."""
    tree = ast.parse(source)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [(str(getattr(node, "module", "")), name) for node in imports for name in node.names]
    found = [name.name for _, name in names if name.name.partition(".")[0] in READERS]
    pillow = {name.asname or name.name for module, name in names if (module, name.name) == ("PIL", "Image")} | {"Image"}
    stored = {name.asname or name.name for module, name in names if (module, name.name) == ("datasets", "Image")}
    opening = {"open", "frombytes", "frombuffer", "fromarray"} - ({"fromarray"} if place in OWN_ARRAYS else set())
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        whole = ast.unparse(node.func)
        of, _, called = whole.rpartition(".")
        as_stored = any(key.arg == "decode" and ast.unparse(key.value) == "False" for key in node.keywords)
        decodes = (whole in stored or whole == "datasets.Image") and not as_stored and place not in STORED
        if called in ALWAYS or (called in opening and of.rpartition(".")[2] in pillow) or decodes:
            found.append(whole)
    return [f"{place}: {what}" for what in found]


def test_nobody_else_opens_a_picture():
    files = [
        file for folder in ("evals", "tokenprune", "adapters", "kernels") for file in (ROOT / folder).rglob("*.py")
    ]
    places = {file.relative_to(ROOT).as_posix(): file for file in files}
    assert len(places) > 100 and "evals/io/picture_reader.py" in places
    found = {place: openings(file.read_text(encoding="utf-8"), place) for place, file in places.items()}
    assert found.pop("evals/io/picture_reader.py"), "the reader itself is seen"
    assert [one for own in found.values() for one in own] == []


@pytest.mark.parametrize(
    "source",
    [
        "from PIL import Image\nImage.open(x)",
        "from PIL import Image as P\nP.open(x)",
        "import PIL.Image\nPIL.Image.open(x)",
        "x.convert('RGB')",
        "from PIL import ImageOps",
        "from datasets import Image as F\nF()",
        "import datasets\ndatasets.Image()",
        "import cv2",
        "from PIL import Image\nImage.fromarray(x)",
        "from transformers.image_utils import load_image",
    ],
)
def test_the_search_sees_what_it_looks_for(source):
    assert len(openings(source, "evals/x.py")) == 1
    assert openings("from datasets import Image as F\nF(decode=False)\nopen(x)", "evals/x.py") == []
