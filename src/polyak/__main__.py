"""`python -m polyak` is the command `polyak`."""

from polyak.cli import main

main()
