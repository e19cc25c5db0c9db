"""``python -m megatron_rl``: the command line, also under torchrun."""

from megatron_rl.cli import main

if __name__ == "__main__":
    main()
