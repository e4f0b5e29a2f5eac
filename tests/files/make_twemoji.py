"""Make Twemoji-32 from its source: emoji of 32x32 on white, with their categories.

    npm pack emoji-datasource-twitter@16.0.0
    python tests/files/make_twemoji.py emoji-datasource-twitter-16.0.0.tgz twemoji-32.npz
    python tests/files/make_twemoji.py emoji-datasource-twitter-16.0.0.tgz \\
        tests/files/twemoji-180.npz --per-class 20

The first makes the file that `flowdiffrax.images.twemoji` reads, 1873 images and 1.8 MB;
the second, the part of it that the tests use. Skin tones are left out, since most of the
images would then be people, and so are emoji that look exactly like an earlier one. The
order is that of a hash of the code points, so that any slice is a fixed random part.
Needs Pillow; takes two seconds. Whose the graphics are stands in `twemoji.txt`.
"""

import argparse
import hashlib
import io
import json
import pathlib
import tarfile

import numpy as np
from PIL import Image

SHA256 = "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"
CLASSES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
# The clean sheet: in the other one, Apple's pictures stand in for missing ones.
SHEET, TABLE = "package/img/twitter/sheets-clean/32.png", "package/emoji.json"
SIDE, PITCH = 32, 34  # a tile, and a tile with its margin of one pixel


def read(path):
    """The sheet as RGBA, and the table, once the archive is known to be the right one."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise SystemExit(f"{path} has sha256 {found} instead of {SHA256}.")
    with tarfile.open(path) as tar:
        members = {name: tar.extractfile(name).read() for name in (SHEET, TABLE)}
    sheet = np.asarray(Image.open(io.BytesIO(members[SHEET])).convert("RGBA"))
    return sheet, json.loads(members[TABLE])


def on_white(rgba):
    """The colours over a white ground, in integers, so that every machine agrees."""
    rgba = rgba.astype(np.uint32)
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def make(sheet, table):
    """Images and labels, in the order of the hashes."""
    drawn, seen = [], set()
    for emoji in table:
        if emoji["category"] not in CLASSES:  # parts such as hair and skin tones
            continue
        y, x = PITCH * emoji["sheet_y"] + 1, PITCH * emoji["sheet_x"] + 1
        image = on_white(sheet[y : y + SIDE, x : x + SIDE])
        if image.tobytes() in seen:
            continue
        seen.add(image.tobytes())
        order = hashlib.sha256(emoji["unified"].encode()).digest()
        drawn.append((order, image, CLASSES.index(emoji["category"])))
    drawn.sort(key=lambda item: item[0])
    images = np.stack([image for _, image, _ in drawn])
    return images, np.asarray([label for *_, label in drawn], np.uint8)


def first_of_each(labels, number):
    """The first rows of each class, in the order in which they stand."""
    rows = [np.flatnonzero(labels == label)[:number] for label in range(len(CLASSES))]
    return np.sort(np.concatenate(rows))


def main(source, out, *, per_class=None):
    images, labels = make(*read(source))
    if per_class is not None:
        rows = first_of_each(labels, per_class)
        images, labels = images[rows], labels[rows]
    np.savez_compressed(out, images=images, labels=labels, class_names=CLASSES)
    content = hashlib.sha256(images.tobytes() + labels.astype("<i4").tobytes())
    counts = np.bincount(labels, minlength=len(CLASSES))
    for name, count in zip(CLASSES, counts, strict=True):
        print(f"{count:5}  {name}")
    print(f"{len(images):5}  images, mean {images.mean((0, 1, 2)).round(1)}")
    print(f"{out}: {pathlib.Path(out).stat().st_size} bytes")
    print(f"sha256 of values and labels: {content.hexdigest()}")
    return content.hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="emoji-datasource-twitter-16.0.0.tgz")
    parser.add_argument("out", help="the .npz to write")
    parser.add_argument("--per-class", type=int, help="so many of each class only")
    options = parser.parse_args()
    main(options.source, options.out, per_class=options.per_class)
