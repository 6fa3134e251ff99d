"""`python -m w2w_fast VERB ...`: the command `w2w`, for torchrun and where no script is on PATH."""

from .cli import main

if __name__ == "__main__":
    main()
