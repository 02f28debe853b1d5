"""`python -m coral`, also for `accelerate launch -m coral train ...`."""

from coral.cli.main import main

if __name__ == "__main__":
    main()
