"""``python -m fedlora``: the same as the `fedlora` command."""

from fedlora.cli.main import main

if __name__ == "__main__":
    main()
