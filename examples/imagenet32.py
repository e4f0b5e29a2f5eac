"""Flow maps of ImageNet at 32x32, with classes or without: train, distil, sample, score.

    python examples/imagenet32.py --preset class-teacher --data imagenet32 \\
        --precision bfloat16 --accumulate 4 --all-devices
    python examples/imagenet32.py --preset class-lmd --data imagenet32 \\
        --teacher out/imagenet32-class-teacher --guidance 1.5

`--data` is the folder with the `.npz` files of the archives. A folder with the parts
`train` and `val` written by `flowdiffrax.images.save_images` is better, since it is
mapped into memory instead of read. Everything else is as in `cifar10.py`. `docs/scale.md`
has the commands for one GPU, one machine and several.
"""

import flowdiffrax as fd
from flowdiffrax.images import command


def presets():
    """The runs on this data set, named without the prefix."""
    return command.published("imagenet32-")


def load(options):
    """Images to train on, and others to compare with."""
    return command.load_split(
        options.data, fd.images.imagenet32, "val", checksums=options.checksums
    )


def main(line=None):
    """Does what the command line says; returns the scores."""
    options = command.parse("imagenet32", __doc__, presets(), "teacher", line)
    if options.data is None and not options.dry_run:
        raise SystemExit("--data is needed: the folder of the images; see docs/data.md")
    return command.run(options, presets(), lambda: load(options))


if __name__ == "__main__":
    main()
