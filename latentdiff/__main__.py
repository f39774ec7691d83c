"""How is `python -m latentdiff` (so `torchrun ... -m latentdiff`) the same as `latentdiff`?"""

from latentdiff.cli import main

if __name__ == "__main__":
    main()
