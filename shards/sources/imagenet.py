"""ImageNet-1K and ImageNet-100 (ILSVRC2012): an extracted tree, or the official tars read where they are."""

import argparse
from contextlib import closing
from pathlib import Path, PurePosixPath

import numpy as np
from sptnet_shards.folder import Folder, need_folder
from sptnet_shards.items import Item, Items
from sptnet_shards.progress import Scan
from sptnet_shards.source import Source, SourceCommand, SourceError, takes_root, text_lines
from sptnet_shards.sources.mat import MatError, read_columns
from sptnet_shards.tar_members import Member, OpenTar, TarError

from sptnet.data.format.files import LARGEST_IMAGE

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = Path("ILSVRC2012_devkit_t12", "data")
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
NUM_OLD = {"imagenet1k": 500, "imagenet100": 50}


class _FilesAndTars(Folder):
    """Files by relative path, and parts of tars by "tar|offset|size"."""

    def __call__(self, where: str) -> bytes:
        tar, _, place = where.partition("|")
        if tar not in (TRAIN_TAR, VAL_TAR) or not place:
            return super().__call__(where)
        offset, size = (int(number) for number in place.split("|"))
        try:
            with closing(OpenTar(self.root / tar)) as opened:
                found = opened.read(Member(where, offset, size))
        except OSError as error:
            raise SourceError(f"{self.root / tar} cannot be read: {error.strerror}") from None
        if len(found) != size:
            raise SourceError(f"{self.root / tar} ends inside of the image at byte {offset}: download it again")
        return found


def _members(path: Path, scan: Scan, begin: int = 0, size: int | None = None) -> list[Member]:
    """The plain files of a tar, or of a tar inside a tar that lies at `begin` and is `size` bytes long, by name."""
    found: dict[str, Member] = {}
    try:
        with closing(OpenTar(path)) as tar:
            for member in tar.members(begin, size):
                scan.count()
                if member.name in found:
                    raise SourceError(f"{path} has two members of the name {member.name!r}: download it again")
                found[member.name] = member
    except OSError as error:
        raise SourceError(f"{path} cannot be read as a tar ({error.strerror}): download it again") from None
    except TarError as error:
        raise SourceError(f"{path} cannot be read as a tar ({error}): download it again") from None
    return sorted(found.values())


def _item_of(wnid: str, tar: Path, member: Member) -> Item:
    if not 0 < member.size <= LARGEST_IMAGE:
        raise SourceError(f"{tar}: {member.name!r} has {member.size:,} bytes, no image has: download it again")
    return Item(wnid, f"{tar.name}|{member.offset}|{member.size}", member.size)


def _train_of_tar(path: Path) -> dict[str, Items]:
    """Per class of the tar of tars: its wnid and its images, by name."""
    scan, found = Scan("images in tars"), {}
    for inner in _members(path, scan):
        wnid = PurePosixPath(inner.name).stem
        if wnid in found:
            raise SourceError(f"{path} has two tars of class {wnid}: download it again")
        found[wnid] = Items.of(_item_of(wnid, path, image) for image in _members(path, scan, inner.offset, inner.size))
    return found


def _train(files: Folder) -> dict[str, Items]:
    if (files.root / "train").is_dir():
        return {wnid: files.images(wnid, f"train/{wnid}") for wnid in files.class_folders("train")}
    if (files.root / TRAIN_TAR).is_file():
        return _train_of_tar(files.root / TRAIN_TAR)
    raise SourceError(f"{files.root} has neither train/ nor {TRAIN_TAR}: give the folder that holds one of them")


def _val_classes(devkit: Path) -> list[str]:
    """The wnid of validation image 1, 2, ..."""
    try:
        columns = read_columns(devkit / "meta.mat", "synsets", ("ILSVRC2012_ID", "WNID"))
    except OSError as error:
        raise SourceError(f"{devkit / 'meta.mat'} cannot be read: {error.strerror}") from None
    except MatError as error:
        raise SourceError(f"{devkit} is not the devkit of ILSVRC2012 ({error})") from None
    wnids = {str(label): str(wnid) for label, wnid in zip(*columns.values(), strict=True)}
    if strange := next((line for line in text_lines(devkit / GROUND_TRUTH) if line.strip() not in wnids), None):
        raise SourceError(f"{devkit / GROUND_TRUTH} has a class that meta.mat does not have: {strange!r}")
    if len(set(wnids.values())) < len(columns["WNID"]):
        raise SourceError(f"{devkit / 'meta.mat'} has a class twice")
    return [wnids[line.strip()] for line in text_lines(devkit / GROUND_TRUTH)]


def _val(files: Folder) -> Items:
    """From val/<wnid>/, a flat val/ or the official tar; the last two need the devkit."""
    folder, tar = files.root / "val", files.root / VAL_TAR
    if folder.is_dir() and (wnids := files.class_folders("val")):
        return Items.of(item for wnid in wnids for item in files.images(wnid, f"val/{wnid}"))
    if folder.is_dir():
        images = files.images("", "val")
    elif tar.is_file():
        images = Items.of(_item_of("", tar, member) for member in _members(tar, Scan("images in tars")))
    else:
        raise SourceError(f"{files.root} has neither val/ nor {VAL_TAR}: give the folder that holds one of them")
    classes = _val_classes(files.root / DEVKIT)
    if len(images) != len(classes):
        raise SourceError(f"{files.root} has {len(images)} validation images, the devkit's ground truth {len(classes)}")
    return Items.of(item._replace(class_name=wnid) for item, wnid in zip(images, classes, strict=True))


def chosen_classes() -> list[int]:
    """The classes of ImageNet-100, indices into the sorted wnids (Vaze et al., CVPR 2022: a seeded draw)."""
    return sorted(int(i) for i in np.random.RandomState(0).choice(1000, 100, replace=False))


def source(name: str, root: Path) -> Source:
    """ImageNet-1K (the first 500 sorted wnids old) or ImageNet-100 (the first 50 of its 100).

    Training images stand in the order of wnid and file name, validation images likewise or in the devkit's.

    Args:
        name: imagenet1k or imagenet100.
        root: the folder that holds train/ or ILSVRC2012_img_train.tar, val/ or ILSVRC2012_img_val.tar, and the devkit.
    """
    files = _FilesAndTars(root)
    train, val = _train(files), _val(files)
    classes = sorted(train)
    whole = {wnid: len(train[wnid]) for wnid in classes}, val.counts()
    if name == "imagenet100":
        if len(classes) != 1000:
            raise SourceError(f"{root} has {len(classes)} classes, ImageNet-100 is chosen from ImageNet's 1,000")
        classes = [classes[i] for i in chosen_classes()]
    if len(classes) <= NUM_OLD[name]:
        raise SourceError(f"{root} has {len(classes)} classes, {name} needs more than its {NUM_OLD[name]} old ones")
    kept = set(classes)
    if empty := next((wnid for wnid in classes if not train[wnid]), None):
        raise SourceError(f"{root}: class {empty} has no training image")
    if strange := min(val.counts().keys() - train.keys(), default=None):
        raise SourceError(f"{root}: validation class {strange} has no training images")
    return Source(
        name,
        classes,
        NUM_OLD[name],
        Items.of(item for wnid in classes for item in train[wnid]),
        Items.of(item for item in val if item.class_name in kept),
        files,
        whole=whole,
    )


def _command(name: str) -> SourceCommand:
    def build(arguments: argparse.Namespace) -> Source:
        return source(name, arguments.root)

    return SourceCommand(
        name,
        f"ILSVRC2012, {NUM_OLD[name]} old classes",
        f"Expects train/<wnid>/*.JPEG or {TRAIN_TAR} (a tar of tars, read without extracting), and val/<wnid>/, a flat "
        f"val/ or {VAL_TAR}; the last two with {DEVKIT}/meta.mat and {GROUND_TRUTH}. From "
        "https://image-net.org/challenges/LSVRC/2012/.",
        takes_root("the folder that holds them"),
        build,
        lambda arguments: _FilesAndTars(need_folder(arguments.root)),
    )


COMMANDS = [_command(name) for name in NUM_OLD]
