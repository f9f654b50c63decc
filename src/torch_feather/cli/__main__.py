"""`python -m torch_feather.cli`, the same as `feather`."""

from . import main

if __name__ == "__main__":
    main()
