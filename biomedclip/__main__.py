"""`python -m biomedclip` is the command line."""

from biomedclip.cli import main

main()
