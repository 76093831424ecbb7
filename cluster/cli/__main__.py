"""`python -m cluster.cli`: the command without its console script; `serve --detach` starts itself so."""

from cluster.cli.main import main

main()
