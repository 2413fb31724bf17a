"""``python -m clients`` is the ``guided`` command."""

from clients.cli import main

main()
