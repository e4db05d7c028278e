"""`python -m sptnet COMMAND` and, on several processes, `accelerate launch ... -m sptnet COMMAND`."""

from sptnet.cli import entry

if __name__ == "__main__":
    entry()
