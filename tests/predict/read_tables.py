"""Odd names of images, and a table as `sptnet predict` writes it."""

import csv
import os

ODD = ["with space.png", "new\nline.png", 'quo"te, comma.png', os.fsdecode(b"latin-\xe9.png"), "ünï.PNG"]


def rows(out):
    """The table, part by part, in order."""
    found = []
    for path in sorted((out / "predictions").glob("*.csv")):
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            found += list(csv.DictReader(file))
    return found


def errors(out):
    with open(out / "errors.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))
