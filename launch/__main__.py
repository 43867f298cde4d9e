"""`python -m launch` is `agon`."""

from launch.cli import main

main()
