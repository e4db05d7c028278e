"""Images below a folder: read by path, listed class by class, and never those of a link that leads out of it."""

import os
import posixpath
import stat
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

from sptnet_shards.items import Item, Items
from sptnet_shards.progress import Scan
from sptnet_shards.source import SourceError, UnreadableError

from sptnet.data.format.files import (
    IMAGE_SUFFIXES,
    LARGEST_IMAGE,
    NO_IMAGES,
    TAKEN,
    folders_in,
    is_folder,
    read_regular,
    told_by_suffix,
)
from sptnet.errors import outcome_of_reading


class Folder:
    """Files below a folder, read by their relative path. Callable, so that it serves as `Source.read`.

    Args:
        listed: the paths come out of a list that somebody else wrote: links that lead out of the folder are refused
            too. Whoever fills folders of classes with links to images elsewhere knows what they do.
        lenient: a file that is none is an item all the same, of no bytes: whoever reads it is told why not.
    """

    def __init__(self, root: Path, listed: bool = False, lenient: bool = False):
        self.root, self.listed, self.lenient = root, listed, lenient
        self._prefix = str(root)
        self.passed_over: Counter[str] = Counter()  # suffixes of files that were no images by them
        self._scan = Scan("files")
        self._real = lru_cache(maxsize=1024)(os.path.realpath)

    def __call__(self, where: str) -> bytes:
        try:
            return read_regular(self._path(where), LARGEST_IMAGE)
        except OSError as error:
            self._unreadable(where, error)

    def item(self, class_name: str, where: str) -> Item:
        """An item of a file that must be there; raises SourceError."""
        self._scan.count()
        if self.listed and where:
            where = posixpath.normpath(where)  # one name for a file that a list calls a.jpg and ./a.jpg
        return self._image(class_name, where)

    def _image(self, class_name: str, where: str) -> Item:
        try:
            return Item(class_name, where, self._size(where))
        except UnreadableError:
            if not self.lenient:
                raise
            return Item(class_name, where, 0)

    def _size(self, where: str) -> int:
        """Bytes of a file. Raises SourceError."""
        try:
            told = os.stat(self._path(where))
        except OSError as error:
            self._unreadable(where, error)
        if not stat.S_ISREG(told.st_mode):
            raise UnreadableError(f"{self.root / where} is no regular file: remove it")
        if told.st_size > LARGEST_IMAGE:
            raise UnreadableError(f"{self.root / where} has {told.st_size:,} bytes: no image has, remove it")
        return told.st_size

    def images(self, class_name: str, folder: str) -> Items:
        """The images anywhere below a folder, by path; other files are left alone."""
        return Items.of(self._images_below(class_name, folder))

    def _images_below(self, class_name: str, folder: str) -> Iterator[Item]:
        # all paths come sorted, and only the names of the folders on the way are held
        waiting = [(folder, iter(self._names(folder)))]
        while waiting:
            above, names = waiting[-1]
            for name in names:
                where = os.path.join(above, name)
                if name.endswith("/"):
                    waiting.append((where[:-1], iter(self._names(where[:-1]))))
                    break
                suffix = os.path.splitext(name)[1].lower()
                if suffix in IMAGE_SUFFIXES:
                    self._scan.count()
                    yield self._image(class_name, where)
                elif name.lower() not in NO_IMAGES:
                    self.passed_over[suffix] += 1
            else:
                waiting.pop()

    def _names(self, folder: str) -> list[str]:
        """What is not hidden in a folder, folders with a slash behind their names; so sorted, whole paths are too."""
        names = []
        try:
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    names.append(f"{entry.name}/" if is_folder(entry) else entry.name)
        except OSError as error:
            _cannot_be_listed(error)
        except ValueError as error:
            raise SourceError(str(error)) from None
        names.sort()
        return names

    def loose_images(self, folder: str) -> list[str]:
        """A sentence where images lie in a folder of class folders, outside of these."""
        path = self.root / folder
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
        loose = [name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
        told = f"{path} has {len(loose)} images outside of class folders, left out: the first is {(loose or [''])[0]}"
        return [told] if loose else []

    def other_suffixes(self) -> list[str]:
        """A sentence where `images` has passed files over for their suffix."""
        kinds = told_by_suffix(self.passed_over)
        told = f"{self.root} has files that are left out for their suffix: {kinds}; images are {TAKEN}"
        return [told] if kinds else []

    def class_folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder, sorted as strings, as torchvision's ImageFolder numbers classes."""
        path = need_folder(self.root / folder)
        try:
            return folders_in(path)
        except OSError as error:
            _cannot_be_listed(error)

    def _path(self, where: str) -> str:
        """The file that `where` names, below the folder; raises SourceError, and OSError where it cannot be found."""
        if where.startswith("/") or ".." in where.split("/") or "\0" in where:
            raise SourceError(f"{where!r} is not a path below {self.root}: the list that names it is not to be trusted")
        path = os.path.join(self._prefix, where)  # as text: this is asked for every image
        if self.listed:
            # the folders' links are looked up once, the file's own each time
            folder, name = os.path.split(path)
            real = os.path.realpath(path) if os.path.islink(path) else os.path.join(self._real(folder), name)
            if not real.startswith(os.path.join(self._real(self.root), "")):
                raise SourceError(f"{path} is a link that leads out of {self.root}: put the image itself there")
        return path

    def _unreadable(self, where: str, error: OSError) -> NoReturn:
        told = f"{self.root / where} cannot be read: {error.strerror}"
        # where its folder is gone too, a disk is, and with it every other image
        alone = outcome_of_reading(error) == "final" and os.path.isdir((self.root / where).parent)
        raise (UnreadableError if alone else SourceError)(told) from None


def _cannot_be_listed(error: OSError) -> NoReturn:
    raise SourceError(f"{error.filename} cannot be listed: {error.strerror}") from None


def has_folder(path: Path) -> bool:
    """Whether there is a folder; SourceError for a link that leads nowhere."""
    try:
        return os.path.lexists(path) and stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        _cannot_be_listed(error)


def need_folder(path: Path) -> Path:
    """The path, if it is a folder; SourceError if not."""
    if not path.is_dir():
        raise SourceError(f"{path} is missing or not a folder: give the dataset's folder as it was unpacked")
    return path
