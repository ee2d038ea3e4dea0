"""`python -m gradlens` is the command `gradlens`."""

from gradlens.cli import main

main()
