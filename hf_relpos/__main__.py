"""`python -m hf_relpos`: the program `hf-relpos`."""

from .cli import main


if __name__ == "__main__":
    main()
