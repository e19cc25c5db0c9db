"""The commands of ``megatron-rl``, one file each.

A command is a thin shell: it reads the environment, calls one function and words its errors. Heavy imports happen
inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import typer

from megatron_rl.cli import convert, doctor, info, plan, train

app = typer.Typer(
    help="Reinforcement learning for the Megatron-Core job you already run. Start `train` with torchrun for more than "
    "one process; everything also runs on a laptop without a GPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command(epilog=train.EPILOG)(train.train)
app.command(epilog=convert.EPILOG)(convert.convert)
app.command(epilog=plan.EPILOG)(plan.plan)
app.command(epilog=doctor.EPILOG)(doctor.doctor)
app.command()(info.info)


def main() -> None:
    """Entry point of the console script."""
    app()
