"""`python -m pyggml` is the program `pyggml`."""

from .cli import main

if __name__ == "__main__":
    main()
