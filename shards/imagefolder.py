"""Your own images: one folder per class, with or without `train/` and `test/` above them."""

from pathlib import Path

from shards.source import Item, Source, SourceError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def read(where: str) -> bytes:
    """The file's bytes, untouched."""
    try:
        return Path(where).read_bytes()
    except OSError as error:
        raise SourceError(f"{where} cannot be read: {error.strerror}") from None


def _class_folders(root: Path) -> dict[str, Path]:
    return {
        folder.name: folder for folder in sorted(root.iterdir()) if folder.is_dir() and not folder.name.startswith(".")
    }


def _items(folders: dict[str, Path]) -> list[Item]:
    items = []
    for name, folder in folders.items():
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix.lower() in SUFFIXES:
                items.append(Item(name, str(path), path.stat().st_size))
    return items


def source(root: Path, num_old: int, name: str | None = None) -> Source:
    """The first `num_old` classes, by folder name, are old.

    Raises:
        SourceError: no folders, no images, a test class that training lacks, or an impossible `num_old`.
    """
    if not root.is_dir():
        raise SourceError(f"{root} is not a folder")
    split = (root / "train").is_dir()
    train = _class_folders(root / "train" if split else root)
    test = _class_folders(root / "test") if split and (root / "test").is_dir() else {}
    if strange := sorted(test.keys() - train.keys()):
        raise SourceError(f"{root / 'test' / strange[0]} is a class that {root / 'train'} does not have")
    if not 0 < num_old < len(train):
        raise SourceError(f"--old {num_old} must leave old and new classes: {root} has {len(train)}")
    train_items = _items(train)
    if lacking := sorted(train.keys() - {item.class_name for item in train_items}):
        raise SourceError(f"{train[lacking[0]]} holds no image ({', '.join(sorted(SUFFIXES))})")
    return Source(name or root.resolve().name, list(train), num_old, train_items, _items(test), read)
