"""A subset of an ImageFolder, as links in class folders: the same one whenever it is drawn.

    python benchmarks/subset.py cifar10 cifar10-7000 --train 5000 --test 2000

Every class keeps an equal number of its images, drawn by key (`sptnet.data.keyed`) from their sorted names.
"""

import argparse
from pathlib import Path

from sptnet.data.keyed import SHOW, permutation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=5000, help="images of train/ that are kept")
    parser.add_argument("--test", type=int, default=2000, help="images of test/ that are kept")
    given = parser.parse_args()
    for part, wanted in (("train", given.train), ("test", given.test)):
        classes = sorted(folder for folder in (given.photos / part).iterdir() if folder.is_dir())
        for number, folder in enumerate(classes):
            images = sorted(folder.iterdir())
            kept = permutation(0, SHOW, number, part == "test", 0, len(images))[: wanted // len(classes)]
            target = given.out / part / folder.name
            target.mkdir(parents=True)
            for i in sorted(kept):
                (target / images[i].name).symlink_to(images[i].resolve())


if __name__ == "__main__":
    main()
