"""One thin file per command of `sptnet`: its arguments, and what it calls.

The docstring of a command's module is its help: the first line in `sptnet --help`, the rest in `sptnet COMMAND --help`.
`run` imports what it needs inside of itself, so that help and mistakes in arguments cost no import of torch. May import
everything but `sptnet.cli`. Begin with `train.py`.
"""
