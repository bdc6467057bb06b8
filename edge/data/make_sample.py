"""Make the Speech Commands sample that ships with the package: ``python -m edge.data.make_sample``.

Clips of the test split only, as many of each class, chosen by the sha256 of their samples: the
same ones from the same files. Samples are unchanged.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np

from edge.data import speech_commands
from edge.data.catalog import load_dataset
from edge.data.sample import SAMPLES

CLIPS_PER_CLASS = 16


def main() -> None:
    """Read the data set, write the sample."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the data set; else $DATAMIX_DATA")
    arguments = parser.parse_args()
    data = load_dataset(speech_commands.NAME, "test", arguments.data)
    clips = data.inputs[:]
    order = sorted(range(len(data)), key=lambda i: hashlib.sha256(clips[i].tobytes()).digest())
    by_class = [
        [i for i in order if data.labels[i] == label][:CLIPS_PER_CLASS]
        for label in range(len(data.class_names))
    ]
    # In turn, so that every prefix is balanced too.
    chosen = [row[turn] for turn in range(CLIPS_PER_CLASS) for row in by_class]
    path = SAMPLES / f"speech-commands-{len(chosen)}.npz"
    np.savez_compressed(
        path,
        pcm=clips[chosen],
        labels=data.labels[chosen].astype(np.uint8),
        speaker=data.attributes["speaker"][chosen],
        word=data.attributes["word"][chosen],
    )
    print(f"{path}: {len(chosen)} clips, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
