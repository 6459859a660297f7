"""`python -m canary`: the command line, for whoever has the package and not its scripts on PATH."""

from canary.cli import main

main()
