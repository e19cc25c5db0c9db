"""What `python -m megatron_rl train` does, as a program for torchrun."""

from megatron_rl.cli import main

if __name__ == "__main__":
    import sys

    sys.argv.insert(1, "train")
    main()
