"""`python -m semtoken_hf` is `semtoken`."""

from .cli.main import main

if __name__ == "__main__":
    main()
