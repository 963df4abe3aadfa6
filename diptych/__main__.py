"""`python -m diptych VERB …`."""

from diptych.cli import main

main()
